"""What an adapter has to prove before it is used, one check at a time.

Loading stops at the first check that fails; ``task=verify`` shows them all. Each names what was
expected, what was found, and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from . import lora, probe
from .base import Base
from .lora import LoraSpec
from .probe import Difference, ProbeInputs, ProbeLogits

_STAGES = {
    "prompt": (
        "prompt",
        "the words around a prompt (data/prompt.py) were changed since; use the version of "
        "mondrian_ft that it was trained with, or train again",
    ),
    "template": (
        "chat template",
        "the base's chat template was changed since, so the model would be asked in another way; "
        "restore the base's folder, or train again",
    ),
    "tokens": (
        "tokenizer",
        "the base's tokenizer makes other token ids of the same text; restore the base's folder, "
        "or install the transformers that its manifest names",
    ),
    "picture": (
        "picture",
        "the drawn photograph becomes other patches here; install the Pillow and mlx-vlm that its "
        "manifest names",
    ),
}
"""What each of a probe's digests is called, and what to do when it differs."""


@dataclass(frozen=True)
class Check:
    """One thing an adapter has to prove.

    Attributes:
        name: a word or two.
        expected, found: in words.
        refusal: what is wrong and what to do next, to follow the adapter's name and a colon; blank
            if the check holds.
    """

    name: str
    expected: str
    found: str
    refusal: str = ""

    @property
    def holds(self) -> bool:
        """Whether it was proved."""
        return not self.refusal


def require(folder: Path, checks: Iterable[Check]) -> None:
    """Refuse at the first check that fails; what comes after it is not even looked at.

    Raises:
        AdapterError: its refusal.
    """
    for check in checks:
        if not check.holds:
            raise AdapterError(f"{folder}: {check.refusal}")


def of_record(
    spec: LoraSpec, config: LoraSpec, manifest: Mapping[str, Any], weights: bytes, found: str
) -> Iterator[Check]:
    """Whether the directory's three files speak of the same adapter.

    Args:
        spec, config: what the manifest and ``adapter_config.json`` say.
        weights: the weights file.
        found: its hash, with the manifest's scale.
    """
    edited = "one of them was edited, so restore it or train again"
    a, b = (f"{lora.NAMES[one.method]} with rank {one.rank}" for one in (spec, config))
    yield _check(
        "method and rank",
        a,
        b,
        f"adapter_config.json speaks of {b}, the manifest of {a}; {edited}",
    )
    a, b = f"{spec.scale:g}", f"{config.scale:g}"
    yield Check(
        "scale of the config",
        a,
        b,
        ""
        if spec.scale == config.scale
        else f"adapter_config.json gives an effective scale of {b}, the manifest {a}; {edited}",
    )
    stated = manifest["lora"].get("scale", spec.scale)
    yield Check(
        "scale of the manifest",
        a,
        f"{stated:g}" if isinstance(stated, int | float) else str(stated),
        ""
        if stated == spec.scale
        else f"its manifest states an effective scale of {stated}, but {lora.NAMES[spec.method]} "
        f"with rank {spec.rank} and alpha {spec.alpha:g} has {a}; the manifest was edited, or "
        "written by a version with another scale rule, so restore it or train again",
    )
    stated = str(manifest["hash"])
    refusal = ""
    if stated != found:
        digest = hashlib.sha256(weights).hexdigest()
        if manifest.get("weights_sha256") == digest:
            refusal = (
                f"its weights are those it was saved with, but with an effective scale of {a} "
                f"they are another adapter, {found[:12]} instead of {stated[:12]}; the scale was "
                "edited in both files, so restore them or train again"
            )
        else:
            refusal = (
                f"the weights have hash {found[:12]}, the manifest says {stated[:12]}; the file "
                "was changed or damaged, so restore it or train again"
            )
    yield Check("hash", stated[:12], found[:12], refusal)


def of_base(manifest: Mapping[str, Any], base: Base) -> Iterator[Check]:
    """Whether it was trained on this base, quantised as it is here."""
    trained, here = manifest.get("base", {}), base.identity
    yield Check(
        "base",
        f"{trained.get('name')} ({trained.get('weights')})",
        f"{here.name} ({here.weights})",
        ""
        if trained.get("weights") == here.weights
        else f"it was trained on {trained.get('name')} (weights {trained.get('weights')}), but "
        f"the base here is {here.name} (weights {here.weights}); set model.path to the base it "
        "was trained on",
    )
    a, b = str(trained.get("quantization")), here.quantization
    yield Check(
        "quantisation",
        f"{a}, or any other" if base.other_precision else a,
        b,
        ""
        if a == b or base.other_precision
        else f"it was trained on a base quantised to {a}, here it is {b}; set model.quantize_bits "
        "to match, or accept other numbers than it was trained with by "
        "model.allow_other_precision=true",
    )


def other_precision(manifest: Mapping[str, Any], base: Base) -> str:
    """A warning where an adapter is used on its base in another quantisation than it was trained
    on; blank where it is the same."""
    trained, here = manifest.get("base", {}).get("quantization"), base.identity.quantization
    if trained == here:
        return ""
    return (
        f"it was trained on a base quantised to {trained} and is used on one quantised to {here} "
        "(model.allow_other_precision=true): its answers are others than those it was trained to "
        "give, and its recorded logits cannot be compared"
    )


def of_pixels(manifest: Mapping[str, Any], pixels: str) -> Iterator[Check]:
    """Whether pictures are prepared here as those it was trained on.

    Args:
        pixels: ``data.pixels.fingerprint`` of the pipeline here.
    """
    trained = manifest.get("pixels", {})
    a = trained.get("fingerprint")
    refusal = ""
    if a is None:
        refusal = (
            "it does not say how the pixels it was trained on were prepared (manifest.json has no "
            "pixels.fingerprint); restore it or train again"
        )
    elif a != pixels:
        keys = ("min_pixels", "max_pixels")
        bounds = " and ".join(f"data.{key}={trained.get(key)}" for key in keys)
        refusal = (
            f"it was trained on pixels prepared as {a}, here they are prepared as {pixels}; set "
            f"{bounds}, or, if they are that, install the Pillow and mlx-vlm that its manifest "
            "names"
        )
    yield Check("pixels", str(a), pixels, refusal)


def of_inputs(manifest: Mapping[str, Any], inputs: ProbeInputs) -> Iterator[Check]:
    """Whether a proof was recorded, and the same photograph and prompt reach the model as then."""
    recorded = manifest.get("probe")
    if not isinstance(recorded, Mapping):
        yield Check(
            "proof",
            f"version {probe.VERSION}",
            "none",
            "its manifest holds no proof that it was ever applied, as it was written by an earlier "
            "version, or the proof was taken out; train it again, or give it a new one with "
            "task=import_adapter",
        )
        return
    a, b = str(probe.VERSION), str(recorded.get("version"))
    yield Check(
        "proof",
        f"version {a}",
        f"version {b}",
        ""
        if a == b
        else f"its proof is of version {b}, this mondrian_ft makes version {a}; use the "
        "mondrian_ft that wrote it, or give it a new one with task=import_adapter",
    )
    digests = recorded.get("digests")
    for key, here in inputs.digests.items():
        then = digests.get(key) if isinstance(digests, Mapping) else None
        name, remedy = _STAGES[key]
        yield _check(
            name,
            str(then),
            here,
            f"the {name} of its proof was {then}, here it is {here}: {remedy}",
        )


def of_tensors(model: Any, values: Mapping[str, Any]) -> Iterator[Check]:
    """Whether tensors are those of the LoRA layers in a model: none missing or more."""
    wrong = lora.misfits(model, values)
    count = len(lora.tensors(model))
    for name, good in (
        ("missing tensors", "none"),
        ("extra tensors", "none"),
        ("shapes", f"as the {count} in the model"),
    ):
        told = wrong.get(name)
        yield Check(name, good, told or good, f"the adapter does not fit: {told}" if told else "")


def of_scale(model: Any, spec: LoraSpec) -> Iterator[Check]:
    """Whether the layers in a model multiply by the scale that the adapter was trained with."""
    found = sorted({float(layer.scale) for layer in lora.lora_layers(model).values()})
    told = ", ".join(f"{scale:g}" for scale in found) or "no layer"
    yield Check(
        "scale in effect",
        f"{spec.scale:g}",
        told,
        ""
        if found == [spec.scale]
        else f"its layers would multiply by {told}, but it was trained with an effective scale of "
        f"{spec.scale:g}; the installed mlx-vlm scales in another way, so install the one that its "
        "manifest names",
    )


def of_effect(logits: Sequence[ProbeLogits]) -> Iterator[Check]:
    """Whether the logits with the adapter are numbers, and others than the base's."""
    bad = [one.name for one in logits if not one.finite]
    yield Check(
        "logits",
        "finite",
        f"not finite ({', '.join(bad)})" if bad else "finite",
        "with the adapter the model gives logits that are not finite; it is damaged, or its "
        "training diverged, so restore it or train again with a lower learning rate"
        if bad
        else "",
    )
    if bad:
        return
    zero = all(one.unchanged for one in logits)
    told = ", ".join(f"{one.effect:.3g} on the {one.name}" for one in logits)
    yield Check(
        "effect",
        "not zero",
        "zero" if zero else told,
        "the adapter changes nothing: with and without it the model gives the same logits, bit "
        "for bit; its weights are zero or it was never trained"
        if zero
        else "",
    )


def of_logits(
    differences: Sequence[Difference], recorded: Mapping[str, Any], *, compared: bool = True
) -> Iterator[Check]:
    """Whether the model says what it said when the adapter was saved, input by input.

    Args:
        compared: False only tells how far off it is, of a base in another precision.
    """
    was = f"{recorded.get('dtype')} on {recorded.get('backend')}"
    for one in differences:
        refusal = ""
        if not compared:
            yield Check(
                f"{one.name} logits",
                "not compared in another precision",
                f"{one.tuned:.2g} with it, {one.base:.2g} without",
            )
            continue
        if one.base > one.allowed:
            refusal = (
                f"on the probe's {one.name} the base alone, without the adapter, is "
                f"{one.base:.2g} away from the logits recorded when the adapter was saved ({was}), "
                f"and {one.allowed:.2g} is allowed: the base computes something else here, so "
                "install the mlx and mlx-vlm that its manifest names"
            )
        elif one.tuned > one.allowed:
            refusal = (
                f"on the probe's {one.name} the logits with the adapter are {one.tuned:.2g} away "
                f"from those recorded when it was saved ({was}), and {one.allowed:.2g} is allowed, "
                f"though the base alone agrees to {one.base:.2g}: the adapter is applied in "
                "another way here, or its proof is another adapter's, so install the mlx-vlm that "
                "its manifest names, or restore the directory"
            )
        yield Check(
            f"{one.name} logits",
            f"within {one.allowed:.2g}",
            f"{one.tuned:.2g} with it, {one.base:.2g} without"
            + ("" if one.tells else f"; too coarse to see its effect of {one.effect:.2g}"),
            refusal,
        )


def _check(name: str, expected: str, found: str, refusal: str) -> Check:
    """A check that two texts are equal."""
    return Check(name, expected, found, "" if expected == found else refusal)
