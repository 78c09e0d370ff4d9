"""Detectors of words that say nothing about the photograph, or fail as a text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from ...data.audit.language import is_english
from ...data.audit.texts import LOOP, longest_loop, repeats_advice, texts, thinks_aloud
from ...data.example import example_share, filled_example
from ...data.rows import Row
from .. import metrics
from ..metrics import Reading
from ..outputs import Output
from .detection import MORE, Detection, of_share, result

GRAM = 5
"""Words in a phrase that is compared; long enough for a stock phrase to be a few of them."""
_QUOTED = re.compile(r'["<>\n]')
"""Where the texts of an example in a prompt begin and end, in JSON and in HTML."""


def recites(
    rows: Sequence[Row],
    answers: Sequence[str],
    train_rows: Sequence[Row],
    base: Sequence[str] = (),
) -> Detection:
    """Answers that are a training critique of another photograph, nearly word for word.

    A text's likeness to the training critiques is the largest share (0-1) of its phrases of five
    words that one of them has. The references of an advisor with stock phrases are alike in the
    same way, so an answer counts as recited only where it is more than halfway from what nine of
    ten references reach to a copy. ``value`` is the share of such answers; ``threshold`` is 0.2
    above the share of references, or of ``base`` answers if larger, that reach it as well. Fewer
    than two recited answers never fire. Scores and the names of dimensions are no part of it.
    """
    if not train_rows:
        return result("recites", False, None, None, (), "There are no training critiques to copy.")
    own, sources = _photographs(rows), _photographs(train_rows)
    library = _library([row.response for row in train_rows])
    usual, mine, of_base = (
        _likeness(texts_of, own, library, sources)
        for texts_of in ([row.response for row in rows], answers, base)
    )
    return _copies(
        "recites",
        rows,
        mine,
        (usual, of_base),
        "repeat a training critique of another photograph nearly word for word",
        "The answers are no copies of training critiques.",
    )


def one_critique(rows: Sequence[Row], answers: Sequence[str]) -> Detection:
    """Answers that are the same for different photographs, nearly word for word.

    The collapse that ``recites`` cannot see where the one critique is none of the training ones.
    Measured in the same way, each answer against those to other photographs before it, and each
    reference likewise, so that of two answers that are alike one counts; ``value`` is the share
    (0-1) of such answers, ``threshold`` 0.2 above the references' share. The base is no excuse
    here: a critique for all judges none. Fewer than two never fire, since two photographs may be
    much alike.
    """
    own = _photographs(rows)
    usual, mine = (
        _likeness(written, own, _library(written), own, before=True)
        for written in ([row.response for row in rows], answers)
    )
    return _copies(
        "one_critique",
        rows,
        mine,
        (usual,),
        "are nearly word for word the answer to a photograph before",
        "The answers differ from photograph to photograph.",
    )


def template_echo(
    rows: Sequence[Row], answers: Sequence[str], readings: Sequence[Reading]
) -> Detection:
    """Answers that are the prompt's own filled example, in their scores or in their words.

    Of the scores the share (0-1) that the example has (`data.example.example_share`), of the words
    the share of phrases of five that stand in the prompt. Either counts as an echo where it is more
    than halfway from what nine of ten references reach to a copy: what is learnt is seldom exact.
    ``value`` is the share of echoes, ``threshold`` 0.2 above the references' share, both of what is
    the plainer: labels that were made with the example in the prompt echo it as well. The base is
    no excuse, and fewer than two never fire.
    """
    examples = {prompt: filled_example(prompt) for prompt in {row.prompt for row in rows}}
    phrases = {prompt: _phrases(_QUOTED.split(prompt)) for prompt in examples}

    def in_scores(row: Row, reading: Reading) -> float:
        found = reading.critique
        return example_share(found, examples[row.prompt]) if found else 0.0

    def in_words(row: Row, text: str) -> float:
        grams = _grams(text)
        return len(grams & phrases[row.prompt]) / len(grams) if grams else 0.0

    scores = _copies(
        "template_echo",
        rows,
        [in_scores(*one) for one in zip(rows, readings, strict=True)],
        ([in_scores(row, metrics.read(row.response)) for row in rows],),
        "have the scores of the example in the prompt, or all but a few",
        "The answers are no copies of an example in the prompt.",
    )
    words = _copies(
        "template_echo",
        rows,
        [in_words(*one) for one in zip(rows, answers, strict=True)],
        ([in_words(row, row.response) for row in rows],),
        "are made of the words of the prompt",
        "The answers are no copies of an example in the prompt.",
    )
    return max(scores, words, key=lambda found: (found.value or 0) - (found.threshold or 0))


def other_language(rows: Sequence[Row], answers: Sequence[str]) -> Detection:
    """Answers that are not in English where the reference is; ``data.audit.language`` tells.

    ``value`` is their share (0-1), ``threshold`` 0.1.
    """
    found = [
        row.job_id
        for row, text in zip(rows, answers, strict=True)
        if is_english(_prose(row.response)) and not is_english(_prose(text))
    ]
    return of_share("other_language", rows, found, "are not in the references’ language")


def loops(rows: Sequence[Row], answers: Sequence[str]) -> Detection:
    """Answers in which a phrase follows on itself eight times or more; value as a share (0-1)."""
    found = [
        row.job_id
        for row, text in zip(rows, answers, strict=True)
        if longest_loop(text) >= LOOP > longest_loop(row.response)
    ]
    return of_share("loops", rows, found, "repeat a word or phrase without end")


def truncated(rows: Sequence[Row], outputs: Sequence[Output]) -> Detection:
    """Answers that the token limit cut; value as a share (0-1)."""
    found = [row.job_id for row, output in zip(rows, outputs, strict=True) if not output.finished]
    return of_share("truncated", rows, found, "were cut by the token limit")


def thinking(rows: Sequence[Row], answers: Sequence[str]) -> Detection:
    """Answers that think aloud where the reference does not; value as a share (0-1)."""
    found = [
        row.job_id
        for row, text in zip(rows, answers, strict=True)
        if thinks_aloud(text) and not thinks_aloud(row.response)
    ]
    return of_share("thinking", rows, found, "have thinking text in them")


def repeated_advice(
    rows: Sequence[Row], readings: Sequence[Reading], references: Sequence[Reading]
) -> Detection:
    """Answers with one recommendation under several dimensions.

    ``value`` is their share (0-1), ``threshold`` 0.2 above the references' share. One answer alone
    never fires.
    """
    found = [
        row.job_id
        for row, reading in zip(rows, readings, strict=True)
        if reading.critique and repeats_advice(reading.critique)
    ]
    known = sum(bool(r.critique and repeats_advice(r.critique)) for r in references) / len(rows)
    share = len(found) / len(rows)
    fired = share > known + MORE and len(found) > 1
    return result(
        "repeated_advice",
        fired,
        share,
        known + MORE,
        found,
        f"{len(found)} of {len(rows)} answers give one advice in several dimensions; {known:.0%} "
        "of the references do."
        if fired
        else "The advice differs from dimension to dimension as it does in the references.",
    )


def _copies(
    name: str,
    rows: Sequence[Row],
    near: Sequence[float],
    known: Sequence[Sequence[float]],
    what: str,
    otherwise: str,
) -> Detection:
    """Fires where copies are commoner among answers than in each list of ``known`` likenesses.

    ``near`` is how like a copy each answer is, 0-1; the first list of ``known`` is the references'
    and says from where on that is a copy. ``what`` and ``otherwise`` are the sentence's words.
    """
    line = (1 + (metrics.percentile(known[0], 90) or 0.0)) / 2
    copied = [row.job_id for row, value in zip(rows, near, strict=True) if value >= line]
    usual, *more = (fmean(value >= line for value in values) for values in known if values)
    share, bound = len(copied) / len(rows), max(usual, *more, 0.0) + MORE
    fired = share > bound and len(copied) >= 2
    told = f"{len(copied)} of {len(rows)} answers {what}; {usual:.0%} of the references do."
    return result(name, fired, share, bound, copied, told if fired else otherwise)


def _photographs(rows: Sequence[Row]) -> list[str]:
    return [row.image_sha256 or str(row.image_path) for row in rows]


def _library(written: Sequence[str]) -> dict[tuple[str, ...], set[int]]:
    """Which texts, by index, have a phrase."""
    library: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for index, text in enumerate(written):
        for gram in _grams(text):
            library[gram].add(index)
    return library


def _likeness(
    written: Sequence[str],
    photographs: Sequence[str],
    library: Mapping[tuple[str, ...], set[int]],
    sources: Sequence[str],
    *,
    before: bool = False,
) -> list[float]:
    """Of each text the largest share (0-1) of its phrases that one other text has.

    Other is what was written of another photograph: ``photographs`` names those of the texts,
    ``sources`` those of the texts in ``library``. With ``before`` the library is the texts
    themselves, and only earlier ones count. No texts, no values.
    """
    found = []
    for place, (text, photograph) in enumerate(zip(written, photographs, strict=bool(written))):
        grams = _grams(text)
        shared = Counter(
            index
            for gram in grams
            for index in library.get(gram, ())
            if sources[index] != photograph and not (before and index >= place)
        )
        found.append(max(shared.values(), default=0) / len(grams) if grams else 0.0)
    return found


def _prose(text: str) -> str:
    """The texts of a critique without keys, names and scores; the whole text if unreadable."""
    critique = metrics.read(text).critique
    return "\n".join(texts(critique)) if critique else text


def _grams(text: str) -> set[tuple[str, ...]]:
    """Phrases of five words, none of which crosses from one text of the critique into the next.

    Crossing would count the order of the schema as likeness.
    """
    return _phrases(_prose(text).split("\n"))


def _phrases(parts: Iterable[str]) -> set[tuple[str, ...]]:
    """Phrases of five words of each part; a part of fewer words is one phrase."""
    found: set[tuple[str, ...]] = set()
    for part in parts:
        words = re.findall(r"\w+", part.casefold())
        for start in range(max(len(words) - GRAM, 0) + 1):
            found.add(tuple(words[start : start + GRAM]))
    return found - {()}
