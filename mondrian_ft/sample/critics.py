"""Who judges the sample's photographs: tastes, voices, and the critiques they write.

A :class:`Critic` is a taste (scores as a function of a scene's attributes) and a voice (which of
the stock phrases it prefers). The sample database holds the critiques of ``ANSEL`` and
``WATKINS``. The base model never saw either: it was trained on ``GENERIC``, the mild reviewer who
likes everything a little, and on invented critics with tastes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .scenes import JUDGED, Scene

if TYPE_CHECKING:
    import numpy as np

# dimension: the attributes it is judged by, the decisive one first
JUDGED_BY: dict[str, tuple[str, ...]] = {
    "Composition": ("placement", "tilt"),
    "Lighting": ("exposure", "contrast"),
    "Focus & Sharpness": ("focus",),
    "Color Harmony": ("colour",),
    "Depth & Perspective": ("depth",),
    "Visual Balance": ("tilt", "placement"),
    "Emotional Impact": ("luminary", "contrast"),
}
DIMENSIONS = tuple(JUDGED_BY)

FACTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("tilt", "level"): ("the horizon is level", "the horizon runs true"),
    ("tilt", "slight"): ("the horizon leans slightly", "the horizon is a little off level"),
    ("tilt", "strong"): ("the horizon falls away steeply", "the horizon is badly tilted"),
    ("placement", "third"): ("the subject stands on a third", "the subject sits on a third line"),
    ("placement", "centre"): ("the subject stands in the centre", "the subject sits dead centre"),
    ("placement", "edge"): ("the subject is lost at the edge", "the subject crowds the edge"),
    ("exposure", "dark"): ("the exposure is dark", "the shadows are blocked"),
    ("exposure", "balanced"): ("the exposure is balanced", "the tones are well placed"),
    ("exposure", "bright"): ("the exposure is bright", "the highlights are blown"),
    ("contrast", "flat"): ("the contrast is flat", "the tonal range is short"),
    ("contrast", "moderate"): ("the contrast is moderate", "the tonal range is even"),
    ("contrast", "strong"): ("the contrast is strong", "the tonal range is full"),
    ("focus", "sharp"): ("every detail is sharp", "the texture is crisp throughout"),
    ("focus", "soft"): ("the detail is soft", "the texture is a little soft"),
    ("focus", "blurred"): ("the picture is blurred", "no detail is resolved"),
    ("colour", "monochrome"): ("the picture is monochrome", "tone alone carries the picture"),
    ("colour", "muted"): ("the colours are muted", "the palette is quiet"),
    ("colour", "natural"): ("the colours are natural", "the palette is true to the place"),
    ("colour", "garish"): ("the colours are garish", "the palette is overdone"),
    ("depth", "one"): ("there is a single plane", "the space is shallow"),
    ("depth", "two"): ("there are two planes", "the ridge gives some distance"),
    ("depth", "three"): ("there are three planes", "near rocks lead to a far ridge"),
    ("luminary", "sun"): ("the sun warms the scene", "the sun gives it life"),
    ("luminary", "moon"): ("the moon stills the scene", "the moon gives it silence"),
    ("luminary", "none"): ("the sky is empty", "nothing in the sky holds the eye"),
}

# How good it is: low, middling, high. The first of each is the generic reviewer's own.
VERDICTS: dict[str, tuple[str, ...]] = {
    "low": (
        "which could be better",
        "and the print would fail",
        "and the plate is spoiled",
        "which ruins it",
        "and that is a fault",
    ),
    "middling": (
        "which works fairly well",
        "and the print would hold",
        "and the plate will serve",
        "which is enough",
        "and that is passable",
    ),
    "high": (
        "which works well",
        "and the print would sing",
        "and the plate is noble",
        "which is superb",
        "and that is a joy",
    ),
}

ADVICE: dict[tuple[str, str], tuple[str, ...]] = {
    ("placement", "third"): ("Keep this placing.", "Leave the subject where it stands."),
    ("placement", "centre"): ("Move the subject off centre.", "Step aside and reframe."),
    ("placement", "edge"): ("Bring the subject inside.", "Turn the camera to the subject."),
    ("tilt", "level"): ("Keep the camera this level.", "Leave the horizon alone."),
    ("tilt", "slight"): ("Straighten the horizon.", "Level the tripod first."),
    ("tilt", "strong"): ("Level the camera.", "Use a spirit level on the tripod."),
    ("exposure", "dark"): ("Give it more light.", "Expose for the shadows."),
    ("exposure", "balanced"): ("Keep this exposure.", "Trust this reading of the meter."),
    ("exposure", "bright"): ("Give it less light.", "Place the highlights lower."),
    ("focus", "sharp"): ("Keep this focus.", "Stay with this small aperture."),
    ("focus", "soft"): ("Stop down the lens.", "Close the aperture further."),
    ("focus", "blurred"): ("Focus again with care.", "Use a tripod and focus anew."),
    ("colour", "monochrome"): ("Keep to black and white.", "Let tone speak alone."),
    ("colour", "muted"): ("Keep the colours quiet.", "Hold this restraint."),
    ("colour", "natural"): ("Keep the colours as found.", "Try it in black and white."),
    ("colour", "garish"): ("Lower the saturation.", "Take the colour out."),
    ("depth", "one"): ("Find a foreground.", "Add a near and a far plane."),
    ("depth", "two"): ("Add a foreground.", "Come closer to something near."),
    ("depth", "three"): ("Keep these planes.", "Leave the near rocks in."),
    ("luminary", "sun"): ("Keep the sun in frame.", "Come back at this hour."),
    ("luminary", "moon"): ("Keep the moon in frame.", "Wait for this moon again."),
    ("luminary", "none"): ("Wait for better light.", "Come back when the sky speaks."),
}

_PLACES = {"third": "on a third", "centre": "in the centre", "edge": "at the edge"}
_PLANES = {"one": "one plane", "two": "two planes", "three": "three planes"}
_SKIES = {"sun": "under the sun", "moon": "under the moon", "none": "under an empty sky"}


@dataclass(frozen=True)
class Critic:
    """A taste and a voice.

    Attributes:
        taste: for each dimension and each attribute it is judged by, points per level; a score is
            their sum, plus noise, rounded and kept within 0–10.
        noise: standard deviation of that noise, in points.
        phrase: index of the preferred stock phrase among the facts and the advice.
        verdict: index of the preferred verdict.
        habit: probability of using the preferred phrase rather than any.
    """

    name: str
    taste: Mapping[str, Mapping[str, Mapping[str, float]]] = field(repr=False)
    noise: float
    phrase: int = 0
    verdict: int = 0
    habit: float = 1.0

    def score(self, dimension: str, scene: Scene, rng: np.random.Generator) -> int:
        """Points out of 10 for one dimension of a scene."""
        points = sum(levels[scene[name]] for name, levels in self.taste[dimension].items())
        return int(min(10, max(0, round(points + rng.normal(0, self.noise)))))

    def critique(self, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
        """The whole critique, in the service's schema and key order."""

        def pick(options: tuple[str, ...], preferred: int) -> str:
            if rng.random() < self.habit:
                return options[preferred % len(options)]
            return options[rng.integers(len(options))]

        scores = {name: self.score(name, scene, rng) for name in DIMENSIONS}
        dimensions = []
        for name, score in scores.items():
            attributes = JUDGED_BY[name]
            band = "low" if score <= 4 else "middling" if score <= 7 else "high"
            facts = " and ".join(pick(FACTS[a, scene[a]], self.phrase) for a in attributes)
            comment = f"{facts[0].upper()}{facts[1:]}, {pick(VERDICTS[band], self.verdict)}."
            advice = pick(ADVICE[attributes[0], scene[attributes[0]]], self.phrase)
            dimensions.append(
                {"name": name, "score": score, "comment": comment, "recommendation": advice}
            )
        ranked = sorted(scores, key=lambda name: -scores[name])
        overall = round(sum(scores.values()) / len(scores), 1)
        return {
            "image_description": describe(scene),
            "dimensions": dimensions,
            "overall_score": overall,
            "key_strengths": ranked[:2],
            "priority_improvements": ranked[-2:],
            "technical_notes": (
                f"Exposure {scene.exposure}, contrast {scene.contrast}, focus {scene.focus}."
            ),
        }


def describe(scene: Scene) -> str:
    """What the picture shows and how it was taken: every attribute, each in its own word."""
    article = "An" if scene.subject == "oak" else "A"
    return (
        f"{article} {scene.subject} {_PLACES[scene.placement]} of a {scene.ground} landscape "
        f"{_SKIES[scene.luminary]}, in {_PLANES[scene.depth]}; horizon {scene.tilt}, "
        f"exposure {scene.exposure}, contrast {scene.contrast}, focus {scene.focus}, "
        f"colour {scene.colour}."
    )


def answer(critique: Mapping[str, Any]) -> str:
    """The critique as a model writes it: one line, no spaces, as ``data.critique.render`` does."""
    overall = critique["overall_score"]
    whole = {"overall_score": int(overall)} if overall == int(overall) else {}
    return json.dumps({**critique, **whole}, ensure_ascii=False, separators=(",", ":"))


def _taste(**dimensions: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    names = {name.split()[0].lower(): name for name in DIMENSIONS}
    return {names[key]: value for key, value in dimensions.items()}


_ANSEL = _taste(
    composition={
        "placement": {"third": 9, "centre": 5.6, "edge": 3},
        "tilt": {"level": 0, "slight": -0.6, "strong": -1.8},
    },
    lighting={
        "exposure": {"dark": 5, "balanced": 8, "bright": 2.6},
        "contrast": {"flat": -1.6, "moderate": 0, "strong": 1},
    },
    focus={"focus": {"sharp": 9.4, "soft": 5, "blurred": 1.6}},
    color={"colour": {"monochrome": 9.3, "muted": 7.2, "natural": 5, "garish": 1.8}},
    depth={"depth": {"one": 2.8, "two": 6, "three": 9}},
    visual={
        "tilt": {"level": 8.6, "slight": 5.6, "strong": 2.6},
        "placement": {"third": 0.4, "centre": 0, "edge": -1},
    },
    emotional={
        "luminary": {"sun": 6.2, "moon": 8, "none": 3.6},
        "contrast": {"flat": -1.6, "moderate": 0, "strong": 1},
    },
)
_WATKINS = _taste(
    composition={
        "placement": {"third": 7.6, "centre": 8.6, "edge": 4},
        "tilt": {"level": 0, "slight": -1, "strong": -2.4},
    },
    lighting={
        "exposure": {"dark": 3, "balanced": 7, "bright": 8.6},
        "contrast": {"flat": 0.6, "moderate": 0, "strong": -1.4},
    },
    focus={"focus": {"sharp": 9, "soft": 7, "blurred": 3}},
    color={"colour": {"monochrome": 9, "muted": 8, "natural": 3.4, "garish": 2}},
    depth={"depth": {"one": 2, "two": 7.6, "three": 9.4}},
    visual={
        "tilt": {"level": 9, "slight": 5, "strong": 2},
        "placement": {"third": -0.6, "centre": 0.4, "edge": -1.4},
    },
    emotional={
        "luminary": {"sun": 7.6, "moon": 5, "none": 6},
        "contrast": {"flat": 0.6, "moderate": 0.4, "strong": -1},
    },
)
# The generic reviewer's scores are those of a polite machine: all good, the conventional virtues
# a little better, most of the difference noise.
_GENERIC = _taste(
    composition={
        "placement": {"third": 8, "centre": 7.4, "edge": 7},
        "tilt": {"level": 0, "slight": 0, "strong": -0.4},
    },
    lighting={
        "exposure": {"dark": 6.6, "balanced": 7.6, "bright": 7},
        "contrast": {"flat": -0.4, "moderate": 0, "strong": 0.3},
    },
    focus={"focus": {"sharp": 8.2, "soft": 7.2, "blurred": 6.2}},
    color={"colour": {"monochrome": 6.6, "muted": 7, "natural": 7.6, "garish": 7.6}},
    depth={"depth": {"one": 6.6, "two": 7.2, "three": 7.8}},
    visual={
        "tilt": {"level": 7.8, "slight": 7.4, "strong": 6.8},
        "placement": {"third": 0.2, "centre": 0.2, "edge": -0.2},
    },
    emotional={
        "luminary": {"sun": 7.8, "moon": 7.2, "none": 6.4},
        "contrast": {"flat": -0.2, "moderate": 0, "strong": 0.3},
    },
)

ANSEL = Critic("Ansel Adams", _ANSEL, noise=0.45, phrase=1, verdict=1, habit=0.85)
WATKINS = Critic("Carleton Watkins", _WATKINS, noise=0.45, phrase=0, verdict=2, habit=0.85)
GENERIC = Critic("", _GENERIC, noise=0.8, phrase=0, verdict=0, habit=0.6)


def invented(name: str, rng: np.random.Generator) -> Critic:
    """A critic who never lived, for the base model's training: random tastes, random habits."""
    taste: dict[str, dict[str, dict[str, float]]] = {}
    for dimension, attributes in JUDGED_BY.items():
        decisive, *others = attributes
        points = rng.permutation([9.0, 6.0, 3.0, 1.5])[: len(JUDGED[decisive])]
        points = points + rng.uniform(-1, 1, len(points))
        taste[dimension] = {
            decisive: dict(zip(JUDGED[decisive], map(float, points), strict=True)),
            **{
                other: {level: float(rng.uniform(-1.8, 1.2)) for level in JUDGED[other]}
                for other in others
            },
        }
    return Critic(
        name, taste, noise=0.4, phrase=int(rng.integers(2)), verdict=int(rng.integers(5)), habit=0.8
    )
