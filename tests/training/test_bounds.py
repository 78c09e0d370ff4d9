"""Memory that runs out is a sentence with the cheapest change; other errors stay what they are."""

from __future__ import annotations

import pytest

from mondrian_ft.errors import TrainingError
from mondrian_ft.training.bounds import told_what_to_change

OOM = "[cuda_malloc] Unable to allocate 1234 bytes.\nmore"


@pytest.mark.parametrize(
    ("checkpoint", "batch_size", "quantized", "change"),
    [
        (False, 4, False, "trainer.grad_checkpoint=true"),
        (True, 4, False, "trainer.batch_size=4 and raise trainer.accumulate"),
        (True, 1, False, "model.quantize_bits=4"),
        (True, 1, True, "lower data.max_pixels"),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError(OOM), MemoryError("out of memory")])
def test_the_change_that_costs_least_is_named(
    checkpoint, batch_size, quantized, change, error
) -> None:
    """What changes no number first, what changes the pictures last."""
    with (
        pytest.raises(TrainingError, match=f"not enough memory .*{change}") as raised,
        told_what_to_change(checkpoint=checkpoint, batch_size=batch_size, quantized=quantized),
    ):
        raise error
    assert raised.value.__cause__ is error


def test_other_errors_are_not_taken_for_memory() -> None:
    """A shape that does not fit is no lack of memory."""
    with (
        pytest.raises(RuntimeError, match="shapes differ"),
        told_what_to_change(checkpoint=False, batch_size=1, quantized=False),
    ):
        raise RuntimeError("shapes differ")
