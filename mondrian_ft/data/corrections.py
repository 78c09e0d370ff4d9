"""What a person decided about labels: ``corrections.jsonl``, beside the manifest it is about.

One JSON object a line, only ever appended to, so that no decision is lost to a crash, and what was
decided before can be read. The last line of a job holds; ``undo`` takes a decision back. Each line
says by two hashes which photograph and which analysis were looked at: a decision about another
text or picture is told, and not applied. The user's job database is never written.

A line has ``job_id``, ``image_sha256``, ``analysis_sha256`` (of `analysis_hash`), ``decision``,
``critique`` (the whole critique as it should be, with ``correct`` only), ``remark``, ``timestamp``
(UTC, ISO 8601) and ``reviewer`` (or null).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from ..errors import DataError
from ..files import append_line
from .critique import Critique, CritiqueError, Said, Text, parse_analysis, render, validate

CORRECTIONS_NAME = "corrections.jsonl"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Decision(StrEnum):
    """What a person said of a label; ``undo`` says nothing any more."""

    ACCEPT = "accept"
    CORRECT = "correct"
    REJECT = "reject"
    UNDO = "undo"


class Correction(BaseModel):
    """One line: a decision about the analysis of ``job_id``, as it was seen.

    ``critique`` is there exactly if the decision is ``correct``. Made by `parse`, which explains
    what is wrong, or by hand from values that are right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: Text
    image_sha256: Sha256
    analysis_sha256: Sha256
    decision: Decision
    critique: Critique | None = None
    remark: Said = ""
    timestamp: Text
    reviewer: Text | None = None

    def line(self) -> str:
        """The line of the file, without its newline; the critique is the canonical one."""
        critique = json.loads(render(self.critique)) if self.critique else None
        return json.dumps(
            {**self.model_dump(mode="json", exclude={"critique"}), "critique": critique},
            ensure_ascii=False,
            separators=(",", ":"),
        )


@dataclass(frozen=True)
class Seen:
    """An analysis as it stands now: its job, its photograph's hash, and its `analysis_hash`."""

    job_id: str
    image_sha256: str
    analysis_sha256: str


@dataclass(frozen=True)
class Fit:
    """Which decisions hold for the analyses as they stand now, by job id.

    Attributes:
        accepted, corrected, rejected: those that hold.
        stale: those that do not, and what is another one now: ``the analysis``,
            ``the photograph`` or ``the analysis and the photograph``.
        unknown: jobs that were decided about and are not in the manifest.
    """

    accepted: dict[str, Correction] = field(default_factory=dict)
    corrected: dict[str, Correction] = field(default_factory=dict)
    rejected: dict[str, Correction] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many there are of each."""
        names = ("accepted", "corrected", "rejected", "stale", "unknown")
        return {name: len(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Corrections:
    """What a corrections file says.

    Attributes:
        path: the file, which need not exist.
        latest: the last line of every job, those taken back (``undo``) left out.
        sha256: the hash of the file's bytes; None if there is no file.
        notice: a sentence about a torn last line, blank if there is none.
    """

    path: Path
    latest: Mapping[str, Correction] = field(default_factory=dict)
    sha256: str | None = None
    notice: str = ""

    def fit(self, seen: Iterable[Seen], known: Collection[str]) -> Fit:
        """Lay the decisions beside the analyses as they stand now.

        Args:
            seen: the analyses that are to be used; only those with a decision matter.
            known: the ids of all jobs of the manifest, those of other advisors included.
        """
        fit = Fit(unknown=tuple(sorted(set(self.latest) - set(known))))
        places = {
            Decision.ACCEPT: fit.accepted,
            Decision.CORRECT: fit.corrected,
            Decision.REJECT: fit.rejected,
        }
        for one in seen:
            correction = self.latest.get(one.job_id)
            if correction is None:
                continue
            if why := difference(correction, one):
                fit.stale[one.job_id] = why
            else:
                places[correction.decision][one.job_id] = correction
        return fit


def facts_of(corrections: Corrections, fit: Fit) -> dict[str, Any] | None:
    """What was made of the corrections, JSON-ready; None if there is no such file.

    ``path``, ``sha256``, a count for each list of `Fit`, and under ``jobs`` their ids (for
    ``stale`` with what changed), those of the rejected ones excepted.
    """
    if corrections.sha256 is None:
        return None
    return {
        "path": str(corrections.path),
        "sha256": corrections.sha256,
        **fit.counts(),
        "jobs": {
            "accepted": sorted(fit.accepted),
            "corrected": sorted(fit.corrected),
            "stale": fit.stale,
            "unknown": list(fit.unknown),
        },
    }


def analysis_hash(text: str) -> str:
    """What identifies an analysis for a reviewer (64 hex digits).

    It is the SHA-256 of its canonical critique, so that linking again, or another file around the
    same words, changes nothing; of the bare text if that cannot be read.
    """
    with suppress(CritiqueError):
        text = render(parse_analysis(text, partial=True).critique)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def difference(correction: Correction, seen: Seen) -> str:
    """What is another one now than when the decision was made, in words; blank if nothing is."""
    changed = [
        name
        for name, before, now in (
            ("the analysis", correction.analysis_sha256, seen.analysis_sha256),
            ("the photograph", correction.image_sha256, seen.image_sha256),
        )
        if before != now
    ]
    return " and ".join(changed)


def decide(
    seen: Seen,
    decision: Decision,
    *,
    critique: Critique | None = None,
    remark: str = "",
    reviewer: str | None = None,
) -> Correction:
    """A decision of now about an analysis.

    Raises:
        DataError: ``correct`` without a critique, or a critique with another decision.
    """
    return parse(
        {
            "job_id": seen.job_id,
            "image_sha256": seen.image_sha256,
            "analysis_sha256": seen.analysis_sha256,
            "decision": decision,
            "critique": critique.model_dump(exclude_unset=True) if critique else None,
            "remark": remark,
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "reviewer": reviewer,
        }
    )


def parse(value: Any) -> Correction:
    """Check one line's object.

    Raises:
        DataError: it is no correction; the sentence names the first key that is wrong.
    """
    if not isinstance(value, dict):
        raise DataError(f"It is {str(value)[:40]!r} and no object.")
    critique = value.get("critique")
    if critique is not None:
        critique = validate(critique, partial=True)
    try:
        correction = Correction.model_validate({**value, "critique": critique})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the object"
        shown = "" if problem["type"] == "missing" else f" is {str(problem['input'])[:60]!r}"
        raise DataError(f"{where}{shown}: {problem['msg']}.") from None
    if (correction.decision is Decision.CORRECT) != (correction.critique is not None):
        raise DataError(
            f"The decision is {correction.decision} and there is "
            f"{'a' if correction.critique else 'no'} critique; correct has one, the others none."
        )
    return correction


def read(path: str | Path) -> Corrections:
    """Read a corrections file; one that does not exist says nothing.

    A last line that a crash cut short was never acknowledged, so it is passed over, and ``notice``
    says so. (`append` cuts it off.)

    Raises:
        DataError: the file cannot be read, or a line of it is damaged; the sentence names the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Corrections(path)
    except OSError as error:
        raise DataError(f"The corrections {path} cannot be read: {error.strerror}.") from error
    latest: dict[str, Correction] = {}
    notice = ""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            correction = parse(json.loads(line))
        except (ValueError, RecursionError, DataError) as error:
            # Only what follows the last newline can be a line that was never finished.
            if number == len(lines) and not isinstance(error, DataError):
                notice = (
                    f"the last line of {path} was cut short, as by a crash, and holds no decision; "
                    "decide about that row again"
                )
                break
            what = str(error).rstrip(".")
            raise DataError(
                f"Line {number} of the corrections {path} is damaged ({what}); mend or remove that "
                "line."
            ) from None
        latest.pop(correction.job_id, None)
        if correction.decision is not Decision.UNDO:
            latest[correction.job_id] = correction
    return Corrections(path, latest, hashlib.sha256(content).hexdigest(), notice)


def append(path: str | Path, correction: Correction) -> None:
    """Add a decision; when this returns it is on the disk.

    Raises:
        MondrianError: the file cannot be written.
    """
    append_line(path, correction.line())
