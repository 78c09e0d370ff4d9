"""Answers that cannot break the format: decoding under the critique's JSON schema.

llguidance keeps a parser for each answer and says, before each token, which tokens keep the text a
beginning of some valid critique; the others' logits become -inf. What is left of the logits is not
touched: tokens keep their order of likelihood, nothing is penalised for having come before, and an
answer that is valid by itself comes out as it would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.critique import DIMENSION_KEYS, KEYS, Critique
from ..errors import ModelError
from ..model.base import Base

_COMPACT = {
    # As data.critique.render writes: no space between JSON tokens, and no escape but those that
    # json.dumps makes. An escaped half of a surrogate pair would be JSON, but no Unicode.
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrtbf"\\',
    "json_allow_general_unicode_escapes": False,
}


@dataclass(frozen=True)
class Lengths:
    """Most characters of each text, and most entries of each list; so every answer has an end.

    Attributes:
        image_description, comment, recommendation, technical_notes: characters of that text.
        entry: characters of one entry of ``key_strengths`` or ``priority_improvements``.
        entries: entries of each of those lists.
    """

    image_description: int = 1500
    comment: int = 800
    recommendation: int = 800
    technical_notes: int = 1500
    entry: int = 400
    entries: int = 10

    @classmethod
    def of(cls, critiques: Sequence[Critique], *, margin: float = 1.5) -> Lengths:
        """Lengths that leave each text ``margin`` times the longest there is, and 20 characters.

        Args:
            critiques: what the answers shall look like, such as the training rows'.
        """

        def most(texts: Sequence[str]) -> int:
            return int(max(map(len, texts), default=0) * margin) + 20

        dimensions = [one for critique in critiques for one in critique.dimensions]
        lists = [
            entries
            for critique in critiques
            for entries in (critique.key_strengths, critique.priority_improvements)
        ]
        return cls(
            image_description=most([one.image_description for one in critiques]),
            comment=most([one.comment for one in dimensions]),
            recommendation=most([one.recommendation for one in dimensions]),
            technical_notes=most([one.technical_notes for one in critiques]),
            entry=most([entry for entries in lists for entry in entries]),
            entries=max(map(len, lists), default=0) + 1,
        )


MOST_DIMENSIONS = 12
"""Of a critique whose dimensions are not given; the longest known has nine."""
NAME_LENGTH = 60
"""Most characters of a dimension's name that is not given."""


def critique_schema(
    names: Sequence[str] | None, *, decimals: bool = False, lengths: Lengths | None = None
) -> dict[str, Any]:
    """The JSON schema of a critique with exactly these dimensions, in this order.

    Keys come in the order of ``data.critique.KEYS``, which is the order that the model was taught.
    Texts start with something that is not white space, so that none is blank.

    Args:
        names: of the dimensions; None leaves number and names to the model, which has them from
            its prompt or its training.
        decimals: the dimensions' scores, 0 to 10, may have one decimal; otherwise they are whole.
            The overall score always may: it is a mean in the labels, and one that was cut to a
            whole number would be wrong by the constraint's doing.
        lengths: bounds on texts and lists.

    Raises:
        ModelError: no name, or one twice.
    """
    if names is not None and (not names or len(set(names)) < len(names)):
        raise ModelError(f"a critique needs dimensions of different names, not {list(names)}")
    lengths = lengths or Lengths()
    whole = {"type": "integer", "minimum": 0, "maximum": 10}
    decimal = {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.1}

    def text(most: int) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\S", "maxLength": most}

    entries = {"type": "array", "items": text(lengths.entry), "maxItems": lengths.entries}

    def dimension(name: dict[str, Any]) -> dict[str, Any]:
        properties = {
            "name": name,
            "score": decimal if decimals else whole,
            "comment": text(lengths.comment),
            "recommendation": text(lengths.recommendation),
        }
        return _closed(DIMENSION_KEYS, properties)

    if names is None:
        dimensions = {"items": dimension(text(NAME_LENGTH)), "minItems": 1}
        dimensions["maxItems"] = MOST_DIMENSIONS
    else:
        dimensions = {"prefixItems": [dimension({"const": name}) for name in names]}
        dimensions |= {"items": False, "minItems": len(names)}

    return _closed(
        KEYS,
        {
            "image_description": text(lengths.image_description),
            "dimensions": {"type": "array", **dimensions},
            "overall_score": decimal,
            "key_strengths": entries,
            "priority_improvements": entries,
            "technical_notes": text(lengths.technical_notes),
        },
    )


class Constraint:
    """A JSON schema, compiled for one model's tokens. Make it once and use it for any answer.

    Args:
        base: whose tokens to allow; its end tokens come when the schema is fulfilled.
        schema: a JSON schema that llguidance knows; :func:`critique_schema` makes ours.

    Raises:
        ModelError: the schema cannot be compiled, or the tokenizer is not a fast one.
    """

    def __init__(self, base: Base, schema: Mapping[str, Any]) -> None:
        import llguidance
        import llguidance.hf

        self.fingerprint = hashlib.sha256(json.dumps([schema, _COMPACT]).encode()).hexdigest()
        size = base.backbone.vocabulary
        try:
            # The model's vocabulary, which may be larger than the tokenizer's: what no text stands
            # for is never allowed.
            self.tokenizer = llguidance.hf.from_tokenizer(
                base.tokenizer,
                n_vocab=size,
                eos_token=sorted(base.end_tokens),
                slices=llguidance.LLTokenizer.json_slices(),
            )
        except ValueError as error:
            raise ModelError(
                f"{base.identity.name} cannot answer under a schema: {error}; leave the constraint "
                "out"
            ) from error
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema),
            overrides=_COMPACT,  # pyright: ignore[reportArgumentType]
        )
        self.words = -(-size // 32)
        self._first = llguidance.LLMatcher(self.tokenizer, grammar)
        if self._first.is_error():
            raise ModelError(f"the schema cannot be compiled: {self._first.get_error()}")
        self._executor = llguidance.LLExecutor()

    @classmethod
    def critique(
        cls,
        base: Base,
        names: Sequence[str] | None,
        *,
        decimals: bool = False,
        lengths: Lengths | None = None,
    ) -> Constraint:
        """The schema of a critique; see :func:`critique_schema`."""
        return cls(base, critique_schema(names, decimals=decimals, lengths=lengths))

    def start(self, rows: int) -> Matching:
        """Parsers for so many new answers."""
        return Matching(self, [self._first.deep_copy() for _ in range(rows)])

    def allowed(self, matchers: Sequence[Any | None]) -> np.ndarray:
        """Tokens that may come next after each of some answers, see :meth:`Matching.allowed`.

        Args:
            matchers: of :class:`Matching`, of one or several; None for an answer that is free.
        """
        from llguidance.numpy import fill_next_token_bitmask_par

        bits = np.full((len(matchers), self.words), -1, np.int32)
        bound = [(one, place) for place, one in enumerate(matchers) if one is not None]
        if bound:
            fill_next_token_bitmask_par(self._executor, bound, bits)
        return bits


class Matching:
    """Where each of some answers stands in the schema."""

    def __init__(self, constraint: Constraint, matchers: list[Any]) -> None:
        self.constraint = constraint
        self.matchers = matchers
        self.ended: set[int] = set()

    def allowed(self, answers: Sequence[int]) -> np.ndarray:
        """Tokens that may come next.

        Args:
            answers: numbers of the answers wanted, in this order.

        Returns:
            (len(answers), ⌈V/32⌉) int32, bit v % 32 of word v // 32 set where token v may come.
        """
        # An answer that has ended is not asked any more: whatever comes after is thrown away.
        return self.constraint.allowed(
            [None if answer in self.ended else self.matchers[answer] for answer in answers]
        )

    def consume(self, answer: int, token: int) -> None:
        """Append a token to an answer.

        Raises:
            ModelError: it was not allowed, or llguidance ran out of what it allows itself.
        """
        matcher = self.matchers[answer]
        if not matcher.consume_token(token):
            raise ModelError(
                f"decoding under the schema failed at token {token}: {matcher.get_error()}; "
                "evaluate without the constraint"
            )
        if token in self.constraint.tokenizer.eos_tokens:
            self.ended.add(answer)


def _closed(order: Sequence[str], properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object with all of these keys in this order, and no other."""
    return {
        "type": "object",
        "properties": {key: properties[key] for key in order},
        "required": list(order),
        "additionalProperties": False,
    }
