"""Adapters of other programs: telling whose they are, and reading them exactly or not at all.

Four layouts are known (docs/exchange.md shows them): PEFT's, mlx-vlm's, mlx-lm's, and the one that
mlx-vlm wrote before, ``{"rank", "alpha", "dropout"}`` beside tensors ``.A`` and ``.B``, which does
not say what it multiplied by. Inside this package tensors have mlx-vlm's names and shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterError
from . import adapter as adapters
from . import lora, targets
from .foreign import LAYERS, Foreign, check_pairs
from .lora import LoraSpec
from .safetensors_file import read_tensors

PEFT, MLX_VLM, MLX_LM, OLD = "PEFT", "mlx-vlm", "mlx-lm", "mlx-vlm's earlier"
SCALE_RULES = ("alpha", "alpha_over_rank")
WEIGHTS_NAMES = (adapters.WEIGHTS, "adapters.safetensors", "weights.safetensors")
_UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz")

_ENDINGS = (
    (re.compile(r"\.lora_A(\.default)?\.weight$"), PEFT, "lora_a"),
    (re.compile(r"\.lora_B(\.default)?\.weight$"), PEFT, "lora_b"),
    (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"), PEFT, "m"),
    (re.compile(r"\.lora_a$"), MLX_VLM, "lora_a"),
    (re.compile(r"\.lora_b$"), MLX_VLM, "lora_b"),
    (re.compile(r"\.m$"), MLX_VLM, "m"),
    (re.compile(r"\.A$"), OLD, "lora_a"),
    (re.compile(r"\.B$"), OLD, "lora_b"),
)
# The decoder's layers by transformers' and by MLX's names, as part of a vision-language model or
# of the language model alone; PEFT puts base_model.model. before them.
_PREFIXES = (
    "model.language_model.layers.",
    "language_model.model.layers.",
    "model.layers.",
)
# The vision tower's, each with the decoder's of the same program.
_TOWERS = {
    "model.visual.": "model.language_model.layers.",
    "vision_tower.": "language_model.model.layers.",
}
_VISION = ("visual.", "vision_tower.", "vision_model.")


def read_foreign(source: Path, scale_rule: str | None = None) -> Foreign:
    """Read an adapter of another program.

    Args:
        source: its folder, or its weights file with ``adapter_config.json`` beside it.
        scale_rule: what ``alpha`` means where the files cannot say: ``alpha`` (the product is
            multiplied by it) or ``alpha_over_rank``.

    Raises:
        AdapterError: it is none of the four layouts, is damaged, holds what cannot be represented
            exactly, or does not say its scale and ``scale_rule`` was not given.
    """
    weights = _weights_file(source)
    content = weights.read_bytes()
    arrays = read_tensors(weights, content)
    config_file = weights.parent / adapters.CONFIG
    if not config_file.is_file():
        raise AdapterError(
            f"{config_file} is missing, and without it nobody can tell the scale of "
            f"{weights.name}; copy it beside the weights"
        )
    config = _config(config_file)
    found = _sort(weights, arrays)
    read = {PEFT: _peft, MLX_VLM: _mlx, MLX_LM: _mlx, OLD: _old}[found.layout]
    if scale_rule is not None and (found.layout == PEFT or "lora_parameters" in config):
        raise AdapterError(
            f"task.scale_rule={scale_rule} is set, but {config_file} states the scale itself; "
            "leave task.scale_rule empty"
        )
    foreign = read(found, config, config_file, scale_rule)
    check_pairs(weights, foreign)
    return replace(foreign, file=weights.name, sha256=hashlib.sha256(content).hexdigest())


# --- which file, whose -----------------------------------------------------------------------


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise AdapterError(f"task.source={source} does not exist; give a folder or a weights file")
    found = [source / name for name in WEIGHTS_NAMES if (source / name).is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise AdapterError(f"{source} holds {names}; give the one to import as task.source")
    if not found:
        unsafe = sorted(path.name for path in source.iterdir() if path.suffix in _UNSAFE)
        if unsafe:
            raise AdapterError(
                f"{source} holds {unsafe[0]}, which is a pickle or may hold one; it is not opened, "
                "because a pickle can run any program, so save the adapter again as safetensors "
                "where it was made"
            )
        raise AdapterError(
            f"{source} holds no adapter; none of {', '.join(WEIGHTS_NAMES)} is in it"
        )
    return found[0]


def _config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{file} is no JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{file} is no JSON object; copy it again")
    return content


@dataclass(frozen=True)
class _Sorted:
    """A file's tensors by matrix, in mlx-vlm's names (``language_model.model.layers.…``,
    ``vision_tower.…``) → part → array."""

    file: Path
    layout: str
    matrices: dict[str, dict[str, np.ndarray]]
    skipped: tuple[str, ...]
    text_only: bool


def _sort(file: Path, arrays: Mapping[str, np.ndarray]) -> _Sorted:
    matrices: dict[str, dict[str, np.ndarray]] = {}
    layouts, prefixes, skipped = set(), set(), []
    for name, array in arrays.items():
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            skipped.append(name)
            continue
        matrix, layout, part = _ending(file, name)
        prefix, inner = _prefix(file, name, matrix.removeprefix("base_model.model."))
        layouts.add(layout)
        prefixes.add(prefix)
        if len(layouts) > 1 or len(prefixes) > 1:
            what = sorted(layouts) if len(layouts) > 1 else sorted(prefixes)
            raise AdapterError(
                f"{file} mixes {' and '.join(what)} names, as no program writes them; save it again"
            )
        parts = matrices.setdefault(inner, {})
        if part in parts:
            raise AdapterError(f"{file} holds {name} twice, under two names; it is damaged")
        parts[part] = array
    if not matrices:
        raise AdapterError(f"{file} holds no LoRA tensors, so there is nothing to import")
    layout, text_only = layouts.pop(), prefixes.pop() == "model.layers."
    if layout == MLX_VLM and text_only:
        layout = MLX_LM
    return _Sorted(file, layout, matrices, tuple(skipped), text_only)


def _ending(file: Path, name: str) -> tuple[str, str, str]:
    """(matrix, layout, part) of a tensor's name."""
    for pattern, layout, part in _ENDINGS:
        if pattern.search(name):
            return pattern.sub("", name), layout, part
    if ".lora_embedding_" in name or ".modules_to_save." in name:
        what = "an embedding's adapter" if "lora_embedding" in name else "a whole module"
        raise AdapterError(
            f"{file}: {name} is {what}; only matrices of the decoder layers can be adapted here, "
            "so train again without it"
        )
    if name.endswith(".bias"):
        raise AdapterError(
            f"{file}: {name} is a trained bias, which LoRA layers here have none of; train again "
            "with bias=none"
        )
    raise AdapterError(
        f"{file}: {name} is no LoRA tensor of PEFT, mlx-vlm or mlx-lm; if it belongs to a module "
        "that was trained whole, merge it into a base of its own first"
    )


def _prefix(file: Path, name: str, matrix: str) -> tuple[str, str]:
    """(prefix of the decoder's, mlx-vlm's name) of a matrix's name without PEFT's own prefix."""
    for prefix in _PREFIXES:
        if matrix.startswith(prefix):
            rest = matrix.removeprefix(prefix)
            if not rest.split(".", 1)[0].isdigit():
                break
            return prefix, f"{LAYERS}{rest}"
    for tower, prefix in _TOWERS.items():
        if matrix.startswith(tower):
            return prefix, f"{targets.VISION}{matrix.removeprefix(tower)}"
    if any(part in f"{matrix}." for part in _VISION):
        raise AdapterError(
            f"{file}: {name} adapts a vision tower whose names are not Qwen3-VL's "
            f"({', '.join(_TOWERS)}); it was made for another architecture"
        )
    if matrix.endswith(("lm_head", "embed_tokens")):
        raise AdapterError(
            f"{file}: {name} adapts {matrix.rsplit('.', 1)[-1]}; only matrices of the decoder "
            "layers can be adapted here, so train again without it"
        )
    raise AdapterError(
        f"{file}: {name} belongs to no matrix of a Qwen3-VL language model, whose names start with "
        f"{', '.join(_PREFIXES)}; it was made for another architecture"
    )


# --- PEFT ------------------------------------------------------------------------------------

# What would change what the adapter does in a way that LoRA layers here do not know.
_PEFT_REFUSED = {
    "rank_pattern": "gives matrices ranks of their own; train again with one rank",
    "alpha_pattern": "gives matrices strengths of their own; train again with one lora_alpha",
    "modules_to_save": "holds modules that were trained whole; train again without modules_to_save",
    "fan_in_fan_out": "speaks of transposed matrices, which this architecture has none of",
    "lora_bias": "has a trained bias in its LoRA layers; train again with lora_bias=false",
    "trainable_token_indices": "trained embeddings of tokens; train again without them",
    "alora_invocation_tokens": "is switched on by tokens (aLoRA), which is not known here",
    "use_qalora": "is a QALoRA adapter, which pools its inputs; that is not known here",
    "use_bdlora": "is a block-diagonal adapter, which is not known here",
    "layer_replication": "repeats layers of its base; merge it into a base of its own first",
    "target_parameters": "adapts bare parameters; train again with target_modules alone",
    "arrow_config": "is a router over several adapters; import one of them",
    "megatron_config": "was made for Megatron's layers; convert it with the program that made it",
    "velora_config": "is a VeLoRA adapter, which is not known here",
    "monteclora_config": "is a MonteCLoRA adapter, which is not known here",
    "kasa_config": "is a KaSA adapter, which is not known here",
}
# Started from matrices taken out of the base: right only on the base that was left over.
_PEFT_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PEFT_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "bias", "use_rslora", "use_dora", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
    *("runtime_config",),
}


def _peft(found: _Sorted, config: dict[str, Any], file: Path, _: str | None) -> Foreign:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{file} is of peft_type {config.get('peft_type')}; LORA can be imported, with or "
            "without use_dora and use_rslora"
        )
    for key, sentence in _PEFT_REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{file}: {key} is {config[key]!r}: the adapter {sentence}")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{file}: bias is {config['bias']!r}: the adapter has trained biases, which LoRA "
            "layers here have none of; train again with bias=none"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_PEFT_STARTS):
        raise AdapterError(
            f"{file}: init_lora_weights is {start}: the adapter fits only the base that was left "
            "when its first matrices were taken out of it; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    rank = _rank(file, config, "r")
    alpha = _number(file, config, "lora_alpha", float)
    assumed = [
        f"{key}={value!r} in {adapters.CONFIG} is not known here and was not used"
        for key, value in config.items()
        if value and key not in _PEFT_KNOWN
    ]
    if found.skipped:
        assumed.append(
            f"{len(found.skipped)} matrices of its base lie in the file ({found.skipped[0]} first) "
            "and were not read"
        )
    method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    if config.get("use_dora") and config.get("use_rslora"):
        # Our DoRA multiplies by alpha / rank, this one by alpha / √rank.
        alpha, stated = alpha * math.sqrt(rank), alpha
        assumed.append(
            f"rsLoRA with DoRA, alpha {stated:g}: kept as DoRA of alpha {alpha:g}, which is the "
            "same effective scale"
        )
    spec = _spec(found, rank, alpha, _dropout(file, config, "lora_dropout"), method)
    tensors = {
        f"{matrix}.{part}": np.ascontiguousarray(_vector(value) if part == "m" else value.T)
        for matrix, parts in found.matrices.items()
        for part, value in parts.items()
    }
    return Foreign(PEFT, spec, tensors, assumed=_with_general(assumed, found, spec))


def _vector(value: np.ndarray) -> np.ndarray:
    """A magnitude as (out,): PEFT before 0.12 kept (1, out)."""
    return value[0] if value.ndim == 2 and value.shape[0] == 1 else value


# --- MLX -------------------------------------------------------------------------------------


def _mlx(found: _Sorted, config: dict[str, Any], file: Path, scale_rule: str | None) -> Foreign:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"{file}: fine_tune_type is {kind!r}; lora and dora can be imported, a model that was "
            "trained whole is a base of its own (model.path)"
        )
    settings = config.get("lora_parameters")
    if settings is None:
        return _old(found, config, file, scale_rule)
    if not isinstance(settings, dict):
        raise AdapterError(f"{file}: lora_parameters is no object; restore the file")
    rank = _rank(file, settings, "rank")
    scale = _number(file, settings, "scale", float)
    dropout = _dropout(file, settings, "dropout")
    _check_keys(found, settings.get("keys"), file)
    layers = config.get("num_layers", -1)
    spec = _spec(found, rank, _alpha_of(scale, rank), dropout, kind)
    return Foreign(
        found.layout,
        spec,
        _named(found),
        assumed=_with_general([], found, spec),
        last_layers=int(layers) if isinstance(layers, int) and layers > 0 else None,
        base_bits=_bits(config.get("base_quantization")),
    )


def _alpha_of(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is this very scale, to the last bit."""
    alpha = scale * rank
    for candidate in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if candidate / rank == scale:
            return candidate
    return alpha


def _check_keys(found: _Sorted, keys: Any, file: Path) -> None:
    """The config's list of matrices against the file's, by full name or by name within a layer."""
    if not keys:
        return
    if not isinstance(keys, Sequence) or isinstance(keys, str):
        raise AdapterError(f"{file}: lora_parameters.keys is no list; restore the file")
    full = any(".layers." in f".{key}" or targets.in_tower(str(key)) for key in keys)

    def named(key: str) -> str:
        if not full or targets.in_tower(key):
            return key
        return LAYERS + key.split("layers.", 1)[-1]

    stated = {named(str(key)) for key in keys}
    there = {
        name if full or targets.in_tower(name) else name.removeprefix(LAYERS).split(".", 1)[1]
        for name in found.matrices
    }
    missing, surplus = sorted(stated - there), sorted(there - stated)
    if missing or surplus:
        what = f"names {missing[0]}" if missing else f"does not name {surplus[0]}"
        where = "no tensors" if missing else "tensors"
        raise AdapterError(
            f"{file}: lora_parameters.keys {what}, for which {found.file.name} has {where}; one of "
            "the two files belongs to another adapter"
        )


def _bits(quantization: Any) -> int | None:
    if not isinstance(quantization, dict):
        return None
    found = [v["bits"] for v in quantization.values() if isinstance(v, dict) and "bits" in v]
    return int(max(found)) if found else None


def _old(found: _Sorted, config: dict[str, Any], file: Path, scale_rule: str | None) -> Foreign:
    """``{"rank", "alpha", "dropout"}``: the file does not say what alpha was made of."""
    rank = _rank(file, config, "rank")
    alpha = _number(file, config, "alpha", float)
    scales = {"alpha": alpha, "alpha_over_rank": alpha / rank}
    if scale_rule is None:
        raise AdapterError(
            f"{file} gives rank {rank} and alpha {alpha:g} but not what they meant: "
            f"task.scale_rule=alpha multiplies by {scales['alpha']:g} (mlx-vlm before April 2026), "
            f"task.scale_rule=alpha_over_rank by {scales['alpha_over_rank']:g} (mlx-vlm since); "
            "choose the one it was trained with"
        )
    scale = scales[scale_rule]
    spec = _spec(
        found, rank, _alpha_of(scale, rank), _dropout(file, config, "dropout"), _kind_of(found)
    )
    told = f"the effective scale is {scale:g}, by task.scale_rule={scale_rule}"
    return Foreign(found.layout, spec, _named(found), assumed=_with_general([told], found, spec))


def _kind_of(found: _Sorted) -> str:
    return "dora" if any("m" in parts for parts in found.matrices.values()) else "lora"


# --- common ----------------------------------------------------------------------------------


def _named(found: _Sorted) -> dict[str, np.ndarray]:
    return {
        f"{matrix}.{part}": value
        for matrix, parts in found.matrices.items()
        for part, value in parts.items()
    }


def _spec(found: _Sorted, rank: int, alpha: float, dropout: float, method: str) -> LoraSpec:
    """The specification; the matrices are those the file has, whatever its config calls them."""
    decoder = [name for name in found.matrices if not targets.in_tower(name)]
    names = sorted({targets.last(name) for name in decoder})
    layers = tuple(sorted({lora.layer_number(name) for name in decoder})) or None
    vision = targets.vision_patterns(name for name in found.matrices if targets.in_tower(name))
    try:
        return LoraSpec(rank, alpha, dropout, tuple(names), method, layers, vision)
    except AdapterError as error:
        raise AdapterError(f"{found.file}: {error}") from None


def _with_general(assumed: list[str], found: _Sorted, spec: LoraSpec) -> tuple[str, ...]:
    told = list(assumed)
    if found.text_only:
        told.append("its names are a language model's alone; the base's language model is meant")
    decoder = sum(not targets.in_tower(name) for name in found.matrices)
    missing = len(spec.targets) * len(spec.layers or ()) - decoder
    if missing:
        told.append(
            f"{missing} matrices of the adapted kinds and layers are not in the file; they get an "
            "update of zero"
        )
    return tuple(told)


def _rank(file: Path, config: Mapping[str, Any], key: str) -> int:
    rank = _number(file, config, key, int)
    if rank < 1:
        raise AdapterError(f"{file}: {key} is {rank}, but it must be 1 or more; restore the file")
    return rank


def _dropout(file: Path, config: Mapping[str, Any], key: str) -> float:
    return _number(file, config, key, float) if config.get(key) else 0.0


def _number(file: Path, config: Mapping[str, Any], key: str, kind: type) -> Any:
    value = config.get(key)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or (kind is int and value != int(value))
    ):
        what = "a whole number" if kind is int else "a number"
        raise AdapterError(f"{file}: {key} is {value!r}, but it must be {what}; restore the file")
    return kind(value)
