"""How much memory training will take, from a model's config and the rows' token counts alone.

The peak of an update lies where the forward pass ends and the backward pass begins: all that the
layers kept for the backward pass is there, and the logits or one layer's gradients beside it.
What is kept is counted tensor by tensor; how often is a matter of the backend, measured by
``python -m benchmarks memory_fit`` and written down in :data:`COSTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ModelError
from ..model import machine

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer."""
GROUP = 64
"""Weights that share a scale and a bias where a base is quantised."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-VL, as its ``config.json`` has them.

    Attributes:
        hidden, ffn, layers, heads, kv_heads, head_dim, vocab: of the language model.
        tied: whether the head's weights are the embedding's.
        vision_hidden, vision_ffn, vision_depth, vision_heads: of the tower.
        deepstack: levels that the tower gives to the first decoder layers.
        patch: numbers of a patch, channels and frames included.
        places: learned positions of the tower.
        merge: patches per image token and side.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    vision_hidden: int
    vision_ffn: int
    vision_depth: int
    vision_heads: int
    deepstack: int
    patch: int
    places: int
    merge: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Shape:
        """The sizes in a ``config.json``.

        Raises:
            ModelError: one is missing, as in other architectures' configs.
        """
        try:
            text, vision = config["text_config"], config["vision_config"]
            heads = int(text["num_attention_heads"])
            return Shape(
                hidden=int(text["hidden_size"]),
                ffn=int(text["intermediate_size"]),
                layers=int(text["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(text.get("num_key_value_heads", heads)),
                head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
                vocab=int(text["vocab_size"]),
                tied=bool(
                    text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
                ),
                vision_hidden=int(vision["hidden_size"]),
                vision_ffn=int(vision["intermediate_size"]),
                vision_depth=int(vision["depth"]),
                vision_heads=int(vision["num_heads"]),
                deepstack=len(vision["deepstack_visual_indexes"]),
                patch=int(vision.get("in_channels", 3))
                * int(vision["temporal_patch_size"])
                * int(vision["patch_size"]) ** 2,
                places=int(vision["num_position_embeddings"]),
                merge=int(vision["spatial_merge_size"]),
            )
        except KeyError as error:
            raise ModelError(
                f"the model's config.json has no {error}, so its memory cannot be predicted; that "
                "works for Qwen3-VL models only"
            ) from None

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    @property
    def names(self) -> list[str]:
        """Full names of all of them."""
        return [
            f"language_model.model.layers.{number}.{part}.{name}"
            for number in range(self.layers)
            for part, names in (("self_attn", MATRICES[:4]), ("mlp", MATRICES[4:]))
            for name in names
        ]

    @property
    def tower_matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of the tower and its mergers, by full name."""
        d, f, wide = self.vision_hidden, self.vision_ffn, self.vision_hidden * self.merge**2
        block = {
            "attn.qkv": (d, 3 * d),
            "attn.proj": (d, d),
            "mlp.linear_fc1": (d, f),
            "mlp.linear_fc2": (f, d),
        }
        merger = {"linear_fc1": (wide, wide), "linear_fc2": (wide, self.hidden)}
        mergers = ["merger", *(f"deepstack_merger_list.{n}" for n in range(self.deepstack))]
        return {
            f"vision_tower.{place}.{name}": sizes
            for places, kinds in (
                ([f"blocks.{n}" for n in range(self.vision_depth)], block),
                (mergers, merger),
            )
            for place in places
            for name, sizes in kinds.items()
        }

    @property
    def linear(self) -> int:
        """Weights of the language model that quantisation reaches."""
        head = 0 if self.tied else self.vocab * self.hidden
        return self.layers * sum(a * b for a, b in self.matrices.values()) + head

    @property
    def other(self) -> int:
        """All other weights: embedding, norms and the vision tower."""
        text = self.vocab * self.hidden + self.hidden
        text += self.layers * (2 * self.hidden + 2 * self.head_dim)
        return text + self.tower

    @property
    def tower(self) -> int:
        """Weights of the vision tower, mergers included."""
        d, f = self.vision_hidden, self.vision_ffn
        block = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        wide = d * self.merge**2
        merger = wide * wide + wide + wide * self.hidden + self.hidden
        # The last merger normalises patches, those of the deepstack levels merged ones.
        norms = 2 * d + self.deepstack * 2 * wide
        first = self.patch * d + d + self.places * d
        return first + self.vision_depth * block + (1 + self.deepstack) * merger + norms


@dataclass(frozen=True)
class Row:
    """Token counts of a row: all, those of its picture, those that are trained."""

    tokens: int
    image_tokens: int
    supervised: int


@dataclass(frozen=True)
class Setting:
    """What a run's config says that matters for memory.

    Attributes:
        batch: rows of a micro-batch.
        checkpoint: whether layers are recomputed in the backward pass.
        itemsize: bytes of a weight and an activation.
        bits: of the quantised matrices; None where they are not.
        rank: of the adapter.
        adapted: names of the adapted matrices and in how many decoder layers; None for all of
            :data:`MATRICES` in every layer.
        magnitudes: whether DoRA's are trained as well.
        moments: arrays the optimizer keeps of each trained one.
        images: photographs whose features are kept in memory; none where the tower is trained.
        vision: full names of the tower's adapted matrices.
    """

    batch: int
    checkpoint: bool
    itemsize: int
    bits: int | None = None
    rank: int = 16
    adapted: tuple[tuple[str, int], ...] | None = None
    magnitudes: bool = False
    moments: int = 2
    images: int = 0
    vision: tuple[str, ...] = ()


@dataclass(frozen=True)
class Costs:
    """How a backend spends memory; each a number of arrays of the size it is named after.

    Attributes:
        hidden, queries, keys, inner: kept of each layer for the backward pass, per token: arrays as
            wide as the hidden state, all queries, all keys, the feed-forward's inner state.
        scores: attention scores kept of each layer; 0 where attention is fused.
        scores_work: attention scores of one layer that are there at a time beside that.
        block: queries that attend at a time, to the keys up to their own; None for all at once.
        layer_work: one layer's kept arrays, that many times, are there while its gradients are
            computed; checkpoint_work: the same where they were recomputed for it.
        logits: float32 arrays as large as a chunk's logits.
        chunk: bytes of such an array at most.
        tower, tower_scores: of one picture in the tower, arrays as wide as its inner state, and
            attention scores.
        in_flight: what kernels that are queued and not done hold, as a multiple of what the layers
            keep for the tokens beyond :data:`QUICK`; of fewer, kernels are done as fast as they are
            queued.
        in_flight_most, in_flight_small: bytes that it is at most, without and with checkpointing,
            which has small graphs.
        expanded: arrays as large as the largest matrix, where a quantised one is expanded.
        tower_kept, tower_kept_scores: the same of each block, kept for the backward pass where the
            tower is trained; tower_work_scores: of one block, there while its gradients are
            computed.
        at_once: rows of a batch that are computed side by side, each by itself and unpadded; None
            for all of them as one.
        sums: base and adapter are added up where their sums take at most so many bytes.
        pad_to: lengths are padded to a multiple of this.
        measured: whether these were fitted to measurements.
    """

    hidden: float = 4.0
    queries: float = 3.0
    keys: float = 3.0
    inner: float = 3.0
    scores: float = 0.0
    scores_work: float = 0.0
    block: int | None = None
    layer_work: float = 1.0
    checkpoint_work: float = 2.2
    logits: float = 3.3
    chunk: int = 128 << 20
    tower: float = 3.0
    tower_scores: float = 0.0
    in_flight: float = 0.0
    in_flight_most: int = 0
    in_flight_small: int = 0
    expanded: float = 0.0
    at_once: int | None = None
    sums: int = 0
    tower_kept: float = 8.7
    tower_kept_scores: float = 0.0
    tower_work_scores: float = 0.0
    pad_to: int = 1
    measured: bool = True


COSTS = {
    "CPU": Costs(
        queries=4.8,
        inner=3.47,
        scores=1.12,
        block=64,
        layer_work=0.5,
        logits=8.8,
        tower_scores=1.0,
        at_once=min(machine.AT_ONCE, machine.cores()),
        sums=machine.SUMMED_BYTES,
        tower_kept_scores=0.7,
        tower_work_scores=3.3,
    ),
    "CUDA": Costs(
        hidden=4.5,
        queries=3.4,
        keys=3.4,
        inner=3.4,
        checkpoint_work=2.05,
        logits=1.0,
        chunk=512 << 20,
        in_flight=1.8,
        in_flight_most=6_500_000_000,
        in_flight_small=1_000_000_000,
        expanded=12.0,
        pad_to=128,
    ),
    "Metal": Costs(scores_work=3.0, tower_work_scores=3.0, measured=False),
}
"""By kind of backend. Recalibrate with ``python -m benchmarks memory_fit`` on a CPU and ``python -m
benchmarks.training_4b memory memory_checkpointed memory_4bit`` on a GPU. Graphs of 1 GB and of 100
MB are under way up to ten at a time (``backend.size_graphs``)."""
QUICK = 800
"""Tokens of a batch up to which a GPU is done with kernels as fast as they are queued."""
FEATURES_KEPT = 2 << 30
"""Bound of ``model.features.FeatureStore`` on the features in memory."""


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of an update, by what they are for.

    Attributes:
        weights: the base; without the tower where that is given back before the first update.
        adapter: what is trained, its gradients and the optimizer's arrays.
        features: of the pictures, kept from update to update.
        activations: what the layers keep for the backward pass.
        work: what is there only for a moment: logits, a layer's gradients, a picture in the tower.
        row_tokens, rows: the batch it was computed for.
    """

    weights: int
    adapter: int
    features: int
    activations: int
    work: int
    row_tokens: int
    rows: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.adapter + self.features + self.activations + self.work


def predict(shape: Shape, setting: Setting, rows: Sequence[Row], costs: Costs) -> Prediction:
    """The peak of the largest micro-batch there can be: the longest rows together.

    Args:
        shape: of the model.
        setting: of the run.
        rows: token counts of every training row, one at least.
        costs: of the backend, see :data:`COSTS`.
    """
    chosen = sorted(rows, key=lambda row: row.tokens)[-setting.batch :]
    length = -(-chosen[-1].tokens // costs.pad_to) * costs.pad_to
    count = len(chosen)
    trained = sum(row.supervised for row in chosen)
    parameters = adapter_size(shape, setting)
    kept, work = _activations(shape, setting, costs, count, length, trained)
    if setting.vision:
        seen = _tower_activations(shape, setting, costs, [row.image_tokens for row in chosen])
        # The tower's gradients come last, when the decoder's layers hold nothing any more.
        kept, work = kept + seen[0], max(work, seen[1] - kept)
    tower = _tower(shape, setting, costs, max(row.image_tokens for row in rows))
    # A large tower is in memory only while photographs go through it, before the first update.
    resting = shape.tower * setting.itemsize
    if setting.vision or resting < machine.RESTS_FROM:
        resting = 0
    tower += resting
    # The optimizer's step: new arrays beside the old ones, when nothing else is there any more.
    step = 4 * parameters * (2 + setting.moments)
    peak = max(kept + work, tower, step)
    mean = sum(row.image_tokens for row in rows) / len(rows)
    features = setting.images * mean * shape.hidden * (1 + shape.deepstack) * setting.itemsize
    return Prediction(
        weights=weights_size(shape, setting) - resting,
        adapter=4 * parameters * (2 + setting.moments) + _sums(shape, setting, costs),
        features=int(min(features, FEATURES_KEPT)),
        activations=int(kept) if peak == kept + work else 0,
        work=int(work) if peak == kept + work else int(peak),
        row_tokens=length,
        rows=count,
    )


def weights_size(shape: Shape, setting: Setting) -> int:
    """Bytes of the base's weights."""
    if setting.bits is None:
        return (shape.linear + shape.other) * setting.itemsize
    # A group's scale and bias have the type that the weights had.
    quantised = shape.linear * setting.bits // 8 + shape.linear // GROUP * 2 * setting.itemsize
    return quantised + shape.other * setting.itemsize


def adapter_size(shape: Shape, setting: Setting) -> int:
    """Trained numbers of the adapter."""
    total = 0
    for name, layers in _adapted(shape, setting):
        a, b = shape.matrices[name]
        total += layers * (setting.rank * (a + b) + (b if setting.magnitudes else 0))
    for name in setting.vision:
        a, b = shape.tower_matrices[name]
        total += setting.rank * (a + b) + (b if setting.magnitudes else 0)
    return total


def _sums(shape: Shape, setting: Setting, costs: Costs) -> int:
    """Bytes of base and adapter added up."""
    if setting.bits is not None or setting.magnitudes or setting.itemsize != 4:
        return 0
    numbers = sum(
        layers * shape.matrices[name][0] * shape.matrices[name][1]
        for name, layers in _adapted(shape, setting)
    )
    return 4 * numbers if 4 * numbers <= costs.sums else 0


def _adapted(shape: Shape, setting: Setting) -> Sequence[tuple[str, int]]:
    if setting.adapted is None:
        return [(name, shape.layers) for name in MATRICES]
    return setting.adapted


def _activations(
    shape: Shape, setting: Setting, costs: Costs, rows: int, length: int, trained: int
) -> tuple[float, float]:
    """Bytes kept for the backward pass of a batch, and those that are there for a moment."""
    tokens = rows * length
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = costs.hidden * shape.hidden + costs.queries * queries
    wide += costs.keys * keys + costs.inner * shape.ffn
    for name, layers in _adapted(shape, setting):
        # The magnitudes' gradients need what each matrix gave.
        outputs = shape.matrices[name][1] if setting.magnitudes else 0
        wide += (setting.rank + outputs) * layers / shape.layers
    span = length if costs.block is None else min(length, (length + costs.block) / 2)
    scores = shape.heads * span
    size = setting.itemsize
    layer = tokens * (wide + costs.scores * scores) * size
    # The others of a batch have left only their gradient, or wait.
    share = min(1.0, (costs.at_once or rows) / rows)
    pieces = 1 if costs.at_once is None else min(rows, costs.at_once)
    chunk = pieces * max(64 * 4 * shape.vocab, costs.chunk)
    moment = share * tokens * costs.scores_work * scores * size
    logits = costs.logits * min(chunk, share * trained * 4 * shape.vocab)
    # The loss' slope is kept beside the hidden states that it belongs to.
    logits += 2 * share * trained * shape.hidden * size
    flight = costs.in_flight * shape.layers * layer * max(0, tokens - QUICK) / tokens
    if setting.bits is not None:
        moment += costs.expanded * size * max(a * b for a, b in shape.matrices.values())
    if setting.checkpoint:
        kept = share * shape.layers * tokens * shape.hidden * size
        work = max(logits, share * costs.checkpoint_work * layer + moment)
        return kept, work + min(costs.in_flight_small, flight)
    work = max(logits, share * costs.layer_work * layer + moment)
    return share * shape.layers * layer, work + min(costs.in_flight_most, flight)


def _tower_activations(
    shape: Shape, setting: Setting, costs: Costs, image_tokens: Sequence[int]
) -> tuple[float, float]:
    """Bytes that the tower keeps for the backward pass of a batch, and those that are there while
    one block's gradients are computed."""
    kept = work = 0.0
    for tokens in image_tokens:
        patches = tokens * shape.merge**2
        wide = costs.tower_kept * max(shape.vision_ffn, 3 * shape.vision_hidden)
        scores = shape.vision_heads * patches
        own = wide + costs.tower_kept_scores * scores
        moment = costs.tower_work_scores * scores + (2 * wide if setting.checkpoint else 0)
        size = patches * setting.itemsize
        kept += shape.vision_depth * size * (shape.vision_hidden if setting.checkpoint else own)
        work = max(work, size * moment)
    return kept, work


def _tower(shape: Shape, setting: Setting, costs: Costs, image_tokens: int) -> float:
    patches = image_tokens * shape.merge**2
    wide = costs.tower * max(shape.vision_ffn, 3 * shape.vision_hidden) + shape.patch
    scores = costs.tower_scores * shape.vision_heads * patches
    return patches * (wide + scores) * setting.itemsize


@dataclass(frozen=True)
class Change:
    """Something that lowers the peak.

    Attributes:
        overrides: keys for the command line.
        alone: bytes at the peak with this change; together: with those before it as well.
        costs: what it costs, in words.
    """

    overrides: tuple[str, ...]
    alone: int
    together: int
    costs: str


def changes(
    shape: Shape,
    setting: Setting,
    rows: Sequence[Row],
    costs: Costs,
    *,
    accumulate: int,
    token_pixels: int,
) -> list[Change]:
    """What would lower the peak, in the order of least harm; only what really does.

    Args:
        accumulate: micro-batches of an update, which a smaller batch makes up for.
        token_pixels: pixels of a picture that one image token stands for.
    """
    largest = max(row.image_tokens for row in rows)
    half = largest // 2
    shrunk = [
        replace(
            row,
            tokens=row.tokens - max(0, row.image_tokens - half),
            image_tokens=min(row.image_tokens, half),
        )
        for row in rows
    ]
    steps: list[tuple[tuple[str, ...], dict[str, Any], Sequence[Row], str]] = []
    if half:
        key = f"data.max_pixels={half * token_pixels}"
        steps.append(((key,), {}, shrunk, "less detail of the largest photographs"))
    if not setting.checkpoint:
        key = "trainer.grad_checkpoint=true"
        steps.append(((key,), {"checkpoint": True}, rows, "about a third more time"))
    if setting.batch > 1:
        keys = ("trainer.batch_size=1", f"trainer.accumulate={accumulate * setting.batch}")
        steps.append((keys, {"batch": 1}, rows, "the same updates, somewhat slower"))
    if setting.bits is None:
        key = "model.quantize_bits=4"
        steps.append(((key,), {"bits": 4}, rows, "a base that is less exact, and slower steps"))
    found: list[Change] = []
    least, so_far, so_rows = predict(shape, setting, rows, costs).total, setting, rows
    before = least
    for overrides, change, changed_rows, words in steps:
        alone = predict(shape, replace(setting, **change), changed_rows, costs).total
        if alone >= before:
            continue
        so_far = replace(so_far, **change)
        so_rows = changed_rows if changed_rows is shrunk else so_rows
        least = predict(shape, so_far, so_rows, costs).total
        found.append(Change(overrides, alone, least, words))
    return found


def cheapest(found: Sequence[Change], limit: int) -> tuple[tuple[str, ...], int] | None:
    """The overrides of the first change that fits alone, else of the first several that fit
    together, and the peak with them; None where nothing does."""
    for change in found:
        if change.alone <= limit:
            return change.overrides, change.alone
    keys: tuple[str, ...] = ()
    for change in found:
        keys += change.overrides
        if change.together <= limit:
            return keys, change.together
    return None


_SPENT = ("out of memory", "outofmemory", "unable to allocate", "insufficient memory", "[malloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there was not enough memory, in Metal's words, CUDA's or C++'s.

    A buffer larger than Metal allows ("greater than the maximum allowed buffer size") counts too.
    """
    if isinstance(error, MemoryError):
        return True
    words = str(error).lower()
    known = any(part in words for part in _SPENT) or "maximum allowed buffer size" in words
    return isinstance(error, RuntimeError) and (known or "bad_alloc" in words)
