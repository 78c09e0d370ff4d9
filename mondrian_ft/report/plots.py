"""The loss curves, and the paired errors, as inline SVG.

Drawn by hand rather than by a plotting library: the strokes take their colours from the page's
stylesheet, so one drawing serves light, dark and paper, its text is the page's own, and a drawing
is a few kilobytes. Every function returns markup that contains numbers and fixed words only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

Point = tuple[float, float]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``training_log.jsonl``; empty if there is no such file.

    An evaluation without training writes no log, which is not an error. A last line without its
    newline is one that a kill cut, and is left out.

    Raises:
        DataError: a whole line is not a JSON object.
    """
    if not path.is_file():
        return []
    *whole, _cut = path.read_text(encoding="utf-8").split("\n")
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(whole, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise DataError(
                f"Line {number} of {path} is not a JSON object; remove that line or the file."
            )
        lines.append(entry)
    return lines


def series(log: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[Point]:
    """The (step, value) points of one quantity, without the nulls of non-finite ones."""
    return [
        (float(line["step"]), float(line[key]))
        for line in log
        if line.get("kind") == kind and isinstance(line.get(key), int | float)
    ]


def smooth(points: Sequence[Point], window: int = 0) -> list[Point]:
    """The mean of the ``window`` points around each, fewer towards the ends, so that it never lags.

    By default an odd window of about a twentieth of the points, at least 3.
    """
    reach = (window or max(3, len(points) // 20)) // 2
    found: list[Point] = []
    for index, (step, _) in enumerate(points):
        around = [value for _, value in points[max(0, index - reach) : index + reach + 1]]
        found.append((step, sum(around) / len(around)))
    return found


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers covering ``low`` to ``high``: steps of 1, 2, 2.5 or 5 by a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: ``0.25``, ``120``, ``2e-04``."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.6g}"


@dataclass(frozen=True)
class Frame:
    """Where data lie in a drawing: ``x`` and ``y`` are data units, the rest pixels."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, point: Point) -> Point:
        """The pixel of a data point; y grows upwards in data and downwards on the page."""
        across = (point[0] - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (point[1] - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def line(self, points: Sequence[Point], css: str) -> str:
        """A polyline; a single point draws nothing."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
        return f'<polyline class="{css}" points="{path}"/>' if len(points) > 1 else ""


def loss_curves(log: Sequence[Mapping[str, Any]], *, width: int, height: int) -> str | None:
    """Training loss, as it was and smoothed, and validation loss over updates; None without any.

    ``width`` and ``height`` are pixels at which its 12-pixel text is meant to be read.
    """
    train, held = series(log, "step", "loss"), series(log, "eval", "val_loss")
    if not train and not held:
        return None
    every = train + held
    # The axis starts at zero, so that half the height is half the loss.
    top = 1.05 * max(value for _, value in every) or 1.0
    across = ticks(0, max(step for step, _ in every), about=max(3, width // 120))
    up = [value for value in ticks(0, top, about=4) if value <= top]
    frame = Frame(
        34, 14, width - 34 - 62, height - 14 - 40, (0, max(s for s, _ in every)), (0, top)
    )
    bottom = frame.top + frame.height
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{described(train, held)}">'
    ]
    for value in up:
        _, y = frame.at((0, value))
        css = "axis" if value == 0 else "grid"
        parts.append(
            f'<line class="{css}" x1="{frame.left}" x2="{frame.left + frame.width:.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in across:
        if value <= frame.x[1]:
            x, _ = frame.at((value, 0))
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
    parts.append(
        f'<text x="{frame.left + frame.width / 2:.1f}" y="{height - 4}" text-anchor="middle">'
        "updates</text>"
    )
    parts.append(frame.line(train, "train-raw"))
    parts.append(frame.line(smooth(train), "train"))
    parts.append(frame.line(held, "held"))
    parts += [
        f'<circle class="held-dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
        for x, y in map(frame.at, held)
    ]
    parts += end_labels(frame, smooth(train), held)
    return "".join(parts) + "</svg>"


def end_labels(frame: Frame, train: Sequence[Point], held: Sequence[Point]) -> list[str]:
    """``train`` and ``held out`` beside the curves' ends, kept 15 pixels apart."""
    ends = [
        (frame.at(points[-1])[1], css, word)
        for points, css, word in ((train, "train", "training"), (held, "held", "held out"))
        if points
    ]
    ends.sort()
    if len(ends) == 2 and ends[1][0] - ends[0][0] < 15:
        middle = min((ends[0][0] + ends[1][0]) / 2, frame.top + frame.height - 10)
        ends = [(middle + shift, *end[1:]) for shift, end in zip((-7.5, 7.5), ends, strict=True)]
    x = frame.left + frame.width + 8
    return [
        f'<text class="label {css}" x="{x:.1f}" y="{y + 4:.1f}">{word}</text>'
        for y, css, word in ends
    ]


def described(train: Sequence[Point], held: Sequence[Point]) -> str:
    """The curves in words, for a reader who does not see them."""
    said: list[str] = []
    if train:
        calm = smooth(train)
        said.append(
            f"Training loss from {train[0][1]:.3f} to {calm[-1][1]:.3f} "
            f"over {train[-1][0]:.0f} updates."
        )
    if held:
        best = min(held, key=lambda point: point[1])
        said.append(
            f"Held-out loss from {held[0][1]:.3f} to {held[-1][1]:.3f}, "
            f"lowest {best[1]:.3f} after {best[0]:.0f} updates."
        )
    return " ".join(said)


@dataclass(frozen=True)
class Pair:
    """A photograph's score error by base and by tuned, and the number of its card."""

    card: int
    base: float
    tuned: float


def paired(pairs: Sequence[Pair], *, width: int, height: int) -> str | None:
    """Each photograph's error by base and by tuned, joined, from most gained to most lost.

    A number under a line is that of its card, and leads there. None with fewer than two.
    """
    if len(pairs) < 2:
        return None
    ranked = sorted(pairs, key=lambda pair: (pair.tuned - pair.base, pair.card))
    up = ticks(0, max(max(pair.base, pair.tuned) for pair in ranked) or 1.0, about=4)
    frame = Frame(30, 10, width - 30 - 8, height - 10 - 42, (0, len(ranked)), (0, up[-1]))
    bottom, step = frame.top + frame.height, frame.width / len(ranked)
    radius = max(1.5, min(5.0, step / 3.2))
    # A number needs about seven pixels a digit; where they would touch, only some are told.
    every = math.ceil(7 * (len(str(max(pair.card for pair in ranked))) + 0.6) / step)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{paired_in_words(ranked)}">'
    ]
    for value in up:
        _, y = frame.at((0, value))
        parts.append(
            f'<line class="{"axis" if value == 0 else "grid"}" x1="{frame.left}" '
            f'x2="{frame.left + frame.width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for at, pair in enumerate(ranked):
        x, before = frame.at((at + 0.5, pair.base))
        _, after = frame.at((at + 0.5, pair.tuned))
        css = "gain" if pair.tuned < pair.base else "loss" if pair.tuned > pair.base else "same"
        parts.append(
            f'<a href="#p{pair.card}" tabindex="-1"><g class="{css}">'
            f"<title>Photograph {pair.card}: {pair.base:.2f} by base, {pair.tuned:.2f} by tuned"
            "</title>"
            # Wide and unseen, so that a finger can meet it.
            f'<rect class="reach" x="{x - step / 2:.1f}" y="{frame.top}" width="{step:.1f}" '
            f'height="{frame.height + 20:.1f}"/>'
            f'<line class="joint" x1="{x:.1f}" x2="{x:.1f}" y1="{before:.1f}" y2="{after:.1f}"/>'
            f'<circle class="base" cx="{x:.1f}" cy="{before:.1f}" r="{radius:.1f}"/>'
            f'<circle class="tuned" cx="{x:.1f}" cy="{after:.1f}" r="{radius:.1f}"/>'
        )
        if at % every == 0:
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{pair.card}</text>'
            )
        parts.append("</g></a>")
    parts.append(
        f'<text x="{frame.left + frame.width / 2:.1f}" y="{height - 5}" text-anchor="middle">'
        "photographs, from most gained to most lost</text>"
    )
    return "".join(parts) + "</svg>"


def paired_in_words(pairs: Sequence[Pair]) -> str:
    """The same for a reader who does not see it: how many fell and rose, and the extremes."""
    fell = sum(pair.tuned < pair.base for pair in pairs)
    rose = sum(pair.tuned > pair.base for pair in pairs)
    said = [
        f"Score error by base and by tuned on {len(pairs)} photographs: lower by tuned on {fell}, "
        f"higher on {rose}, the same on {len(pairs) - fell - rose}."
    ]
    best = min(pairs, key=lambda pair: pair.tuned - pair.base)
    worst = max(pairs, key=lambda pair: pair.tuned - pair.base)
    for word, pair, there in (("fall", best, fell), ("rise", worst, rose)):
        if there:
            said.append(
                f"Largest {word} from {pair.base:.2f} to {pair.tuned:.2f}, photograph {pair.card}."
            )
    return " ".join(said)
