"""A dense forward for Qwen3-VL, over mlx-vlm's own modules and weights.

mlx-vlm's forward asks the host where the image tokens are (``np.where``, ``.tolist()``) in every
step. Here the host has computed positions and image indices when the batch was made, so nothing
synchronises: the forward can be differentiated, checkpointed and compiled as one function. The
modules are the stock ones (so LoRA layers put in their place are used), only the way through them
is ours. Equality with the stock forward is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ModelError
from . import decoder, lora
from .backend import mx
from .backend import number as to_float

Grid = tuple[int, int, int]
"""Patches of a picture: (time, height, width); time is 1 for photographs."""


@dataclass(frozen=True)
class VisionFeatures:
    """What the vision tower says of one picture.

    Attributes:
        features: shape (N, D), one row per image token.
        deepstack: for each of the first decoder layers, (N, D) to add at the image tokens.
    """

    features: mx.array
    deepstack: tuple[mx.array, ...]

    def blank(self) -> VisionFeatures:
        """The same of nothing at all."""
        return VisionFeatures(self.features * 0, tuple(level * 0 for level in self.deepstack))

    def backwards(self) -> VisionFeatures:
        """The same with its pieces in the opposite order."""
        return VisionFeatures(self.features[::-1], tuple(level[::-1] for level in self.deepstack))


@dataclass(frozen=True)
class Unseen:
    """A picture that has yet to go through the tower, as part of a forward.

    Attributes:
        patches: shape (P, C), as the processor makes them.
        grid: their arrangement.
    """

    patches: mx.array
    grid: Grid

    def blank(self) -> Unseen:
        """A picture of one colour."""
        return Unseen(self.patches * 0, self.grid)

    def backwards(self) -> Unseen:
        """The same with its patches in the opposite order."""
        return Unseen(self.patches[::-1], self.grid)


@dataclass(frozen=True)
class Inputs:
    """One batch for :meth:`Qwen3VL.hidden`. B rows, right-padded to L tokens; M image tokens.

    Attributes:
        tokens: (B, L) int32.
        positions: (3, B, L) int32, MRoPE positions (time, height, width).
        image_index: (B, L) int32; 0 where the token is text, else 1 + its row in ``features``.
        features: (M, D), the image tokens of all rows, concatenated; None without pictures.
        deepstack: like ``features``, one per deepstack layer.
        unseen: in place of both, the pictures themselves, in the order of their rows.
    """

    tokens: mx.array
    positions: mx.array
    image_index: mx.array | None = None
    features: mx.array | None = None
    deepstack: tuple[mx.array, ...] = ()
    unseen: tuple[Unseen, ...] = ()


class Qwen3VL:
    """The backbone: ``encode`` pictures once, ``hidden`` states from tokens, ``head`` to logits.

    Args:
        model: an ``mlx_vlm.models.qwen3_vl.Model``.
    """

    model_type = "qwen3_vl"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text = model.language_model.model
        self.tower = model.vision_tower
        self.image_token = int(model.config.image_token_id)
        self.longest = int(model.config.text_config.max_position_embeddings)
        self.merge = int(model.config.vision_config.spatial_merge_size)

    @property
    def tower_adapted(self) -> bool:
        """Whether there is an adapter in the tower: then its features are nobody else's."""
        return lora.reaches_tower(self.model)

    @property
    def keeps_features(self) -> bool:
        """Whether what the tower says of a picture holds beyond this moment."""
        return not self.tower_adapted

    @property
    def compiles(self) -> bool:
        """Whether a step may be compiled. With the tower in it, every combination of picture sizes
        would be another function, and the first call of one takes a minute on CUDA."""
        return not self.tower_adapted

    # --- pictures ---------------------------------------------------------------------------

    def encode(self, pixels: np.ndarray | mx.array, grid: Grid) -> list[VisionFeatures]:
        """Features of pictures of one size.

        Args:
            pixels: (P, C) or (B, P, C) patches as the processor makes them, P = t·h·w.
            grid: patches of each picture.

        Returns:
            One :class:`VisionFeatures` per picture, N = t·h·w / merge² tokens each.
        """
        patches = mx.array(pixels)
        if patches.ndim == 2:
            patches = patches[None]
        features, deepstack = self.tower_forward(patches, grid)
        return [
            VisionFeatures(features[i], tuple(level[i] for level in deepstack))
            for i in range(patches.shape[0])
        ]

    def tower_forward(
        self, patches: mx.array, grid: Grid, *, checkpoint: bool = False
    ) -> tuple[mx.array, list[mx.array]]:
        """Vision tower over (B, P, C) patches of equal grids → (B, N, D) and a list of the same.

        ``checkpoint`` recomputes each block in the backward pass.
        """
        tower = self.tower
        # The patch embedding's kernel covers its whole patch, so it is a product, which a CPU does
        # faster than the convolution it is written as (benchmarks/LOG.md).
        convolution = tower.patch_embed.proj
        kernel = convolution.weight.transpose(0, 4, 1, 2, 3).reshape(
            convolution.weight.shape[0], -1
        )
        h = patches.astype(kernel.dtype) @ kernel.T + convolution.bias
        index, weight, angles = _vision_positions(grid, self.merge, tower.num_grid_per_side)
        freqs = mx.array(angles) @ _vision_frequencies(tower)
        cos, sin = mx.cos(freqs), mx.sin(freqs)
        cos = mx.concatenate([cos, cos], axis=-1)[None, :, None, :]
        sin = mx.concatenate([sin, sin], axis=-1)[None, :, None, :]
        position = tower.pos_embed(mx.array(index))
        position = (position * mx.array(weight)[..., None].astype(position.dtype)).sum(axis=0)
        h = h + position[None]
        deepstack = []
        for number, block in enumerate(tower.blocks):

            def forward(h: mx.array, block: Any = block) -> mx.array:
                h = h + _vision_attention(block.attn, block.norm1(h), cos, sin)
                return h + block.mlp(block.norm2(h))

            h = decoder.recomputed(block, forward)(h) if checkpoint else forward(h)
            if number in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(number)]
                deepstack.append(_merge(merger, h))
        return _merge(tower.merger, h), deepstack

    def look(self, inputs: Inputs, *, checkpoint: bool = False) -> Inputs:
        """The inputs with their pictures through the tower, those that are not yet.

        One after the other, as without an adapter: what a picture gives depends on no neighbour.
        """
        if not inputs.unseen:
            return inputs
        seen = [
            self.tower_forward(one.patches[None], one.grid, checkpoint=checkpoint)
            for one in inputs.unseen
        ]
        levels = zip(*(deepstack for _, deepstack in seen), strict=True)
        return replace(
            inputs,
            features=mx.concatenate([features[0] for features, _ in seen]),
            deepstack=tuple(mx.concatenate([one[0] for one in level]) for level in levels),
            unseen=(),
        )

    # --- text -------------------------------------------------------------------------------

    def hidden(
        self,
        inputs: Inputs,
        *,
        cache: Sequence[Any] | None = None,
        mask: mx.array | str = "causal",
        checkpoint: bool = False,
    ) -> mx.array:
        """Hidden states after the final norm, shape (B, L, D).

        Right padding needs no mask: a causal token never looks to its right.

        Args:
            inputs: the batch.
            cache: for each layer what takes its keys and values (see `decode.prefill`), or None.
            mask: as ``mx.fast.scaled_dot_product_attention`` takes it.
            checkpoint: recompute each layer in the backward pass instead of keeping its inner
                activations.
        """
        inputs = self.look(inputs, checkpoint=checkpoint)
        h = self.text.embed_tokens(inputs.tokens)
        index = inputs.image_index
        if inputs.features is not None and index is not None:
            h = mx.where((index > 0)[..., None], _take(inputs.features, index, h.dtype), h)
        cos, sin = self.text.layers[0].self_attn.rotary_emb(h, inputs.positions)
        seed = int(to_float(mx.random.randint(0, 1 << 30, ()))) if checkpoint else 0
        for number, layer in enumerate(self.text.layers):
            run = _checkpointed(layer, seed + number) if checkpoint else layer
            h = run(h, mask, cache[number] if cache is not None else None, None, (cos, sin))
            if index is not None and number < len(inputs.deepstack):
                added = _take(inputs.deepstack[number], index, h.dtype)
                h = h + mx.where((index > 0)[..., None], added, mx.zeros_like(added))
        return self.text.norm(h)

    def hidden_at(
        self,
        inputs: Inputs,
        where: mx.array,
        *,
        checkpoint: bool = False,
    ) -> mx.array:
        """Hidden states after the final norm of the M positions ``where``, shape (M, D).

        For training: what the last layer computes for other positions than these is left out.

        Args:
            inputs: the batch.
            where: (M,) int32, flat indices row · L + position.
            checkpoint: recompute each layer in the backward pass instead of keeping its inner
                activations.
        """
        inputs = self.look(inputs, checkpoint=checkpoint)
        rows, width = inputs.tokens.shape
        h = self.text.embed_tokens(inputs.tokens)
        cos, sin = self.text.layers[0].self_attn.rotary_emb(h, inputs.positions)
        turn = decoder.rotary(cos, sin)
        h = h.reshape(rows * width, -1)
        index = None if inputs.image_index is None else inputs.image_index.reshape(-1)
        if inputs.features is not None and index is not None:
            h = mx.where((index > 0)[:, None], _take(inputs.features, index, h.dtype), h)
        last = len(self.text.layers) - 1
        for number, layer in enumerate(self.text.layers):
            cut = where if number == last and number >= len(inputs.deepstack) else None

            def forward(h: mx.array, layer: Any = layer, cut: mx.array | None = cut) -> mx.array:
                return decoder.layer_forward(layer, h, turn, (rows, width), cut)

            h = decoder.recomputed(layer, forward)(h) if checkpoint else forward(h)
            if index is not None and number < len(inputs.deepstack):
                added = _take(inputs.deepstack[number], index, h.dtype)
                h = h + mx.where((index > 0)[:, None], added, mx.zeros_like(added))
        if last < len(inputs.deepstack):
            h = h[where]
        return decoder.normed(self.text.norm, h)

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the activations."""
        return self.text.norm.weight.dtype

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return int(self.text.norm.weight.size)

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return int(self.text.vocab_size)

    def head_back(self, slope: mx.array) -> mx.array:
        """The gradient of hidden states, (M, D), of the logits', (M, V)."""
        tied = self.model.language_model.args.tie_word_embeddings
        matrix = self.text.embed_tokens if tied else self.model.language_model.lm_head
        if "scales" not in matrix:
            return slope @ matrix.weight
        return mx.quantized_matmul(
            slope,
            matrix.weight,
            scales=matrix.scales,
            biases=matrix.get("biases"),
            transpose=False,
            group_size=matrix.group_size,
            bits=matrix.bits,
            mode=matrix.mode,
        )

    def head(self, h: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D)."""
        if self.model.language_model.args.tie_word_embeddings:
            return self.text.embed_tokens.as_linear(h)
        return self.model.language_model.lm_head(h)


def assemble(
    tokens: np.ndarray,
    lengths: Sequence[int],
    features: Sequence[VisionFeatures | Unseen | None],
    grids: Sequence[Grid | None],
    *,
    image_token: int,
    merge: int,
) -> tuple[Inputs, np.ndarray]:
    """One picture a row or none, put together for the forward.

    Args:
        tokens: (B, L) int32, right-padded.
        lengths: real tokens of each row.
        features, grids: each row's picture; None where the row is text alone. Either all pictures
            are :class:`Unseen` or none is.
        image_token: id of the tokens that stand for the picture.
        merge: patches per image token and side.

    Returns:
        The inputs, and (B,) int32, the rotary position after each row's last token.

    Raises:
        ModelError: a row's image tokens are not one run as long as its picture's features. The
            forward would still give numbers, of a picture shown in part or at the wrong place.
    """
    rows, width = tokens.shape
    index = np.zeros((rows, width), np.int32)
    positions = np.zeros((3, rows, width), np.int32)
    following = np.zeros(rows, np.int32)
    offset = 0
    for row, (length, picture, grid) in enumerate(zip(lengths, features, grids, strict=True)):
        found = np.flatnonzero(tokens[row, :length] == image_token)
        if picture is None or grid is None:
            if len(found):
                raise ModelError(f"row {row} of the batch has image tokens and no picture")
            positions[:, row, :length] = np.arange(length)
            following[row] = length
            continue
        count = _image_tokens(picture, merge)
        tokens_of_grid = grid[0] * grid[1] * grid[2] // merge**2
        start = int(found[0]) if len(found) else 0
        if not (0 < count == tokens_of_grid == len(found)) or found[-1] + 1 - start != count:
            raise ModelError(
                f"row {row} of the batch has {len(found)} image tokens for a picture of {count} "
                f"(grid {grid}); encode the row again with the pixel settings of its picture, and "
                "keep image tokens out of its texts"
            )
        index[row, start : start + count] = np.arange(offset + 1, offset + count + 1)
        offset += count
        places = positions_of(length, start, grid, merge)
        positions[:, row, :length] = places
        following[row] = places.max() + 1
    pictures = [picture for picture in features if picture is not None]
    if not pictures:
        return Inputs(mx.array(tokens), mx.array(positions)), following
    unseen = tuple(one for one in pictures if isinstance(one, Unseen))
    seen = [one for one in pictures if isinstance(one, VisionFeatures)]
    if unseen:
        if seen:
            raise ModelError("pictures and features of pictures cannot be in one batch")
        inputs = Inputs(mx.array(tokens), mx.array(positions), mx.array(index), unseen=unseen)
        return inputs, following
    joined = [
        mx.concatenate([picture.deepstack[level] for picture in seen])
        for level in range(len(seen[0].deepstack))
    ]
    inputs = Inputs(
        mx.array(tokens),
        mx.array(positions),
        mx.array(index),
        mx.concatenate([picture.features for picture in seen]),
        tuple(joined),
    )
    return inputs, following


def _image_tokens(picture: VisionFeatures | Unseen, merge: int) -> int:
    if isinstance(picture, Unseen):
        return picture.patches.shape[0] // merge**2
    return picture.features.shape[0]


def positions_of(length: int, image_start: int | None, grid: Grid, merge: int = 2) -> np.ndarray:
    """MRoPE positions of one row with at most one picture (Qwen3-VL; no interleaving).

    Args:
        length: tokens of the row, the image tokens among them.
        image_start: index of the first image token, None without a picture.
        grid: the picture's patches.
        merge: patches per image token and side.

    Returns:
        (3, length) int32: time, height and width. Text counts up equally in all three; image
        tokens keep one time and count their row and column; the text after goes on from the
        largest position used.
    """
    if image_start is None:
        return np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)).copy()
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    count = t * h * w
    positions = np.empty((3, length), np.int32)
    positions[:, :image_start] = np.arange(image_start)
    inside = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"))
    positions[:, image_start : image_start + count] = inside.reshape(3, -1) + image_start
    after = length - image_start - count
    start = image_start + max(t, h, w)
    positions[:, image_start + count :] = np.arange(start, start + after)
    return positions


def _take(features: mx.array, index: mx.array, dtype: mx.Dtype) -> mx.array:
    """Rows of ``features`` at ``index - 1``; text tokens (0) get row 0, which the caller masks."""
    return features.astype(dtype)[mx.maximum(index - 1, 0)]


def _checkpointed(layer: Any, seed: int) -> Any:
    """The layer as a function whose inner activations are recomputed in the backward pass.

    Per instance, not on the class: a patch of the class would outlive this model. Both runs of the
    layer start from the same seed, or the backward pass would draw another dropout mask than the
    one the loss came from.
    """

    def forward(parameters: Any, *args: Any) -> mx.array:
        layer.update(parameters)
        mx.random.seed(seed)
        return layer(*args)

    recomputed = mx.checkpoint(forward)
    return lambda *args: recomputed(layer.trainable_parameters(), *args)


def _vision_attention(attn: Any, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Self-attention within each picture of the batch. x: (B, P, D)."""
    rows, count, _ = x.shape
    qkv = attn.qkv(x).reshape(rows, count, 3, attn.num_heads, -1)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def turn(t: mx.array) -> mx.array:
        half = t.shape[-1] // 2
        rotated = mx.concatenate([-t[..., half:], t[..., :half]], axis=-1)
        return (t * cos + rotated * sin).astype(t.dtype)

    q, k, v = (t.transpose(0, 2, 1, 3) for t in (turn(q), turn(k), v))
    size = q.shape[-1]
    # MLX's fused attention knows head sizes 64, 80 and 128; padding with zeros changes nothing.
    target = next((known for known in (64, 80, 128) if size <= known), size)
    if target != size and q.dtype != mx.float32:
        q, k, v = (mx.pad(t, [(0, 0)] * 3 + [(0, target - size)]) for t in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=attn.scale)[..., :size]
    return attn.proj(out.transpose(0, 2, 1, 3).reshape(rows, count, -1))


def _merge(merger: Any, h: mx.array) -> mx.array:
    """Patch merger over (B, P, D): groups of merge² patches become one token."""
    rows = h.shape[0]
    merged = merger(h.reshape(-1, h.shape[-1]))
    return merged.reshape(rows, -1, merged.shape[-1])


@lru_cache(maxsize=256)
def _vision_positions(grid: Grid, merge: int, side: int) -> tuple[np.ndarray, ...]:
    """Learned-position corners and rotary angles of a grid, in the processor's patch order.

    Returns:
        index (4, P) int32 and weight (4, P) float32: the corners and weights of the bilinear
        interpolation of the side × side table of learned positions; angles (P, 2) float32: row
        and column of each patch.
    """
    t, h, w = grid
    # float32 throughout, as the reference does: a float64 grid rounds to other corners.
    rows = np.linspace(0, side - 1, h, dtype=np.float32)
    columns = np.linspace(0, side - 1, w, dtype=np.float32)
    r0, c0 = rows.astype(np.int32), columns.astype(np.int32)
    r1, c1 = np.minimum(r0 + 1, side - 1), np.minimum(c0 + 1, side - 1)
    dr, dc = rows - r0, columns - c0
    index = np.stack([np.add.outer(r * side, c) for r in (r0, r1) for c in (c0, c1)])
    weight = np.stack([np.outer(a, b) for a in (1 - dr, dr) for b in (1 - dc, dc)])
    place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij")).astype(np.float32)

    def order(a: np.ndarray) -> np.ndarray:
        blocks = a.reshape(-1, h // merge, merge, w // merge, merge).transpose(0, 1, 3, 2, 4)
        return np.tile(blocks.reshape(a.shape[0], -1), (1, t))

    return order(index).astype(np.int32), order(weight), order(place).T.copy()


def _vision_frequencies(tower: Any) -> mx.array:
    """(2, head_dim / 2): maps a patch's (row, column) to its rotary angles."""
    dim = tower.rotary_pos_emb.dim
    frequency = 1.0 / (tower.rotary_pos_emb.theta ** (mx.arange(0, dim, 2, dtype=mx.float32) / dim))
    zero = mx.zeros_like(frequency)
    return mx.stack([mx.concatenate([frequency, zero]), mx.concatenate([zero, frequency])])
