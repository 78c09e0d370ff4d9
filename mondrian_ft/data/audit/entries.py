"""What the audit looks at: one entry a row, with all that its findings need to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..critique import Critique, CritiqueError, parse_analysis, rename_dimensions
from ..prompt import build_prompt
from ..rows import Row


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


def entries_of_manifest(
    manifest: Mapping[str, Any],
    advisor: str | None = None,
    *,
    dimension_map: Mapping[str, str | None] | None = None,
) -> list[Entry]:
    """An entry for every record of a linked manifest, of one advisor or of all (None).

    The dimensions are called as ``dimension_map`` says; see `critique.rename_dimensions`.

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
            found = [_entry(record, name, prompts) for record in group["records"]]
            entries += [_mapped(entry, dimension_map or {}) for entry in found]
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


def _mapped(entry: Entry, dimension_map: Mapping[str, str | None]) -> Entry:
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
