"""Learning rates by update, and AdamW, against plain arithmetic."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import TrainingError
from mondrian_ft.model.backend import mx, nn, number
from mondrian_ft.training import optim


def rates(**settings: Any) -> list[float]:
    """The rate of each update of a run, as the optimizer uses it."""
    settings = {"schedule": "cosine", **settings}
    schedule = optim.learning_rate(1e-3, **settings)
    return [number(schedule(mx.array(done))) for done in range(settings["total"])]


def test_warmup_climbs_in_equal_steps_and_reaches_the_peak() -> None:
    """Update k of a warm-up of 10 has k/10 of the peak; no update has a rate of zero."""
    got = rates(warmup=10, total=50)
    assert got[:10] == pytest.approx([1e-3 * k / 10 for k in range(1, 11)], rel=1e-5)
    assert max(got) == pytest.approx(1e-3, rel=1e-6)
    assert min(got) > 0


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_cosine_falls_to_nearly_zero_over_what_remains(warmup: int) -> None:
    """The last update is small but not wasted; a warm-up of one once wasted it."""
    got = rates(warmup=warmup, total=50)
    climbed = warmup if warmup > 1 else 0
    rest = 50 - climbed
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * n / rest)) for n in range(rest)]
    assert got[climbed:] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert 0 < got[-1] < 5e-6
    assert optim.peak_reached(1e-3, warmup=warmup, total=50) == pytest.approx(max(got), rel=1e-6)


def test_linear_and_constant() -> None:
    """Linear falls in equal steps; constant stays."""
    got = rates(warmup=2, total=12, schedule="linear")
    assert got[2:] == pytest.approx([1e-3 * (1 - n / 10) for n in range(10)], rel=1e-4)
    assert rates(warmup=0, total=5, schedule="constant") == pytest.approx([1e-3] * 5)


def test_a_warmup_longer_than_the_run_is_obeyed() -> None:
    """100 against 80 updates: 0.8 of the peak is the most it gets."""
    got = rates(warmup=100, total=80)
    assert got == pytest.approx([1e-5 * k for k in range(1, 81)], rel=1e-5)
    assert optim.peak_reached(1e-3, warmup=100, total=80) == pytest.approx(got[-1], rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (1, 7), (3, 7), (7, 7), (20, 7), (10, 261)])
def test_every_rate_equals_a_reference_in_numpy(schedule, warmup, total) -> None:
    """Update by update: no first update of rate 0, no peak one too late, no second peak."""
    number_of = np.arange(1, total + 1)
    climb = number_of / max(1, warmup)
    climbed = warmup if warmup > 1 else 0
    share = np.clip((number_of - climbed - 1) / max(1, total - climbed), 0, 1)
    fall = {
        "cosine": 0.5 * (1 + np.cos(np.pi * share)),
        "linear": 1 - share,
        "constant": np.ones(total),
    }[schedule]
    expected = 1e-3 * np.where(number_of <= climbed, climb, fall)
    got = rates(warmup=warmup, total=total, schedule=schedule)
    assert got == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-9)


class Pair(nn.Module):
    """Two matrices named as an adapter's are."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        self.lora_a = mx.array(rng.normal(size=(6, 3)).astype(np.float32))
        self.lora_b = mx.array(rng.normal(size=(3, 5)).astype(np.float32))


def moved(name: str, updates: int = 3, plus: float = 1.0, decay: float = 0.0) -> Any:
    """What an optimizer makes of the pair, and the gradients that it was given."""
    model = Pair()
    schedule = optim.learning_rate(1e-2, warmup=2, total=5, schedule="cosine")
    optimizer = optim.build(name, schedule, weight_decay=decay, plus=plus)
    optimizer.init(model.trainable_parameters())
    rng = np.random.default_rng(2)
    grads = [
        {part: rng.normal(size=model[part].shape).astype(np.float32) for part in model}
        for _ in range(updates)
    ]
    for each in grads:
        optimizer.update(model, {part: mx.array(grad) for part, grad in each.items()})
    return {part: np.array(model[part]) for part in model}, grads, optimizer


def test_adam_equals_a_float64_reference() -> None:
    """With bias correction, and without any decay."""
    got, grads, _ = moved("adam")
    rates = [0.5e-2, 1e-2, 1e-2]
    for part, value in Pair().items():
        w, m, v = np.array(value, np.float64), 0.0, 0.0
        for t, (each, rate) in enumerate(zip(grads, rates, strict=True), 1):
            m = 0.9 * m + 0.1 * each[part]
            v = 0.999 * v + 0.001 * each[part] ** 2
            w = w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert np.allclose(got[part], w, atol=1e-6), part


def test_adam_does_not_swallow_a_weight_decay() -> None:
    """MLX's Adam has none, so asking for one is refused rather than forgotten."""
    with pytest.raises(TrainingError, match=r"weight_decay is 0.1, but adam decays no weights"):
        optim.build("adam", lambda step: mx.array(1e-3), weight_decay=0.1)


def test_muon_equals_a_float64_reference() -> None:
    """Nesterov momentum, orthogonalised in five Newton-Schulz steps, larger for tall matrices."""
    got, grads, _ = moved("muon", decay=0.1)
    rates = [0.5e-2, 1e-2, 1e-2]
    for part, value in Pair().items():
        w, v = np.array(value, np.float64), 0.0
        for each, rate in zip(grads, rates, strict=True):
            grad = each[part] + 0.1 * w
            v = 0.95 * v + 0.05 * grad
            x = 0.05 * grad + 0.95 * v
            rows, columns = x.shape
            x = x.T if rows > columns else x
            x = x / np.linalg.norm(x)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if rows > columns else x
            w = w - rate * math.sqrt(max(1, rows / columns)) * x
        assert np.allclose(got[part], w, atol=1e-4), part


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_with_lora_plus_b_moves_further(name) -> None:
    """B by the ratio, A as without it; the rate that is told is A's."""
    decay = 0.0 if name == "adam" else 0.1
    start = {part: np.array(value) for part, value in Pair().items()}
    plain, _, one = moved(name, 1, decay=decay)
    plus, _, two = moved(name, 1, plus=16.0, decay=decay)
    assert np.array_equal(plain["lora_a"], plus["lora_a"])
    assert not np.array_equal(plain["lora_a"], start["lora_a"])
    ratio = (plus["lora_b"] - start["lora_b"]) / (plain["lora_b"] - start["lora_b"])
    assert ratio == pytest.approx(16.0, rel=1e-2)
    assert number(two.learning_rate) == number(one.learning_rate) == pytest.approx(0.5e-2)


def test_adamw_equals_a_float64_reference_for_five_updates() -> None:
    """Decoupled decay, bias correction (which MLX leaves off by default) and global clipping."""
    from mlx.optimizers import clip_grad_norm

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mx.array([1.0, -2.0, 0.5])
            self.b = mx.array([[3.0], [0.1]])

    model = Two()
    schedule = optim.learning_rate(1e-2, warmup=2, total=5, schedule="cosine")
    optimizer = optim.adamw(schedule, weight_decay=0.1)
    optimizer.init(model.trainable_parameters())
    w = {"a": np.array([1.0, -2.0, 0.5]), "b": np.array([[3.0], [0.1]])}
    m = {name: np.zeros_like(value) for name, value in w.items()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    rate = [0.5e-2, 1e-2, 1e-2, 1e-2 * 0.75, 1e-2 * 0.25]
    rng = np.random.default_rng(0)
    for t in range(1, 6):
        grads = {name: rng.normal(size=value.shape) * 2 for name, value in w.items()}
        clipped, norm = clip_grad_norm({n: mx.array(g) for n, g in grads.items()}, 1.0)
        optimizer.update(model, clipped)
        size = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm.item() == pytest.approx(size, rel=1e-6)
        for name, grad in grads.items():
            grad = grad * min(1.0, 1.0 / (size + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.999 * v[name] + 0.001 * grad**2
            corrected = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            w[name] = w[name] * (1 - rate[t - 1] * 0.1) - rate[t - 1] * corrected
            assert np.allclose(np.array(model[name]), w[name], rtol=1e-5, atol=1e-6), (t, name)


def test_a_learning_rate_needs_no_tracker() -> None:
    """mlx-lm's maker of schedules imported wandb before the first update: a tenth of its start."""
    script = (
        "import sys\nfrom mondrian_ft.training import optim\n"
        "optim.learning_rate(1e-3, warmup=2, total=5, schedule='cosine')\n"
        "print(sorted({'mlx_lm', 'wandb', 'mlx_vlm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


class Two(nn.Module):
    """A pair in the language model and one in the tower."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = Pair()
        self.vision_tower = Pair()


@pytest.mark.parametrize(("plus", "vision"), [(1.0, 0.25), (4.0, 0.25), (4.0, 4.0), (2.0, 1.0)])
def test_the_tower_has_a_rate_of_its_own(plus, vision) -> None:
    """Each part moves by its own multiple of what it moves by with one rate for all."""

    def moves(**factors: float) -> dict[str, Any]:
        model, start = Two(), Pair()
        rate = optim.learning_rate(1e-3, warmup=0, total=5, schedule="constant")
        optimizer = optim.build("adamw", rate, weight_decay=0.0, **factors)
        optimizer.init(model.trainable_parameters())
        grads = {part: mx.ones(start[part].shape) for part in start}
        optimizer.update(model, {"language_model": grads, "vision_tower": grads})
        assert number(optimizer.learning_rate) == pytest.approx(1e-3)
        return {
            f"{side}.{part}": np.array(model[side][part] - start[part])
            for side in ("language_model", "vision_tower")
            for part in start
        }

    one, several = moves(), moves(plus=plus, vision=vision)
    for name, value in one.items():
        factor = (vision if name.startswith("vision") else 1) * (plus if name[-1] == "b" else 1)
        assert np.allclose(several[name], factor * value, rtol=1e-3), name
