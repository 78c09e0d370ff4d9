"""Whole models with an adapter merged in: in the published layout, or quantised for mlx-vlm.

The published layout is what transformers and mlx-vlm both load. An mlx-vlm folder would be loaded
by transformers too, as a model of random weights and without a word (facts of both versions are
tested), so the quantised form says in its card that it is mlx-vlm's alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from . import shards
from .backend import mx, nn, number
from .base import QUANTIZATION_GROUP, Base, quantizable
from .lora import LoraSpec
from .shards import Entry
from .targets import in_tower

_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_NOT_COPIED = ("adapter_config.json", "manifest.json", "training_args.json")
_PATCHES = "vision_tower.patch_embed.proj.weight"


def merge(
    weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array | None = None
) -> mx.array:
    """One matrix with its update merged in, computed in float32.

    Args:
        weight: (out, in), any floating-point type.
        lora_a: (in, rank).
        lora_b: (rank, out).
        scale: the effective scale.
        m: (out,), DoRA's magnitudes; None for LoRA.

    Returns:
        (out, in), float32: W + scale · (A B)ᵀ, with DoRA each row scaled to the length m.
    """
    merged = weight.astype(mx.float32) + scale * (lora_a @ lora_b).T
    if m is not None:
        merged = (m / mx.linalg.norm(merged, axis=1))[:, None] * merged
    return merged


def write_published(
    folder: Path,
    base: Base,
    *,
    spec: LoraSpec | None = None,
    tensors: Mapping[str, mx.array] | None = None,
    largest: int = shards.LARGEST,
) -> None:
    """Write the base as a model folder in the published layout, with an adapter merged in if given.

    Merged in float32 and then cast to the type that the matrix is stored in. Of a base that was
    quantised (in its folder or by ``model.quantize_bits``) the weights that the adapter was
    trained on are written: the dequantised ones.

    Args:
        folder: where to; it exists and is empty.
        base: the base; its weights are read from its folder again, one matrix at a time.
        spec, tensors: the adapter; both None for the base alone.
        largest: bytes of one weight file.

    Raises:
        ModelError: a matrix of the adapter is not in the folder's files.
        OSError: the disk is full.
    """
    tied = base.tied
    entries, left = [], {name.rsplit(".", 1)[0] for name in tensors or {}}
    for name, entry in _float_entries(base):
        matrix = name.removesuffix(".weight")
        if spec is not None and tensors is not None and matrix in left:
            left.discard(matrix)
            entry = _merged_entry(entry, matrix, spec, tensors)
        entries.append(Entry(to_published_name(name), entry.shape, entry.dtype, entry.load))
    if left:
        raise ModelError(f"{base.folder} has no weights of {min(left)}, which the adapter is for")
    shards.write_model(folder, entries, form="pt", largest=largest)
    _copy_rest(base.folder, folder)
    _write_config(base.folder, folder, tied)


def to_published_name(name: str) -> str:
    """mlx-vlm's name of a parameter to the published one."""
    name = name.replace("language_model.model.", "model.language_model.", 1)
    name = name.replace("vision_tower.", "model.visual.", 1)
    return name.replace("language_model.lm_head.", "lm_head.", 1)


def from_published_name(name: str) -> str:
    """The inverse of :func:`to_published_name`; mlx-vlm's own names stay."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("model.visual.", "vision_tower.", 1)


def _merged_entry(
    entry: Entry, matrix: str, spec: LoraSpec, tensors: Mapping[str, mx.array]
) -> Entry:
    def load() -> mx.array:
        stored = entry.load()
        a, b = tensors[f"{matrix}.lora_a"], tensors[f"{matrix}.lora_b"]
        return merge(stored, a, b, spec.scale, tensors.get(f"{matrix}.m")).astype(stored.dtype)

    return Entry(entry.name, entry.shape, entry.dtype, load)


def _float_entries(base: Base) -> Iterator[tuple[str, Entry]]:
    """The base's tensors by mlx-vlm's names, in the published layout, dequantised."""
    stored = shards.read_entries(base.folder)
    found = {from_published_name(entry.name): entry for entry in stored}
    in_mlx_layout = any(entry.name == _PATCHES for entry in stored)
    for name, entry in found.items():
        matrix, _, part = name.rpartition(".")
        if base.tied and matrix == "language_model.lm_head":
            continue  # the embedding once more
        if part in ("scales", "biases") and f"{matrix}.scales" in found:
            continue
        if f"{matrix}.scales" in found:
            entry = _dequantized(base, matrix, found)
        elif name == _PATCHES and in_mlx_layout:
            entry = _channels_first(entry)
        elif part == "weight" and isinstance(_module(base.model, matrix), nn.QuantizedLinear):
            entry = _requantized(base, matrix, entry)
        yield name, entry


def _channels_first(entry: Entry) -> Entry:
    """The patch embedding's kernel, of which MLX keeps the channels last."""
    out, *kernel, channels = entry.shape
    shape = (out, channels, *kernel)
    return Entry(entry.name, shape, entry.dtype, lambda: entry.load().transpose(0, 4, 1, 2, 3))


def _dequantized(base: Base, matrix: str, found: Mapping[str, Entry]) -> Entry:
    """A matrix that its folder keeps quantised."""
    module = _module(base.model, matrix)
    scales, biases = found[f"{matrix}.scales"], found.get(f"{matrix}.biases")
    packed = found[f"{matrix}.weight"]

    def load() -> mx.array:
        return mx.dequantize(
            packed.load(),
            scales.load(),
            None if biases is None else biases.load(),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        ).astype(scales.load().dtype)

    shape = (packed.shape[0], packed.shape[1] * 32 // module.bits)
    return Entry(matrix, shape, scales.dtype, load)


def _requantized(base: Base, matrix: str, entry: Entry) -> Entry:
    """A matrix as ``model.quantize_bits`` left it in memory, dequantised again."""
    module = _module(base.model, matrix)
    how = {"group_size": module.group_size, "bits": module.bits}

    def load() -> mx.array:
        stored = entry.load()
        parts = mx.quantize(stored.astype(_dtype(module)), **how)
        return mx.dequantize(*parts, **how).astype(stored.dtype)

    return Entry(entry.name, entry.shape, entry.dtype, load)


def _module(model: Any, name: str) -> Any:
    """The base's module of this name, below a LoRA layer if there is one; None for no module."""
    found: Any = model
    for part in name.split("."):
        if isinstance(found, list):
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = found.get(part)
        if found is None:
            return None
    return found["linear"] if "lora_a" in found else found


def _copy_rest(source: Path, folder: Path) -> None:
    """Tokenizer, processor, chat template, generation config: every file a loader may want."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)


def _write_config(source: Path, folder: Path, tied: bool) -> None:
    """The base's ``config.json``, byte for byte if it can be.

    Saved anew by transformers 5 it would not load in mlx-vlm. Two things are set where they must:
    both places that say whether head and embedding are tied, because transformers reads one and
    mlx-vlm the other; and a quantisation that the written weights have not is left out.
    """
    content = (source / "config.json").read_bytes()
    config = json.loads(content)
    text = config.get("text_config", {})
    flags = (config.get("tie_word_embeddings"), text.get("tie_word_embeddings"))
    quantized = [key for key in ("quantization", "quantization_config") if key in config]
    if flags == (tied, tied) and not quantized:
        (folder / "config.json").write_bytes(content)
        return
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    for key in quantized:
        del config[key]
    _write_json(folder / "config.json", config)


# --- quantised, for mlx-vlm -------------------------------------------------------------------


def quantize_merged(
    base: Base, spec: LoraSpec | None, tensors: Mapping[str, mx.array], bits: int = 4
) -> dict[str, dict[str, float]]:
    """Merge an adapter into a base's model and quantise it, in place.

    Matrices that the base keeps quantised keep their bits and groups; of a base in floating point
    every matrix of the language model that can be is quantised to ``bits``.

    Args:
        base: without an adapter in it; its model is another one afterwards.
        spec, tensors: the adapter.

    Returns:
        For each adapted matrix ``weight``, the relative error of quantising the merged matrix
        (Frobenius norm, 0.1 is 10 %), and ``update``, the same error in units of the update itself:
        at 1 the rounding is as large as what was learnt.

    Raises:
        ModelError: no matrix has inputs that quantisation groups divide.
    """
    errors: dict[str, dict[str, float]] = {}
    matrices = {name.rsplit(".", 1)[0] for name in tensors}
    replaced: dict[str, Any] = {}
    for name, module in base.model.named_modules():
        adapted = name in matrices
        if in_tower(name) and adapted and not isinstance(module, nn.QuantizedLinear):
            # The tower stays in floating point, as in the base.
            replaced[name] = _plain_merge(module, name, spec, tensors)
        if not name.startswith("language_model.") and not (
            adapted and isinstance(module, nn.QuantizedLinear)
        ):
            continue
        quantized = isinstance(module, nn.QuantizedLinear)
        if not (quantized and adapted) and not (not quantized and quantizable(module)):
            if adapted:
                replaced[name] = _plain_merge(module, name, spec, tensors)
            continue
        before = _weight(module).astype(mx.float32)
        whole = before
        if adapted:
            assert spec is not None
            whole = merge(before, *_pair(name, tensors), spec.scale, tensors.get(f"{name}.m"))
        linear = nn.Linear(1, 1, bias="bias" in module)
        linear.weight = whole.astype(_dtype(module))
        if "bias" in module:
            linear.bias = module.bias
        group = module.group_size if quantized else QUANTIZATION_GROUP
        layer = nn.QuantizedLinear.from_linear(linear, group, module.bits if quantized else bits)
        mx.eval(layer.parameters())
        if adapted:
            off = mx.linalg.norm(_weight(layer).astype(mx.float32) - whole)
            errors[name] = {
                "weight": number(off / mx.linalg.norm(whole)),
                "update": number(off / mx.linalg.norm(whole - before)),
            }
        replaced[name] = layer
    if not any(
        isinstance(module, nn.QuantizedLinear)
        for module in (*replaced.values(), *(one for _, one in base.model.named_modules()))
    ):
        raise ModelError(
            f"no matrix of {base.identity.name} has a multiple of {QUANTIZATION_GROUP} inputs, so "
            "nothing would be quantised; use task.format=fused"
        )
    from mlx.utils import tree_unflatten

    base.model.update_modules(tree_unflatten(list(replaced.items())))
    base.model.freeze()
    base.model.eval()
    return errors


def _plain_merge(
    module: Any, name: str, spec: LoraSpec | None, tensors: Mapping[str, mx.array]
) -> Any:
    """An adapted matrix whose inputs no group divides: merged, and left in floating point."""
    assert spec is not None
    linear = nn.Linear(1, 1, bias="bias" in module)
    whole = merge(module.weight, *_pair(name, tensors), spec.scale, tensors.get(f"{name}.m"))
    linear.weight = whole.astype(module.weight.dtype)
    if "bias" in module:
        linear.bias = module.bias
    return linear


def _pair(name: str, tensors: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
    return tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]


def _weight(module: Any) -> mx.array:
    if not isinstance(module, nn.QuantizedLinear):
        return module.weight
    return mx.dequantize(
        module.weight,
        module.scales,
        module.biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


def _dtype(module: Any) -> mx.Dtype:
    return module.scales.dtype if isinstance(module, nn.QuantizedLinear) else module.weight.dtype


def write_quantized(folder: Path, base: Base, *, largest: int = shards.LARGEST) -> None:
    """Write a base whose model is quantised in memory as a folder for mlx-vlm, in its layout.

    Raises:
        OSError: the disk is full.
    """
    from mlx.utils import tree_flatten

    parameters: Any = tree_flatten(base.model.parameters())
    entries = [shards.entry_of(name, value) for name, value in parameters]
    shards.write_model(folder, entries, form="mlx", largest=largest)
    _copy_rest(base.folder, folder)
    config = json.loads((base.folder / "config.json").read_text())
    tied = base.tied
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    config.pop("quantization_config", None)
    config["quantization"] = _quantization(base.model)
    _write_json(folder / "config.json", config)


def _quantization(model: Any) -> dict[str, Any]:
    """``quantization`` of ``config.json``: what most layers have, and by name what others have."""
    found = {
        name: {"group_size": layer.group_size, "bits": layer.bits}
        for name, layer in model.named_modules()
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    settings = list(found.values())
    common = max(settings, key=settings.count)
    others = {name: value for name, value in found.items() if value != common}
    return {**common, "mode": "affine", **others}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
