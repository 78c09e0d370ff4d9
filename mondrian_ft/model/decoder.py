"""Decoder layers for training: the modules are mlx-vlm's, the way through them is ours.

Everything is computed on flat (T, D) rows, T = B · L, so that products have one shape; what is
not a matrix product is written so that a compiler can fuse it and that little is kept for the
backward pass. On a CPU, where nothing is compiled, attention goes by blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import cpu_math, cuda_attention, cuda_joined, cuda_train, joined
from .backend import ON_CPU, mx, nn
from .lora_layers import drawing_from, project

Rotary = tuple[mx.array, mx.array]
"""cos and sin, each (B, L, 1, head_dim), the signs of a rotation in sin."""


def rotary(cos: mx.array, sin: mx.array) -> Rotary:
    """What :func:`layer_forward` takes, of mlx-vlm's (B, L, head_dim) pair."""
    half = sin.shape[-1] // 2
    signed = mx.concatenate([-sin[..., :half], sin[..., half:]], axis=-1)
    return cos[:, :, None, :], signed[:, :, None, :]


def layer_forward(
    layer: Any,
    h: mx.array,
    turn: Rotary,
    size: tuple[int, int],
    rows: mx.array | None = None,
) -> mx.array:
    """One layer.

    Args:
        layer: an mlx-vlm ``Qwen3VLDecoderLayer``.
        h: (B · L, D).
        turn: see :func:`rotary`.
        size: B and L.
        rows: (M,) of the rows of h; only for these is anything computed that no other row needs,
            which in the last layer is all but keys and values.

    Returns:
        (B · L, D), or (M, D) with ``rows``.
    """
    attn, kernels = layer.self_attn, _kernels(layer, h)
    norm = layer.input_layernorm
    x, h = cuda_train.normed(h, norm) if kernels else (normed(norm, h), h)
    out = _attended(attn, x, turn, size, kernels)
    if rows is not None:
        out, h = out[rows], h[rows]
    (h,) = project((attn.o_proj,), out, h)
    norm = layer.post_attention_layernorm
    x, h = cuda_train.normed(h, norm) if kernels else (normed(norm, h), h)
    pair = joined.product(layer.mlp, joined.GATE, x) if kernels else None
    if pair is not None:
        inner: Any = cuda_joined.gated_pair(pair)
    else:
        gate, up = project((layer.mlp.gate_proj, layer.mlp.up_proj), x)
        inner = cuda_train.gated(gate, up) if kernels else _gated(gate, up)
    return project((layer.mlp.down_proj,), inner, h)[0]


def _attended(
    attn: Any, x: mx.array, turn: Rotary, size: tuple[int, int], kernels: bool
) -> mx.array:
    """What comes out of the heads, (B · L, heads · head_dim), of normalised rows x."""
    batch, length = size
    heads = attn.n_heads, attn.n_kv_heads
    whole = joined.product(attn, joined.ATTENTION, x) if kernels else None
    if whole is not None:
        norms = attn.q_norm, attn.k_norm
        if cuda_attention.fits(x.dtype, length, *heads, attn.head_dim):
            return cuda_joined.turned_attention(whole, norms, turn, heads, length, attn.scale)
        q, k, v = cuda_joined.turned_all(whole, norms, turn, heads)
    else:
        q, k, v = project((attn.q_proj, attn.k_proj, attn.v_proj), x)
    if kernels and whole is None:
        q = cuda_train.turned(q, attn.q_norm, turn, attn.n_heads)
        k = cuda_train.turned(k, attn.k_norm, turn, attn.n_kv_heads)
    q = q.reshape(batch, length, attn.n_heads, -1)
    k = k.reshape(batch, length, attn.n_kv_heads, -1)
    v = v.reshape(batch, length, attn.n_kv_heads, -1)
    if not kernels:
        q = _normed_and_turned(attn.q_norm, q, turn)
        k = _normed_and_turned(attn.k_norm, k, turn)
    return _attention(q, k, v, attn.scale).reshape(batch * length, -1)


def _kernels(layer: Any, h: mx.array) -> bool:
    """Whether what lies between the products goes through our own kernels."""
    attn, width = layer.self_attn, h.shape[-1]
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attn.q_norm, attn.k_norm)
    return (
        attn.head_dim == cuda_train.HEAD_SIZE
        and attn.q_norm.eps == attn.k_norm.eps
        and width <= cuda_train.MOST_WIDE
        and cuda_train.fits(h.dtype, width)
        and all(norm.weight.dtype == h.dtype for norm in norms)
    )


def recomputed(layer: Any, forward: Callable[[mx.array], mx.array]) -> Any:
    """A layer's forward of which only the input is kept for the backward pass.

    MLX may recompute at any time, and so for all layers at once, what depends on the forward pass
    alone, as with ``mx.checkpoint``. Here the second forward waits for the gradient from above, and
    the gradient that goes on waits for this layer's own. Both forwards draw the same dropout masks.

    Args:
        layer: its trained parameters are what gradients are kept of.
        forward: (T, D) → (T', D) through the layer.
    """
    from mlx.utils import tree_flatten, tree_unflatten

    flat: list[Any] = tree_flatten(layer.trainable_parameters())  # pyright: ignore
    names = [name for name, _ in flat]
    key = _own_key() if _draws(layer) else None

    def through(h: mx.array, *values: mx.array) -> mx.array:
        if names:
            layer.update(tree_unflatten(list(zip(names, values, strict=True))))
        with drawing_from(key):
            return forward(h)

    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        again = mx.depends(list(primals), [cotangent])
        _, grads = mx.vjp(through, again, [cotangent])
        below, *own = grads
        if own:
            (below,) = mx.depends([below], own)
        return (below, *own)

    wrapped = mx.custom_function(through)
    wrapped.vjp(backward)
    values = [value for _, value in flat]
    return lambda h: wrapped(h, *values)


def normed(norm: Any, x: mx.array) -> mx.array:
    """An ``nn.RMSNorm`` of x."""
    if ON_CPU and x.dtype == mx.float32:
        return cpu_math.rms_norm(x, norm.weight, norm.eps)
    return norm(x)


def _normed_and_turned(norm: Any, x: mx.array, turn: Rotary) -> mx.array:
    """Heads x (B, L, heads, head_dim), normalised, at their rotary positions."""
    if ON_CPU and x.dtype == mx.float32:
        return cpu_math.normed_and_turned(x, norm.weight, norm.eps, *turn)
    turned: Any = _turned
    return turned(norm(x), *turn)


def _draws(layer: Any) -> bool:
    """Whether a layer draws random numbers: dropout that is on."""
    return any(
        isinstance(module, nn.Dropout) and module.training and module._p_1 < 1
        for _, module in layer.named_modules()
    )


def _own_key() -> mx.array:
    """A key (2,) uint32 that nobody else draws from."""
    return mx.random.randint(0, (1 << 31) - 1, (2,)).astype(mx.uint32)


def _swap(x: mx.array) -> mx.array:
    """The two halves of the last axis exchanged; a view."""
    half = x.shape[-1] // 2
    return x.reshape(*x.shape[:-1], 2, half)[..., ::-1, :].reshape(x.shape)


@mx.custom_function
def _turned(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary positions of x (B, L, heads, head_dim)."""
    return x * cos + _swap(x) * sin


@_turned.vjp
def _turned_back(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    _, cos, sin = primals
    # The transpose of a rotation is the rotation back.
    back = cotangent * cos - _swap(cotangent) * sin
    return back, mx.zeros_like(cos), mx.zeros_like(sin)


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up; the backward pass keeps the two inputs and nothing else."""
    return gate * mx.sigmoid(gate) * up


@_swiglu.vjp
def _swiglu_back(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    gate, up = primals
    s = mx.sigmoid(gate)
    silu = gate * s
    return cotangent * up * (s + silu * (1 - s)), cotangent * silu


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    if ON_CPU and gate.dtype == mx.float32:
        pair: Any = cpu_math.swiglu(gate, up)
        return pair[0]
    made: Any = _swiglu(gate, up)
    return made


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, all (B, L, heads, head_dim)."""
    if ON_CPU and q.dtype == mx.float32:
        return cpu_math.attention(q, k, v, scale)
    if cuda_attention.fits(q.dtype, *q.shape[1:3], *k.shape[2:]):
        return cuda_attention.attention(q, k, v, scale)
    q, k, v = (one.transpose(0, 2, 1, 3) for one in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    return out.transpose(0, 2, 1, 3)
