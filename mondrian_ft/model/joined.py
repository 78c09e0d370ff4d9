"""Matrices that take the same input, as one.

Queries, keys and values of a layer are products of the same rows, and so are gate and up. On a
large GPU each such product has a price beside its arithmetic: a kernel to start, rows to read,
processors that run out of work at its end; and an adapter has two thin products a matrix, five in
the backward pass, which are nothing but that price. Here the matrices lie one below the other in
one array, of which each layer's own weight is a view; their adapters are put together at each
step, the second matrices on the diagonal of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import cuda_joined, cuda_train
from .backend import mx, nn
from .lora_layers import is_plain, matrix, times

ATTENTION = ("q_proj", "k_proj", "v_proj")
GATE = ("gate_proj", "up_proj")

MOST_BYTES = 256 * 2**20
"""Largest result side by side. Above it separate arrays are as fast, and one is done with sooner
than both (10,240 tokens of Qwen3-VL-4B, checkpointed: 13.4 GB, and 14.3 side by side)."""

MOST_EXPANDED = 16 * 2**20
"""Largest group of quantised matrices that is joined, in bytes of 16 bits a number: they are
expanded for a product, and all of a group at once (4-bit Qwen3-VL-4B, checkpointed, one row of
2,544 tokens: 6.26 GB with both groups joined, 5.86 with neither, in an earlier state)."""

_ARRAYS = ("weight", "scales", "biases")
"""What a dense or quantised layer holds, each with a row for each output."""


@dataclass(frozen=True)
class _Joined:
    """Matrices one below the other.

    Attributes:
        linear: as one layer.
        views: the arrays of each matrix, which are views of it.
    """

    linear: Any
    views: tuple[tuple[mx.array, ...], ...]

    def are(self, layers: Sequence[Any]) -> bool:
        """Whether these layers hold the very views; another weight may have been put in since."""
        return len(layers) == len(self.views) and all(
            len(held) == len(views) and all(a is b for a, b in zip(held, views, strict=True))
            for held, views in zip(map(_arrays, layers), self.views, strict=True)
        )


def join(layers: Sequence[Any]) -> None:
    """Let the matrices that :func:`product` takes be one array in memory, in decoder layers.

    Their values stay as they are. One group is copied at a time, so that no more memory is taken
    than the largest of them. Groups of different kinds (one quantised, one not) stay apart, and so
    do quantised ones above ``MOST_EXPANDED``.

    Args:
        layers: mlx-vlm's ``Qwen3VLDecoderLayer``, with or without adapters.
    """
    for layer in layers:
        for owner, names in ((layer.self_attn, ATTENTION), (layer.mlp, GATE)):
            held = [_linear(owner[name]) for name in names]
            known = _joined_of(owner)
            fits = _alike(held) and _expanded(held) <= MOST_EXPANDED
            if fits and (known is None or not known.are(held)):
                # Not as an item: those are a module's parameters and children.
                object.__setattr__(owner, "_joined", _join(held))


def _join(layers: Sequence[Any]) -> _Joined:
    kinds = [_arrays(layer) for layer in layers]
    whole = [mx.concatenate(list(parts)) for parts in zip(*kinds, strict=True)]
    ends = [sum(int(parts[0].shape[0]) for parts in kinds[: n + 1]) for n in range(len(kinds) - 1)]
    pieces = [mx.split(one, ends) for one in whole]
    mx.eval(whole, pieces)
    views = tuple(zip(*pieces, strict=True))
    names = [name for name in _ARRAYS if name in layers[0]]
    for layer, parts in zip(layers, views, strict=True):
        for name, part in zip(names, parts, strict=True):
            layer[name] = part
    del kinds
    mx.clear_cache()
    return _Joined(_as_layer(layers[0], dict(zip(names, whole, strict=True))), views)


def _as_layer(like: Any, arrays: dict[str, mx.array]) -> Any:
    if isinstance(like, nn.QuantizedLinear):
        size = like.group_size
        made: Any = nn.QuantizedLinear(size, 1, False, size, like.bits, like.mode)
    else:
        made = nn.Linear(1, 1, bias=False)
    for name, value in arrays.items():
        made[name] = value
    made.freeze()
    return made


def _alike(layers: Sequence[Any]) -> bool:
    """Whether layers are of one kind, without a bias, with rows of the same length and type."""
    first = layers[0]

    def kind(layer: Any) -> tuple[Any, ...]:
        arrays = _arrays(layer)
        how = tuple(getattr(layer, name, None) for name in ("group_size", "bits", "mode"))
        return type(layer), how, [(one.shape[1:], one.dtype) for one in arrays]

    return (
        type(first) in (nn.Linear, nn.QuantizedLinear)
        and not any("bias" in layer for layer in layers)
        and all(kind(layer) == kind(first) for layer in layers)
    )


def _expanded(layers: Sequence[Any]) -> int:
    """Bytes of quantised matrices as 16-bit numbers; dense ones are not expanded."""
    if not isinstance(layers[0], nn.QuantizedLinear):
        return 0
    return sum(2 * layer.weight.size * 32 // layer.bits for layer in layers)


def product(owner: Any, names: Sequence[str], x: mx.array) -> mx.array | None:
    """What some matrices of one module make of x (T, K), side by side: (T, sum of N).

    None where they are not joined, where their adapters are not of one kind, or where it would be
    larger than ``MOST_BYTES``: then each has to be asked for its own, see ``lora_layers.project``.
    """
    known = _joined_of(owner)
    layers = [owner[name] for name in names]
    if known is None or not known.are([_linear(layer) for layer in layers]):
        return None
    if x.shape[0] * known.linear.weight.shape[0] * x.dtype.size > MOST_BYTES:
        return None
    if not all(is_plain(layer) for layer in layers):
        return None
    scale, rank = float(layers[0].scale), layers[0].lora_a.shape[1]
    if any(float(one.scale) != scale or one.lora_a.shape[1] != rank for one in layers):
        return None
    return _product(known.linear, layers, scale, x)


def _product(linear: Any, layers: Sequence[Any], scale: float, x: mx.array) -> mx.array:
    count, rank = len(layers), int(layers[0].lora_a.shape[1])
    sizes = [int(layer.lora_b.shape[1]) for layer in layers]
    starts = [sum(sizes[:n]) for n in range(count)]

    def forward(x: mx.array, *adapters: mx.array) -> list[mx.array]:
        a, b = _packed(adapters[::2], adapters[1::2])
        b = times(scale, b)
        z = x @ a
        # The adapter's part first: see the text of ``lora_layers``.
        return [mx.addmm(z @ b, x, matrix(linear, x).T), z, a, b]

    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, above = primals[0], cotangents[0]
        _, z, a, b = outputs
        inner = above @ b.T
        below = mx.addmm(inner @ a.T, above, matrix(linear, above))
        of_a, of_b = x.T @ inner, times(scale, z.T @ above)
        own: list[mx.array] = []
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            here = slice(number * rank, (number + 1) * rank)
            own += [of_a[:, here], of_b[here, start : start + size]]
        (below,) = mx.depends([below], [of_a, of_b])
        return (below, *own)

    whole: Any = mx.custom_function(forward)
    whole.vjp(backward)
    adapters = [one.astype(x.dtype) for layer in layers for one in (layer.lora_a, layer.lora_b)]
    return whole(x, *adapters)[0]


def _packed(firsts: Sequence[mx.array], seconds: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """See :func:`cuda_joined.packed`; in MLX's operations where its kernel does not fit."""
    rank = firsts[0].shape[1]
    sizes = [int(b.shape[1]) for b in seconds]
    if cuda_train.fits(firsts[0].dtype, rank, firsts[0].shape[0], *sizes):
        return cuda_joined.packed(firsts, seconds)
    rows = [
        mx.pad(b, [(0, 0), (sum(sizes[:n]), sum(sizes[n + 1 :]))]) for n, b in enumerate(seconds)
    ]
    return mx.concatenate(list(firsts), axis=1), mx.concatenate(rows)


def _joined_of(owner: Any) -> _Joined | None:
    return owner.__dict__.get("_joined")


def _linear(layer: Any) -> Any:
    return layer.linear if "lora_a" in layer else layer


def _arrays(layer: Any) -> tuple[mx.array, ...]:
    return tuple(layer[name] for name in _ARRAYS if name in layer)
