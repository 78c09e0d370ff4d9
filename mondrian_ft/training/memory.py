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

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer."""
GROUP = 64
"""Weights that share a scale and a bias where a base is quantised."""
_ROUND_ERROR = "its config.json has no {}, so its memory cannot be told; is it a Qwen3-VL model?"


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
        targets: names of the adapted matrices of a decoder layer.
        layers: how many decoder layers are adapted; None for all.
        magnitudes: whether DoRA's are trained as well.
        moments: arrays the optimizer keeps of each trained one.
        images: photographs whose features are kept in memory.
    """

    batch: int
    checkpoint: bool
    itemsize: int
    bits: int | None = None
    rank: int = 16
    targets: tuple[str, ...] = MATRICES
    layers: int | None = None
    magnitudes: bool = False
    moments: int = 2
    images: int = 0
