"""How much memory a step may use beside what it has to keep, and what to say when it is too much.

MLX queues work ahead of the GPU, and holds what is queued and what it has freed. Neither is needed
where memory is what is short.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import TrainingError
from ..model.backend import ON_CPU, mx

_FIXED = 1_300_000_000
_WIDTHS = 50
"""Bytes that may be in use beside weights and optimizer, and numbers for each element of a batch's
hidden states: 2 GB and 4 GB for one and four rows of Qwen3-VL-4B (benchmarks/LOG.md)."""


@contextmanager
def bounded(elements: int, *, checkpoint: bool) -> Iterator[None]:
    """Within the block a GPU waits for what is running rather than queue beyond a bound.

    The bound is soft: a step that needs more gets it. Only with gradient checkpointing, where
    memory is bought with time; both limits are as before after the block.

    Args:
        elements: of the hidden states of the largest batch, B · L · D.
        checkpoint: whether layers are recomputed.
    """
    if ON_CPU or not checkpoint:
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


@contextmanager
def told_what_to_change(*, checkpoint: bool, batch_size: int, quantized: bool) -> Iterator[None]:
    """Turns an allocation that failed into a sentence with the change that costs least.

    Raises:
        TrainingError: there was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = str(error).lower()
        if not isinstance(error, MemoryError) and not any(
            sign in words for sign in ("out of memory", "malloc", "allocate")
        ):
            raise
        if not checkpoint:
            change = "set trainer.grad_checkpoint=true, which changes no number and takes longer"
        elif batch_size > 1:
            change = (
                f"lower trainer.batch_size={batch_size} and raise trainer.accumulate as much, "
                "which changes no number"
            )
        elif not quantized:
            change = "set model.quantize_bits=4, or lower data.max_pixels"
        else:
            change = "lower data.max_pixels, or use a smaller base"
        raise TrainingError(
            f"there was not enough memory for an update ({str(error).splitlines()[0][:200]}); the "
            f"first update has the longest rows, so no later one needs more: {change}"
        ) from error
