"""How an adapter's tensors and settings are written by PEFT and by mlx-vlm.

The same matrices are spelt twice (facts: "Adapter layouts"): mlx-vlm keeps ``lora_a`` as (in, r)
under ``language_model.model.…`` and ``vision_tower.…``; PEFT keeps ``lora_A.weight`` as (r, in)
under transformers' names, ``base_model.model.model.language_model.…`` and ``….model.visual.…``; a
DoRA magnitude is a vector (out,) in both. Inside
this package tensors have mlx-vlm's names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import AdapterError
from .lora import LoraSpec
from .targets import VISION, in_tower

_ROOTS = (
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.visual."),
)
"""What names begin with in mlx-vlm and in transformers."""
_PARTS = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "m": ".lora_magnitude_vector",
}


def to_peft_name(name: str) -> str:
    """``language_model.model.layers.0.…q_proj.lora_a`` to PEFT's name on transformers' model."""
    matrix, part = name.rsplit(".", 1)
    for mine, its in _ROOTS:
        if matrix.startswith(mine):
            matrix = its + matrix.removeprefix(mine)
            break
    return f"base_model.model.{matrix}{_PARTS[part]}"


def from_peft_name(name: str) -> str:
    """The inverse of :func:`to_peft_name`.

    Raises:
        AdapterError: the name is none of PEFT's for this architecture.
    """
    inner = name.removeprefix("base_model.model.")
    for part, ending in _PARTS.items():
        for mine, its in _ROOTS:
            if inner.endswith(ending) and inner.startswith(its):
                return f"{mine}{inner.removeprefix(its).removesuffix(ending)}.{part}"
    raise AdapterError(f"the adapter has a tensor {name}, which belongs to no matrix of the model")


def to_peft(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under PEFT's names and in its shapes, sorted by name."""
    found = {to_peft_name(name): np.ascontiguousarray(v.T) for name, v in tensors.items()}
    return dict(sorted(found.items()))


def from_peft(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of :func:`to_peft`.

    Raises:
        AdapterError: a name is none of PEFT's for this architecture.
    """
    return {from_peft_name(name): np.ascontiguousarray(v.T) for name, v in arrays.items()}


def peft_config(spec: LoraSpec, *, base: str, tensors: Iterable[str]) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT reads it.

    Args:
        base: the base model's name.
        tensors: names of the adapter's tensors.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.method == "rslora",
        "use_dora": spec.method == "dora",
        # A pattern rather than suffixes: a suffix such as o_proj could also match elsewhere.
        "target_modules": _pattern(spec, tensors),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _pattern(spec: LoraSpec, tensors: Iterable[str]) -> str:
    """A regular expression for just the matrices that the tensors belong to."""
    found = {name.rsplit(".", 1)[0] for name in tensors}
    tower = sorted(name.removeprefix(VISION) for name in found if in_tower(name))
    matrices = {name.split("layers.", 1)[1] for name in found if not in_tower(name)}
    # One by one: a pattern for the blocks' would have to know how many there are.
    visual = rf"model\.visual\.({'|'.join(map(re.escape, tower))})"
    if not matrices:
        return visual
    return _decoder_pattern(spec, matrices) + (f"|{visual}" if tower else "")


def _decoder_pattern(spec: LoraSpec, matrices: set[str]) -> str:
    numbers = {name.split(".", 1)[0] for name in matrices}
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in matrices})
    start = r"model\.language_model\.layers\."
    if len(matrices) != len(numbers) * len(suffixes):
        # Not the same ones in every layer: a shorter pattern would make PEFT adapt more.
        return f"{start}({'|'.join(re.escape(name) for name in sorted(matrices))})"
    layers = r"\d+" if spec.layers is None else f"({'|'.join(map(str, spec.layers))})"
    return rf"{start}{layers}\..*\.({'|'.join(suffixes)})"


def mlx_config(spec: LoraSpec, tensors: Iterable[str]) -> dict[str, Any]:
    """``adapter_config.json`` as mlx-vlm reads it."""
    return {
        "fine_tune_type": "dora" if spec.method == "dora" else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": spec.rank,
            "scale": spec.scale,
            "dropout": spec.dropout,
            "keys": sorted({name.rsplit(".", 1)[0] for name in tensors}),
        },
    }
