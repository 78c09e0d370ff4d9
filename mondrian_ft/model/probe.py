"""The probe: two fixed inputs whose logits show that an adapter is applied, and how.

No hash sees that a library's forward changed, that a tower's activation is another one, or that a
scale is multiplied in twice. The numbers that come out do. When an adapter is saved, the probe is
run with and without it and the most likely tokens' logits are written down; whoever loads the
adapter runs it again and compares.

Tolerances follow from what the same weights give under another BLAS or in another dtype
(benchmarks/LOG.md): they are shares of the logits' scale, so that a model with larger logits is not
held to a finer measure than its arithmetic has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import AdapterError
from . import lora
from .backend import describe, mx
from .base import Base
from .qwen3_vl import Grid, Inputs, assemble

VERSION = 1
"""Bump when the inputs, or what is recorded of them, change."""
POSITIONS = 16
"""Last positions of each input that are compared with and without the adapter."""
TOP = 16
"""Tokens whose logits are recorded, the most likely at the last position."""
TOLERANCE = {"float32": 5e-6, "bfloat16": 2.5e-2, "float16": 5e-3}
"""By the base's dtype, as a share of the largest recorded logit: 1e-4 and 0.5 on a scale of 20.

CUDA may multiply float32 with TF32's ten bits, which are float16's, and is given its tolerance.
"""


@dataclass(frozen=True)
class ProbeInput:
    """What the model is given.

    Attributes:
        name: ``text`` or ``picture``.
        tokens: (L,) int32.
        patches, grid: the picture as the pixel pipeline made it; None for text alone.
    """

    name: str
    tokens: np.ndarray
    patches: np.ndarray | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class ProbeInputs:
    """The probe as this machine's pixel and prompt pipelines make it.

    Attributes:
        inputs: what is run.
        pixels: ``data.pixels.fingerprint`` of the pixel pipeline, its bounds included.
        digests: 16 hexadecimal digits each, of one stage of the way in: ``picture`` (patches and
            grid), ``prompt`` (the text that was built), ``template`` (that text in the model's chat
            template) and ``tokens`` (the ids the tokenizer made of it).
    """

    inputs: tuple[ProbeInput, ...]
    pixels: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class ProbeLogits:
    """What came out of one input.

    Attributes:
        name: the input's.
        tuned, base: (P, V) float32, logits at the last P positions with and without the adapter.
    """

    name: str
    tuned: np.ndarray
    base: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether all logits with the adapter are numbers."""
        return bool(np.isfinite(self.tuned).all())

    @property
    def unchanged(self) -> bool:
        """Whether the adapter changes no bit of any logit."""
        return bool(np.array_equal(self.tuned, self.base))

    @property
    def effect(self) -> float:
        """The largest change of a logit."""
        return float(np.abs(self.tuned - self.base).max())

    @property
    def moved(self) -> float:
        """Share of the positions whose most likely token is another one."""
        return float((self.tuned.argmax(-1) != self.base.argmax(-1)).mean())


@dataclass(frozen=True)
class Difference:
    """How far an input's logits are from the recorded ones.

    Attributes:
        name: the input's.
        tuned, base: largest distance with and without the adapter, at the recorded tokens.
        allowed: what either may be.
        effect: largest recorded distance between with and without, at the same tokens.
    """

    name: str
    tuned: float
    base: float
    allowed: float
    effect: float

    @property
    def tells(self) -> bool:
        """Whether the adapter could be missing and the difference would show it."""
        return self.effect > self.allowed


def run(base: Base, inputs: Sequence[ProbeInput]) -> list[ProbeLogits]:
    """Run inputs with and without the adapter that is in a base's model, in evaluation mode.

    Raises:
        AdapterError: there is no adapter in it.
        ModelError: an input's image tokens are not its picture's.
    """
    if not lora.lora_layers(base.model):
        raise AdapterError("there is no adapter in the model to probe; load one")
    was_training = base.model.training
    base.model.eval()
    try:
        found = []
        for one in inputs:
            given = _prepared(base, one)
            tuned = _logits(base, given)
            # A tower without an adapter says the same to both, so it is asked once.
            own_view = base.backbone.tower_adapted
            with lora.without_adapter(base.model):
                given = _prepared(base, one) if own_view else given
                found.append(ProbeLogits(one.name, tuned, _logits(base, given)))
        return found
    finally:
        base.model.train(was_training)


def record(base: Base, probe: ProbeInputs, logits: Sequence[ProbeLogits]) -> dict[str, Any]:
    """What the manifest keeps of a run, as JSON types."""
    return {
        "version": VERSION,
        "dtype": base.identity.dtype,
        "backend": describe(),
        "tolerance": dict(TOLERANCE),
        "digests": dict(probe.digests),
        "inputs": [
            {
                "name": one.name,
                "top": (top := np.argsort(-one.tuned[-1], kind="stable")[:TOP].tolist()),
                "tuned": [round(float(value), 6) for value in one.tuned[-1, top]],
                "base": [round(float(value), 6) for value in one.base[-1, top]],
                "effect": round(one.effect, 6),
                "moved": round(one.moved, 4),
            }
            for one in logits
        ],
    }


def compare(
    recorded: Mapping[str, Any], logits: Sequence[ProbeLogits], *, dtype: str
) -> list[Difference]:
    """How far logits are from recorded ones, input by input.

    Args:
        recorded: of :func:`record`.
        dtype: the base's, here. The coarser of both sides' tolerances counts.

    Raises:
        AdapterError: the record has other inputs, or is none.
    """
    try:
        kept = {one["name"]: one for one in recorded["inputs"]}
        if set(kept) != {one.name for one in logits}:
            raise ValueError(f"inputs {sorted(kept)}")
        share = tolerance((str(recorded["dtype"]), str(recorded["backend"])), (dtype, describe()))
        return [_difference(kept[one.name], one, share) for one in logits]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise AdapterError(
            f"its recorded proof cannot be read ({error!r}); the manifest was edited, so restore it"
        ) from None


def tolerance(*sides: tuple[str, str]) -> float:
    """What logits may differ by, as a share of their scale, between (dtype, backend) pairs."""
    return max(
        TOLERANCE["float16" if (dtype, backend) == ("float32", "CUDA") else dtype]
        for dtype, backend in sides
    )


def _difference(kept: Mapping[str, Any], logits: ProbeLogits, share: float) -> Difference:
    top = [int(token) for token in kept["top"]]
    tuned, base = (np.array(kept[side], np.float64) for side in ("tuned", "base"))
    if not (0 < len(top) == tuned.size == base.size) or min(top) < 0:
        raise ValueError(f"{len(top)} tokens and {tuned.size} logits")
    if not (np.isfinite(tuned).all() and np.isfinite(base).all()):
        raise ValueError("its logits are not finite")
    scale = float(max(np.abs(tuned).max(), np.abs(base).max()))

    def distance(here: np.ndarray, then: np.ndarray) -> float:
        found = float(np.abs(here[-1, top] - then).max())
        return found if math.isfinite(found) else math.inf

    # The record has six decimals.
    allowed = share * scale + 1e-6
    return Difference(
        logits.name,
        distance(logits.tuned, tuned),
        distance(logits.base, base),
        allowed,
        float(np.abs(tuned - base).max()),
    )


def _prepared(base: Base, one: ProbeInput) -> Inputs:
    picture = None
    if one.patches is not None and one.grid is not None:
        (picture,) = base.backbone.encode(one.patches[None], one.grid)
    inputs, _ = assemble(
        one.tokens[None],
        [len(one.tokens)],
        [picture],
        [one.grid],
        image_token=base.backbone.image_token,
        merge=base.backbone.merge,
    )
    return inputs


def _logits(base: Base, inputs: Inputs) -> np.ndarray:
    h = base.backbone.hidden(inputs)
    return np.array(base.backbone.head(h[:, -POSITIONS:])[0].astype(mx.float32))
