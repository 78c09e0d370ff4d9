"""One door from file to pixels: upright, RGB, bounded, and the same everywhere."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mondrian_ft.data import pixels
from mondrian_ft.data.pixels import (
    PixelSettings,
    fingerprint,
    open_photograph,
    to_photograph,
    to_pixels,
)
from mondrian_ft.errors import DataError

BOUNDS = PixelSettings(4096, 24576)
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def processor() -> Any:
    from mondrian_ft.model.processor import image_processor
    from mondrian_ft.sample import model_dir

    return image_processor(model_dir())


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """Four quarters of different colours: every turn of it is another picture."""
    values = np.zeros((height, width, 3), np.uint8)
    half, middle = height // 2, width // 2
    values[:half, :middle] = (200, 30, 30)
    values[:half, middle:] = (30, 200, 30)
    values[half:, :middle] = (30, 30, 200)
    values[half:, middle:] = (220, 220, 90)
    return Image.fromarray(values)


STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an upright picture under each EXIF orientation."""


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_gives_the_same_upright_picture(
    tmp_path, processor, orientation
) -> None:
    """Training elsewhere skips EXIF and inference applies it, so the model sees two worlds."""
    upright = picture()
    turn = STORED[orientation]
    stored = upright.transpose(turn) if turn is not None else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    opened = open_photograph(tmp_path / "a.png")
    assert opened.size == (96, 64)
    assert np.array_equal(np.asarray(opened), np.asarray(upright))
    ours = to_pixels(opened, processor, BOUNDS)
    assert np.array_equal(ours.patches, to_pixels(upright, processor, BOUNDS).patches)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: Any) -> np.ndarray:
    image.save(tmp_path / name, **options)
    opened = open_photograph(tmp_path / name)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def test_grey_is_grey(tmp_path) -> None:
    """L and 1-bit: three equal channels."""
    grey = picture().convert("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    assert np.array_equal(saved(tmp_path, grey), expected)
    bits = np.asarray(grey) > 100
    assert np.array_equal(saved(tmp_path, Image.fromarray(bits))[..., 0], bits * 255)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_transparent_lies_on_white(tmp_path, mode) -> None:
    """As transformers does; dropping alpha shows colours nobody saw."""
    image = picture().convert(mode)
    alpha = np.zeros((64, 96), np.uint8)
    alpha[:, 48:] = 255
    alpha[:, 40:48] = 128
    image.putalpha(Image.fromarray(alpha))
    found = saved(tmp_path, image)
    plain = np.asarray(picture().convert(mode).convert("RGB"))
    assert (found[:, :40] == 255).all()
    assert np.array_equal(found[:, 48:], plain[:, 48:])
    between = (plain[:, 40:48].astype(float) + 255) / 2
    assert np.abs(found[:, 40:48] - between).max() <= 1.5


def test_palettes(tmp_path) -> None:
    """With and without a transparent colour."""
    image = picture().quantize(4)
    assert np.abs(saved(tmp_path, image).astype(int) - np.asarray(picture())).max() < 8
    clear = int(np.asarray(image)[0, 0])
    found = saved(tmp_path, image, transparency=clear)
    assert (found[:32, :48] == 255).all()
    assert (found[32:, 48:, 2] < 255).all()


def test_cmyk(tmp_path) -> None:
    """As Pillow converts it; the colours are about right."""
    found = saved(tmp_path, picture().convert("CMYK"), "a.tiff")
    assert np.abs(found.astype(int) - np.asarray(picture())).max() < 4


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bit_grey_is_scaled(tmp_path, name) -> None:
    """Both libraries clip it at 255, which makes any such photograph white."""
    values = (np.arange(64 * 96).reshape(64, 96) * 10).astype(np.uint16)
    found = saved(tmp_path, Image.fromarray(values), name)
    assert np.array_equal(found[..., 0], np.round(values / 257).astype(np.uint8))


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path) -> None:
    """Below 256 of 65,535 it is black; it was once taken for 8 bits and came out bright."""
    values = np.full((64, 96), 200, np.uint16)
    assert saved(tmp_path, Image.fromarray(values)).max() == 1


def write(path: Path, content: bytes | Image.Image) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    return path


def jpeg() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def claim(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = (header, data, b"IEND")
    chunks = b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


BAD: dict[str, tuple[str, Any, str]] = {
    "truncated": ("a.jpg", jpeg()[:2000], "cannot be decoded .*truncated"),
    "text": ("a.jpg", b"This is a note, not a photograph.\n", "is not a picture"),
    "empty": ("a.jpg", b"", "is not a picture"),
    "one pixel": ("a.png", Image.new("RGBA", (1, 1)), "has 1×1 pixels; a side needs at least 32"),
    "strip": ("a.png", Image.new("RGB", (8000, 32)), "a strip longer than 200:1; crop it"),
    "large": ("a.png", claim(13_100, 13_000), "13100×13000 pixels, more than the 170,000,000"),
    "bomb": ("a.png", claim(60_000, 60_000), "more than the 170,000,000 that are read; shrink"),
    "float": ("a.tiff", Image.new("F", (64, 64), 0.5), "floating-point pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, kind) -> None:
    """It names the file and says what to do; size claims are refused unread."""
    name, content, sentence = BAD[kind]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=sentence) as caught:
        open_photograph(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path) -> None:
    """Sentences too."""
    with pytest.raises(DataError, match="does not exist; it was there when"):
        open_photograph(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="cannot be decoded"):
        open_photograph(tmp_path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(at=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_no_damage_gets_past_as_anything_but_a_picture_or_a_sentence(scratch, kind, at) -> None:
    """Changed bytes anywhere, EXIF included: a picture, or a DataError."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(48, 40).save(file, kind, exif=exif)
    content = bytearray(file.getvalue())
    for place, value in at:
        content[place % len(content)] = value
    path = scratch / f"a.{kind.lower()}"
    path.write_bytes(bytes(content))
    with suppress(DataError):
        assert open_photograph(path).mode == "RGB"


@pytest.mark.parametrize("size", [(96, 64), (301, 200), (40, 33), (1200, 90)])
def test_patches_equal_mlx_vlms_processor(tmp_path, processor, size) -> None:
    """The very numbers its own processor gives for the picture."""
    noise = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    ours = to_pixels(open_photograph(tmp_path / "a.png"), processor, BOUNDS)
    theirs = processor(
        [Image.fromarray(noise)], min_pixels=BOUNDS.min_pixels, max_pixels=BOUNDS.max_pixels
    )
    assert np.array_equal(ours.patches, np.asarray(theirs["pixel_values"]))
    assert ours.grid == tuple(int(n) for n in theirs["image_grid_thw"][0])
    t, h, w = ours.grid
    assert ours.patches.shape[0] == t * h * w
    assert ours.tokens == t * h * w // 4
    assert BOUNDS.min_pixels <= h * w * 256 <= BOUNDS.max_pixels


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.48, 0.46, 0.41)])
@pytest.mark.parametrize("size", [(64, 96), (160, 64), (128, 128)])
def test_patches_become_the_picture_again(processor, monkeypatch, size, mean) -> None:
    """To the last bit where nothing was resized, whatever the normalisation is."""
    monkeypatch.setattr(processor, "image_mean", list(mean))
    monkeypatch.setattr(processor, "image_std", [0.5, 0.27, 0.3])
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    found = to_photograph(to_pixels(Image.fromarray(noise), processor, BOUNDS), processor)
    assert found.mode == "RGB"
    assert found.size == size
    assert np.array_equal(np.asarray(found), noise)


def test_a_picture_made_smaller_comes_back_small(processor) -> None:
    """What is shown is what the model sees, not the file."""
    found = to_photograph(to_pixels(picture(960, 640), processor, BOUNDS), processor)
    assert found.size == (192, 128)
    values = np.asarray(found).astype(int)
    assert np.abs(values[5, 5] - (200, 30, 30)).max() <= 1
    assert np.abs(values[-5, -5] - (220, 220, 90)).max() <= 1


def test_the_bounds_are_obeyed(processor) -> None:
    """A large photograph shrinks to the cap; the folder's own setting has no say."""
    large = Image.fromarray(np.zeros((900, 1350, 3), np.uint8))
    tokens = [
        to_pixels(large, processor, PixelSettings(3136, most)).tokens
        for most in (4_096, 65_536, 1_310_720)
    ]
    assert tokens[0] <= 4 < tokens[1] <= 64 < tokens[2] <= 1280
    assert tokens[2] > 1000
    small = Image.fromarray(np.zeros((40, 33, 3), np.uint8))
    assert to_pixels(small, processor, PixelSettings(16_384, 24_576)).tokens >= 16
    assert to_pixels(small, processor, PixelSettings(1_024, 24_576)).tokens == 1


def test_the_fingerprint_changes_with_what_changes_pixels(processor, monkeypatch) -> None:
    """Each bound, the pipeline's version, the processor's numbers; nothing else."""
    first = fingerprint(processor, BOUNDS)
    assert fingerprint(processor, PixelSettings(4096, 24576)) == first
    assert len(first) == 16
    others = [
        fingerprint(processor, PixelSettings(3136, 24576)),
        fingerprint(processor, PixelSettings(4096, 16384)),
    ]

    class Other:
        """The same processor with another mean."""

        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

        def __call__(self, images: Any, **kwargs: Any) -> Any:
            output = dict(processor(images, **kwargs))
            return output | {"pixel_values": np.asarray(output["pixel_values"]) * 1.01}

    others.append(fingerprint(Other(), BOUNDS))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(pixels, "PIPELINE_VERSION", 99)
    others.append(fingerprint(processor, BOUNDS))
    assert len({first, *others}) == 5
