"""The curves say what the log says."""

from __future__ import annotations

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
