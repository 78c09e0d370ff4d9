"""An exponential moving average of the adapter (Polyak and Juditsky 1992; Tarvainen 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..model import lora
from ..model.backend import mx


class Average:
    """The average of the adapter's tensors over the updates so far.

    After update n (from 1) it keeps ``min(decay, (1 + n) / (10 + n))`` of itself and takes the
    rest from the tensors, so that a short run does not stay at its random beginning.

    Args:
        decay: what it keeps in the long run, above 0 and below 1; 0.999 is about the last 1,000
            updates.

    Attributes:
        values: the averaged tensors by name, float32; empty before the first update.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, mx.array] = {}

    def take(self, model: Any, updates: int) -> None:
        """Take in the model's tensors after ``updates`` updates. Waits for nothing."""
        tensors = {name: value.astype(mx.float32) for name, value in lora.tensors(model).items()}
        kept = min(self.decay, (1 + updates) / (10 + updates))
        self.values = {
            name: kept * self.values[name] + (1 - kept) * value if self.values else value
            for name, value in tensors.items()
        }
        # Queued, or the graph of all updates would grow until somebody looks.
        mx.async_eval(self.values)

    @contextmanager
    def worn(self, model: Any) -> Iterator[None]:
        """The average in the model for as long as the block lasts."""
        if not self.values:
            yield
            return
        own = lora.tensors(model)
        lora.set_tensors(model, self.values)
        try:
            yield
        finally:
            lora.set_tensors(model, own)
