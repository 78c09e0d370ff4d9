"""An adapter of another program, once it is read: checking it, and putting it into a base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterError
from . import adapter as adapters
from . import lora
from .backend import mx, nn
from .base import Base
from .lora import LoraSpec

LAYERS = "language_model.model.layers."
"""What the names of all decoder matrices begin with; those of the tower, with `targets.VISION`."""


@dataclass(frozen=True)
class Foreign:
    """An adapter of another program, as read.

    Attributes:
        layout: whose it is.
        spec: rank, strength and matrices, in our terms.
        tensors: by mlx-vlm's names and in its shapes, float32.
        file: name of the weights file.
        sha256: of its bytes.
        assumed: sentences on what the files do not say or what was left out.
        last_layers: how many last layers its config speaks of; None for all or not said.
        base_bits: bits that its base was quantised to; None for not quantised or not said.
    """

    layout: str
    spec: LoraSpec
    tensors: dict[str, np.ndarray]
    file: str = ""
    sha256: str = ""
    assumed: tuple[str, ...] = ()
    last_layers: int | None = None
    base_bits: int | None = None


def attach(base: Base, foreign: Foreign) -> LoraSpec:
    """Put an imported adapter into a base's model; returns the specification it has there.

    Matrices that the file leaves out where others of their kind are adapted get an update of zero.

    Raises:
        AdapterError: it was made for another base, by the numbers of layers, the shapes or the
            quantisation. The model is then its base, as before.
    """
    depth = _check_fits(base, foreign)
    spec = foreign.spec
    if spec.layers == tuple(range(depth)):
        spec = replace(spec, layers=None)
    lora.attach(base.model, spec, seed=0)
    try:
        values = dict(foreign.tensors)
        for name, fresh in lora.tensors(base.model).items():
            if name not in values:
                # B starts at zero and a magnitude at the matrix's own: no update, exactly.
                values[name] = np.zeros(fresh.shape, np.float32)
                if name.endswith(".m"):
                    values[name] = np.array(fresh, np.float32)
        lora.set_tensors(base.model, {name: mx.array(value) for name, value in values.items()})
        base.model.eval()
        mx.eval(base.model.parameters())
    except BaseException:
        lora.detach(base.model)
        raise
    return spec


def check_pairs(file: Path, foreign: Foreign) -> None:
    """Every matrix whole, and of the rank that the config states.

    Raises:
        AdapterError: half a pair, a magnitude too many or missing, or another rank.
    """
    parts = ("lora_a", "lora_b", "m") if foreign.spec.method == "dora" else ("lora_a", "lora_b")
    ranks: dict[int, str] = {}
    for matrix in sorted({name.rsplit(".", 1)[0] for name in foreign.tensors}):
        have = {part: foreign.tensors.get(f"{matrix}.{part}") for part in ("lora_a", "lora_b", "m")}
        if missing := [part for part in parts if have[part] is None]:
            raise AdapterError(
                f"{file}: {matrix} has no {missing[0]}; the file is incomplete, so copy it again"
            )
        if have["m"] is not None and "m" not in parts:
            raise AdapterError(
                f"{file}: {matrix} has a DoRA magnitude, but {adapters.CONFIG} does not speak of "
                "DoRA; one of the two files belongs to another adapter"
            )
        a, b = have["lora_a"], have["lora_b"]
        assert a is not None
        assert b is not None
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise AdapterError(
                f"{file}: the two tensors of {matrix} have shapes {a.shape} and {b.shape} (inputs "
                "× rank, rank × outputs), which cannot be multiplied; the file is damaged"
            )
        ranks.setdefault(a.shape[1], matrix)
    if len(ranks) > 1:
        told = ", ".join(f"{rank} ({matrix})" for rank, matrix in sorted(ranks.items()))
        raise AdapterError(
            f"{file} mixes ranks: {told}; an adapter here has one rank, so train again with one"
        )
    (rank,) = ranks
    if rank != foreign.spec.rank:
        raise AdapterError(
            f"{file} has tensors of rank {rank}, but {adapters.CONFIG} speaks of "
            f"{foreign.spec.rank}; one of the two files belongs to another adapter"
        )


def other_bits(base: Base, foreign: Foreign) -> bool:
    """Whether an adapter says that it was trained on another quantisation than the base has."""
    bits = foreign.base_bits
    return bits is not None and not base.identity.quantization.startswith(f"{bits} ")


def _check_fits(base: Base, foreign: Foreign) -> int:
    """The base has these matrices, in these shapes, and the quantisation that was trained on.

    Returns:
        How many decoder layers the base has.
    """
    here = base.identity
    if other_bits(base, foreign) and not base.other_precision:
        raise AdapterError(
            f"the adapter was trained on a base quantised to {foreign.base_bits} bits, here "
            f"{here.name} is quantised to: {here.quantization}; set model.quantize_bits or "
            "model.path to match, or accept other numbers than it was trained with by "
            "model.allow_other_precision=true"
        )
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and (
            name.startswith(LAYERS) or lora.in_tower(name)
        ):
            shapes[name] = _dimensions(module)
    depth = 1 + max(lora.layer_number(name) for name in shapes if not lora.in_tower(name))
    for name, value in foreign.tensors.items():
        matrix, part = name.rsplit(".", 1)
        if matrix not in shapes:
            raise AdapterError(
                f"the adapter has {matrix}, and {here.name} has no such matrix (it has {depth} "
                "layers); set model.path to the base it was trained on"
            )
        inputs, outputs = shapes[matrix]
        rank = foreign.spec.rank
        expected = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}[part]
        if value.shape != expected:
            raise AdapterError(
                f"the adapter's {name} has shape {value.shape}, {here.name} needs {expected}; set "
                "model.path to the base it was trained on"
            )
    stated, layers = foreign.last_layers, foreign.spec.layers
    if stated is not None and layers != tuple(range(max(0, depth - stated), depth)):
        raise AdapterError(
            f"the adapter's config speaks of the last {stated} layers, its file of the layers "
            f"{_span(layers)}, and {here.name} has {depth}; set model.path to the base it was "
            "trained on, or restore its two files"
        )
    return depth


def _dimensions(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a matrix, quantised or not."""
    outputs, inputs = module.weight.shape
    if isinstance(module, nn.QuantizedLinear):
        inputs = inputs * 32 // module.bits
    return inputs, outputs


def _span(layers: tuple[int, ...] | None) -> str:
    found = layers or ()
    if len(found) > 1 and found == tuple(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))
