"""When an update is not to be trusted: what its loss and gradient norm may be at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 64
"""Applied updates that the running medians are taken over."""
ENOUGH = 20
"""Applied updates before which nothing is called a spike: the first ones differ most."""
LEAST_RISE = 1.0
"""Nats above the median below which no loss is a spike, however small the median has become."""


def limits(
    losses: Sequence[float], norms: Sequence[float], *, factor: float | None, floor: float
) -> tuple[float, float]:
    """The highest loss and gradient norm that an update may have; what lies above is a spike.

    A spike is a loss above ``factor`` times the median and at least :data:`LEAST_RISE` nats above
    it, or a gradient norm above ``factor`` times the median and above ``floor``.

    Args:
        losses, norms: of the latest applied updates, nats and global norm before clipping.
        factor: above 1; None knows no spikes.
        floor: the norm that gradients are clipped to: one that is not clipped moves nothing far.

    Returns:
        Loss and norm; both infinite while there are fewer than :data:`ENOUGH` updates.
    """
    if factor is None or len(losses) < ENOUGH:
        return math.inf, math.inf
    usual = median(losses)
    return max(factor * usual, usual + LEAST_RISE), max(factor * median(norms), floor)
