"""The main job several times over, folds times seeds, judged as one.

With 60 to 90 rows a held-out part is a dozen photographs. In k-fold mode each of k adapters is
asked about the photographs that it was not trained on, so that every row is judged once; with
several seeds each of them once a seed. What is judged so is the recipe, not one adapter, and
nothing is registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..data.rows import Row, check_disjoint, data_lock
from ..errors import DataError
from ..evaluation import evidence, metrics
from ..evaluation.evaluator import Evaluator
from ..model import lora
from ..model.base import Base
from ..model.features import FeatureStore
from ..report import wording
from . import evaluation, judging, training
from .evaluation import Asked, Evaluated
from .rows import Parts

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


@dataclass(frozen=True)
class Repeat:
    """One training of the recipe; ``fold`` is None where the split's own parts are used."""

    fold: int | None
    seed: int
    parts: Parts

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"seed-{self.seed}" if self.fold is None else f"fold-{self.fold}-seed-{self.seed}"


def wanted(config: Config) -> bool:
    """Whether the config asks for more than one training."""
    return config.eval.folds is not None or config.eval.seeds > 1


def evaluate(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    *,
    labels: str | None = None,
) -> tuple[Evaluated, float | None]:
    """Train every repeat, pool what the adapters said, and write one report.

    Returns:
        The comparison, and the mean of the repeats' validation losses.

    Raises:
        DataError: the rows carry no folds, or there are no held-out ones.
    """
    repeats = list(plan(config, parts))
    rows = list({id(row): row for repeat in repeats for row in repeat.parts.judged}.values())
    limit = config.eval.max_tokens
    if limit is None and rows:
        # One limit for all: a fold's own longest reference would be another's cut answers.
        limit = Evaluator.limit(training.encode_rows(config, run, base, rows))
    asked: list[Asked] = []
    facts: list[dict[str, Any]] = []
    losses: list[float] = []
    for number, repeat in enumerate(repeats, 1):
        run.console.print(f"\n{repeat.name}, {number} of {len(repeats)}", style="bold")
        own = replace(
            config,
            trainer=replace(config.trainer, seed=repeat.seed),
            eval=replace(config.eval, max_tokens=limit),
        )
        with run.within(own, f"repeats/{repeat.name}") as part:
            adapter, loss = training.train(
                own, part, base, features, repeat.parts, part.folder / "adapter"
            )
            assert adapter is not None  # this process is alone
            try:
                answers = evaluation.ask(
                    own, part, base, features, repeat.parts, adapter, alone=True
                )
            finally:
                lora.detach(base.model)
        asked.append(answers)
        losses += [] if loss is None else [loss]
        facts.append(
            {
                "fold": repeat.fold,
                "seed": repeat.seed,
                "adapter_hash": adapter.hash,
                "adapter": str(adapter.folder),
                "val_loss": loss,
                "n": len(answers.examples),
                "score_mae": {arm: _error(answers, arm) for arm in ("base", "tuned")},
            }
        )
    pooled = pool(asked)
    everything = replace(
        parts,
        # A fold's own constant would know its training rows alone. This one knows them all, which
        # makes it a little harder to beat.
        train=[*parts.train, *parts.val] if config.eval.folds else parts.train,
    )
    report = evaluation.build(config, everything, base, pooled, None)
    report["evidence"]["repeats"] = facts
    if labels is not None:
        report["evidence"]["labels"] = labels
    report = judging.judged(config, run, report)
    return evaluation.write(config, run, report, None), fmean(losses) if losses else None


def plan(config: Config, parts: Parts) -> Iterator[Repeat]:
    """Every training there will be: folds within seeds.

    A fold's photographs are validation part and judged part in one; as there is no test part then,
    the last checkpoint is kept and no row both chooses and judges. The split's own test part stays
    out of it.
    """
    count = config.eval.folds
    for seed in range(config.trainer.seed, config.trainer.seed + config.eval.seeds):
        if count is None:
            yield Repeat(None, seed, parts)
            continue
        inside = [*parts.train, *parts.val]
        if {row.fold for row in inside} != set(range(count)):
            raise DataError(
                f"the rows were not dealt into {count} folds, as eval.folds wants; prepare them "
                f"again with data.folds={count}"
            )
        for fold in range(count):
            named: dict[str, list[Row]] = {
                "train": [row for row in inside if row.fold != fold],
                "val": [row for row in inside if row.fold == fold],
                "test": [],
            }
            check_disjoint(named)
            yield Repeat(fold, seed, Parts(**named, lock=data_lock(named), source=parts.source))


def pool(asked: list[Asked]) -> Asked:
    """The answers of all repeats as those of one asking; an arm that failed once is left out."""
    failed = {arm: reason for each in asked for arm, reason in each.failed.items()}
    arms = [arm for arm in asked[0].outputs if all(arm in each.outputs for each in asked)]
    reused: dict[str, int] = {}
    for each in asked:
        for arm, number in each.settings["answers_reused"].items():
            reused[arm] = reused.get(arm, 0) + number
    return Asked(
        examples=[example for each in asked for example in each.examples],
        outputs={arm: [one for each in asked for one in each.outputs[arm]] for arm in arms},
        failed=failed,
        hashes={
            arm: found for arm, found in asked[0].hashes.items() if not arm.startswith("tuned")
        },
        peak_memory={
            arm: max(each.peak_memory.get(arm, 0.0) for each in asked)
            for arm in arms
            if any(arm in each.peak_memory for each in asked)
        },
        settings=asked[0].settings | {"answers_reused": reused},
        part=(asked[0].part[0], sum(each.part[1] for each in asked)),
        base=asked[0].base,
    )


def told(config: Config) -> str:
    """What is judged, in a few words."""
    parts = []
    if config.eval.folds:
        parts.append(f"{config.eval.folds} folds")
    if config.eval.seeds > 1:
        parts.append(wording.count(config.eval.seeds, "seed"))
    return " and ".join(parts)


def _error(asked: Asked, arm: str) -> float | None:
    """An arm's mean score error in one repeat, points of 0-10, by photograph."""
    if arm not in asked.outputs:
        return None
    errors = [
        metrics.score_error(
            metrics.read(output.text).scores, metrics.read(example.row.response).scores
        )
        for output, example in zip(asked.outputs[arm], asked.examples, strict=True)
    ]
    photographs = [evidence.photograph(row) for row in asked.rows]
    return evidence.mean_of(metrics.by_photograph(errors, photographs).values())
