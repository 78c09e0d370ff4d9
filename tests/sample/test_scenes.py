"""Rendered photographs: the same for the same scene, and showing what the scene says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mondrian_ft.sample.scenes import ATTRIBUTES, SIZES, Scene, render


def scene(key: int = 0, **levels: str) -> Scene:
    return replace(Scene.draw(np.random.default_rng([77, key])), **levels)


def pixels(drawn: Scene) -> np.ndarray:
    return np.asarray(render(drawn), np.float32) / 255


def averages(attribute: str, measure, **fixed: str) -> dict[str, float]:
    """The mean of a measure over a few scenes, for each level of an attribute."""
    return {
        level: float(
            np.mean([measure(scene(key, **{**fixed, attribute: level})) for key in range(6)])
        )
        for level in ATTRIBUTES[attribute]
    }


def test_same_scene_same_picture() -> None:
    """A scene's seed drives everything that is random."""
    for key in range(5):
        first, second = render(scene(key)), render(scene(key))
        assert first.mode == "RGB"
        assert first.size in SIZES
        assert first.tobytes() == second.tobytes()
    assert render(scene(0)).tobytes() != render(replace(scene(0), seed=1)).tobytes()


def test_drawn_evenly() -> None:
    """Every level of every attribute is as likely as its neighbours."""
    rng = np.random.default_rng(0)
    drawn = [Scene.draw(rng) for _ in range(2000)]
    for attribute, levels in ATTRIBUTES.items():
        shares = [np.mean([s[attribute] == level for s in drawn]) for level in levels]
        assert np.allclose(shares, 1 / len(levels), atol=0.05), attribute


def test_tone_shows() -> None:
    """Exposure is the mean of luminance and contrast its spread, whatever is shown."""

    def grey(drawn: Scene) -> np.ndarray:
        return np.asarray(render(drawn).convert("L"), np.float32) / 255

    mean = averages("exposure", lambda s: grey(s).mean())
    assert mean["dark"] < 0.35 < mean["balanced"] < 0.65 < mean["bright"]
    spread = averages("contrast", lambda s: grey(s).std(), exposure="balanced")
    assert spread["flat"] < 0.09 < spread["moderate"] < 0.18 < spread["strong"]


def test_colour_shows() -> None:
    """The levels of colour differ in how far the channels lie apart."""
    chroma = averages("colour", lambda s: np.ptp(pixels(s), axis=-1).mean(), exposure="balanced")
    assert chroma["monochrome"] == 0
    assert chroma["muted"] < 0.7 * chroma["natural"] < 0.7 * 0.7 * chroma["garish"]


def test_focus_shows() -> None:
    """The blurrier the lens, the less is left of a picture's fine detail beside its grain."""

    def detail(drawn: Scene) -> float:
        grey = np.asarray(render(drawn).convert("L").reduce(2), np.float32)
        return float(np.abs(np.diff(grey, axis=0)).mean())

    sharp = averages("focus", detail, contrast="strong", exposure="balanced", ground="meadow")
    assert sharp["sharp"] > 1.2 * sharp["soft"] > 1.2 * sharp["blurred"]


@pytest.mark.parametrize("attribute", ["tilt", "placement", "depth", "luminary", "subject"])
def test_content_shows(attribute: str) -> None:
    """Changing one attribute of what is in the picture changes the picture."""
    sharp = {"focus": "sharp", "exposure": "balanced", "contrast": "strong"}
    made = [pixels(scene(1, **sharp, **{attribute: level})) for level in ATTRIBUTES[attribute]]
    for index, one in enumerate(made):
        for other in made[index + 1 :]:
            assert np.abs(one - other).mean() > 0.01


def test_corners_are_filled() -> None:
    """A turned canvas never shows what lies outside of it."""
    for key in range(8):
        turned = scene(key, tilt="strong", exposure="bright", contrast="flat", focus="sharp")
        corner = np.asarray(render(turned).resize((24, 24), Image.Resampling.BOX).convert("L"))
        assert corner.min() > 60
