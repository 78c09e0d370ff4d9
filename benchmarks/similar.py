"""``python -m benchmarks similar``: copies that are missed, and photographs taken for copies.

The material: the sample's rendered scenes of several seeds, the photographs that scikit-image and
scikit-learn ship, and those of a folder of one's own (the environment variable
``MONDRIAN_FT_PHOTOGRAPHS``). Every copy is written as a file and compared with its original's file.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

OWN = "MONDRIAN_FT_PHOTOGRAPHS"
SEEDS = 10
"""Samples whose every scene is compared with every other."""
SCENES = 60
"""Scenes of which copies are made."""
NO_PHOTOGRAPHS = {
    # Drawn by a program, the second of a stereo pair, or the grey copy of its neighbour.
    "chessboard_GRAY.png",
    "chessboard_RGB.png",
    "color.png",
    "horse.png",
    "logo.png",
    "motorcycle_right.png",
    "no_time_for_that_tiny.gif",
    "phantom.png",
}
EXIF_ORIENTATION = 0x0112
TURNS = {3: 180, 6: 90, 8: 270}
"""Degrees counter-clockwise by which a picture is stored turned, by its EXIF orientation."""


def scenes(seed: int) -> Iterator[Image.Image]:
    """The scenes of a sample, each once."""
    from mondrian_ft.sample.jobs import plan
    from mondrian_ft.sample.scenes import render

    # Damaged files would show scenes too; what is compared here is scenes.
    for scene in dict.fromkeys(shown.scene for shown in plan(seed).photographs):
        yield render(scene)


def photographs() -> dict[str, Image.Image]:
    """Photographs of other people, in RGB, by file name."""
    import skimage
    import sklearn

    folders = [
        Path(str(skimage.__file__)).parent / "data",
        Path(str(sklearn.__file__)).parent / "datasets" / "images",
        *([Path(os.environ[OWN])] if OWN in os.environ else []),
    ]
    found = {}
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.suffix in (".jpg", ".png") and path.name not in NO_PHOTOGRAPHS:
            with Image.open(path) as file:
                found[path.name] = file.convert("RGB")
    return found


def copies(picture: Image.Image, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """(what was done, JPEG file) of every kind of copy; random where the kind leaves a choice."""
    for quality in (25, 50, 75, 95):
        yield f"quality {quality}", _jpeg(picture, quality)
    for share in (0.2, 0.35, 0.5, 0.75):
        size = [max(32, round(side * share)) for side in picture.size]
        yield f"resized {share}", _jpeg(picture.resize((size[0], size[1])), 85)
    yield "grey", _jpeg(picture.convert("L"), 85)
    for change, factor in (("brightness", 0.85), ("brightness", 1.15)):
        yield change, _jpeg(ImageEnhance.Brightness(picture).enhance(factor), 85)
    for factor in (0.85, 1.2):
        yield "contrast", _jpeg(ImageEnhance.Contrast(picture).enhance(factor), 85)
    for orientation, degrees in TURNS.items():
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        turned = picture.rotate(degrees, expand=True)
        yield "turned by EXIF", _jpeg(turned, 85, exif=exif)
    for least in (0.9, 0.8, 0.7, 0.6):
        for shares in _shares(least, rng):
            name = f"crop, sides {round(100 * least)} to {round(100 * least) + 10} %"
            yield name, _jpeg(_crop(picture, shares, rng), int(rng.integers(40, 91)))
    for shares in ((0.6, 1.0), (1.0, 0.6), (0.75, 1.0), (1.0, 0.75)):
        yield "crop of one side", _jpeg(_crop(picture, shares, rng), int(rng.integers(40, 91)))
    for _ in range(3):
        share = rng.uniform(0.6, 1)
        made = _crop(picture, (share, share), rng)
        made = made.resize((made.width // 2, made.height // 2)).convert("L")
        yield "crop, halved, grey, quality 50", _jpeg(made, 50)


def _shares(least: float, rng: np.random.Generator) -> Iterator[tuple[float, float]]:
    """Two crops that keep the aspect and two whose sides are drawn on their own."""
    for _ in range(2):
        share = rng.uniform(least, least + 0.1)
        yield share, share
        yield rng.uniform(least, least + 0.1), rng.uniform(least, least + 0.1)


def _crop(
    picture: Image.Image, shares: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    width, height = (round(s * k) for s, k in zip(picture.size, shares, strict=True))
    left = int(rng.integers(picture.width - width + 1))
    top = int(rng.integers(picture.height - height + 1))
    return picture.crop((left, top, left + width, top + height))


def _jpeg(picture: Image.Image, quality: int, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, **options)
    return stream.getvalue()


def run(repeats: int) -> dict[str, Any]:
    """Copies missed, by what was done to them, and pairs of photographs taken for one.

    ``repeats`` changes nothing: what is counted is the same each time.
    """
    from mondrian_ft.data.similar import Look, look_at, near_pairs

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:

        def look(data: bytes, name: str) -> Look:
            path = Path(folder) / name
            path.write_bytes(data)
            return look_at(path)

        def png(picture: Image.Image) -> bytes:
            stream = io.BytesIO()
            picture.save(stream, "PNG", compress_level=1)
            return stream.getvalue()

        def missed(job: tuple[int, Image.Image]) -> list[tuple[str, bool]]:
            number, picture = job
            original = look(png(picture), f"{number}.png")
            made = copies(picture, np.random.default_rng([1, number]))
            return [
                (what, not near_pairs([original, look(data, f"{number}.jpg")]))
                for what, data in made
            ]

        theirs = photographs()
        ours = [picture for seed in range(SEEDS) for picture in scenes(seed)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for kind, some in (("scenes", ours[:SCENES]), ("photographs", list(theirs.values()))):
                counts: dict[str, list[int]] = {}
                for what, miss in (m for one in pool.map(missed, enumerate(some)) for m in one):
                    count = counts.setdefault(what, [0, 0])
                    count[0] += miss
                    count[1] += 1
                for what, (miss, tried) in counts.items():
                    print(f"{kind:<12} {what:<34} missed {miss:3d} of {tried}")
                results[kind] = {what: f"{m} of {n}" for what, (m, n) in counts.items()}
            everything = [*ours, *theirs.values()]
            jobs = [(png(picture), f"all-{n}.png") for n, picture in enumerate(everything)]
            looks = list(pool.map(lambda job: look(*job), jobs))
        # Several samples may draw one scene twice, byte for byte; those are no mistake.
        different = list({look.grey: look for look in looks}.values())
        pairs = near_pairs(different)
    total = len(different) * (len(different) - 1) // 2
    print(f"{len(pairs)} of {total:,} pairs of different photographs are taken for one")
    return {**results, "false_pairs": f"{len(pairs)} of {total}"}
