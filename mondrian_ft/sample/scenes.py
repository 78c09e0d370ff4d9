"""Rendered landscapes with known attributes: the sample's photographs.

A :class:`Scene` says what a photograph shows and how well it was taken; :func:`render` draws it.
Everything a critique may talk about is an attribute with a few named levels, so a generated
critique is true of its picture by construction, and what a model says can be checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# What the advisors judge. The order of levels carries no rank: that is each advisor's own affair.
JUDGED: dict[str, tuple[str, ...]] = {
    "tilt": ("level", "slight", "strong"),
    "placement": ("third", "centre", "edge"),
    "exposure": ("dark", "balanced", "bright"),
    "contrast": ("flat", "moderate", "strong"),
    "focus": ("sharp", "soft", "blurred"),
    "colour": ("monochrome", "muted", "natural", "garish"),
    "depth": ("one", "two", "three"),
    "luminary": ("sun", "moon", "none"),
}
# What a picture shows besides; described, never scored.
SHOWN: dict[str, tuple[str, ...]] = {
    "subject": ("pine", "oak", "cabin", "boulder"),
    "ground": ("water", "meadow", "sand"),
}
ATTRIBUTES = {**JUDGED, **SHOWN}

SIZES = ((320, 240), (240, 320), (336, 224), (288, 288), (400, 300), (224, 336))

_TILT_DEGREES = {"level": (0.0, 0.8), "slight": (4.0, 6.0), "strong": (10.0, 14.0)}
_PLACEMENT_X = {"third": (0.31, 0.36), "centre": (0.48, 0.52), "edge": (0.08, 0.12)}
_MEAN = {"dark": (0.22, 0.28), "balanced": (0.46, 0.54), "bright": (0.74, 0.80)}
_SPREAD = {"flat": (0.055, 0.075), "moderate": (0.13, 0.155), "strong": (0.23, 0.27)}
_BLUR = {"sharp": (0.0, 0.0), "soft": (1.3, 1.6), "blurred": (5.5, 7.0)}
_SATURATION = {
    "monochrome": (0.0, 0.0),
    "muted": (0.38, 0.48),
    "natural": (1.0, 1.15),
    "garish": (2.4, 2.9),
}
_GROUND = {"water": (0.28, 0.42, 0.56), "meadow": (0.32, 0.44, 0.22), "sand": (0.66, 0.56, 0.38)}
# The canvas is drawn larger than the frame, so that turning it never shows its corners.
_MARGIN = 1.34


@dataclass(frozen=True)
class Scene:
    """One photograph to be: a level for every attribute of :data:`ATTRIBUTES`, and a seed.

    ``seed`` drives everything that carries no meaning: sizes, clouds, textures, grain and the
    exact place within a level.
    """

    tilt: str
    placement: str
    exposure: str
    contrast: str
    focus: str
    colour: str
    depth: str
    luminary: str
    subject: str
    ground: str
    seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Scene:
        """A scene with every attribute drawn uniformly and independently."""
        levels = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
        return cls(**levels, seed=int(rng.integers(2**31)))

    def __getitem__(self, attribute: str) -> str:
        return getattr(self, attribute)


def render(scene: Scene) -> Image:
    """Draw a scene.

    Returns:
        An upright RGB image whose size is one of :data:`SIZES` (pixels, width by height).
    """
    import numpy as np
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(scene.seed)
    width, height = SIZES[rng.integers(len(SIZES))]

    def within(bounds: tuple[float, float]) -> float:
        return float(rng.uniform(*bounds))

    w, h = round(width * _MARGIN), round(height * _MARGIN)
    picture, horizon = _land_and_sky(scene, w, h, rng)
    picture = _subject(scene, picture, width, height, horizon, rng, within)

    angle = within(_TILT_DEGREES[scene.tilt]) * (1 if rng.random() < 0.5 else -1)
    picture = _frame(picture, width, height, angle)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    blur = within(_BLUR[scene.focus])
    pixels = np.empty((3, height, width), np.float32)
    for channel, band in enumerate(picture.split()):
        if blur:
            band = band.filter(ImageFilter.GaussianBlur(blur))
        np.divide(np.asarray(band), np.float32(255), out=pixels[channel])
    _develop(pixels, scene, within)
    # Grain comes last: film has it whether or not the lens was in focus. It is kept weaker than
    # the texture of a sharp picture, so that it cannot be mistaken for focus.
    pixels += (rng.standard_normal((height, width)) * 0.006).astype(np.float32)
    return _picture(pixels, 0.5)


def _picture(pixels: np.ndarray, rounding: float) -> Image:
    """An RGB image of planes (3, h, w) in [0, 1], which are overwritten.

    ``rounding`` is added before the fraction is cut: 0.5 rounds, 0 truncates.
    """
    import numpy as np
    from PIL import Image

    np.clip(pixels, 0, 1, out=pixels)
    pixels *= 255
    if rounding:
        pixels += rounding
    return Image.merge("RGB", [Image.fromarray(plane) for plane in pixels.astype(np.uint8)])


def _frame(canvas: Image, width: int, height: int, degrees: float) -> Image:
    """The middle (width, height) of a canvas turned about its centre, counter-clockwise."""
    from PIL import Image

    turn = math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    w, h = canvas.size
    # Where the frame's own pixels begin, relative to the canvas's centre.
    left, top = (w - width) // 2 - w / 2, (h - height) // 2 - h / 2
    matrix = (
        cos, -sin, cos * left - sin * top + w / 2,
        sin, cos, sin * left + cos * top + h / 2,
    )  # fmt: skip
    affine = Image.Transform.AFFINE
    return canvas.transform((width, height), affine, matrix, Image.Resampling.BILINEAR)


def _cloud(
    rng: np.random.Generator, w: int, h: int, cells: int, first: int = 0, last: int | None = None
) -> np.ndarray:
    """Smooth noise in [-1, 1] with about ``cells`` lumps across a canvas of (h, w).

    Only the rows from ``first`` to ``last`` are made; shape (last - first, w).
    """
    import numpy as np
    from PIL import Image

    last = h if last is None else last
    high = max(2, cells * h // w)
    small = Image.fromarray(rng.uniform(-1, 1, (high, cells)).astype(np.float32))
    box = (0, first * high / h, cells, last * high / h)
    return np.array(small.resize((w, last - first), Image.Resampling.BICUBIC, box=box))


def _ridge(rng: np.random.Generator, w: int, roughness: float) -> np.ndarray:
    """A skyline in [0, 1], shape (w,), from a few octaves of noise."""
    import numpy as np

    x = np.linspace(0, 1, w)
    line = np.zeros(w)
    for octave, weight in ((3, 1.0), (7, 0.45), (17, 0.2 * roughness)):
        knots = rng.uniform(0, 1, octave + 1)
        line += weight * np.interp(x, np.linspace(0, 1, octave + 1), knots)
    return (line - line.min()) / (np.ptp(line) + 1e-6)


def _land_and_sky(scene: Scene, w: int, h: int, rng: np.random.Generator) -> tuple[Image, float]:
    """Sky, sun or moon, ridges and ground, upright. Returns the canvas and the horizon's row.

    Each part is drawn on the rows it covers only. The order of the draws from ``rng`` is what a
    scene's seed means, and must stay.
    """
    import numpy as np
    from PIL import ImageDraw

    horizon = h * float(rng.uniform(0.50, 0.58))
    first = math.floor(horizon) + 1
    rows = np.arange(h, dtype=np.float32)[:, None]
    columns = np.arange(w, dtype=np.float32)[None, :]
    canvas = np.empty((3, h, w), np.float32)
    sky, land = canvas[:, :first], canvas[:, first:]

    top = np.array([0.30, 0.46, 0.74], np.float32) + rng.normal(0, 0.04, 3).astype(np.float32)
    low = np.array([0.80, 0.80, 0.82], np.float32) + rng.normal(0, 0.05, 3).astype(np.float32)
    if scene.luminary == "sun":
        low = np.array([0.98, 0.78, 0.52], np.float32)
    elif scene.luminary == "moon":
        top, low = top * 0.45, low * 0.55
    lowness = rows[:first] / horizon
    clouds = _cloud(rng, w, h, 6, 0, first)
    clouds += 0.4 * _cloud(rng, w, h, 15, 0, first)
    np.clip(clouds, 0, 1, out=clouds)
    clouds *= 0.12 * (1 - lowness * 0.5)
    np.add(_planes(top) + _planes(low - top) * lowness, clouds, out=sky)

    # Sun and moon stand on the far side of the frame from the subject, well inside it.
    x, y = w * float(rng.uniform(0.62, 0.74)), horizon * float(rng.uniform(0.42, 0.56))
    if scene.luminary != "none":
        _shine(sky, scene.luminary, x, y, min(w, h))

    if scene.depth in ("two", "three"):
        far = horizon - h * (0.05 + 0.14 * _ridge(rng, w, 1.0))
        start = max(0, math.floor(far.min()))
        stone = np.array([0.36, 0.38, 0.46], np.float32)
        veins = 0.05 * _cloud(rng, w, h, 40, start, first)
        behind = rows[start:first] > far
        np.copyto(sky[:, start:], _planes(stone) + veins, where=behind)

    ground = np.array(_GROUND[scene.ground], np.float32) + rng.normal(0, 0.02, 3).astype(np.float32)
    below = rows[first:]
    nearness = (below - horizon) / (h - horizon)
    if scene.ground == "water":
        surface = np.sin(below * 1.1 + 2.5 * _cloud(rng, w, h, 8, first))
        surface *= 0.06
        if scene.luminary != "none":
            across = 0.32 * np.exp(-(((columns - x) / (w * 0.05)) ** 2))
            surface += across * (0.6 + 0.4 * np.sin(below * 1.1))
    else:
        spread = 0.055 if scene.ground == "meadow" else 0.03
        surface = (rng.standard_normal((h, w))[first:] * spread).astype(np.float32)
        surface += 0.05 * _cloud(rng, w, h, 12, first)
    np.add(_planes(ground) * (1.12 - 0.42 * nearness), surface, out=land)

    if scene.depth == "three":
        near = h * 0.76 - h * 0.07 * _ridge(rng, w, 2.0)
        start = math.floor(near.min())
        rocks = np.array([0.15, 0.13, 0.11], np.float32)
        grit = (rng.standard_normal((h, w))[start:] * 0.03).astype(np.float32)
        np.copyto(canvas[:, start:], _planes(rocks) + grit, where=rows[start:] > near)

    image = _picture(canvas, 0)
    draw = ImageDraw.Draw(image)
    draw.line([(0, horizon), (w, horizon)], fill=tuple(int(255 * c * 0.7) for c in ground), width=1)
    return image, horizon


def _planes(colour: np.ndarray) -> np.ndarray:
    """A colour, shape (3,), to be spread over planes, shape (3, 1, 1)."""
    return colour[:, None, None]


def _shine(sky: np.ndarray, luminary: str, x: float, y: float, side: int) -> None:
    """Put the sun or the moon and its glow at column ``x`` and row ``y`` of planes (3, h, w)."""
    import numpy as np

    _, h, w = sky.shape
    dx, dy = np.arange(w, dtype=np.float32) - x, np.arange(h, dtype=np.float32)[:, None] - y
    colour = (1.0, 0.93, 0.66) if luminary == "sun" else (0.97, 0.97, 1.0)
    light = _planes(np.array(colour, np.float32))
    radius = side * (0.060 if luminary == "sun" else 0.045)
    reach = radius * (2.6 if luminary == "sun" else 1.2)
    glow = np.exp(-((dy / reach) ** 2)) * (0.55 * np.exp(-((dx / reach) ** 2)))
    sky *= 1 - glow
    sky += glow * light
    inside = np.s_[
        max(0, math.floor(y - radius - 1)) : math.ceil(y + radius + 2),
        max(0, math.floor(x - radius - 1)) : math.ceil(x + radius + 2),
    ]
    disc = np.clip(radius - np.hypot(dx[inside[1]], dy[inside[0]]) + 0.5, 0, 1)
    part = sky[:, *inside]
    part += disc * (light - part)


def _subject(
    scene: Scene,
    image: Image,
    width: int,
    height: int,
    horizon: float,
    rng: np.random.Generator,
    within: Callable[[tuple[float, float]], float],
) -> Image:
    """Draw the main subject with its foot a little below the horizon."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    x = (image.width - width) / 2 + width * within(_PLACEMENT_X[scene.placement])
    size = min(width, height) * float(rng.uniform(0.36, 0.42))
    foot = horizon + size * 0.16
    if scene.subject == "pine":
        dark = (24, 46, 30)
        draw.rectangle(
            [x - size * 0.03, foot - size * 0.2, x + size * 0.03, foot], fill=(48, 34, 24)
        )
        for tier in range(5):
            base, reach = foot - size * (0.12 + 0.17 * tier), size * (0.27 - 0.045 * tier)
            draw.polygon([(x - reach, base), (x + reach, base), (x, base - size * 0.30)], fill=dark)
    elif scene.subject == "oak":
        draw.rectangle(
            [x - size * 0.05, foot - size * 0.45, x + size * 0.05, foot], fill=(58, 42, 28)
        )
        for _ in range(9):
            cx = x + size * float(rng.uniform(-0.22, 0.22))
            cy = foot - size * float(rng.uniform(0.45, 0.80))
            r = size * float(rng.uniform(0.10, 0.17))
            shade = int(rng.integers(-10, 10))
            draw.ellipse(
                [cx - r, cy - r, cx + r, cy + r], fill=(46 + shade, 72 + shade, 34 + shade)
            )
    elif scene.subject == "cabin":
        half, wall = size * 0.30, size * 0.30
        draw.rectangle([x - half, foot - wall, x + half, foot], fill=(112, 66, 44))
        for plank in range(1, 5):
            y = foot - wall * plank / 5
            draw.line([(x - half, y), (x + half, y)], fill=(80, 46, 30))
        roof = [(x - half * 1.2, foot - wall), (x + half * 1.2, foot - wall)]
        draw.polygon([*roof, (x, foot - wall - size * 0.28)], fill=(52, 36, 36))
        draw.rectangle(
            [x - size * 0.06, foot - size * 0.18, x + size * 0.06, foot], fill=(30, 22, 18)
        )
    else:
        points = []
        for step in range(11):
            turn = math.pi * step / 10
            r = size * 0.34 * float(rng.uniform(0.85, 1.1))
            points.append((x + math.cos(turn) * r, foot - math.sin(turn) * r * 0.9))
        draw.polygon(points, fill=(98, 94, 90))
        draw.polygon([points[0], points[1], points[2], points[3], (x, foot)], fill=(70, 67, 64))
    return image


def _develop(
    pixels: np.ndarray, scene: Scene, within: Callable[[tuple[float, float]], float]
) -> None:
    """Saturation, then contrast and exposure as spread and mean of luminance, in place.

    Spread and mean are set, not scaled: a scene's own brightness must not pass for its exposure.
    ``pixels`` are planes, shape (3, h, w), in [0, 1].
    """
    import numpy as np

    luminance = 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
    saturation = within(_SATURATION[scene.colour])
    spread, mean = within(_SPREAD[scene.contrast]), within(_MEAN[scene.exposure])
    toned = luminance - luminance.mean()
    toned /= (luminance.std() + 1e-6) * 2.2
    np.tanh(toned, out=toned)
    toned *= spread * 2.2
    toned += mean
    if saturation:
        # Colour fades towards black and white, as it does on film and sensors alike.
        room = np.clip(1 - np.abs(2 * toned - 1), 0.15, 1)
        pixels -= luminance
        pixels *= saturation * (0.35 + 0.65 * room)
        pixels += toned
    else:
        pixels[:] = toned
