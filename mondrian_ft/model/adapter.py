"""The adapter directory: writing it, and loading it strictly.

An adapter is weights for one base, prompts and pixels prepared in one way. Its ``manifest.json``
says which; loading compares. What does not fit is refused, never loaded in part: an adapter that
is silently not applied, or applied to something else, is the failure this project exists against.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterError
from ..files import atomic_write_bytes, atomic_write_json
from ..identity import identity_hash
from . import layouts, lora, proof
from . import probe as probes
from .agreement import drawn_picture
from .backend import mx
from .base import Base
from .lora import LoraSpec
from .probe import ProbeInput, ProbeInputs
from .proof import Check, require

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
_VERSION = 1
_PLAIN_TEXT = "The horizon is level, the light is low, and the near rocks lead to a far ridge."
"""What is tried where no probe is given."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter directory holds.

    Attributes:
        folder: the directory.
        hash: 64 hexadecimal digits over the weights file and the effective scale: its name.
        spec: rank, alpha, targets and method.
        tensors: by mlx-vlm's names, see ``lora.tensors``; float32.
        manifest: everything else that was recorded.
    """

    folder: Path
    hash: str
    spec: LoraSpec
    tensors: dict[str, mx.array]
    manifest: dict[str, Any]


def save(
    folder: Path,
    base: Base,
    spec: LoraSpec,
    *,
    pixels: Mapping[str, Any],
    prompts: Sequence[str],
    data_lock: str,
    facts: Mapping[str, Any],
    probe: ProbeInputs | None = None,
) -> Adapter:
    """Write the LoRA layers that are in a base's model as an adapter directory.

    Args:
        folder: receives the files; other files in it are left alone.
        base: with the layers in it.
        spec: what they were made with.
        pixels: settings and fingerprint of the pixel pipeline.
        prompts: fingerprints of the prompts it was trained on.
        data_lock: which rows were in which part.
        facts: more for the manifest, such as how it was trained (JSON types).
        probe: what its proof is made with; without them the manifest holds none, and the
            adapter can be loaded only where none is asked for.

    Raises:
        AdapterError: the adapter changes nothing, or gives no numbers; nothing is written.
        MondrianError: the folder cannot be written.
    """
    logits = probes.run(base, probe.inputs if probe else _plain_inputs(base))
    for check in proof.of_effect(logits):
        if not check.holds:
            raise AdapterError(check.refusal)
    tensors = {
        name: np.array(value, np.float32) for name, value in lora.tensors(base.model).items()
    }
    weights = _weights_bytes(tensors)
    digest = identity_hash(weights, spec.scale)
    atomic_write_bytes(folder / WEIGHTS, weights)
    atomic_write_json(
        folder / CONFIG, layouts.peft_config(spec, base=base.identity.name, tensors=tensors)
    )
    manifest = {
        "version": _VERSION,
        "hash": digest,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": asdict(base.identity),
        "lora": {
            "rank": spec.rank,
            "alpha": spec.alpha,
            "method": spec.method,
            "scale": spec.scale,
            "dropout": spec.dropout,
            "targets": list(spec.targets),
            "layers": None if spec.layers is None else list(spec.layers),
            "vision": list(spec.vision),
            "tensors": len(tensors),
            "parameters": int(sum(value.size for value in tensors.values())),
        },
        "pixels": dict(pixels),
        "prompts": sorted(prompts),
        "data_lock": data_lock,
        "versions": _versions(),
        "probe": probes.record(base, probe, logits) if probe else None,
        **facts,
    }
    # The manifest comes last: a directory that has one has everything it speaks of.
    atomic_write_json(folder / MANIFEST, manifest)
    return read(folder)


def read(folder: Path) -> Adapter:
    """Read an adapter directory, and check it against its own manifest.

    Raises:
        AdapterError: a file is missing, damaged, or not what the manifest says.
    """
    opened = _open(folder)
    require(folder, opened.checks())
    return opened.adapter()


def load(
    folder: Path, base: Base, *, probe: ProbeInputs | None = None, pixels: str | None = None
) -> Adapter:
    """Put an adapter directory into a base's model, and see that it does what it did when saved.

    Args:
        folder: the adapter directory.
        base: without an adapter in it.
        probe: the probe as it is made here; run and compared with the manifest's. None only where
            there is no pixel or prompt pipeline that could make one.
        pixels: fingerprint of the pixel pipeline it will be used with; the probe's where there is
            one, and compared where given.

    Raises:
        AdapterError: it is damaged, was made for another base, quantisation, pixels or prompts, its
            tensors do not fit, it changes nothing, or other logits come out of it. The model is
            then its base, as before.
    """
    adapter = read(folder)
    require(folder, _before(adapter.manifest, base, probe, pixels))
    try:
        lora.attach(base.model, adapter.spec, seed=0)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    try:
        require(folder, _within(adapter, base))
        _put_in(adapter, base)
        require(folder, _after(adapter.manifest, base, probe))
    except BaseException:
        lora.detach(base.model)
        raise
    if told := proof.other_precision(adapter.manifest, base):
        base.notice(f"{folder}: {told}")
    return adapter


def prove(adapter: Adapter, base: Base, probe: ProbeInputs) -> None:
    """See that an adapter that is in a base's model, in whatever form, does what it did when saved.

    Raises:
        AdapterError: it changes nothing, or other logits come out of it.
    """
    require(adapter.folder, _after(adapter.manifest, base, probe))


def examine(folder: Path, base: Base, probe: ProbeInputs) -> list[Check]:
    """Every check of :func:`load`, those after a failed one as well as far as they can be made.

    The model is its base before and after.

    Raises:
        AdapterError: the model carries an adapter already.
    """
    try:
        opened = _open(folder)
    except AdapterError as error:
        return [Check("files", "an adapter directory", "none", _without(folder, error))]
    found = [Check("files", "an adapter directory", "an adapter directory"), *opened.checks()]
    found += _before(opened.manifest, base, probe, None)
    try:
        adapter = opened.adapter()
    except AdapterError as error:
        return [*found, Check("weights", "readable", "not readable", _without(folder, error))]
    try:
        lora.attach(base.model, adapter.spec, seed=0)
    except AdapterError as error:
        return [*found, Check("matrices", "those of the base", "others", str(error))]
    try:
        fits = list(_within(adapter, base))
        found += fits
        if all(check.holds for check in fits if check.name != "scale in effect"):
            _put_in(adapter, base)
            found += _after(adapter.manifest, base, probe)
    except AdapterError as error:
        found.append(Check("logits", "computed", "none", _without(folder, error)))
    finally:
        lora.detach(base.model)
    return found


@contextmanager
def applied(
    folder: Path, base: Base, *, probe: ProbeInputs | None = None, pixels: str | None = None
) -> Iterator[Adapter]:
    """This adapter instead of whatever is in the model, for the length of the block.

    Raises:
        AdapterError: as :func:`load`; what was in the model is in it again then, too.
    """
    with lora.without_adapter(base.model):
        adapter = load(folder, base, probe=probe, pixels=pixels)
        try:
            yield adapter
        finally:
            lora.detach(base.model)


def _peft_method(config: Mapping[str, Any]) -> str:
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def _weights_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The weights file: no time, path or config in it, so equal training gives equal bytes."""
    from safetensors.numpy import save as to_bytes

    return to_bytes(layouts.to_peft(tensors), {"format": "pt"})


@dataclass(frozen=True)
class _Opened:
    """The three files of an adapter directory, each readable by itself."""

    folder: Path
    manifest: dict[str, Any]
    hash: str
    spec: LoraSpec
    config: LoraSpec
    weights: bytes

    def checks(self) -> Iterator[Check]:
        """Whether they belong together."""
        found = identity_hash(self.weights, self.spec.scale)
        return proof.of_record(self.spec, self.config, self.manifest, self.weights, found)

    def adapter(self) -> Adapter:
        """With the tensors.

        Raises:
            AdapterError: the weights file is damaged, or holds tensors of another model or type.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load as from_bytes

        try:
            found = from_bytes(self.weights)
        except SafetensorError as error:
            raise AdapterError(
                f"{self.folder / WEIGHTS} is damaged ({error}); train again"
            ) from None
        except KeyError as error:  # numpy has no such type
            found, kinds = {}, {str(error.args[0])}
        else:
            kinds = {str(value.dtype) for value in found.values()} - {"float32"}
        if kinds:
            raise AdapterError(
                f"{self.folder / WEIGHTS} holds tensors of type {', '.join(sorted(kinds))}, where "
                "an adapter directory has float32; give it to task=import_adapter"
            )
        try:
            arrays = layouts.from_peft(found)
        except AdapterError as error:
            raise AdapterError(f"{self.folder}: {error}") from None
        tensors = {name: mx.array(value) for name, value in arrays.items()}
        return Adapter(self.folder, self.hash, self.spec, tensors, self.manifest)


def _open(folder: Path) -> _Opened:
    for name in (MANIFEST, CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            what = "does not exist" if not folder.exists() else f"holds no {name}"
            raise AdapterError(
                f"{folder} {what}, so it is no adapter directory; give the folder that task=train "
                "wrote, or a registered version"
            )
    manifest, config = _json(folder / MANIFEST), _json(folder / CONFIG)
    try:
        for key in ("base", "lora", "pixels"):
            if not isinstance(manifest.get(key, {}), dict):
                raise TypeError(f"{key} is no object")
        about = manifest["lora"]
        spec = LoraSpec(
            rank=int(about["rank"]),
            alpha=float(about["alpha"]),
            dropout=float(about["dropout"]),
            targets=tuple(about["targets"]),
            method=str(about["method"]),
            layers=None if about.get("layers") is None else tuple(map(int, about["layers"])),
            # Adapters of earlier versions do not speak of the tower, which they leave frozen.
            vision=tuple(about.get("vision", ())),
        )
        stated = str(manifest["hash"])
        peft = LoraSpec(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=0.0,
            targets=(),
            method=_peft_method(config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{folder} has an incomplete manifest or config ({error!r}); restore it or train again"
        ) from None
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}; restore it or train again") from None
    return _Opened(folder, manifest, stated, spec, peft, (folder / WEIGHTS).read_bytes())


def _before(
    manifest: Mapping[str, Any], base: Base, inputs: ProbeInputs | None, pixels: str | None
) -> Iterator[Check]:
    """What can be checked before anything is put into the model."""
    yield from proof.of_base(manifest, base)
    pixels = inputs.pixels if inputs else pixels
    if pixels is not None:
        yield from proof.of_pixels(manifest, pixels)
    if inputs is not None:
        yield from proof.of_inputs(manifest, inputs)


def _within(adapter: Adapter, base: Base) -> Iterator[Check]:
    """What can be checked with fresh layers in the model."""
    yield from proof.of_tensors(base.model, adapter.tensors)
    yield from proof.of_scale(base.model, adapter.spec)


def _after(manifest: Mapping[str, Any], base: Base, inputs: ProbeInputs | None) -> Iterator[Check]:
    """What can be checked with the adapter in the model."""
    logits = probes.run(base, inputs.inputs if inputs else _plain_inputs(base))
    yield from proof.of_effect(logits)
    recorded = manifest.get("probe")
    if inputs is not None and isinstance(recorded, dict):
        try:
            differences = probes.compare(recorded, logits, dtype=base.identity.dtype)
        except AdapterError as error:
            yield Check("recorded logits", "readable", "not readable", str(error))
            return
        other = base.other_precision and bool(proof.other_precision(manifest, base))
        yield from proof.of_logits(differences, recorded, compared=not other)


def _put_in(adapter: Adapter, base: Base) -> None:
    lora.set_tensors(base.model, adapter.tensors)
    base.model.eval()
    mx.eval(base.model.parameters())


def _plain_inputs(base: Base) -> list[ProbeInput]:
    tokens = base.tokenizer.encode(_PLAIN_TEXT, add_special_tokens=False)
    inputs = [ProbeInput("text", np.array(tokens, np.int32))]
    if base.backbone.tower_adapted:
        # A text does not tell what an adapter in the tower does.
        inputs.append(ProbeInput("picture", *drawn_picture(base)))
    return inputs


def _without(folder: Path, error: AdapterError) -> str:
    """A sentence without the folder it begins with, as a check's refusal has it."""
    return str(error).removeprefix(f"{folder}: ")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise AdapterError(f"{path} is no JSON ({error}); restore it or train again") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} is no JSON object; restore it or train again")
    return content


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("mlx", "mlx-vlm", "transformers", "pillow")}
