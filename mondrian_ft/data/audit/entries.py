"""What the audit looks at: one entry a row, with all that its findings need to know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..corrections import Corrections, Fit, Seen, analysis_hash
from ..critique import Critique, CritiqueError, parse_analysis, rename_dimensions, render
from ..prompt import build_prompt
from ..rows import Row, hash_photograph


@dataclass(frozen=True)
class Entry:
    """One row under audit.

    Attributes:
        image: path of the photograph.
        photograph: hash of its bytes; equal bytes, one photograph.
        size: (width, height) in pixels, upright; None where nobody measured it.
        prompt: the text beside the photograph.
        text: the analysis as it is stored, before any repair.
        critique: the label read from it; None if it cannot be read.
        problem: why it cannot.
        mends: what reading it had to repair.
    """

    job_id: str
    advisor: str
    image: Path
    photograph: str
    size: tuple[int, int] | None
    prompt: str
    text: str
    critique: Critique | None
    problem: str = ""
    mends: tuple[str, ...] = ()

    @property
    def scores(self) -> tuple[float, ...]:
        """The scores in the order of the analysis; none if it cannot be read."""
        return tuple(d.score for d in self.critique.dimensions) if self.critique else ()

    def seen(self) -> Seen:
        """What a decision about this row is about.

        Raises:
            DataError: the photograph has to be hashed, and cannot be read.
        """
        hashed = len(self.photograph) == 64 and not set(self.photograph) - set("0123456789abcdef")
        sha256 = (
            self.photograph if hashed else hash_photograph(self.image, f"job {self.job_id}", {})
        )
        return Seen(self.job_id, sha256, analysis_hash(self.text))


def entries_of_manifest(manifest: Mapping[str, Any], advisor: str | None = None) -> list[Entry]:
    """An entry for every record of a linked manifest, of one advisor or of all (None).

    An analysis that is gone or unreadable gives an entry without a critique; it is never skipped.

    Raises:
        DataError: the manifest is not one of ``link``.
    """
    prompts = manifest.get("prompts") or {}
    entries = []
    try:
        for name, group in manifest["by_advisor"].items():
            if advisor is not None and name != advisor:
                continue
            entries += [_entry(record, name, prompts) for record in group["records"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"The manifest is malformed ({error!r}); run task=link again.") from None
    return entries


def entries_of_rows(rows: Iterable[Row]) -> list[Entry]:
    """An entry for every prepared row; its stored text is the canonical response."""
    return [
        Entry(
            row.job_id,
            row.advisor,
            row.image_path,
            row.image_sha256,
            None,
            row.prompt,
            row.response,
            *_read(row.response),
        )
        for row in rows
    ]


def corrected(
    entries: Iterable[Entry], corrections: Corrections, known: Collection[str]
) -> tuple[list[Entry], Fit]:
    """Entries with what a person decided: corrected labels as corrected, rejected rows left out.

    Args:
        entries: from `entries_of_manifest`.
        known: the ids of all jobs of the manifest.
    """
    entries = list(entries)
    fit = corrections.fit([e.seen() for e in entries if e.job_id in corrections.latest], known)
    kept = []
    for entry in entries:
        correction = fit.corrected.get(entry.job_id)
        if correction and correction.critique:
            text = render(correction.critique)
            entry = replace(entry, text=text, critique=correction.critique, problem="", mends=())
        if entry.job_id not in fit.rejected:
            kept.append(entry)
    return kept, fit


def jobs_of(manifest: Mapping[str, Any]) -> set[str]:
    """The ids of every job of a manifest, whoever the advisor."""
    groups = manifest["by_advisor"].values()
    return {str(record["job_id"]) for group in groups for record in group["records"]}


def _entry(record: Mapping[str, Any], advisor: str, prompts: Mapping[str, Any]) -> Entry:
    known = prompts.get(record.get("prompt_id", ""))
    size = record.get("image_size")
    image = Path(record["image_path"])
    try:
        text = Path(record["analysis_path"]).read_bytes().decode("utf-8-sig")
        read = _read(text)
    except (OSError, UnicodeDecodeError) as error:
        text, read = "", (None, f"The analysis cannot be read: {error}", ())
    return Entry(
        job_id=str(record["job_id"]),
        advisor=advisor,
        image=image,
        # A manifest made by hand has no hashes; its paths stand for the photographs.
        photograph=str(record.get("image_sha256") or image.absolute()),
        size=(int(size[0]), int(size[1])) if size else None,
        prompt=known["text"] if known else build_prompt(None, advisor)[0],
        text=text,
        critique=read[0],
        problem=read[1],
        # What linking had to repair may be gone from the text that it stored.
        mends=tuple(dict.fromkeys([*(record.get("mends") or ()), *read[2]])),
    )


def renamed(entries: Iterable[Entry], dimension_map: Mapping[str, str | None]) -> list[Entry]:
    """The entries with dimensions called as ``dimension_map`` says.

    See `critique.rename_dimensions`; one that it does not fit has no critique, and says why.
    """
    return [_renamed(entry, dimension_map) for entry in entries]


def _renamed(entry: Entry, dimension_map: Mapping[str, str | None]) -> Entry:
    if entry.critique is None:
        return entry
    try:
        critique, _ = rename_dimensions(entry.critique, dimension_map)
    except CritiqueError as error:
        return replace(entry, critique=None, problem=f"data.dimension_map does not fit: {error}")
    return replace(entry, critique=critique)


def _read(text: str) -> tuple[Critique | None, str, tuple[str, ...]]:
    try:
        parsed = parse_analysis(text, partial=True)
    except CritiqueError as error:
        return None, str(error), ()
    return parsed.critique, "", tuple(parsed.mends)
