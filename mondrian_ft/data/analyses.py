"""Finding a row's analysis: a file named after the job, a file named in the row, or inline text.

Each rule is a function from a row to an `Analysis` or None; the first that finds one wins, even if
what it found is malformed: a broken analysis is reported, not worked around.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..files import atomic_write_text
from .photographs import base_name, existing_file
from .reasons import LeftOut, Reason
from .store import Job


@dataclass(frozen=True)
class Analysis:
    """An analysis found: its text, the rule that found it, and its file (None for inline text)."""

    text: str
    rule: str
    path: Path | None


@dataclass(frozen=True)
class Shelf:
    """Where analyses are looked for: the folder (None = only inline) and the known job ids."""

    folder: Path | None
    job_ids: Collection[str]

    def file(self, name: str) -> Path | None:
        """The file of that plain name in the folder, if there is one."""
        if self.folder is None or "/" in name or "\\" in name:
            return None
        return existing_file(self.folder / name)


def _by_job_id(job: Job, advisor: str, shelf: Shelf) -> Path | None:
    # The row may spell its advisor in another way than the id in use.
    spelt = (job.advisor or advisor).strip()
    return shelf.file(f"analysis-{advisor}-{job.id}.md") or shelf.file(
        f"analysis-{spelt}-{job.id}.md"
    )


def _by_bare_job_id(job: Job, advisor: str, shelf: Shelf) -> Path | None:
    # "<id> (rag)" is a second run of "<id>": the file is its own only if there is no first.
    bare = re.sub(r"\s+\([^()]*\)$", "", job.id or "")
    return None if bare in shelf.job_ids else shelf.file(f"analysis-{advisor}-{bare}.md")


def _named_in_markdown(job: Job, advisor: str, shelf: Shelf) -> Path | None:
    name = _file_name(job.analysis_markdown)
    return shelf.file(name) if name else None


def _named_in_file(job: Job, advisor: str, shelf: Shelf) -> Path | None:
    name = _file_name(job.analysis_file)
    # HTML pages hold no JSON; they are another shape of analysis.
    return shelf.file(name) if name and not name.lower().endswith((".html", ".htm")) else None


FILE_RULES: tuple[tuple[str, Callable[[Job, str, Shelf], Path | None]], ...] = (
    ("job_id", _by_job_id),
    ("bare_job_id", _by_bare_job_id),
    ("analysis_markdown_name", _named_in_markdown),
    ("analysis_file_name", _named_in_file),
)
"""Tried in this order, before the text in ``analysis_markdown`` itself (rule ``inline``)."""


def find_analysis(job: Job, advisor: str, shelf: Shelf) -> Analysis:
    """The analysis of a row.

    Raises:
        LeftOut: there is none, the row names a file that is not there, or it is not UTF-8 text.
    """
    for rule, find in FILE_RULES:
        if path := find(job, advisor, shelf):
            return Analysis(_read(path), rule, path)
    inline = job.analysis_markdown or ""
    if name := _file_name(inline):
        where = shelf.folder or "data.analysis_dir, which is not set,"
        raise LeftOut(Reason.ANALYSIS_MISSING, f"There is no analysis {name!r} in {where}.")
    if not inline.strip():
        raise LeftOut(Reason.NO_ANALYSIS, "The row has no analysis, as a file or as text.")
    if "analysis_markdown" in job.undecodable:
        raise LeftOut(Reason.ANALYSIS_UNREADABLE, "analysis_markdown is not UTF-8 text.")
    return Analysis(inline, "inline", None)


def shelve(analysis: Analysis, job: Job, advisor: str, scratch: Path) -> Path:
    """The analysis's file; inline text is written to ``<scratch>/analyses/`` first.

    The name there ends in a hash of id and text, so equal text means an equal, reused file.
    """
    if analysis.path:
        return analysis.path
    # Both come from the database, and neither may lead out of the folder.
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{advisor}-{job.id}")[:100]
    key = sha256(f"{job.id}\0{analysis.text}".encode()).hexdigest()[:12]
    path = scratch / "analyses" / f"analysis-{plain}-{key}.md"
    if not path.is_file():
        atomic_write_text(path, analysis.text)
    return path


_FILE_NAME = re.compile(r"[^\n\r{}<>]{0,400}\.(?:md|json|txt|html?)", re.IGNORECASE)


def _file_name(value: str | None) -> str | None:
    """The base name in a cell that holds a path; None if it holds something else."""
    value = (value or "").strip()
    return base_name(value) if _FILE_NAME.fullmatch(value) else None


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"{path.name} is not UTF-8 text (byte {error.start})."
    except OSError as error:
        detail = f"{path.name} cannot be read: {error.strerror}."
    raise LeftOut(Reason.ANALYSIS_UNREADABLE, detail)
