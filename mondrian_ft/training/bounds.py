"""How much memory a step may use beside what it has to keep.

MLX queues work ahead of the GPU, and holds what is queued and what it has freed. Neither is needed
where memory is what is short. On CUDA small graphs of kernels are the better bound
(``model.backend.size_graphs``); here is the one for Metal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..model.backend import ON_CPU, mx

_FIXED = 1_300_000_000
_WIDTHS = 50
"""Bytes that may be in use beside weights and optimizer, and numbers for each element of a batch's
hidden states: 2 GB and 4 GB for one and four rows of Qwen3-VL-4B (benchmarks/LOG.md)."""


@contextmanager
def bounded(elements: int, *, checkpoint: bool) -> Iterator[None]:
    """Within the block Metal waits for what is running rather than queue beyond a bound.

    The bound is soft: a step that needs more gets it. Only with gradient checkpointing, where
    memory is bought with time; both limits are as before after the block.

    Args:
        elements: of the hidden states of the largest batch, B · L · D.
        checkpoint: whether layers are recomputed.
    """
    if ON_CPU or not checkpoint or not mx.metal.is_available():
        yield
        return
    room = _FIXED + 2 * _WIDTHS * elements
    limit = mx.set_memory_limit(mx.get_active_memory() + room)
    cache = mx.set_cache_limit(room)
    try:
        yield
    finally:
        mx.set_memory_limit(limit)
        mx.set_cache_limit(cache)
