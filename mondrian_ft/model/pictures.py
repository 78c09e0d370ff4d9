"""Pictures of architectures that see every photograph in one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ModelError
from .backend import mx
from .qwen3_vl import Unseen

_BLANK = (64, 96)


class FixedPictures:
    """An image processor that gives pixels of one size, in the terms of one that gives patches.

    A picture that takes N image tokens has N rows of numbers here, cut from its pixels as they lie
    in memory, and :meth:`arguments` puts them together again. No row is a place in the picture;
    nothing needs one to be.

    Args:
        processor: the model's own, of text and pictures.
        image_token: id of its image tokens.
        name: what to call the model in errors.

    Raises:
        ModelError: pictures of different sizes get different numbers of tokens or pixels, or a
            picture's tokens do not follow each other.
    """

    merge_size = 1
    patch_size = 1
    temporal_patch_size = 1

    def __init__(self, processor: Any, image_token: int, name: str) -> None:
        self._images = processor.image_processor
        self.do_rescale = bool(getattr(self._images, "do_rescale", True))
        self.rescale_factor = float(getattr(self._images, "rescale_factor", 1 / 255))
        self.do_normalize = bool(getattr(self._images, "do_normalize", True))
        self.image_mean = list(getattr(self._images, "image_mean", (0.5,) * 3))
        self.image_std = list(getattr(self._images, "image_std", (0.5,) * 3))
        text = processor.tokenizer.decode([image_token])
        found = []
        for height, width in (_BLANK, _BLANK[::-1]):
            picture = np.zeros((height, width, 3), np.uint8)
            output = processor(text=[text], images=[picture])
            ids = np.asarray(output["input_ids"]).reshape(-1)
            found.append((int((ids == image_token).sum()), self._pixels(picture).shape))
        (self.tokens, self.shape), other = found
        size = int(np.prod(self.shape))
        if other != found[0] or self.shape[0] != 1 or not self.tokens or size % self.tokens:
            told = " and ".join(f"{count} tokens for pixels {shape}" for count, shape in found)
            raise ModelError(
                f"{name} has {told} of two pictures of different sides; only architectures that "
                "see every picture in one piece and one size can be trained here, so use a qwen3_vl"
            )

    def _pixels(self, picture: np.ndarray) -> np.ndarray:
        """(1, C, H, W) float32 of an RGB picture (H', W', 3)."""
        from PIL import Image

        output = self._images([Image.fromarray(picture)])
        return np.stack([np.asarray(one, np.float32) for one in output["pixel_values"]])

    def __call__(self, images: Any, **bounds: Any) -> dict[str, Any]:
        """Patches (N, C H W / N) of one picture (3, H', W'); the bounds on its pixels do nothing,
        since its size is the model's."""
        pixels = self._pixels(np.asarray(images[0]).transpose(1, 2, 0))
        patches = pixels.reshape(self.tokens, -1)
        return {"pixel_values": patches, "image_grid_thw": np.array([[1, 1, self.tokens]])}

    def num_image_tokens(self, height: int, width: int, **bounds: Any) -> int:
        """Image tokens of a picture, which are as many for any."""
        return self.tokens

    def whole(self, patches: np.ndarray) -> np.ndarray:
        """Pixels (C, H, W) of a picture's patches, as the model takes them."""
        return patches.reshape(self.shape)[0]

    def arguments(self, picture: Unseen) -> tuple[mx.array, Mapping[str, mx.array]]:
        """``pixel_values`` (1, C, H, W) for the model's forward."""
        return picture.patches.reshape(self.shape), {}
