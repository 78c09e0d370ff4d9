"""LoRA layers that multiply in the activations' type, and several of one input in one product.

mlx-vlm's layers multiply 16-bit activations by float32 adapters: every input is copied to float32
for it, and the copy is kept for the backward pass. Here the adapters are cast instead. What is
trained, its gradient and the optimizer's state stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_vlm.trainer.peft.lora_layers import LoRALinear

from .backend import mx, nn


class LoRALayer(LoRALinear):
    """mlx-vlm's ``LoRALinear`` with its products in the type of what comes in."""

    @staticmethod
    def from_base(linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> Any:
        """A fresh layer around a dense or quantised matrix."""
        inner = linear.weight.shape[1]
        if isinstance(linear, nn.QuantizedLinear):
            inner = inner * 32 // linear.bits
        layer = LoRALayer(inner, linear.weight.shape[0], r=r, dropout=dropout, scale=scale)
        layer.linear = linear
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """The adapted product, shape (..., out), of x (..., in)."""
        z = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return _add(self.linear(x), z, self)


def project(layers: Sequence[Any], x: mx.array) -> list[mx.array]:
    """What each of some matrices makes of the same input (T, in).

    LoRA layers without dropout have their A matrices put side by side: the input is read once for
    all of them, in the backward pass as well.
    """
    if len(layers) < 2 or not all(_joinable(layer) for layer in layers):
        return [layer(x) for layer in layers]
    joined = mx.concatenate([layer.lora_a for layer in layers], axis=1).astype(x.dtype)
    ends, end = [], 0
    for layer in layers[:-1]:
        end += layer.lora_a.shape[1]
        ends.append(end)
    parts = mx.split(x @ joined, ends, axis=-1)
    return [_add(layer.linear(x), z, layer) for layer, z in zip(layers, parts, strict=True)]


def _joinable(layer: Any) -> bool:
    # Dropout draws a mask for each matrix; then each has an input of its own.
    return type(layer) is LoRALayer and not (layer.training and layer.dropout._p_1 < 1)


def _add(y: mx.array, z: mx.array, layer: Any) -> mx.array:
    b = (layer.scale * layer.lora_b).astype(y.dtype)
    return mx.addmm(y, z, b) if y.ndim == 2 else y + z @ b
