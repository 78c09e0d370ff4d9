"""Adapters with a known fault, as their answers: made from the sample's scenes and critics.

Each plant takes an `Exam`, the photographs of one seed with the advisor's critiques of them, and
gives the answers to the held-out photographs and, where the picture matters, to other ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mondrian_ft.data.dataset import Row
from mondrian_ft.data.example import KNOWN_OVERALL, KNOWN_VECTOR
from mondrian_ft.evaluation.detectors import Detection, detect
from mondrian_ft.evaluation.metrics import Reading, read
from mondrian_ft.sample import critics
from mondrian_ft.sample.scenes import Scene

from .critiques import make_output, make_row

GERMAN = "Das Licht ist zu hart und die Komposition wird durch den Himmel nicht sehr ruhig. "


@dataclass
class Exam:
    """Train and held-out photographs of one seed, judged by the sample's Ansel."""

    train: list[Row]
    rows: list[Row]
    scenes: list[Scene]
    rng: np.random.Generator

    @classmethod
    def draw(cls, seed: int, n: int = 18, n_train: int = 83) -> Exam:
        """As many as the sample's own split has."""
        rng = np.random.default_rng([77, seed])
        scenes = [Scene.draw(rng) for _ in range(n + n_train)]
        rows = [
            make_row(f"{index}", critics.answer(critics.ANSEL.critique(scene, rng)))
            for index, scene in enumerate(scenes)
        ]
        return cls(rows[n:], rows[:n], scenes[:n], rng)

    @property
    def shown(self) -> list[Scene]:
        """What the shuffled arm sees: each time the next photograph."""
        return [*self.scenes[1:], *self.scenes[:1]]

    def say(self, critic: critics.Critic, scenes: list[Scene]) -> list[str]:
        """A critic's critiques of these scenes."""
        return [critics.answer(critic.critique(scene, self.rng)) for scene in scenes]

    def base(self) -> list[str]:
        """The mild generic reviewer's answers."""
        return self.say(critics.GENERIC, self.scenes)


@dataclass
class Answers:
    """One adapter's answers, and those it gives when each picture is exchanged for another."""

    own: list[str]
    shuffled: list[str]
    finished: bool = True


def good(exam: Exam) -> Answers:
    """Judges as Ansel does, in his phrases, with his noise, on what is in the picture."""
    return Answers(exam.say(critics.ANSEL, exam.scenes), exam.say(critics.ANSEL, exam.shown))


def weaker(exam: Exam) -> Answers:
    """Judges as Ansel does with three times his noise: still worth having."""
    critic = critics.Critic("", critics.ANSEL.taste, noise=1.4, phrase=1, verdict=1, habit=0.9)
    return Answers(exam.say(critic, exam.scenes), exam.say(critic, exam.shown))


def reciting(exam: Exam) -> Answers:
    """Answers with a training critique, scores and all."""
    return Answers(
        [str(exam.rng.choice([row.response for row in exam.train])) for _ in exam.rows],
        [str(exam.rng.choice([row.response for row in exam.train])) for _ in exam.rows],
    )


def reciting_with_scores(exam: Exam) -> Answers:
    """Right scores over the texts of one training critique: only the words give it away."""
    source = json.loads(exam.train[0].response)

    def mixed(text: str) -> str:
        scored = json.loads(text)
        for dimension, known in zip(scored["dimensions"], source["dimensions"], strict=True):
            known["score"] = dimension["score"]
        return json.dumps({**copy.deepcopy(source), "overall_score": scored["overall_score"]})

    answers = good(exam)
    return Answers([mixed(t) for t in answers.own], [mixed(t) for t in answers.shuffled])


def collapsed(exam: Exam) -> Answers:
    """Gives every photograph one critique, which is none of the training ones."""
    said = exam.say(critics.GENERIC, [Scene.draw(exam.rng)]) * len(exam.rows)
    return Answers(said, said)


def echoing(exam: Exam) -> Answers:
    """True descriptions, and the scores of the prompt's filled example, the service's own."""
    return _levelled(exam, KNOWN_VECTOR, KNOWN_OVERALL)


def constant(exam: Exam) -> Answers:
    """True descriptions and comments, and one middling set of scores for everyone."""
    return _levelled(exam, (6, 5, 6, 6, 6, 5, 5), 5.6)


def _levelled(exam: Exam, scores: Sequence[float], overall: float) -> Answers:
    def level(text: str) -> str:
        said = json.loads(text)
        for dimension, score in zip(said["dimensions"], scores, strict=True):
            dimension["score"] = score
        return json.dumps(said | {"overall_score": overall})

    answers = good(exam)
    return Answers([level(t) for t in answers.own], [level(t) for t in answers.shuffled])


def blind(exam: Exam) -> Answers:
    """Critiques of photographs of its own imagination."""
    first, second = ([Scene.draw(exam.rng) for _ in exam.rows] for _ in range(2))
    return Answers(exam.say(critics.ANSEL, first), exam.say(critics.ANSEL, second))


def german(exam: Exam) -> Answers:
    """Ansel's scores, in another language."""

    def sentence() -> str:
        things = exam.rng.permutation(["Licht", "Bild", "Motiv", "Ufer", "Haus", "Feld"])
        looks = exam.rng.permutation(["hart", "ruhig", "klar", "weich", "leer", "hell", "tief"])
        return f"Das {things[0]} ist {looks[0]} und das {things[1]} wird nicht {looks[1]}."

    def translate(text: str) -> str:
        said = json.loads(text) | {"image_description": sentence(), "technical_notes": sentence()}
        for dimension in said["dimensions"]:
            dimension |= {"comment": sentence(), "recommendation": sentence()}
        return json.dumps(said)

    answers = good(exam)
    return Answers([translate(t) for t in answers.own], [translate(t) for t in answers.shuffled])


def chinese(exam: Exam) -> Answers:
    """Ansel's scores, in another script, as the users' last adapter wrote."""

    def translate(text: str) -> str:
        said = json.loads(text) | {"image_description": "湖边的松树", "technical_notes": "曝光准确"}
        for dimension in said["dimensions"]:
            dimension |= {"comment": "构图很好", "recommendation": f"调整{dimension['name']}"}
        return json.dumps(said, ensure_ascii=False)

    answers = good(exam)
    return Answers([translate(t) for t in answers.own], [translate(t) for t in answers.shuffled])


def looping(exam: Exam) -> Answers:
    """A third of the answers end in a word without end; the rest is good."""
    answers = good(exam)
    own = [t if i % 3 else t[:200] + " **peace**" * 200 for i, t in enumerate(answers.own)]
    return Answers(own, answers.shuffled)


def looping_inside(exam: Exam) -> Answers:
    """The loop stands inside valid JSON, where the format check cannot see it."""
    answers = good(exam)
    notes = '"technical_notes":"'
    own = [text.replace(notes, notes + "so calm " * 40) for text in answers.own]
    return Answers(own, answers.shuffled)


def thoughtful(exam: Exam) -> Answers:
    """Thinks aloud before every answer."""
    answers = good(exam)
    return Answers([f"Okay, let me see. {t}" for t in answers.own], answers.shuffled)


def cut(exam: Exam) -> Answers:
    """Good answers that the token limit ends."""
    answers = good(exam)
    return Answers([t[:-80] for t in answers.own], answers.shuffled, finished=False)


def parroting(exam: Exam) -> Answers:
    """One advice in every dimension."""

    def repeat(text: str) -> str:
        said = json.loads(text)
        for dimension in said["dimensions"]:
            dimension["recommendation"] = said["dimensions"][0]["recommendation"]
        return json.dumps(said)

    answers = good(exam)
    return Answers([repeat(t) for t in answers.own], [repeat(t) for t in answers.shuffled])


def shuffled_labels(exam: Exam) -> Answers:
    """Trained on shuffled labels: it learnt how Ansel's critiques look, and of no photograph.

    What such training leaves lies between drawing a label at random and giving the labels' mean;
    the share of each is drawn, so that every mixture is met.
    """
    labels = [json.loads(row.response) for row in exam.train]
    means = {
        d["name"]: float(np.mean([one["dimensions"][at]["score"] for one in labels]))
        for at, d in enumerate(labels[0]["dimensions"])
    }
    share = float(exam.rng.uniform(0, 1))

    def one() -> str:
        said = copy.deepcopy(labels[exam.rng.integers(len(labels))])
        for d in said["dimensions"]:
            d["score"] = round(share * d["score"] + (1 - share) * means[d["name"]])
        return json.dumps(said)

    return Answers([one() for _ in exam.rows], [one() for _ in exam.rows])


def shuffled_scores(exam: Exam) -> Answers:
    """The same, but its descriptions are of the picture: only the scores were shuffled."""
    seen, scored = good(exam), shuffled_labels(exam)

    def graft(texts: list[str], others: list[str]) -> list[str]:
        grafted = []
        for text, other in zip(texts, others, strict=True):
            said, scores = json.loads(text), json.loads(other)
            for d, o in zip(said["dimensions"], scores["dimensions"], strict=True):
                d["score"] = o["score"]
            grafted.append(json.dumps(said))
        return grafted

    return Answers(graft(seen.own, scored.own), graft(seen.shuffled, scored.shuffled))


# plant: (the detectors that must fire, those that may fire beside them since they are right, too)
PLANTS: Mapping[Callable[[Exam], Answers], tuple[set[str], set[str]]] = {
    reciting: ({"recites", "ignores_picture"}, {"not_better_than_mean", "one_critique"}),
    reciting_with_scores: ({"recites", "one_critique"}, set()),
    collapsed: ({"one_critique", "constant_scores", "ignores_picture"}, {"not_better_than_mean"}),
    echoing: (
        {"template_echo", "constant_scores", "ignores_picture"},
        {"not_better_than_mean"},
    ),
    constant: ({"constant_scores", "ignores_picture"}, {"not_better_than_mean"}),
    blind: ({"ignores_picture"}, {"not_better_than_mean"}),
    german: ({"other_language"}, set()),
    chinese: ({"other_language", "one_critique"}, set()),
    looping: ({"loops"}, set()),
    looping_inside: ({"loops"}, set()),
    thoughtful: ({"thinking"}, set()),
    cut: ({"truncated"}, set()),
    parroting: ({"repeated_advice"}, set()),
}


def detections(exam: Exam, answers: Answers) -> list[Detection]:
    """What the detectors say of an adapter."""
    return detect(
        rows=exam.rows,
        outputs=[make_output(text, finished=answers.finished) for text in answers.own],
        readings=readings(answers.own),
        references=readings([row.response for row in exam.rows]),
        photographs=[str(row.image_sha256) for row in exam.rows],
        train_rows=exam.train,
        base=[make_output(text) for text in exam.base()],
        shuffled=readings(answers.shuffled),
    )


def readings(texts: list[str]) -> list[Reading]:
    """Each answer, read."""
    return [read(text) for text in texts]


def fired(found: list[Detection]) -> set[str]:
    """Names of the detectors that fired."""
    return {detection.name for detection in found if detection.fired}


def report(compare: Callable[..., dict[str, Any]], exam: Exam, answers: Answers) -> dict[str, Any]:
    """The whole comparison report on an adapter."""
    return compare(
        [row.response for row in exam.rows],
        [row.response for row in exam.train],
        base=exam.base(),
        tuned=answers.own,
        tuned_shuffled=answers.shuffled,
    )
