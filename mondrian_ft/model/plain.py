"""Any architecture that mlx-vlm loads, through its own forward: slower, and nothing is cached.

The tower runs in every step, logits are computed for every position, and since such forwards ask
the host where the image tokens are, a step is not compiled. What it learns is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError
from .backend import mx


@dataclass(frozen=True)
class PlainInputs:
    """One row as a processor makes it.

    Attributes:
        tokens: (1, L) int32, image tokens among them, without padding.
        pixels: ``pixel_values`` as the model takes them; None without a picture.
        more: further arguments of the model's forward, such as ``image_grid_thw``.
    """

    tokens: mx.array
    pixels: mx.array | None = None
    more: Mapping[str, mx.array] = field(default_factory=dict)


class Plain:
    """A backbone over a model's stock forward, for rows one at a time.

    It hands on logits where :class:`Qwen3VL` hands on hidden states, so its head does nothing.

    Args:
        model: an mlx-vlm model with a ``language_model``.
    """

    compiles = False

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the activations."""
        return self.model.language_model.model.norm.weight.dtype

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return int(self.model.language_model.model.embed_tokens.weight.shape[0])

    def hidden_at(
        self, inputs: PlainInputs, where: mx.array, *, checkpoint: bool = False
    ) -> mx.array:
        """Logits (M, V) of the M positions ``where`` of a row.

        Raises:
            ModelError: recomputing layers was asked for, which this forward cannot.
        """
        if checkpoint:
            raise ModelError(
                "trainer.grad_checkpoint=true recomputes the layers of Qwen3-VL alone; leave it "
                "false for this architecture, or lower data.max_pixels to save memory"
            )
        mask = mx.ones(inputs.tokens.shape, mx.int32)
        output = self.model(inputs.tokens, inputs.pixels, mask, **inputs.more)
        return output.logits[0][where]

    def head(self, h: mx.array) -> mx.array:
        """The logits, as they are."""
        return h

    def head_back(self, slope: mx.array) -> mx.array:
        """The gradient, as it is."""
        return slope
