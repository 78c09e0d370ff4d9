"""The learning curves of a 48-point grid on the sample model, trained once and kept.

A search is a matter of luck, so it has to be measured many times; training 48 points for each of
them would take hours. Training gives the same bits each time, so what a trial would have
measured can be looked up instead. ``search`` does that.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import measure

PATH = measure.RESULTS / "curves" / "sample.json"
SPACE: dict[str, list[float]] = {
    "optimizer.learning_rate": [2e-4, 1e-3, 5e-3, 2e-2],
    "lora.rank": [2, 4, 8, 16],
    "lora.dropout": [0.0, 0.1, 0.3],
}
"""Four rates, four ranks, three dropouts: 48 points."""
SEEDS = (0, 1, 2)
UPDATES, EVERY, BATCH, ROWS = 16, 2, 2, 12


def points() -> list[dict[str, float]]:
    """Every point of the grid, in the order of a sweep."""
    return [dict(zip(SPACE, each, strict=True)) for each in itertools.product(*SPACE.values())]


def name(point: dict[str, float], seed: int) -> str:
    """What a point's curve is stored under."""
    return " ".join(f"{key}={value:g}" for key, value in point.items()) + f" seed={seed}"


def run(repeats: int) -> dict[str, Any]:
    """Train what is not there yet, and say how long it took; the curves lie beside the results."""
    known: dict[str, Any] = json.loads(PATH.read_text()) if PATH.is_file() else {"curves": {}}
    known |= {"updates": UPDATES, "eval_every": EVERY, "batch_size": BATCH, "rows": ROWS}
    missing = [
        (point, seed)
        for seed in SEEDS
        for point in points()
        if name(point, seed) not in known["curves"]
    ]
    seconds = []
    for (point, seed), (curve, taken) in zip(missing, _trained(missing), strict=True):
        known["curves"][name(point, seed)] = curve
        seconds.append(taken)
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name(point, seed)}  {curve[-1]:.4f}  {taken:.1f} s", flush=True)
    return {
        "what": f"{UPDATES} updates of {BATCH} of {ROWS} rows, validation loss every {EVERY}",
        "curves": len(known["curves"]),
        "trained_now": len(seconds),
        "seconds_each": measure.spread(seconds, 1) if seconds else None,
    }


def _trained(wanted: list[tuple[dict[str, float], int]]) -> Iterator[tuple[list[float], float]]:
    """Validation losses (nats) after every ``EVERY`` updates, and the seconds of each training."""
    if not wanted:
        return
    from mondrian_ft.data.batches import BatchStream
    from mondrian_ft.model import lora
    from mondrian_ft.training import optim
    from mondrian_ft.training.trainer import Trainer

    with TemporaryDirectory() as folder:
        base, features, train, validation = _sample(Path(folder))
        for point, seed in wanted:
            started = time.perf_counter()
            spec = lora.LoraSpec(
                rank=int(point["lora.rank"]),
                alpha=32.0,
                dropout=point["lora.dropout"],
                targets=(
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                ),
            )
            lora.attach(base.model, spec, seed=seed)
            rate = optim.learning_rate(
                point["optimizer.learning_rate"], warmup=2, total=UPDATES, schedule="cosine"
            )
            optimizer = optim.build("adamw", rate, weight_decay=0.01, plus=1.0)
            optimizer.init(base.model.trainable_parameters())
            trainer = Trainer(
                base.backbone,
                optimizer,
                BatchStream(train, batch_size=BATCH, seed=seed, pad_token=base.pad_token),
                features,
                validation,
                _Nowhere(),
                max_steps=UPDATES,
                save_every=UPDATES,
                eval_every=EVERY,
                max_bad_steps=UPDATES,
            )
            curve = _Curve()
            trainer.callbacks = [curve]
            trainer.fit()
            lora.detach(base.model)
            yield curve.losses, time.perf_counter() - started


def _sample(folder: Path) -> tuple[Any, Any, Any, Any]:
    """The sample's base, its features, twelve training rows, and half as many validation rows."""
    from mondrian_ft.config import Config
    from mondrian_ft.pipeline import rows, training
    from mondrian_ft.run import Run
    from mondrian_ft.schema import DataConfig, TrackingConfig, TrackingMode

    data = DataConfig(
        train_split=0.7, val_split=0.15, test_split=0.15, max_pixels=24_576, min_pixels=4_096
    )
    config = Config(data=data, tracking=TrackingConfig(mode=TrackingMode.disabled))
    with Run.open(config, folder / "run") as run:
        parts = rows.linked_and_prepared(config, run)
        base, features = training.load_base_of(config, run, to_train=True)
        train = training.encode_rows(config, run, base, parts.train[:ROWS], features)
        validation = training.encode_rows(config, run, base, parts.val[: ROWS // 2], features)
    return base, features, train, validation


class _Curve:
    """Keeps the validation losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, state: Any, update: Any) -> None:
        pass

    def on_eval(self, state: Any) -> None:
        self.losses.append(round(state.val_loss, 6))

    def on_end(self, state: Any) -> None:
        pass


class _Nowhere:
    """Keeps no checkpoint: nothing is resumed here."""

    def save(self, trainer: Any) -> Path:
        return Path()

    def mark_best(self, step: int) -> None:
        pass

    def last(self) -> Path | None:
        return None
