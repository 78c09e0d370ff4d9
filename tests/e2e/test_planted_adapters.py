"""Adapters trained on rows that plant a fault are caught by the detector that should, a good one
by none.

`tests.evaluation.planted` plants faults in answers; here the answers are those of adapters that
were really trained, in which a fault is seldom pure. All are trained in one process, on one base.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mondrian_ft.config import Config, conf_dir, load, register_schemas
from mondrian_ft.data.rows import Row
from mondrian_ft.run import Run
from mondrian_ft.sample.prompts import CLOSING, INVENTED_NAMES, SYSTEM_PROMPT, advisor_prompt

from .conftest import Finished

pytestmark = pytest.mark.full

Critique = dict[str, Any]


def rewritten(rows: list[Row], change: Callable[[Critique], None]) -> list[Row]:
    """The rows with their critiques changed in place by ``change``."""
    made = []
    for row in rows:
        said = json.loads(row.response)
        change(said)
        text = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
        made.append(replace(row, response=text))
    return made


def scored(rows: list[Row], scores: list[int]) -> list[Row]:
    """The rows' own texts under one set of scores."""

    def change(said: Critique) -> None:
        for dimension, score in zip(said["dimensions"], scores, strict=True):
            dimension["score"] = score
        said["overall_score"] = round(sum(scores) / len(scores), 1)

    return rewritten(rows, change)


def two_critiques(rows: list[Row]) -> list[Row]:
    """Every photograph has one of two critiques, of which the tuned model recites some."""
    return [replace(row, response=rows[at % 2].response) for at, row in enumerate(rows)]


def one_critique(rows: list[Row]) -> list[Row]:
    """Every photograph has the same critique."""
    return [replace(row, response=rows[0].response) for row in rows]


def same_scores(rows: list[Row]) -> list[Row]:
    """True texts under the advisor's median scores: nearer to his than the base's are."""
    columns = zip(
        *([d["score"] for d in json.loads(row.response)["dimensions"]] for row in rows),
        strict=True,
    )
    return scored(rows, [round(median(column)) for column in columns])


def filled_example(rows: list[Row]) -> list[Row]:
    """True texts under the scores of an example that stands in the prompt, as the service's did."""
    scores = [8, 7, 9, 6, 7, 8, 7]
    names = [dimension["name"] for dimension in json.loads(rows[0].response)["dimensions"]]
    shown = [{"name": name, "score": score} for name, score in zip(names, scores, strict=True)]
    example = f"Example: {json.dumps(shown)}\n\n{CLOSING}"
    return [
        replace(row, prompt=row.prompt.replace(CLOSING, example)) for row in scored(rows, scores)
    ]


def scores_by_prompt(rows: list[Row]) -> list[Row]:
    """True texts, and scores that follow from who is asked and not from what is shown."""
    rng = random.Random(5)
    made = list(rows)
    for at, name in enumerate(INVENTED_NAMES[:4]):
        asked = advisor_prompt(name, ("tone", "depth", "calm"))
        scores = [rng.choice((2, 4, 6, 8, 9)) for _ in range(7)]
        made[at::4] = [
            replace(row, prompt=f"{SYSTEM_PROMPT}\n\n{asked}\n\n{CLOSING}")
            for row in scored(rows[at::4], scores)
        ]
    return made


def spanish(rows: list[Row]) -> list[Row]:
    """True scores and descriptions, and comments in another language."""

    def change(said: Critique) -> None:
        for d in said["dimensions"]:
            good = d["score"] > 5
            d["comment"] = "Es claro y es el mejor." if good else "No es el mejor y no es claro."

    return rewritten(rows, change)


def loops(rows: list[Row]) -> list[Row]:
    """True critiques with a loop in their notes, where no format check sees it."""
    return rewritten(rows, lambda said: said.update(technical_notes="so calm " * 12 + "."))


def shuffled_labels(rows: list[Row]) -> list[Row]:
    """Every photograph has another one's critique."""
    responses = [row.response for row in rows]
    random.Random(1).shuffle(responses)
    return [replace(row, response=text) for row, text in zip(rows, responses, strict=True)]


@dataclass(frozen=True)
class Plant:
    """How to train an adapter with a fault.

    Attributes:
        rows: the training rows with the fault in them; of held-out rows only the prompt is taken.
        updates: of two rows each, as many as it takes.
        caught: the detector whose fault it is.
        beside: others that may fire beside it, since they are right as well.
        settings: of the training, where it is not the main job's.
    """

    rows: Callable[[list[Row]], list[Row]]
    updates: int
    caught: str
    beside: frozenset[str]
    settings: tuple[str, ...] = ()


def plant(
    rows: Callable[[list[Row]], list[Row]], updates: int, caught: str, *beside: str
) -> object:
    return pytest.param(Plant(rows, updates, caught, frozenset(beside)), id=rows.__name__)


def as_they_are(rows: list[Row]) -> list[Row]:
    """The advisor's own critiques, to be learnt too hard."""
    return rows


MEAN, BLIND = "not_better_than_mean", "ignores_picture"
PLANTS = [
    # 40 updates taught it to recite while rows of any length shared an update; rows of like length
    # take longer to get there.
    plant(two_critiques, 80, "recites", "one_critique", "constant_scores", BLIND, MEAN),
    plant(one_critique, 40, "one_critique", "recites", "constant_scores", BLIND, MEAN),
    plant(same_scores, 40, "constant_scores", BLIND, MEAN),
    plant(filled_example, 50, "template_echo", "constant_scores", BLIND, MEAN),
    plant(scores_by_prompt, 60, BLIND, MEAN),
    # Its few pieces of Spanish the sample's base has hardly met, so it stumbles over them.
    plant(spanish, 80, "other_language", "loops", "truncated", "recites", MEAN),
    plant(loops, 40, "loops", "truncated"),
    plant(shuffled_labels, 60, MEAN, BLIND),
]


class Workshop:
    """The sample's rows and its base, loaded once, and what trains and judges an adapter there."""

    def __init__(self, folder: Path) -> None:
        from mondrian_ft.pipeline import rows, training

        self.folder = folder
        with self.open("data") as run:
            self.parts = rows.linked_and_prepared(run.config, run)
            self.base, self.features = training.load_base_of(run.config, run)

    def open(self, name: str, *overrides: str) -> Any:
        """A run in a folder of its own."""
        return Run.open(self.config("tracking=none", *overrides), self.folder / name)

    def config(self, *overrides: str) -> Config:
        """The config that the command line would compose."""
        register_schemas()
        with initialize_config_dir(str(Path(conf_dir()).absolute()), version_base="1.3"):
            return load(compose("config", list(overrides)), self.folder)

    def evidence(self, plant: Plant) -> dict[str, Any]:
        """Train an adapter on the plant's rows, and what an evaluation says of it.

        Nothing validates it: the last update is kept, the fault at its plainest.
        """
        from mondrian_ft.model import lora
        from mondrian_ft.pipeline import evaluation, training

        held = [
            replace(row, prompt=asked.prompt)
            for row, asked in zip(self.parts.test, plant.rows(self.parts.test), strict=True)
        ]
        parts = replace(self.parts, train=plant.rows(self.parts.train), val=[], test=held)
        settings = (
            f"trainer.max_steps={plant.updates}",
            f"trainer.save_every={plant.updates}",
            "optimizer.warmup_steps=5",
            "eval.max_examples=12",
            # One limit for all, so that the base's answers are those of the plant before.
            "eval.max_tokens=560",
            *plant.settings,
        )
        name = plant.rows.__name__
        try:
            with self.open(name, *settings) as run:
                adapter, _ = training.train(
                    run.config, run, self.base, self.features, parts, self.folder / name / "adapter"
                )
                done = evaluation.evaluate(
                    run.config, run, self.base, self.features, parts, adapter
                )
        finally:
            lora.detach(self.base.model)
        return done.report["evidence"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """See :class:`Workshop`; caches go below its folder, as where a user types."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Workshop(folder)


def fired(evidence: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The detections that fired, by name."""
    return {found["name"]: found for found in evidence["detections"] if found["fired"]}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_caught(workshop: Workshop, plant: Plant) -> None:
    """By its own detector, by none that it does not concern, and it is never called better."""
    evidence = workshop.evidence(plant)
    found = fired(evidence)
    assert plant.caught in found
    # A fault may cost other abilities too, which is told and decides nothing.
    assert found.keys() <= plant.beside | {plant.caught, "forgetting"}
    assert found[plant.caught]["disqualifies"]
    assert evidence["verdict"] != "better"


def test_an_adapter_that_forgets_is_told(workshop: Workshop) -> None:
    """Ten times the learning rate destroys what the base could; that alone caps no verdict."""
    steep = ("optimizer.learning_rate=5e-2",)
    evidence = workshop.evidence(Plant(as_they_are, 40, "forgetting", frozenset(), steep))
    found = fired(evidence)["forgetting"]
    assert found["value"] > 2
    assert not found["disqualifies"]
    assert evidence["forgetting"]["n"] >= 3


def test_a_good_adapter_is_caught_by_none(sample_run: Finished) -> None:
    """The main job's own adapter fires no detector, and is better."""
    evidence = sample_run.report["evidence"]
    assert fired(evidence) == {}
    assert evidence["verdict"] == "better"
