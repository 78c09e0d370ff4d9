"""Golden hashes of awkward pictures, and one door for training and evaluation."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mondrian_ft.data.batches import encode
from mondrian_ft.data.pixels import open_photograph
from mondrian_ft.data.rows import Row


def rgb() -> Image.Image:
    """48 × 40, unlike itself in every orientation."""
    x, y = np.meshgrid(np.arange(48), np.arange(40))
    planes = [(x * 5) % 256, (y * 6) % 256, (x * y) % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def with_alpha(mode: str) -> Image.Image:
    picture = rgb().convert(mode)
    picture.putalpha(
        Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) % 256).convert("L")
    )
    return picture


def sixteen_bits() -> Image.Image:
    return Image.fromarray((np.arange(48 * 40, dtype=np.uint16) * 34).reshape(40, 48))


def palette() -> Image.Image:
    picture = Image.new("P", (48, 40))
    picture.putpalette([value for n in range(256) for value in (n, 255 - n, (n * 7) % 256)])
    picture.putdata([n % 256 for n in range(48 * 40)])
    return picture


AWKWARD: dict[str, tuple[Callable[[], Image.Image], str, str]] = {
    "rgb": (rgb, "png", "31092833a41af9ff"),
    "l": (lambda: rgb().getchannel(0), "png", "a6c6a1f378d355a8"),
    "la": (lambda: with_alpha("L"), "png", "f8129a81dedd7665"),
    "p": (palette, "png", "cf2795506beabc51"),
    "rgba": (lambda: with_alpha("RGB"), "png", "cfef5a03a3c332b3"),
    "sixteen_bits": (sixteen_bits, "png", "2ffa3b947a78541c"),
    "cmyk": (lambda: rgb().convert("CMYK"), "tiff", "31092833a41af9ff"),
}
"""Kind: how it is made, a lossless format, the first 16 digits of the hash of its RGB values."""
ORIENTED = (
    "31092833a41af9ff",
    "3ef1d009a96d604c",
    "2734066a249c7e6e",
    "7e3c33b9e43f4640",
    "96a94409f9c10629",
    "ee3e3e6c27cc3ba6",
    "a98863f1901f3c65",
    "757630133d220e37",
)
"""Of the RGB picture with EXIF orientation 1 to 8."""


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def saved(folder: Path, name: str, picture: Image.Image, ending: str, orientation: int = 1) -> Path:
    path, exif = folder / f"{name}.{ending}", Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_pictures_become_the_same_numbers_for_ever(kind: str, tmp_path: Path):
    """A new Pillow or a change of ours that moves a pixel is noticed here, not by an adapter."""
    make, ending, golden = AWKWARD[kind]
    opened = open_photograph(saved(tmp_path, kind, make(), ending))
    assert (opened.mode, opened.size) == ("RGB", (48, 40))
    assert digest(np.asarray(opened)) == golden


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_has_its_golden_hash(orientation: int, tmp_path: Path):
    opened = open_photograph(saved(tmp_path, "o", rgb(), "png", orientation))
    assert opened.size == ((48, 40) if orientation < 5 else (40, 48))
    assert digest(np.asarray(opened)) == ORIENTED[orientation - 1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_and_evaluation_see_the_same_pixels(
    orientation: int, tmp_path: Path, lab: Any, base: Any
):
    """What the trainer's batches hold and what the evaluator's requests hold, hash for hash."""
    from mondrian_ft.data.batches import BatchStream, in_order

    path = saved(tmp_path, "o", rgb().resize((120, 96)), "png", orientation)

    def seen(response: str) -> Any:
        row = Row("job", "ansel", path, "Judge it.", response, "0" * 64)
        return encode(row, base, base.image_processor, lab.settings, base.backbone.image_token)

    stream = BatchStream([seen("{}")], batch_size=1, seed=0, pad_token=base.pad_token)
    trained = stream.next().examples[0].pixels
    judged = next(in_order([seen('{"other": 1}')], 1, base.pad_token)).examples[0].pixels
    assert trained.grid == judged.grid
    assert digest(trained.patches) == digest(judged.patches)
    assert (trained.grid[1] > trained.grid[2]) == (orientation >= 5)
