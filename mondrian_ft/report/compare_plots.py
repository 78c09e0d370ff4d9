"""Curves of several runs over one another, and their settings side by side, as inline SVG.

In the manner of `plots`: strokes take their colours from the page's stylesheet, and a run's number
stands beside its line, so that nothing depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from .experiment import value as as_text
from .plots import Frame, Point, number, ticks

APART = 13
"""Pixels between two numbers at the ends of lines."""


@dataclass(frozen=True)
class Curve:
    """A run's line: its number, the class of its colour, its name, and its points."""

    number: str
    css: str
    name: str
    points: list[Point]


@dataclass(frozen=True)
class Axis:
    """One setting, or the result, from 0 (below) to 1.

    Attributes:
        name: what stands under it.
        places: values in words, and where each lies.
        scale: ``names``, ``linear`` or ``log``: how a value becomes a place.
    """

    name: str
    places: list[tuple[str, float]]
    scale: str
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, name: str, values: Sequence[Any], *, exact: bool = False) -> Axis:
        """An axis for ``values``: few of them stand one by one, many numbers along a scale.

        Args:
            exact: draw to scale however few there are.
        """
        told = {as_text(value): value for value in values}
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        scaled = len(numbers) == len(values) and len(set(numbers)) > 1
        if not scaled or (len(told) <= 6 and not exact):
            texts = sorted(told, key=lambda t: (told[t] if scaled else 0, t))
            last = max(1, len(texts) - 1)
            return cls(
                name,
                [(text, i / last if len(texts) > 1 else 0.5) for i, text in enumerate(texts)],
                "names",
            )
        low, high = float(min(numbers)), float(max(numbers))
        if low > 0 and high / low >= 20:
            return cls(name, [(number(low), 0.0), (number(high), 1.0)], "log", low, high)
        marks = ticks(low, high, about=4)
        low, high = min(low, marks[0]), max(high, marks[-1])
        places = [(number(mark), (mark - low) / (high - low)) for mark in marks]
        return cls(name, places, "linear", low, high)

    def at(self, value: Any) -> float:
        """Where a value lies."""
        if self.scale == "names":
            return dict(self.places)[as_text(value)]
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def curves(lines: Sequence[Curve], name: str, *, width: int, height: int) -> str | None:
    """Lines over updates; None without any. A line of one point is a dot."""
    if not lines:
        return None
    every = [point for line in lines for point in line.points]
    values = sorted(value for _, value in every)
    # The first updates of a run that starts badly would press all others to the floor.
    top = 1.05 * values[min(len(values) - 1, math.ceil(0.99 * len(values)))] or 1.0
    low = 0.95 * values[0] if values[0] > top / 3 else 0.0
    right = max(step for step, _ in every) or 1.0
    frame = Frame(40, 12, width - 40 - 30, height - 12 - 40, (0, right), (low, top))
    parts = [_open(width, height, f"{name} over updates. {_ends(lines)}")]
    for value in ticks(low, top, about=4):
        if low <= value <= top:
            _, y = frame.at((0, value))
            parts.append(
                f'<line class="grid" x1="{frame.left}" x2="{frame.left + frame.width:.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}'
                "</text>"
            )
    for value in ticks(0, right, about=max(3, width // 120)):
        if value <= right:
            x, _ = frame.at((value, low))
            parts.append(
                f'<text x="{x:.1f}" y="{frame.top + frame.height + 18:.1f}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
    parts.append(
        f'<text x="{frame.left + frame.width / 2:.1f}" y="{height - 4}" text-anchor="middle">'
        "updates</text>"
    )
    for line in lines:
        inside = [(step, min(value, top)) for step, value in thinned(line.points, width)]
        parts.append(f'<g class="{line.css}"><title>{_titled(line)}</title>')
        parts.append(frame.line(inside, "way"))
        if len(inside) <= 40:
            radius = 3 if len(inside) <= 12 else 2
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
                for x, y in map(frame.at, inside)
            ]
        parts.append("</g>")
    parts += _numbers(frame, lines, top)
    return "".join(parts) + "</svg>"


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points and the last: of each stretch the lowest and the highest.

    More than there are pixels would only make the page heavy, and a peak is not lost.
    """
    if len(points) <= most:
        return list(points)
    stretch = -(-2 * len(points) // most)
    found: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        found += sorted(ends)
    return found if found[-1] == points[-1] else [*found, points[-1]]


def parallel(
    axes: Sequence[Axis], lines: Sequence[Curve], *, width: int, height: int
) -> str | None:
    """Each run's way through its settings to its result, which is the last axis."""
    if len(lines) < 2 or len(axes) < 2:
        return None
    left, right = (56, 46) if width > 500 else (34, 34)
    frame = Frame(left, 14, width - left - right, height - 14 - 52, (0, len(axes) - 1), (0, 1))
    told = ", ".join(axis.name for axis in axes[:-1])
    parts = [_open(width, height, f"{len(lines)} runs by {told}, and the {axes[-1].name} of each.")]
    for line in lines:
        parts.append(f'<g class="{line.css}"><title>{_titled(line)}</title>')
        parts.append(frame.line(line.points, "way"))
        parts.append("</g>")
    for index, axis in enumerate(axes):
        x, bottom = frame.at((index, 0))
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{bottom:.1f}"/>'
        )
        for text, place in axis.places:
            _, y = frame.at((index, place))
            parts.append(
                f'<text class="tick" x="{x - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">'
                f"{escape(text)}</text>"
            )
        group, _, key = axis.name.rpartition(".")
        anchor = "end" if index == len(axes) - 1 else "start" if index == 0 else "middle"
        edge = x + (right - 4 if anchor == "end" else 4 - left if anchor == "start" else 0)
        parts.append(
            f'<text class="name" x="{edge:.1f}" y="{bottom + 24:.1f}" text-anchor="{anchor}">'
            f"{escape(key)}</text>"
        )
        if group:
            parts.append(
                f'<text x="{edge:.1f}" y="{bottom + 40:.1f}" text-anchor="{anchor}">'
                f"{escape(group)}</text>"
            )
    parts += _numbers(frame, lines, 1.0)
    return "".join(parts) + "</svg>"


def _open(width: int, height: int, described: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(described)}">'
    )


def _titled(line: Curve) -> str:
    return str(escape(f"Run {line.number}: {line.name}" if line.number else line.name))


def _ends(lines: Sequence[Curve]) -> str:
    """The last values in words, the best run first."""
    told = [
        f"{f'run {line.number}' if line.number else 'it'} ends at {line.points[-1][1]:.4g}"
        for line in reversed(lines)
    ]
    said = "; ".join(told[:8])
    return f"{said[0].upper()}{said[1:]}."


def _numbers(frame: Frame, lines: Sequence[Curve], top: float) -> list[str]:
    """Each coloured run's number beside the end of its line, kept apart from its neighbours."""
    coloured = [line for line in lines if line.number and line.css != "rx"]
    ends = [(_end(frame, line, top), line) for line in coloured]
    ends.sort(key=lambda end: end[0])
    floor = frame.top + frame.height
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + APART) if places else y)
    # What was pushed out at the bottom is pushed back from there.
    for index in range(len(places) - 1, -1, -1):
        below = places[index + 1] - APART if index + 1 < len(places) else floor
        places[index] = min(places[index], below)
    x = frame.left + frame.width + 8
    return [
        f'<text class="label {line.css}" x="{x:.1f}" y="{place + 4:.1f}">{line.number}</text>'
        for place, (_, line) in zip(places, ends, strict=True)
    ]


def _end(frame: Frame, line: Curve, top: float) -> float:
    """How far down a line ends, in pixels."""
    step, value = line.points[-1]
    return frame.at((step, min(value, top)))[1]
