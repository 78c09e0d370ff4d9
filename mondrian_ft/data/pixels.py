"""The only door from an image file to the numbers a model sees.

Training, evaluation and the service all come through :func:`open_photograph` and
:func:`to_pixels`, and the :func:`fingerprint` of the settings is stored with every adapter, so
that a model never meets pictures prepared in another way than those it learnt from.
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from ..errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# Bump when the same file and settings start to give other numbers.
PIPELINE_VERSION = 1
MAX_FILE_PIXELS = 170_000_000
"""Photographs that claim more pixels than this are refused unread (decompression bombs).

Below the 178,956,970 at which Pillow refuses by itself, with advice for programmers.
"""
MIN_SIDE = 32
"""Pixels; one image token is 32 × 32, and a smaller picture shows nothing to criticise."""
MAX_ASPECT = 200.0
"""Qwen's processor refuses longer strips."""

Grid = tuple[int, int, int]
"""Patches of a picture: (time, height, width); time is 1 for photographs."""


class ImageProcessor(Protocol):
    """What makes patches of an RGB image; mlx-vlm's ``Qwen3VLImageProcessor`` is one."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, Any]: ...
    def num_image_tokens(self, height: int, width: int, **kwargs: Any) -> int: ...


@dataclass(frozen=True)
class PixelSettings:
    """Bounds on a picture's pixels (width × height) after resizing; the aspect is kept."""

    min_pixels: int
    max_pixels: int


@dataclass(frozen=True)
class Pixels:
    """A photograph as the model sees it.

    Attributes:
        patches: (P, C) float32, P = time · height · width patches in the processor's order.
        grid: those three numbers; time is 1.
        merge: patches per image token and side.
    """

    patches: np.ndarray
    grid: Grid
    merge: int

    @property
    def tokens(self) -> int:
        """Image tokens: P / merge²."""
        return self.grid[0] * self.grid[1] * self.grid[2] // self.merge**2


@dataclass(frozen=True)
class LatePixels:
    """A photograph whose patches are made when they are asked for, and not kept.

    Patches of a photograph take 25 MB, its features are cached; of thousands of rows nobody needs
    more than a few at a time, and none in a second run.

    Attributes:
        path: the file.
        processor, settings: how it is read.
        grid, merge: as in :class:`Pixels`.
    """

    path: Path
    processor: ImageProcessor
    settings: PixelSettings
    grid: Grid
    merge: int

    @property
    def tokens(self) -> int:
        """Image tokens: P / merge²."""
        return self.grid[0] * self.grid[1] * self.grid[2] // self.merge**2

    @property
    def patches(self) -> np.ndarray:
        """See :class:`Pixels`; reads the file.

        Raises:
            DataError: it cannot be read, or is another picture than it was.
        """
        pixels = to_pixels(open_photograph(self.path), self.processor, self.settings)
        if pixels.grid != self.grid:
            raise DataError(
                f"photograph {self.path} has other sides than when the run began; leave the files "
                "alone while a run reads them, and start again"
            )
        return pixels.patches


def grid_of(path: Path, processor: Any, settings: PixelSettings) -> Grid | None:
    """The grid that a photograph will have, from the head of its file; None if only its pixels
    tell, or nothing does."""
    from PIL import Image

    if not hasattr(processor, "_resolved_size"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                width, height = file.size
                if file.getexif().get(0x0112, 1) in (5, 6, 7, 8):
                    width, height = height, width
        bounds = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
        high, wide = processor._resolved_size(height, width, **bounds)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return None
    return 1, high // processor.patch_size, wide // processor.patch_size


def open_photograph(path: Path | IO[bytes], *, shortest: int | None = None) -> Image:
    """Read a photograph upright and in RGB.

    EXIF orientation is applied; grey, palette, CMYK and 16-bit pictures are converted; what is
    transparent is laid on white, as transformers' processor does.

    Args:
        path: the file, or its bytes as a stream; errors name it as ``str`` gives it.
        shortest: decode a JPEG at a half, a quarter or an eighth of its size, as long as both
            sides keep at least so many pixels: every byte is read in a third of the time.

    Raises:
        DataError: the file is missing, no picture, truncated, too small, too long a strip, in
            floating point, or claims more than :data:`MAX_FILE_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Our own limit is lower than Pillow's error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                _check_size(path, *file.size)
                if shortest is not None:
                    file.draft("RGB", (shortest, shortest))
                file.load()
                return _to_rgb(path, ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise DataError(
            f"photograph {path} does not exist; it was there when the data were linked, so link "
            "again or put it back"
        ) from None
    except UnidentifiedImageError:
        raise DataError(
            f"{path} is not a picture Pillow can read; leave it out or replace it"
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(path, "too many") from None
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise DataError(f"{path} cannot be decoded ({error}); leave it out or replace it") from None


def to_pixels(photograph: Image, processor: ImageProcessor, settings: PixelSettings) -> Pixels:
    """Patches of an upright RGB photograph, resized within the pixel bounds."""
    import numpy as np

    output = processor(
        [np.asarray(photograph).transpose(2, 0, 1)],
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
    )
    t, h, w = (int(n) for n in output["image_grid_thw"][0])
    return Pixels(np.asarray(output["pixel_values"], np.float32), (t, h, w), processor.merge_size)


def count_tokens(path: Path, processor: ImageProcessor, settings: PixelSettings) -> int:
    """Image tokens that a photograph will have, from its header: no pixel is decoded.

    Raises:
        DataError: as :func:`open_photograph`, for what a header tells.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                _check_size(path, *file.size)
                width, height = file.size
                turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        raise DataError(f"photograph {path} does not exist; link again or put it back") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{path} is not a picture Pillow can read; leave it out or replace it"
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(path, "too many") from None
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise DataError(f"{path} cannot be read ({error}); leave it out or replace it") from None
    if turned:
        width, height = height, width
    return int(
        processor.num_image_tokens(
            height, width, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
        )
    )


def to_photograph(pixels: Pixels | LatePixels, processor: ImageProcessor) -> Image:
    """The RGB picture that patches were made of: :func:`to_pixels` undone, but for the resizing.

    What a person sees of it is what enters the vision tower, and nothing else: it is put together
    from the patches, never read from the file.
    """
    if isinstance(whole := getattr(processor, "whole", None), Callable):
        # Of one size for all photographs, and no patches of it.
        return _as_photograph(whole(pixels.patches).transpose(1, 2, 0), processor)
    _, high, wide = pixels.grid
    merge, side = pixels.merge, processor.patch_size
    # The processor's order: blocks of merge x merge patches, row by row; in each patch the
    # channels, then the frames. A photograph's frames are copies of each other, so one is enough.
    shape = (high // merge, wide // merge, merge, merge, -1, processor.temporal_patch_size)
    values = pixels.patches.reshape(*shape, side, side)[:, :, :, :, :, 0]
    values = values.transpose(0, 2, 5, 1, 3, 6, 4).reshape(high * side, wide * side, -1)
    return _as_photograph(values, processor)


def _as_photograph(values: np.ndarray, processor: ImageProcessor) -> Image:
    """An RGB picture of what a processor made of one, (H, W, 3)."""
    import numpy as np
    from PIL import Image

    if processor.do_normalize:
        values = values * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    if processor.do_rescale:
        values = values / processor.rescale_factor
    return Image.fromarray(np.round(values).clip(0, 255).astype(np.uint8))


def fingerprint(processor: ImageProcessor, settings: PixelSettings) -> str:
    """16 hexadecimal digits that change when the same photograph would give other numbers.

    Covers the settings, the pipeline's version and the patches of a drawn probe picture, so that
    a changed library is noticed as well as a changed setting.
    """
    import numpy as np
    from PIL import Image

    x, y = np.meshgrid(np.arange(203), np.arange(149))
    probe = np.stack([(x * 5) % 256, (y * 7) % 256, (x * y) % 256], axis=-1).astype(np.uint8)
    pixels = to_pixels(Image.fromarray(probe), processor, settings)
    facts = {
        "version": PIPELINE_VERSION,
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "grid": pixels.grid,
        # Rounded: the last bit of a bicubic filter may differ between processors of one kind.
        "probe": hashlib.sha256(np.round(pixels.patches, 3).astype("<f4").tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _check_size(path: Path | IO[bytes], width: int, height: int) -> None:
    if width * height > MAX_FILE_PIXELS:
        raise _too_large(path, f"{width}×{height}")
    if min(width, height) < MIN_SIDE:
        raise DataError(
            f"{path} has {width}×{height} pixels; a side needs at least {MIN_SIDE}, so leave it out"
        )
    if max(width, height) / min(width, height) > MAX_ASPECT:
        raise DataError(
            f"{path} has {width}×{height} pixels, a strip longer than {MAX_ASPECT:.0f}:1; crop it"
        )


def _too_large(path: Path | IO[bytes], claim: str) -> DataError:
    return DataError(
        f"{path} claims {claim} pixels, more than the {MAX_FILE_PIXELS:,} that are read; shrink it "
        "first"
    )


def _to_rgb(path: Path | IO[bytes], image: Image) -> Image:
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise DataError(
            f"{path} holds floating-point pixels, whose black and white are unknown; save it with "
            "8 or 16 bits"
        )
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling. Plain "I" has 32
        # bits, of which a file uses 8 or 16.
        values = np.asarray(image).astype(np.float32)
        scale = 257.0 if image.mode != "I" or values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.round(values / scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, rgba)
    return image.convert("RGB")
