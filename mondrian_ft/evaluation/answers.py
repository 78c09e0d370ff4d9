"""Answers that were given before: a repeated evaluation costs nothing, a killed one goes on.

Greedy answers follow from the model, the picture, the prompt and the settings of decoding, so they
are kept under hashes of exactly those. One file holds the answers of one model under one set of
settings, a line each, appended as soon as they are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import MondrianError
from ..files import append_line
from .outputs import Output

VERSION = 1
"""Bump when the same model, picture, prompt and settings start to give other answers."""


@dataclass(frozen=True)
class Question:
    """What an answer answers: the picture (its content's SHA-256) and the prompt (likewise)."""

    picture: str
    prompt: str


class AnswerStore:
    """The answers of one model under one set of settings.

    Args:
        folder: where such files are kept; None keeps answers only as long as this object lives.
        model: what tells the model from others: base, quantisation, dtype, adapter.
        settings: all else that an answer depends on: pixels, token limit, batch size, constraint.

    A line that cannot be read (the last one of a killed run, a damaged one) is passed over, and
    its question asked again; ``damaged`` counts them. ``problem`` says why answers are no longer
    written to the disk; blank while they are, or are not meant to be.
    """

    def __init__(
        self, folder: Path | None, model: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> None:
        facts = {"version": VERSION, "model": dict(model), "settings": dict(settings)}
        self.facts = facts
        text = json.dumps(facts, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.path = folder / f"{self.key}.jsonl" if folder else None
        self.damaged = 0
        self.problem = ""
        self._known: dict[Question, Output] = {}
        if self.path and self.path.is_file():
            self._read(self.path)

    def get(self, question: Question) -> Output | None:
        """The answer, if it was given before; its times are those of then."""
        return self._known.get(question)

    def put(self, question: Question, answer: Output) -> None:
        """Keep an answer. One that cannot be written is kept in memory: the run goes on."""
        self._known[question] = answer
        if self.path is None:
            return
        line = {**asdict(question), "answer": asdict(answer)}
        try:
            append_line(self.path, json.dumps(line))
        except MondrianError as error:
            # The cache only saves time; what it cannot keep is in the report all the same.
            self.path, self.problem = None, str(error)

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
                question = Question(str(value["picture"]), str(value["prompt"]))
                self._known[question] = Output(**value["answer"])
            except (ValueError, KeyError, TypeError):
                self.damaged += 1
