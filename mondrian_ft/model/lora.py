"""LoRA layers in a base model: putting them in, taking them out for a moment, reading them.

The layers are mlx-vlm's own (``trainer.peft``), so whatever loads its adapters loads ours; DoRA's
know their norms by heart while nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import AdapterError
from . import targets
from .backend import mx, nn
from .targets import in_tower as in_tower
from .targets import layer_number as layer_number

METHODS = ("lora", "rslora", "dora")
TRAINED_TOWER = "qwen3_vl"
"""The architecture whose vision tower can have an adapter."""
NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
"""How people write them."""


@dataclass(frozen=True)
class LoraSpec:
    """What determines an adapter's shape and strength.

    Attributes:
        rank: inner dimension of each pair of matrices, 1 or more.
        alpha: strength; what multiplies the product is :attr:`scale`.
        dropout: probability of dropping an input feature while training, 0 ≤ p < 1.
        targets: names of the matrices adapted in every decoder layer, such as ``q_proj``, or
            regular expressions for whole names (see ``model.targets``).
        method: ``lora`` (scale = alpha / rank, Hu et al. 2021), ``rslora`` (alpha / √rank,
            Kalajdzievski 2023) or ``dora`` (alpha / rank, and a trained magnitude for each output,
            Liu et al. 2024).
        layers: numbers of the decoder layers adapted, ascending; None for all.
        vision: like ``targets``, of the vision tower and its mergers; none leave it frozen.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    method: str = "lora"
    layers: tuple[int, ...] | None = None
    vision: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"an adapter of rank {self.rank} cannot be made; use 1 or more")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"a dropout of {self.dropout:g} is out of range; use 0 or more, < 1")
        if self.method not in METHODS:
            raise AdapterError(f"the method {self.method} is unknown; use {', '.join(METHODS)}")
        if self.layers is not None and (
            not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0
        ):
            raise AdapterError(
                f"the layers {list(self.layers)} cannot be adapted; give numbers from 0, ascending"
            )

    @property
    def scale(self) -> float:
        """The effective scale: output = base(x) + scale · (x A) B, before DoRA's magnitude."""
        return self.alpha / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)


def attach(model: Any, spec: LoraSpec, *, seed: int) -> list[str]:
    """Freeze the model and put fresh LoRA layers into its language model, and into its vision tower
    where the specification names matrices of it.

    Args:
        seed: of the A matrices; B starts at zero, so the adapted model first equals its base.

    Returns:
        Full names of the adapted matrices, in the model's order.

    Raises:
        AdapterError: a target or a layer matches no matrix, or the model already has an adapter.
    """
    from .lora_layers import LoRALayer

    if lora_layers(model):
        raise AdapterError("the model already carries an adapter; load the base again first")
    model.freeze()
    mx.random.seed(seed)
    linear: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    ours = [name for name in linear if name.startswith(targets.PREFIX) and ".layers." in name]
    elsewhere = [name for name in linear if not name.startswith(targets.PREFIX)]
    chosen = targets.matching(ours, spec.targets, spec.layers, elsewhere)
    if spec.vision:
        kind = str(getattr(getattr(model, "config", None), "model_type", ""))
        if kind != TRAINED_TOWER:
            raise AdapterError(
                f"lora.vision={list(spec.vision)} trains the vision tower of {TRAINED_TOWER} "
                f"alone, and this is a {kind or 'model of another build'}; leave it empty"
            )
        tower = [name for name in elsewhere if targets.in_tower(name)]
        chosen += targets.matching_vision(tower, spec.vision)
    if not chosen:
        raise AdapterError(
            "an adapter without a matrix cannot be made; name some in lora.target_modules or "
            "lora.vision"
        )
    kind = _dora_layer() if spec.method == "dora" else LoRALayer
    # The model's own order depends on how its modules are stored; the seed should not. The tower
    # comes last, so that the language model's matrices begin as they would without it.
    ordered = sorted(chosen, key=_natural)
    for name in ordered:
        layer = kind.from_base(linear[name], r=spec.rank, dropout=spec.dropout, scale=spec.scale)
        _set_module(model, name, layer)
    mx.eval(model.trainable_parameters())
    return ordered


def lora_layers(model: Any) -> dict[str, Any]:
    """The LoRA layers in a model, by full name, in layer order."""
    found = {name: module for name, module in model.named_modules() if "lora_a" in module}
    return {name: found[name] for name in sorted(found, key=_natural)}


def reaches_tower(model: Any) -> bool:
    """Whether LoRA layers are in a model's vision tower, so that what it says of a picture is no
    longer the base's."""
    tower = getattr(model, "vision_tower", None)
    return tower is not None and any("lora_a" in module for _, module in tower.named_modules())


def tensors(model: Any) -> dict[str, mx.array]:
    """Adapter tensors by name: ``<matrix>.lora_a`` (in, rank), ``.lora_b`` (rank, out).

    With DoRA also ``.m`` (out,), the magnitudes.
    """
    return {
        f"{name}.{part}": layer[part]
        for name, layer in lora_layers(model).items()
        for part in ("lora_a", "lora_b", "m")
        if part in layer
    }


def set_tensors(model: Any, values: Mapping[str, mx.array]) -> None:
    """Give a model's LoRA layers these tensors, strictly.

    Raises:
        AdapterError: a tensor is missing, too many, or of another shape.
    """
    wrong = misfits(model, values)
    if wrong:
        raise AdapterError(f"the adapter does not fit: {'; '.join(wrong.values())}")
    layers = lora_layers(model)
    for name, value in values.items():
        matrix, part = name.rsplit(".", 1)
        layers[matrix][part] = value


def misfits(model: Any, values: Mapping[str, mx.array]) -> dict[str, str]:
    """Why tensors do not fit a model's LoRA layers: a clause for each of ``missing tensors``,
    ``extra tensors`` and ``shapes`` that is not as it should be."""
    expected = {name: tuple(value.shape) for name, value in tensors(model).items()}
    missing = sorted(expected.keys() - values.keys(), key=_natural)
    surplus = sorted(values.keys() - expected.keys(), key=_natural)
    found = {}
    if missing:
        found["missing tensors"] = f"{len(missing)} tensors are missing, {missing[0]} first"
    if surplus:
        found["extra tensors"] = f"{len(surplus)} match nothing in the model, {surplus[0]} first"
    for name, shape in expected.items():
        if name in values and tuple(values[name].shape) != shape:
            found["shapes"] = (
                f"{name} has shape {tuple(values[name].shape)}, the model needs {shape}"
            )
            break
    return found


def detach(model: Any) -> None:
    """Take all LoRA layers out; the model is its base again."""
    take_out(model)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base alone, for the length of the block: its very layers, not a zero scale."""
    layers = take_out(model)
    try:
        yield
    finally:
        put_in(model, layers)


def take_out(model: Any) -> dict[str, Any]:
    """Take all LoRA layers out, and return them by full name; for :func:`put_in`."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        _set_module(model, name, layer.linear)
    return layers


def put_in(model: Any, layers: Mapping[str, Any]) -> None:
    """Put LoRA layers that were taken out of this very model into it; no array is touched.

    Raises:
        AdapterError: the model carries an adapter.
    """
    if lora_layers(model):
        raise AdapterError("the model already carries an adapter; take it out first")
    for name, layer in layers.items():
        _set_module(model, name, layer)


@cache
def _dora_layer() -> Any:
    """mlx-vlm's DoRA layer, which knows m / ‖W + scale · A B‖ by heart in evaluation mode.

    Stock, every call computes the norm of the whole adapted matrix: a decoding step of the sample
    model takes 10.6 ms so and 4.5 ms in this way, with LoRA 3.5 ms (benchmarks/LOG.md).
    """
    from mlx_vlm.trainer.peft.dora_layers import DoRALinear

    from .lora_layers import dropped

    class DoRALayer(DoRALinear):
        @staticmethod
        def from_base(linear: Any, r: int, dropout: float, scale: float) -> Any:
            inner = linear.weight.shape[1]
            if isinstance(linear, nn.QuantizedLinear):
                inner = inner * 32 // linear.bits
            layer = DoRALayer(inner, linear.weight.shape[0], r=r, dropout=dropout, scale=scale)
            layer.set_linear(linear)
            return layer

        def _set_training_mode(self, mode: bool) -> None:
            super()._set_training_mode(mode)
            if mode or self._remembered() is not None:
                return
            adapted = self._dequantized_weight() + (self.scale * self.lora_b.T) @ self.lora_a.T
            factor = self.m / mx.linalg.norm(adapted, axis=1)
            # Now: in a compiled step it would be computed in every call.
            mx.eval(factor)
            object.__setattr__(self, "_known", (self._parts(), factor))

        def __setitem__(self, key: str, value: Any) -> None:
            object.__setattr__(self, "_known", None)
            super().__setitem__(key, value)

        def _parts(self) -> tuple[mx.array, ...]:
            return self.lora_a, self.lora_b, self.m, self.linear.weight

        def _remembered(self) -> mx.array | None:
            """The factor (out,), if it is that of the very arrays in the layer now."""
            known = self.__dict__.get("_known")
            if known is None or any(
                a is not b for a, b in zip(known[0], self._parts(), strict=True)
            ):
                return None
            return known[1]

        def __call__(self, x: mx.array) -> mx.array:
            factor = None if self.training else self._remembered()
            if factor is None:
                # ‖W + s A B‖ is a constant of the gradient (Liu et al. 2024, section 4.3).
                adapted = self._dequantized_weight() + (self.scale * self.lora_b.T) @ self.lora_a.T
                norm = mx.linalg.norm(adapted.astype(mx.float32), axis=1)
                factor = self.m / mx.stop_gradient(norm)
            z = dropped(self.dropout, x) @ self.lora_a.astype(x.dtype)
            b = (self.scale * self.lora_b).astype(x.dtype)
            base = self.linear(x) - self.linear.bias if "bias" in self.linear else self.linear(x)
            out = factor.astype(x.dtype) * (base + z @ b)
            return out + self.linear.bias if "bias" in self.linear else out

    return DoRALayer


@contextmanager
def wearing(model: Any, layers: Mapping[str, Any]) -> Iterator[None]:
    """These layers, which :func:`lora_layers` gave before, in place of those that are there."""
    with without_adapter(model):
        for name, layer in layers.items():
            _set_module(model, name, layer)
        try:
            yield
        finally:
            detach(model)


def _set_module(root: Any, name: str, module: Any) -> None:
    *path, last = name.split(".")
    parent: Any = root
    for step in path:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    parent[last] = module


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
