"""Any architecture that mlx-vlm loads, through its own forward: slower, and nothing is cached.

The tower runs in every step, logits are computed for every position, and since such forwards ask
the host where the image tokens are, a step is not compiled. What it learns is the same. A picture
stays what the processor made of it (:class:`Unseen`) until the forward takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ModelError
from . import decoder
from .backend import mx
from .qwen3_vl import Grid, Inputs, Unseen

LAYERS = "language_model.model.layers."
"""What the names of decoder matrices have to begin with, because adapters are stored under them."""


@dataclass(frozen=True)
class PlainInputs:
    """One row as a processor makes it.

    Attributes:
        tokens: (1, L) int32, image tokens among them; right padding changes nothing.
        pixels: ``pixel_values`` as the model takes them; None without a picture.
        more: further arguments of the model's forward, such as ``image_grid_thw``.
    """

    tokens: mx.array
    pixels: mx.array | None = None
    more: Mapping[str, mx.array] = field(default_factory=dict)


Arguments = Callable[[Unseen], tuple[mx.array, Mapping[str, mx.array]]]
"""Makes ``pixels`` and ``more`` of :class:`PlainInputs` from a picture."""


def with_grid(picture: Unseen) -> tuple[mx.array, Mapping[str, mx.array]]:
    """The arguments of Qwen2-VL and its kin: patches, and how they are arranged."""
    return picture.patches, {"image_grid_thw": mx.array([picture.grid])}


class Plain:
    """A backbone over a model's stock forward, for rows one at a time.

    It hands on logits where :class:`Qwen3VL` hands on hidden states, so its head does nothing.

    Args:
        model: an mlx-vlm model with a ``language_model``.
        image_token: id of the tokens that stand for a picture.
        merge: patches per image token and side.
        arguments: makes the forward's arguments of a picture.
    """

    compiles = False
    tower_adapted = False
    keeps_features = False

    def __init__(
        self,
        model: Any,
        *,
        image_token: int = -1,
        merge: int = 2,
        arguments: Arguments = with_grid,
    ) -> None:
        self.model = model
        self.image_token = image_token
        self.merge = merge
        self.arguments = arguments

    @property
    def model_type(self) -> str:
        """The architecture."""
        return str(self.model.config.model_type)

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        text = getattr(self.model.config, "text_config", self.model.config)
        return int(getattr(text, "max_position_embeddings", None) or 1 << 15)

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the activations."""
        return self.model.language_model.model.norm.weight.dtype

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return int(self.model.language_model.model.norm.weight.size)

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return int(self.model.language_model.model.embed_tokens.weight.shape[0])

    def encode(self, pixels: np.ndarray | mx.array, grid: Grid) -> list[Unseen]:
        """The pictures as they are: the forward takes nothing else.

        Args:
            pixels: (P, C) or (B, P, C).
            grid: patches of each picture.
        """
        patches = mx.array(pixels)
        return [Unseen(one, grid) for one in (patches[None] if patches.ndim == 2 else patches)]

    def rows(self, inputs: Inputs | PlainInputs) -> list[PlainInputs]:
        """A batch's rows, each with the arguments of the stock forward."""
        if isinstance(inputs, PlainInputs):
            return [inputs]
        pictures, made = iter(inputs.unseen), []
        index = inputs.image_index
        shown: Any = [] if index is None else np.array(index > 0).any(1)
        for row in range(inputs.tokens.shape[0]):
            pixels, more = None, {}
            if len(shown) and shown[row]:
                pixels, more = self.arguments(next(pictures))
            made.append(PlainInputs(inputs.tokens[row : row + 1], pixels, more))
        return made

    def hidden(
        self, inputs: Inputs | PlainInputs, *, cache: Any = None, checkpoint: bool = False
    ) -> mx.array:
        """Logits (B, L, V) of a batch.

        Raises:
            ModelError: a cache was given, which this forward fills in its own way
                (see ``evaluation.stock``).
        """
        if cache is not None:
            raise ModelError(f"a {self.model_type} model is not answered with caches of our own")
        return mx.stack([self._logits(row, checkpoint) for row in self.rows(inputs)])

    def hidden_at(
        self, inputs: Inputs | PlainInputs, where: mx.array, *, checkpoint: bool = False
    ) -> mx.array:
        """Logits (M, V) of the M positions ``where``, flat indices row · L + position.

        ``checkpoint`` recomputes each decoder layer in the backward pass.
        """
        found = self.hidden(inputs, checkpoint=checkpoint)
        return found.reshape(-1, found.shape[-1])[where]

    def head(self, h: mx.array) -> mx.array:
        """The logits, as they are."""
        return h

    def head_back(self, slope: mx.array) -> mx.array:
        """The gradient, as it is."""
        return slope

    def forget(self) -> None:
        """Take out the positions that a language model keeps of the latest picture.

        mlx-vlm's Qwen2-VL and its kin go on with them in the next call, whatever that is of: a text
        after a picture would get other logits than the text alone.
        """
        for name in ("_position_ids", "_rope_deltas"):
            if hasattr(self.model.language_model, name):
                setattr(self.model.language_model, name, None)

    def _logits(self, row: PlainInputs, checkpoint: bool) -> mx.array:
        """Logits (L, V) of a row, on the way that mlx-vlm's generation takes.

        Not through the model's own call: some architectures (LLaVA) take the mask that it asks for
        in the place of the causal one, and every token would see the answer that it has to learn.
        """
        self.forget()
        mask = mx.ones(row.tokens.shape, mx.int32)
        more: dict[str, Any] = dict(row.more)
        made = self.model.get_input_embeddings(row.tokens, row.pixels, mask=mask, **more)
        given = {name: value for name, value in made.to_dict().items() if value is not None}
        given = more | given
        layers = self.model.language_model.model.layers
        with _recomputing(layers) if checkpoint else nullcontext():
            return self.model.language_model(row.tokens, **given).logits[0]


class _Recomputed:
    """A decoder layer whose inner activations are recomputed in the backward pass; all else that
    the model asks of it is the layer's own."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, h: mx.array, *rest: Any, **named: Any) -> mx.array:
        def forward(h: mx.array) -> mx.array:
            made = self._layer(h, *rest, **named)
            if not isinstance(made, mx.array):
                raise ModelError(
                    "trainer.grad_checkpoint=true needs layers that give one array, and this "
                    f"architecture's give a {type(made).__name__}; leave it false, or lower "
                    "data.max_pixels to save memory"
                )
            return made

        return decoder.recomputed(self._layer, forward)(h)


@contextmanager
def _recomputing(layers: list[Any]) -> Iterator[None]:
    """These very layers recomputed, for the length of the block; nothing of it outlives it."""
    before = list(layers)
    layers[:] = [_Recomputed(layer) for layer in before]
    try:
        yield
    finally:
        layers[:] = before


def unfit(model: Any, names: Sequence[str]) -> str:
    """What keeps an mlx-vlm model from being trained through :class:`Plain`; blank for nothing.

    Args:
        model: as mlx-vlm loads it.
        names: full names of its linear layers.
    """
    if not hasattr(model, "language_model"):
        return "has no language model in it that could be told from the rest"
    inner = getattr(model.language_model, "model", None)
    if not all(hasattr(inner, part) for part in ("layers", "norm", "embed_tokens")):
        return "has a language model of another build than layers, a norm and an embedding"
    if not any(name.startswith(LAYERS) for name in names):
        return f"keeps its decoder's matrices under other names than {LAYERS}…"
    return ""
