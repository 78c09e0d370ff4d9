"""What is called a spike."""

from __future__ import annotations

import math

from mondrian_ft.training.guard import ENOUGH, limits


def test_nothing_is_a_spike_before_there_is_something_to_compare_with() -> None:
    """The first updates differ most of all; and without a factor nothing ever is."""
    few = [1.0] * (ENOUGH - 1)
    assert limits(few, few, factor=10, floor=1) == (math.inf, math.inf)
    many = [1.0] * 100
    assert limits(many, many, factor=None, floor=1) == (math.inf, math.inf)


def test_a_spike_is_far_above_the_median() -> None:
    """A single outlier among those before does not move the limit."""
    losses, norms = [2.0] * 30 + [900.0], [0.5] * 30 + [900.0]
    assert limits(losses, norms, factor=10, floor=1) == (20.0, 5.0)


def test_small_figures_are_no_spikes() -> None:
    """A memorised set has a median of nearly zero, and its rows still differ by factors."""
    losses, norms = [0.01] * 30, [0.02] * 30
    assert limits(losses, norms, factor=10, floor=1) == (1.01, 1.0)
