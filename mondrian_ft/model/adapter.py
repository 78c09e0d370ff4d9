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
from . import layouts, lora
from .backend import mx
from .base import Base
from .lora import LoraSpec
from .qwen3_vl import Inputs

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
"""How people write the methods."""
_VERSION = 1
_PROBE_TEXT = "The horizon is level, the light is low, and the near rocks lead to a far ridge."


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

    Raises:
        AdapterError: the adapter changes nothing; nothing is written.
        MondrianError: the folder cannot be written.
    """
    check_effect(base)
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
            "tensors": len(tensors),
            "parameters": int(sum(value.size for value in tensors.values())),
        },
        "pixels": dict(pixels),
        "prompts": sorted(prompts),
        "data_lock": data_lock,
        "versions": _versions(),
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
    for name in (MANIFEST, CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            what = "does not exist" if not folder.exists() else f"holds no {name}"
            raise AdapterError(
                f"{folder} {what}, so it is no adapter directory; give the folder that task=train "
                "wrote, or a registered version"
            )
    manifest, config = _json(folder / MANIFEST), _json(folder / CONFIG)
    weights = (folder / WEIGHTS).read_bytes()
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
    if (peft.method, peft.rank) != (spec.method, spec.rank):
        raise AdapterError(
            f"{folder}: {CONFIG} speaks of {NAMES[peft.method]} with rank {peft.rank}, the "
            f"manifest of {NAMES[spec.method]} with rank {spec.rank}; one of them was edited, so "
            "restore it or train again"
        )
    if peft.scale != spec.scale:
        raise AdapterError(
            f"{folder}: {CONFIG} gives an effective scale of {peft.scale:g}, the manifest "
            f"{spec.scale:g}; one of them was edited, so restore it or train again"
        )
    found = identity_hash(weights, spec.scale)
    if found != stated:
        raise AdapterError(
            f"{folder}: the weights have hash {found[:12]}, the manifest says {stated[:12]}; the "
            "file was changed or damaged, so restore it or train again"
        )
    return Adapter(folder, stated, spec, _read_weights(folder, weights), manifest)


def load(folder: Path, base: Base, *, pixels: str | None = None) -> Adapter:
    """Put an adapter directory into a base's model.

    Args:
        folder: the adapter directory.
        base: without an adapter in it.
        pixels: fingerprint of the pixel pipeline it will be used with; compared where given.

    Raises:
        AdapterError: it is damaged, was made for another base, quantisation or pixels, its
            tensors do not fit, or it changes nothing. The model is then its base, as before.
    """
    adapter = read(folder)
    check_base(adapter, base)
    trained_on = adapter.manifest.get("pixels", {}).get("fingerprint")
    if pixels is not None and trained_on is None:
        raise AdapterError(
            f"{folder} does not say how the pixels it was trained on were prepared "
            f"({MANIFEST} has no pixels.fingerprint); restore it or train again"
        )
    if pixels is not None and pixels != trained_on:
        raise AdapterError(
            f"{folder} was trained on pixels prepared as {trained_on}, here they are prepared as "
            f"{pixels}; set {_bounds(adapter)}, or, if they are that, install the Pillow and "
            "mlx-vlm that its manifest names"
        )
    lora.attach(base.model, adapter.spec, seed=0)
    try:
        lora.set_tensors(base.model, adapter.tensors)
        base.model.eval()
        mx.eval(base.model.parameters())
        check_effect(base)
    except AdapterError as error:
        lora.detach(base.model)
        raise AdapterError(f"{folder}: {error}") from None
    except BaseException:
        lora.detach(base.model)
        raise
    return adapter


@contextmanager
def applied(folder: Path, base: Base, *, pixels: str | None = None) -> Iterator[Adapter]:
    """This adapter instead of whatever is in the model, for the length of the block.

    Raises:
        AdapterError: as :func:`load`; what was in the model is in it again then, too.
    """
    with lora.without_adapter(base.model):
        adapter = load(folder, base, pixels=pixels)
        try:
            yield adapter
        finally:
            lora.detach(base.model)


def check_effect(base: Base) -> None:
    """Refuse an adapter that changes nothing, or that breaks the model.

    Raises:
        AdapterError: on a line of text, the logits with and without it are bit-identical, or
            those with it are not finite.
    """
    tokens = mx.array([base.tokenizer.encode(_PROBE_TEXT, add_special_tokens=False)])
    positions = mx.broadcast_to(mx.arange(tokens.shape[1], dtype=mx.int32), (3, *tokens.shape))

    def logits() -> mx.array:
        return base.backbone.head(base.backbone.hidden(Inputs(tokens, positions)))

    was_training = base.model.training
    base.model.eval()
    with lora.without_adapter(base.model):
        before = logits()
        mx.eval(before)
    after = logits()
    same = bool(mx.array_equal(before, after).item())
    finite = bool(mx.isfinite(after).all().item())
    base.model.train(was_training)
    if not finite:
        raise AdapterError(
            "with the adapter the model gives logits that are not finite; it is damaged, or its "
            "training diverged, so restore it or train again with a lower learning rate"
        )
    if same:
        raise AdapterError(
            "the adapter changes nothing: with and without it the model gives the same logits, bit "
            "for bit; its weights are zero or it was never trained"
        )


def identity_hash(weights: bytes, scale: float) -> str:
    """64 hexadecimal digits that name an adapter: the weights file and the effective scale."""
    return hashlib.sha256(weights + f"scale={scale!r}".encode()).hexdigest()


def _peft_method(config: Mapping[str, Any]) -> str:
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def _weights_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The weights file: no time, path or config in it, so equal training gives equal bytes."""
    from safetensors.numpy import save as to_bytes

    return to_bytes(layouts.to_peft(tensors), {"format": "pt"})


def _read_weights(folder: Path, weights: bytes) -> dict[str, mx.array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    try:
        arrays = from_bytes(weights)
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged ({error}); train again") from None
    return {name: mx.array(value) for name, value in layouts.from_peft(arrays).items()}


def check_base(adapter: Adapter, base: Base) -> None:
    """Refuse a base or a quantisation that an adapter was not trained on."""
    trained = adapter.manifest.get("base", {})
    here = asdict(base.identity)
    if trained.get("weights") != here["weights"]:
        raise AdapterError(
            f"{adapter.folder} was trained on {trained.get('name')} (weights "
            f"{trained.get('weights')}), but the base here is {here['name']} (weights "
            f"{here['weights']}); set model.path to the base it was trained on"
        )
    if trained.get("quantization") != here["quantization"]:
        raise AdapterError(
            f"{adapter.folder} was trained on a base quantised to {trained.get('quantization')}, "
            f"here it is {here['quantization']}; set model.quantize_bits to match"
        )


def _bounds(adapter: Adapter) -> str:
    """The keys to set for the pixels that an adapter was trained on."""
    keys = ("min_pixels", "max_pixels")
    return " and ".join(f"data.{key}={adapter.manifest['pixels'].get(key)}" for key in keys)


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
