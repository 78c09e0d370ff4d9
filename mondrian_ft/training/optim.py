"""Optimizers and learning-rate schedules. Steps are updates, never micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import TrainingError
from ..model.backend import mx
from ..model.targets import in_tower

Schedule = Callable[[mx.array], mx.array]
"""The learning rate as a function of the number of updates done, from 0."""


def learning_rate(peak: float, *, warmup: int, total: int, schedule: str) -> Schedule:
    """Linear warm-up, then ``cosine`` or ``linear`` towards 0, or ``constant``.

    Update k (from 1) of the warm-up has peak · k / warmup, so that no update is wasted on a rate
    of 0 and update ``warmup`` has the peak. The decay is spread over the updates that remain.

    Args:
        peak: the highest rate, above 0.
        warmup: updates of the warm-up; a run shorter than it never reaches the peak.
        total: updates of the whole run.
        schedule: the name of the decay.

    Returns:
        A function of the number of updates done (from 0), built of MLX's schedules.
    """
    # Not by mlx-lm's build_schedule, which makes the same of these: it brings wandb along, a tenth
    # of the time from starting a process to its first update.
    from mlx.optimizers import cosine_decay, join_schedules, linear_schedule

    # A warm-up of one update is none: the first update has the peak either way.
    rest = max(1, total - warmup if warmup > 1 else total)
    makers: dict[str, Callable[[], Schedule]] = {
        "cosine": lambda: cosine_decay(peak, rest),
        "linear": lambda: linear_schedule(peak, 0.0, rest),
        "constant": lambda: linear_schedule(peak, peak, rest),
    }
    decay = makers[schedule]()
    if warmup <= 1:
        return decay
    # Started one step up the slope, it is at the peak in update ``warmup``.
    climb = linear_schedule(peak / warmup, peak, warmup - 1)
    return join_schedules([climb, decay], [warmup])


def peak_reached(peak: float, *, warmup: int, total: int) -> float:
    """The highest rate a run of ``total`` updates sees."""
    return peak if warmup <= total else peak * total / warmup


def build(
    name: str, rate: Schedule, *, weight_decay: float, plus: float = 1.0, vision: float = 1.0
) -> Any:
    """An optimizer by name: ``adamw``, ``adam`` or ``muon``.

    Args:
        rate: its learning rate.
        weight_decay: see each optimizer.
        plus: how many times that rate the matrices B move with (LoRA+, Hayou et al. 2024).
        vision: how many times that rate the vision tower's part moves with, its B with ``plus``
            times that.

    Returns:
        An MLX optimizer. With several rates it is made of as many, whose states are apart; the rate
        that it tells is that of A in the language model.
    """
    make = {"adamw": adamw, "adam": adam, "muon": muon}[name]

    def times(path: str) -> float:
        return (vision if in_tower(path) else 1.0) * (plus if path.endswith("lora_b") else 1.0)

    factors = list(dict.fromkeys((1.0, plus, vision, vision * plus)))
    if factors == [1.0]:
        return make(rate, weight_decay=weight_decay)
    from mlx.optimizers import MultiOptimizer

    def scaled(factor: float) -> Schedule:
        return rate if factor == 1.0 else lambda done: factor * rate(done)

    return MultiOptimizer(
        [make(scaled(factor), weight_decay=weight_decay) for factor in factors],
        [lambda path, _, factor=factor: times(path) == factor for factor in factors[:-1]],
    )


def adamw(rate: Schedule, *, weight_decay: float) -> Any:
    """AdamW (Loshchilov and Hutter 2019) with bias correction, which MLX leaves off by default."""
    from mlx.optimizers import AdamW

    return AdamW(
        rate, betas=[0.9, 0.999], eps=1e-8, weight_decay=weight_decay, bias_correction=True
    )


def adam(rate: Schedule, *, weight_decay: float) -> Any:
    """Adam (Kingma and Ba 2015) with bias correction; it decays no weights.

    Raises:
        TrainingError: a weight decay is asked for.
    """
    from mlx.optimizers import Adam

    if weight_decay:
        raise TrainingError(
            f"optimizer.weight_decay is {weight_decay:g}, but adam decays no weights; set it to 0 "
            "or use optimizer.name=adamw"
        )
    return Adam(rate, betas=[0.9, 0.999], eps=1e-8, bias_correction=True)


def muon(rate: Schedule, *, weight_decay: float) -> Any:
    """Muon (Jordan et al. 2024): momentum 0.95, orthogonalised, for matrices.

    Its weight decay is no decoupled one: MLX adds ``weight_decay`` · w to the gradient.
    """
    from mlx.optimizers import Muon

    return Muon(rate, momentum=0.95, weight_decay=weight_decay)
