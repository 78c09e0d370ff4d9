"""Decoding with shapes that never change from step to step.

Every layer's keys and values lie in arrays of a fixed capacity; a step writes one column at a
position that is an array, masks what is not filled, and gives the next tokens. No Python number
changes between steps, so that on a GPU ``mx.compile`` traces the step once for a number of rows and
a capacity. On a CPU compiling is off (`backend`) and the same function runs as it is.

Prompts are padded on the right for the prefill, where padding is exact. Every row writes its new
keys and values into the same column; what matters to attention is a token's rotary position, which
each row counts on from its own prompt, and the mask, which hides the columns between a shorter
prompt's end and the first new column.

After the picture all three MRoPE positions of a token are equal, so the rotation is plain rotary
embedding. Equality with :meth:`Qwen3VL.hidden` over the whole text is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import ON_CPU, mx
from .qwen3_vl import Inputs, Qwen3VL

GPU_BLOCK = 256
"""Capacities are multiples of this on a GPU, where each capacity is another compiled function."""
CPU_BLOCK = 64
"""On a CPU a cache grows by this, because attention there pays for every column it has."""

Arrays = list[mx.array]


@dataclass(frozen=True)
class Prefilled:
    """Prompts read once; any number of decodings may start from it, and none changes it.

    Attributes:
        logits: (B, V) of the first new token.
        keys, values: per layer (B, H, L, D): H key-value heads, L the longest prompt.
        lengths: (B,) int32, tokens of each prompt.
        positions: (B,) int32, rotary position of each row's first new token.
    """

    logits: mx.array
    keys: Arrays
    values: Arrays
    lengths: np.ndarray
    positions: np.ndarray


class _Recorder:
    """Takes the place of a key-value cache in a prefill; keeps what it is shown."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


def prefill(backbone: Qwen3VL, inputs: Inputs, lengths: np.ndarray, following: np.ndarray):
    """Read the prompts of a batch.

    Args:
        inputs, following: from :func:`qwen3_vl.assemble`.
        lengths: (B,) tokens of each prompt.

    Returns:
        :class:`Prefilled`, computed when this returns.
    """
    caches = [_Recorder() for _ in backbone.text.layers]
    h = backbone.hidden(inputs, cache=caches)
    last = mx.take_along_axis(h, mx.array(lengths - 1)[:, None, None], axis=1)
    logits = backbone.head(last)[:, 0]
    keys, values = [cache.keys for cache in caches], [cache.values for cache in caches]
    mx.eval(logits, keys, values)
    return Prefilled(
        logits, keys, values, lengths.astype(np.int32), np.asarray(following, np.int32)
    )


class Decoding:
    """Rows that are being answered, at one point of their answers.

    Args:
        steps: what advances them; shared by all decodings of one model.
        start: their prompts.
        capacity: columns the cache will need in the end, prompt and answer.
        seeds: (B,) of the draws, one per row; see :class:`Steps`.
    """

    def __init__(
        self, steps: Steps, start: Prefilled, *, capacity: int, seeds: np.ndarray | None = None
    ) -> None:
        self.steps = steps
        self.most = capacity
        self.rows = int(start.logits.shape[0])
        self.filled = int(start.keys[0].shape[2])
        self.capacity = self.filled
        self.logits: mx.array | None = start.logits
        self.keys, self.values = list(start.keys), list(start.values)
        self.token = mx.zeros((self.rows,), mx.int32)
        self.lengths = mx.array(start.lengths)
        self.position = mx.array(start.positions)
        self.width = mx.array([self.filled], mx.int32)
        self.column = mx.array([self.filled], mx.int32)
        seeds = np.zeros(self.rows) if seeds is None else seeds
        self.seeds = mx.array(np.asarray(seeds, np.uint32))

    def choose(self, allowed: np.ndarray | None = None) -> None:
        """Take ``token`` from ``logits``, which are there at the start and after a step that did
        not choose.

        Args:
            allowed: (B, ⌈V/32⌉) int32, bit v % 32 of word v // 32 set where token v may come;
                None for any token.
        """
        assert self.logits is not None
        if allowed is None:
            self.token = self.steps.choose(self.logits, self.seeds, self.column - self.width)
        else:
            bits = mx.array(allowed.view(np.uint32))
            self.token = self.steps.choose_of(
                self.logits, self.seeds, self.column - self.width, bits
            )
        mx.async_eval(self.token)

    def advance(self, *, choosing: bool) -> None:
        """Queue one step over ``token``: the next ``token``, or only its ``logits``.

        Read ``token`` before, or keep it: this replaces it. Returns without waiting.
        """
        if self.filled == self.capacity:
            self._grow()
        step = self.steps.token_step if choosing else self.steps.logits_step
        result, self.position, self.column, self.keys, self.values = step(
            self.token,
            self.position,
            self.column,
            self.width,
            self.lengths,
            self.seeds,
            self.keys,
            self.values,
        )
        # The old keys and values have no name left by now, or the update could not be in place.
        self.filled += 1
        if choosing:
            self.token, self.logits = result, None
        else:
            self.logits = result
        mx.async_eval(result)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index = mx.array(np.asarray(rows, np.int32))
        self.rows = len(rows)
        for name in ("token", "position", "lengths", "seeds"):
            setattr(self, name, getattr(self, name)[index])
        if self.logits is not None:
            self.logits = self.logits[index]
        self.keys = [one[index] for one in self.keys]
        self.values = [one[index] for one in self.values]

    def _grow(self) -> None:
        block = CPU_BLOCK if ON_CPU else GPU_BLOCK
        wanted = self.capacity + 1 if ON_CPU else max(self.most, self.capacity + 1)
        target = -(-wanted // block) * block
        added = target - self.capacity

        def longer(one: mx.array) -> mx.array:
            rows, heads, _, size = one.shape
            return mx.concatenate([one, mx.zeros((rows, heads, added, size), one.dtype)], axis=2)

        self.keys = [longer(one) for one in self.keys]
        self.values = [longer(one) for one in self.values]
        self.capacity = target


class Steps:
    """The functions that advance a batch by one token; they take and give arrays only.

    The weights a step was traced with are part of it, so make new steps after any change of the
    model (another adapter, an update); retracing takes a fraction of a second, and the kernels that
    were compiled are found again.

    Args:
        backbone: the model.
        temperature: 0 takes the most likely token; above it tokens are drawn, each by its row's
            seed and its place in the answer, whatever other rows there are.
    """

    def __init__(self, backbone: Qwen3VL, *, temperature: float = 0.0) -> None:
        self.backbone = backbone
        self.temperature = temperature
        self.token_step = mx.compile(self._token_step)
        self.logits_step = mx.compile(self._logits_step)
        self.choose = mx.compile(self._choose)
        self.choose_of = mx.compile(self._choose_of)

    def _token_step(self, token, position, column, width, lengths, seeds, keys, values) -> Any:
        logits, *rest = self._logits_step(
            token, position, column, width, lengths, seeds, keys, values
        )
        return self._choose(logits, seeds, rest[1] - width), *rest

    def _logits_step(self, token, position, column, width, lengths, seeds, keys, values) -> Any:
        """Logits (B, V) after ``token`` (B,); position, column + 1; updated keys and values."""
        text = self.backbone.text
        h = text.embed_tokens(token[:, None])
        cos, sin = text.layers[0].self_attn.rotary_emb(h, position[:, None])
        half = cos.shape[-1] // 2
        # Rotating is x cos + (−x₂, x₁) sin; the sign goes to the sine, once for all layers.
        sin = mx.concatenate([-sin[..., :half], sin[..., half:]], axis=-1)
        cos, sin = cos[:, None], sin[:, None]
        place = mx.arange(keys[0].shape[2])[None]
        seen = (place < lengths[:, None]) | ((place >= width) & (place <= column))
        seen = seen[:, None, None, :]
        new_keys, new_values = [], []
        for layer, old_keys, old_values in zip(text.layers, keys, values, strict=True):
            attended, k, v = _attention(
                layer.self_attn,
                layer.input_layernorm(h),
                (cos, sin),
                (old_keys, old_values),
                column,
                seen,
            )
            h = h + attended
            h = h + layer.mlp(layer.post_attention_layernorm(h))
            new_keys.append(k)
            new_values.append(v)
        logits = self.backbone.head(text.norm(h))[:, 0]
        return logits, position + 1, column + 1, new_keys, new_values

    def _choose(self, logits: mx.array, seeds: mx.array, count: mx.array) -> mx.array:
        return self._pick(logits, logits, seeds, count)

    def _choose_of(
        self, logits: mx.array, seeds: mx.array, count: mx.array, bits: mx.array
    ) -> mx.array:
        rows, size = logits.shape
        each = (bits[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
        each = each.reshape(rows, -1)[:, :size].astype(mx.bool_)
        masked = mx.where(each, logits, mx.array(-mx.inf, logits.dtype))
        return self._pick(logits, masked, seeds, count)

    def _pick(
        self, logits: mx.array, masked: mx.array, seeds: mx.array, count: mx.array
    ) -> mx.array:
        """Tokens (B,) int32 of ``masked``; -1 in a row whose ``logits`` are not all finite."""
        masked = masked.astype(mx.float32)
        if self.temperature > 0:
            each = mx.broadcast_to(count.astype(mx.uint32), seeds.shape)
            keys = mx.stack([seeds, each], axis=-1)
            token = mx.vmap(lambda one, key: mx.random.categorical(one, key=key))(
                masked / self.temperature, keys
            )
        else:
            token = mx.argmax(masked, axis=-1)
        sound = mx.isfinite(logits).all(axis=-1)
        return mx.where(sound, token.astype(mx.int32), -1)


def _attention(
    attn: Any,
    x: mx.array,
    rotary: tuple[mx.array, mx.array],
    cache: tuple[mx.array, mx.array],
    column: mx.array,
    seen: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """One new token a row, x (B, 1, D), against a cache of C columns; seen: (B, 1, 1, C).

    The query heads that share a key head are the rows of one product, so each key is read once.
    Written out, because ``mx.fast``'s kernel for single queries takes no mask on CUDA.
    """
    rows, size, groups = x.shape[0], attn.head_dim, attn.n_kv_heads
    q = attn.q_norm(attn.q_proj(x).reshape(rows, groups, -1, size))
    k = attn.k_norm(attn.k_proj(x).reshape(rows, groups, 1, size))
    v = attn.v_proj(x).reshape(rows, groups, 1, size)
    q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    keys = mx.slice_update(cache[0], k.astype(cache[0].dtype), column, axes=(2,))
    values = mx.slice_update(cache[1], v.astype(cache[1].dtype), column, axes=(2,))
    scores = (q * attn.scale) @ keys.swapaxes(-1, -2)
    scores = mx.where(seen, scores, mx.array(-mx.inf, scores.dtype))
    out = mx.softmax(scores, axis=-1, precise=True) @ values
    return attn.o_proj(out.reshape(rows, 1, -1)), keys, values


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    half = x.shape[-1] // 2
    swapped = mx.concatenate([x[..., half:], x[..., :half]], axis=-1)
    return (x * cos + swapped * sin).astype(x.dtype)
