"""The curves say what the log says."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import pytest

from mondrian_ft.report import plots


def test_ticks_are_round_and_cover() -> None:
    """Ticks are round numbers from at most the low to at least the high end."""
    assert plots.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert plots.ticks(0, 180, about=8) == [0, 25, 50, 75, 100, 125, 150, 175, 200]
    assert plots.ticks(0, 3e-4, about=3) == [0, 1e-4, 2e-4, 3e-4]
    assert plots.ticks(2, 2) == [2]


def test_smoothing_keeps_constants_and_never_lags() -> None:
    """A constant stays, a straight line stays in its middle, nothing is invented."""
    assert plots.smooth([(s, 2.0) for s in range(9)]) == [(s, 2.0) for s in range(9)]
    line = [(float(s), float(s)) for s in range(100)]
    assert plots.smooth(line)[50] == (50.0, pytest.approx(50.0))
    assert plots.smooth([]) == []


def test_null_values_are_left_out() -> None:
    """What was not finite is null in the log, and no point in the drawing."""
    log = [{"kind": "step", "step": 1, "loss": 1.0}, {"kind": "step", "step": 2, "loss": None}]
    assert plots.series(log, "step", "loss") == [(1.0, 1.0)]


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_curves_are_drawn_inside_and_described(steps: int) -> None:
    """The drawing is XML, every point is inside it, and its label says the numbers."""
    log: list[dict] = [
        {"kind": "step", "step": s, "loss": 3 / s + 5 * (s == 1)} for s in range(1, steps + 1)
    ]
    log += [
        {"kind": "eval", "step": 0, "val_loss": 2.5},
        {"kind": "eval", "step": steps, "val_loss": 0.5},
    ]
    drawn = plots.loss_curves(log, width=343, height=230)
    assert drawn is not None
    root = ET.fromstring(drawn)
    assert "lowest 0.500" in root.attrib["aria-label"]
    for line in root.iter("polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 343
            assert 0 <= y <= 230


def test_nothing_to_draw() -> None:
    """Without a loss there is no drawing; a loss of zero everywhere still has one."""
    assert plots.loss_curves([], width=100, height=100) is None
    zero = [{"kind": "step", "step": s, "loss": 0.0} for s in (1, 2)]
    assert plots.loss_curves(zero, width=300, height=200) is not None


PAIRS = [plots.Pair(1, 2.0, 2.5), plots.Pair(2, 3.0, 0.5), plots.Pair(3, 1.0, 1.0)]


@pytest.mark.parametrize(("width", "n"), [(1040, 3), (343, 3), (343, 400)])
def test_paired_errors_are_drawn_inside_in_order_and_described(width: int, n: int) -> None:
    """From most gained to most lost, each with its numbers, none outside, none touching."""
    pairs = PAIRS + [plots.Pair(k, 2.0, 1.0) for k in range(4, n + 1)]
    drawn = plots.paired(pairs, width=width, height=230)
    assert drawn is not None
    root = ET.fromstring(drawn)
    links = [link.attrib["href"] for link in root.iter("a")]
    assert (links[0], links[-1]) == ("#p2", "#p1")
    assert len(links) == n
    titles = [title.text for title in root.iter("title")]
    assert titles[0] == "Photograph 2: 3.00 by base, 0.50 by tuned"
    for circle in root.iter("circle"):
        assert 30 <= float(circle.attrib["cx"]) <= width
        assert 10 <= float(circle.attrib["cy"]) <= 230
    told = [t for t in root.iter("text") if t.attrib["y"] == "205.0"]
    ends = [float(text.attrib["x"]) for text in told]
    assert len(ends) > 1
    assert all(b - a >= 7 * len(str(n)) for a, b in itertools.pairwise(ends))
    said = root.attrib["aria-label"]
    assert f"on {n} photographs: lower by tuned on {n - 2}, higher on 1, the same on 1." in said
    assert "Largest fall from 3.00 to 0.50, photograph 2." in said
    assert "Largest rise from 2.00 to 2.50, photograph 1." in said


def test_what_cannot_be_paired() -> None:
    """One photograph is no plot; errors of zero everywhere still are one."""
    assert plots.paired(PAIRS[:1], width=300, height=200) is None
    same = [plots.Pair(k, 0.0, 0.0) for k in (1, 2)]
    drawn = plots.paired(same, width=300, height=200)
    assert drawn is not None
    assert "Largest" not in drawn
