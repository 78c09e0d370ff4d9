"""What people prefer: ``assessments.jsonl``, beside the ``comparison_report.json`` it is about.

One JSON object a line, only ever appended to. The last line of a job and a reviewer holds; ``undo``
takes a judgement back. Each line says by two hashes which answers were looked at, so a judgement of
other answers than the report holds now is told and not counted.

A line has ``job_id``, ``image``, ``adapter_hash`` (or null), ``base_sha256`` and ``tuned_sha256``
(of the whole answers), ``choice`` (``left right equal undo``), ``left`` (the arm that stood there),
``remark``, ``seconds`` (from showing the pair to the choice), ``reviewer`` (or null),
``reference_shown`` (before the choice) and ``timestamp`` (UTC, ISO 8601).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ..errors import DataError
from ..files import append_line
from .stats import LEVEL, SMALLEST_SAMPLE

ASSESSMENTS_NAME = "assessments.jsonl"
BLOCKS = {"base": "base_model", "tuned": "fine_tuned_model"}
"""The arms that are compared, and the workbook's names of them in ``sample_results``."""

Arm = Literal["base", "tuned"]
Filled = Annotated[str, StringConstraints(pattern=r"\S")]
Plain = Annotated[str, StringConstraints(pattern=r"^")]
"""A text of valid Unicode, blank or not: what a pattern makes pydantic check."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Choice(StrEnum):
    """Which side was better; ``undo`` says nothing any more."""

    LEFT = "left"
    RIGHT = "right"
    EQUAL = "equal"
    UNDO = "undo"


class Judgement(BaseModel):
    """One line of the file; see the module for its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: Filled
    image: Plain
    adapter_hash: Plain | None
    base_sha256: Sha256
    tuned_sha256: Sha256
    choice: Choice
    left: Arm
    remark: Plain = ""
    seconds: float = Field(ge=0, allow_inf_nan=False)
    reviewer: Filled | None = None
    reference_shown: bool
    timestamp: Filled

    @property
    def preferred(self) -> str:
        """``base``, ``tuned`` or ``equal``."""
        if self.choice is Choice.EQUAL:
            return "equal"
        right = "base" if self.left == "tuned" else "tuned"
        return self.left if self.choice is Choice.LEFT else right

    def line(self) -> str:
        """The line of the file, without its newline."""
        return json.dumps(
            self.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"), allow_nan=False
        )


@dataclass(frozen=True)
class Pair:
    """The two answers to one row; ``image_sha256`` is None in reports that do not hold it."""

    job_id: str
    image: str
    image_path: str
    image_sha256: str | None
    base: str
    tuned: str
    reference: str

    @property
    def photograph(self) -> str:
        """What tells its photograph from others: rows that share one count as one."""
        return self.image_sha256 or self.image_path or self.image

    @property
    def hashes(self) -> tuple[str, str]:
        """SHA-256 of the base's and of the tuned answer."""
        return sha256_text(self.base), sha256_text(self.tuned)


@dataclass(frozen=True)
class Assessments:
    """What a file says: ``latest`` by job id and reviewer, without those taken back."""

    path: Path
    latest: Mapping[tuple[str, str | None], Judgement] = field(default_factory=dict)
    notice: str = ""
    """A sentence about a torn last line, blank if there is none."""


def sha256_text(text: str) -> str:
    """SHA-256 of a text as UTF-8, 64 hexadecimal digits; lone surrogates are kept apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_report(path: str | Path) -> dict[str, Any]:
    """A ``comparison_report.json``.

    Raises:
        DataError: it is not there, cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"The report {path} cannot be read: {(error.strerror or str(error)).lower()}; "
            "task=evaluate writes one."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"The report {path} is not JSON ({error}); run task=evaluate again.") from (
            None
        )
    if not isinstance(found, dict):
        raise DataError(f"The report {path} is no JSON object; task=evaluate writes one.")
    return found


def pairs_of(report: Mapping[str, Any], path: str | Path) -> list[Pair]:
    """The pairs of answers in a report, in its order; ``path`` is for the sentences.

    Of a report that has only the workbook's keys, the excerpts of 500 characters are taken.

    Raises:
        DataError: it has no ``sample_results``, one without two answers, or one job twice.
    """
    samples = report.get("sample_results")
    if not isinstance(samples, list) or not samples:
        raise DataError(
            f"The report {path} has no sample_results, so there is nothing to compare; "
            "task=evaluate writes them."
        )
    found: dict[str, Pair] = {}
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample, dict):
            raise DataError(f"Entry {number} of sample_results in {path} is no object.")
        texts = {name: _answer(sample, block) for name, block in BLOCKS.items()}
        for name, text in texts.items():
            if text is None:
                raise DataError(
                    f"Entry {number} of sample_results in {path} has no answer of the {name} "
                    "model, and a comparison needs both; run task=evaluate with task.adapter."
                )
        image = str(sample.get("image") or Path(str(sample.get("image_path") or "")).name)
        job = str(sample.get("job_id") or image)
        if not job.strip():
            raise DataError(f"Entry {number} of sample_results in {path} names no photograph.")
        if job in found:
            raise DataError(f"The job {job} is twice in the sample_results of {path}.")
        found[job] = Pair(
            job,
            image,
            str(sample.get("image_path") or ""),
            sample.get("image_sha256") or None,
            texts["base"] or "",
            texts["tuned"] or "",
            _answer(sample, "reference") or "",
        )
    return list(found.values())


def _answer(sample: Mapping[str, Any], block: str) -> str | None:
    answer = sample.get(block)
    if not isinstance(answer, Mapping):
        return None
    text = answer.get("full_output", answer.get("output"))
    return text if isinstance(text, str) else None


def adapter_hash(report: Mapping[str, Any]) -> str | None:
    """The hash of the adapter a report is about; None where it does not say."""
    evidence = report.get("evidence")
    found = evidence.get("adapter_hash") if isinstance(evidence, Mapping) else None
    return None if found is None else str(found)


def draw(what: str, seed: int, adapter: str | None, job_id: str) -> int:
    """A number of 0 to 2**64 - 1 that looks random and is the same at every start."""
    text = json.dumps([what, seed, adapter, job_id])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def left_of(seed: int, adapter: str | None, job_id: str) -> Arm:
    """The arm that stands on the left of a pair: either one with probability a half."""
    return "tuned" if draw("left", seed, adapter, job_id) % 2 else "base"


def shuffled(pairs: Iterable[Pair], seed: int, adapter: str | None) -> list[Pair]:
    """The pairs in random order, the same at every start."""
    return sorted(pairs, key=lambda pair: draw("order", seed, adapter, pair.job_id))


def judge(
    pair: Pair,
    choice: Choice,
    *,
    left: Arm,
    adapter: str | None,
    remark: str = "",
    seconds: float = 0.0,
    reviewer: str | None = None,
    reference_shown: bool = False,
) -> Judgement:
    """A judgement of now about a pair.

    Raises:
        DataError: a value that the file cannot hold.
    """
    base, tuned = pair.hashes
    return parse(
        {
            "job_id": pair.job_id,
            "image": pair.image,
            "adapter_hash": adapter,
            "base_sha256": base,
            "tuned_sha256": tuned,
            "choice": choice,
            "left": left,
            "remark": remark,
            "seconds": round(seconds, 1),
            "reviewer": reviewer,
            "reference_shown": reference_shown,
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def parse(value: Any) -> Judgement:
    """Check one line's object.

    Raises:
        DataError: it is no judgement; the sentence names the first key that is wrong.
    """
    try:
        return Judgement.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the object"
        raise DataError(f"{where}: {problem['msg']}.") from None


def read(path: str | Path) -> Assessments:
    """Read an assessments file; one that does not exist says nothing.

    A last line that a crash cut short was never acknowledged: it is passed over, and ``notice``
    says so. (`append` cuts it off.)

    Raises:
        DataError: the file cannot be read, or a line of it is damaged; the sentence names the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Assessments(path)
    except OSError as error:
        raise DataError(f"The assessments {path} cannot be read: {error.strerror}.") from error
    latest: dict[tuple[str, str | None], Judgement] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            judgement = parse(json.loads(line))
        except (ValueError, RecursionError, DataError) as error:
            # Only what follows the last newline can be a line that was never finished.
            if number == len(lines) and not isinstance(error, DataError):
                notice = (
                    f"the last line of {path} was cut short, as by a crash, and holds no "
                    "judgement; judge that photograph again"
                )
                return Assessments(path, latest, notice)
            what = str(error).rstrip(".")
            raise DataError(
                f"Line {number} of the assessments {path} is damaged ({what}); mend or remove "
                "that line."
            ) from None
        key = (judgement.job_id, judgement.reviewer)
        latest.pop(key, None)
        if judgement.choice is not Choice.UNDO:
            latest[key] = judgement
    return Assessments(path, latest)


def append(path: str | Path, judgement: Judgement) -> None:
    """Add a judgement; when this returns it is on the disk.

    Raises:
        MondrianError: the file cannot be written.
    """
    append_line(path, judgement.line())


def fits(judgement: Judgement, pair: Pair) -> bool:
    """Whether a judgement is about the answers that the pair holds now."""
    return (judgement.base_sha256, judgement.tuned_sha256) == pair.hashes


def summarise(pairs: Sequence[Pair], found: Assessments) -> dict[str, Any]:
    """``evidence.people``: what was preferred, with photographs as the unit. JSON-ready.

    A photograph goes to the arm that most of its judgements prefer, over reviewers and over rows
    that share it; without a majority it is ``equal``. ``p_value`` is the exact two-sided sign test
    of no preference (Dixon & Mood 1946, "The Statistical Sign Test", JASA 41), which leaves the
    equal ones out; ``share`` is the tuned model's of the photographs that are not equal (0-1), and
    ``interval`` its 95 % interval (Clopper & Pearson 1934, Biometrika 26), which is the one that
    agrees with the test. All three are None where no photograph has a preference.

    Further keys: ``n`` photographs judged of ``photographs``, ``tuned base equal`` (they add up to
    ``n``), ``judgements``, ``reviewers`` (how many), ``reference_shown`` (judgements made with the
    reference in sight), ``stale`` (judgements of other answers than these, not counted) and
    ``agreement``, see `agreement`.
    """
    counted = [judgement for _, judgement in _counted(pairs, found)]
    preferred = preferences(pairs, found)
    outcomes = Counter(preferred.values())
    tuned, base = outcomes["tuned"], outcomes["base"]
    share, interval, p_value = sign_test(tuned, base)
    return {
        "n": len(preferred),
        "photographs": len({pair.photograph for pair in pairs}),
        "tuned": tuned,
        "base": base,
        "equal": outcomes["equal"],
        "share": share,
        "interval": interval,
        "p_value": p_value,
        "judgements": len(counted),
        "reviewers": len({judgement.reviewer for judgement in counted}),
        "reference_shown": sum(judgement.reference_shown for judgement in counted),
        "stale": len(found.latest) - len(counted),
        "agreement": agreement(counted),
    }


def preferences(pairs: Sequence[Pair], found: Assessments) -> dict[str, str]:
    """``tuned``, ``base`` or ``equal`` by photograph, of those that were judged."""
    votes: dict[str, list[str]] = defaultdict(list)
    for pair, judgement in _counted(pairs, found):
        votes[pair.photograph].append(judgement.preferred)
    return {photograph: majority(said) for photograph, said in votes.items()}


def _counted(pairs: Sequence[Pair], found: Assessments) -> Iterator[tuple[Pair, Judgement]]:
    """The judgements of these answers, each with its pair."""
    by_job = {pair.job_id: pair for pair in pairs}
    for (job, _), judgement in found.latest.items():
        pair = by_job.get(job)
        if pair is not None and fits(judgement, pair):
            yield pair, judgement


def majority(said: Sequence[str]) -> str:
    """The arm that is preferred more often, else ``equal``."""
    lead = said.count("tuned") - said.count("base")
    return "tuned" if lead > 0 else "base" if lead < 0 else "equal"


def sign_test(tuned: int, base: int) -> tuple[float | None, list[float] | None, float | None]:
    """The share preferring tuned, its 95 % interval, and the two-sided p-value; see `summarise`."""
    n = tuned + base
    if n == 0:
        return None, None, None
    from scipy.stats import binomtest

    test = binomtest(tuned, n, 0.5, alternative="two-sided")
    interval = test.proportion_ci(confidence_level=LEVEL, method="exact")
    return tuned / n, [float(interval.low), float(interval.high)], float(test.pvalue)


def agreement(judgements: Iterable[Judgement]) -> dict[str, Any] | None:
    """How far reviewers agree; None unless two of them judged one row.

    ``pairs`` of judgements of one row by two reviewers, the ``share`` (0-1) of them that say the
    same, and with exactly two reviewers ``kappa``, see `kappa`.
    """
    by_job: dict[str, dict[str, str]] = defaultdict(dict)
    for judgement in judgements:
        by_job[judgement.job_id][judgement.reviewer or ""] = judgement.preferred
    both = [
        (said[first], said[second])
        for said in by_job.values()
        for first, second in combinations(sorted(said), 2)
    ]
    if not both:
        return None
    share, beyond = kappa(both)
    two = len({reviewer for said in by_job.values() for reviewer in said}) == 2
    return {"pairs": len(both), "share": share, "kappa": beyond if two else None}


def kappa(both: Sequence[tuple[str, str]]) -> tuple[float, float | None]:
    """The share (0-1) of pairs that say the same twice, and Cohen's kappa.

    Kappa is the agreement beyond what the frequencies of the two would give by chance (Cohen 1960,
    Educational and Psychological Measurement 20), 1 at most; None where chance alone would make
    them agree always.
    """
    share = sum(first == second for first, second in both) / len(both)
    left, right = (Counter(column) for column in zip(*both, strict=True))
    by_chance = sum(left[what] * right[what] for what in left) / len(both) ** 2
    return share, (share - by_chance) / (1 - by_chance) if by_chance < 1 else None


def sentence(people: Mapping[str, Any]) -> str:
    """The counts and the test in words, for the page, the report and the terminal."""
    n, tuned, base, equal = (people[key] for key in ("n", "tuned", "base", "equal"))
    if n == 0:
        return "People: no photograph is judged yet."
    noun = "photograph" if n == 1 else "photographs"
    said = (
        f"People: in {tuned} of {n} {noun} the tuned critique was preferred, in {base} the base's, "
        f"{equal} equal"
    )
    p = people["p_value"]
    if p is None:
        return f"{said}; without a preference there is nothing to test."
    return f"{said}; exact sign test {chance(p)}."


def chance(p: float) -> str:
    """A p-value in words: ``p = 0.031``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def notes(people: Mapping[str, Any]) -> list[str]:
    """What else one has to know to read the counts, a sentence each."""
    found: list[str] = []
    if people["interval"] is not None:
        low, high = (f"{100 * value:.0f}" for value in people["interval"])
        found.append(
            f"Where one was preferred, it was the tuned one in {100 * people['share']:.0f} % "
            f"(95 % interval {low} to {high} %)."
        )
        if people["tuned"] + people["base"] < SMALLEST_SAMPLE:
            found.append(
                f"Fewer than {SMALLEST_SAMPLE} photographs with a preference cannot settle it, "
                "however they fall."
            )
    if left := people["photographs"] - people["n"]:
        found.append(f"{left} of {people['photographs']} photographs were not judged.")
    if people["reviewers"] > 1:
        found.append(
            f"{people['reviewers']} people judged; a photograph goes to what most of them prefer."
        )
    if both := people["agreement"]:
        kappa = "" if both["kappa"] is None else f" (Cohen's kappa {both['kappa']:.2f})"
        found.append(
            f"Two of them say the same of one pair in {100 * both['share']:.0f} % of "
            f"{both['pairs']} cases{kappa}."
        )
    if shown := people["reference_shown"]:
        found.append(
            f"In {shown} of {people['judgements']} judgements the reference was in sight before."
        )
    if stale := people["stale"]:
        what = "judgement is" if stale == 1 else "judgements are"
        found.append(f"{stale} {what} about other answers than this report's and not counted.")
    return found
