"""Decoding with shapes that never change from step to step.

Every layer's keys and values lie in arrays of a fixed capacity; a step writes one column at a
position that is an array, masks what is not filled, and gives the next tokens. No Python number
changes between steps, so that on a GPU ``mx.compile`` traces the step once for a number of rows and
a capacity. On a CPU compiling is off (`backend`) and the same function runs as it is.

An array that a compiled function updates is copied whole. With many rows that is most of a step,
so there a step updates only a block of new columns, beside old ones that stay as they are; a full
block joins the old columns. With few rows the copy costs less than the further kernels that two
parts need, and the whole cache is the block. On CUDA a bfloat16 model takes its steps in kernels of
our own (`cuda_step`), always with blocks.

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
from .cuda_step import MOST_ROWS, cuda_step
from .qwen3_vl import Inputs, Qwen3VL

GPU_BLOCK = 256
"""Capacities are multiples of this on a GPU, where each capacity is another compiled function."""
CPU_BLOCK = 64
"""On a CPU a cache grows by this, because attention there pays for every column it has."""
NEW_COLUMNS = 64
"""Columns of a block of new ones: what a step copies grows with it, and how seldom one joins."""
MANY_ROWS = 4
"""Rows from which on a GPU a step of MLX's operations updates a block, not the cache."""

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
        block: columns of a block of new ones, 0 for none; chosen by device and rows if not given.
    """

    def __init__(
        self,
        steps: Steps,
        start: Prefilled,
        *,
        capacity: int,
        seeds: np.ndarray | None = None,
        block: int | None = None,
    ) -> None:
        self.steps = steps
        self.most = capacity
        self.rows = int(start.logits.shape[0])
        self.filled = int(start.keys[0].shape[2])
        self.capacity = self.filled
        self.logits: mx.array | None = start.logits
        self.block = steps.block(self.rows) if block is None else block
        self.old_keys, self.old_values = list(start.keys), list(start.values)
        self.new_keys: Arrays = []
        self.new_values: Arrays = []
        if self.block:
            self.first = self.filled
            self.new_keys = [_longer(one[:, :, :0], self.block) for one in start.keys]
            self.new_values = [_longer(one[:, :, :0], self.block) for one in start.values]
        else:
            self.first = 0
            self.new_keys, self.old_keys = self.old_keys, []
            self.new_values, self.old_values = self.old_values, []
        self.token = mx.zeros((self.rows,), mx.int32)
        self.lengths = mx.array(start.lengths)
        self.position = mx.array(start.positions)
        self.width = mx.array([self.filled], mx.int32)
        self.column = mx.array([self.filled], mx.int32)
        self.start = mx.array([self.first], mx.int32)
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
        # Blocks need room only when they join, but on a GPU another capacity is another trace.
        if self.filled == self.capacity and not (self.block and ON_CPU):
            self._grow()
        if self.block and self.filled == self.first + self.block:
            self._join()
        step = self.steps.token_step if choosing else self.steps.logits_step
        result, self.position, self.column, self.new_keys, self.new_values = step(
            self.token,
            self.position,
            (self.lengths, self.width, self.start, self.column),
            self.seeds,
            (self.old_keys, self.old_values),
            (self.new_keys, self.new_values),
        )
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
        for name in ("old_keys", "old_values", "new_keys", "new_values"):
            setattr(self, name, [one[index] for one in getattr(self, name)])

    def _join(self) -> None:
        """Write the block, which is full, to the old columns, and begin another."""
        if self.filled > self.capacity:
            self._grow()
        for old, new in ((self.old_keys, self.new_keys), (self.old_values, self.new_values)):
            for number, block in enumerate(new):
                old[number] = mx.slice_update(old[number], block, self.start, axes=(2,))
        # What the block holds is written over or not looked at; it needs no clearing.
        self.first = self.filled
        self.start = self.column

    def _grow(self) -> None:
        step = CPU_BLOCK if ON_CPU else GPU_BLOCK
        wanted = self.filled + 1 if ON_CPU else max(self.most, self.filled + 1)
        target = -(-wanted // step) * step
        for cache in (
            (self.old_keys, self.old_values) if self.block else (self.new_keys, self.new_values)
        ):
            cache[:] = [_longer(one, target - self.capacity) for one in cache]
        self.capacity = target


def _longer(one: mx.array, columns: int) -> mx.array:
    rows, heads, _, size = one.shape
    return mx.concatenate([one, mx.zeros((rows, heads, columns, size), one.dtype)], axis=2)


class Steps:
    """The functions that advance a batch by one token; they take and give arrays only.

    The weights a step was traced with are part of it, so make new steps after any change of the
    model (another adapter, an update); retracing takes a fraction of a second, and the kernels that
    were compiled are found again.

    Args:
        backbone: the model.
        temperature: 0 takes the most likely token; above it tokens are drawn, each by its row's
            seed and its place in the answer, whatever other rows there are.
        own_kernels: take `cuda_step`'s kernels where they fit; off, to measure MLX's operations.
        changing: arrays by name that the model's layers look at beside their weights, and that are
            others from step to step, such as ``answering.Rows.arrays``; None where there are none.
    """

    def __init__(
        self,
        backbone: Qwen3VL,
        *,
        temperature: float = 0.0,
        own_kernels: bool = True,
        changing: dict[str, mx.array] | None = None,
    ) -> None:
        self.backbone = backbone
        self.temperature = temperature
        self.kernels = cuda_step(backbone) if own_kernels else None
        self.token_step = mx.compile(self._token_step, inputs=changing)
        self.logits_step = mx.compile(self._logits_step, inputs=changing)
        self.choose = mx.compile(self._choose)
        self.choose_of = mx.compile(self._choose_of)

    def block(self, rows: int) -> int:
        """Columns of a block of new ones for this many rows, 0 for none."""
        if ON_CPU:
            return 0  # there a function is not compiled, and the cache is updated where it is
        own = self.kernels is not None and rows <= MOST_ROWS
        return NEW_COLUMNS if own or rows >= MANY_ROWS else 0

    def _token_step(self, token, position, places, seeds, old, new) -> Any:
        logits, *rest = self._logits_step(token, position, places, seeds, old, new)
        return self._choose(logits, seeds, rest[1] - places[1]), *rest

    def _logits_step(self, token, position, places, seeds, old, new) -> Any:
        """Logits (B, V) after ``token`` (B,); position, column + 1; updated new keys, new values.

        Args:
            places: (lengths, width, start, column): columns of each row's prompt and of the longest
                prompt, the first column of ``new``, the column of this token.
            old: lists of keys and values that stay as they are; empty ones where ``new`` is all.
            new: lists of keys and values, each updated.
        """
        lengths, width, start, column = places
        if self.kernels is not None and old[0] and token.shape[0] <= MOST_ROWS:
            logits, *changed = self.kernels.logits(token, position, places, old, new)
            return logits, position + 1, column + 1, *changed
        text = self.backbone.text
        h = text.embed_tokens(token[:, None])
        cos, sin = text.layers[0].self_attn.rotary_emb(h, position[:, None])
        half = cos.shape[-1] // 2
        # Rotating is x cos + (−x₂, x₁) sin; the sign goes to the sine, once for all layers.
        sin = mx.concatenate([-sin[..., :half], sin[..., half:]], axis=-1)
        cos, sin = cos[:, None], sin[:, None]

        def filled(place: mx.array, limit: mx.array) -> mx.array:
            seen = ((place < lengths[:, None]) | (place >= width)) & (place < limit)
            return seen[:, None, None, :]

        seen = filled(start + mx.arange(new[0][0].shape[2])[None], column + 1)
        if old[0]:
            before = filled(mx.arange(old[0][0].shape[2])[None], start)
            seen = mx.concatenate([before, seen], axis=-1)
        new_keys, new_values = [], []
        for number, layer in enumerate(text.layers):
            attended, k, v = _attention(
                layer.self_attn,
                layer.input_layernorm(h),
                (cos, sin),
                (old[0][number], old[1][number]) if old[0] else None,
                (new[0][number], new[1][number]),
                column - start,
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
    old: tuple[mx.array, mx.array] | None,
    new: tuple[mx.array, mx.array],
    column: mx.array,
    seen: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """One new token a row, x (B, 1, D), against C columns; seen: (B, 1, 1, C).

    ``column`` is the token's among those of ``new``, which is updated; ``old`` comes before.

    The query heads that share a key head are the rows of one product, so each key is read once.
    Written out, because ``mx.fast``'s kernel for single queries takes no mask on CUDA.
    """
    rows, size, groups = x.shape[0], attn.head_dim, attn.n_kv_heads
    q = attn.q_norm(attn.q_proj(x).reshape(rows, groups, -1, size))
    k = attn.k_norm(attn.k_proj(x).reshape(rows, groups, 1, size))
    v = attn.v_proj(x).reshape(rows, groups, 1, size)
    q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    keys = mx.slice_update(new[0], k.astype(new[0].dtype), column, axes=(2,))
    values = mx.slice_update(new[1], v.astype(new[1].dtype), column, axes=(2,))
    q = q * attn.scale
    scores = q @ keys.swapaxes(-1, -2)
    if old is not None:
        scores = mx.concatenate([q @ old[0].swapaxes(-1, -2), scores], axis=-1)
    scores = mx.where(seen, scores, mx.array(-mx.inf, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True)
    if old is None:
        out = weights @ values
    else:
        border = old[0].shape[2]
        out = weights[..., :border] @ old[1] + weights[..., border:] @ values
    return attn.o_proj(out.reshape(rows, 1, -1)), keys, values


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    half = x.shape[-1] // 2
    swapped = mx.concatenate([x[..., half:], x[..., :half]], axis=-1)
    return (x * cos + swapped * sin).astype(x.dtype)
