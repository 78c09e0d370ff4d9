"""Finding a row's analysis: everywhere one may be, the best source first.

A row's analysis can lie in several places, and they differ in worth: a model's raw answer is what
was said, a page made of it may have lost something. So every place is looked at in the order of
`find_sources`, and the first whose text can be used is taken; what was passed over is told.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..files import replacing
from .critique import CritiqueError, Flaw, render
from .parsers import MAX_CHARACTERS, Reading, read_analysis
from .parsers.dimensional import profile_text
from .parsers.outputs import unwrap
from .photographs import Folder, base_name, stems
from .reasons import LeftOut, Reason
from .store import Job, advisor_id

ACCEPT = ("strict", "mended", "all")
"""What an analysis must be to be linked: read without a mend; complete, whatever had to be mended;
or with its dimensions, their scores and an overall score, even if texts are missing."""


@dataclass(frozen=True)
class Source:
    """A place where a row's analysis may be: its name, and the text or the file that holds it.

    ``problem`` is why the file may not be read, if that is so.
    """

    rule: str
    text: str | None = None
    path: Path | None = None
    problem: str = ""


@dataclass(frozen=True)
class Analysis:
    """An analysis that can be used: where it was found, its text, and what was read from it.

    ``passed_over`` are better sources that could not be used, each with its reason.
    """

    source: Source
    text: str
    reading: Reading
    passed_over: list[dict[str, str]] = field(default_factory=list)


_PREFIXED = re.compile(r"analysis-(.{1,10})-(.{6})\.(md|html?)", re.IGNORECASE | re.DOTALL)


class Shelf:
    """Where analyses are looked for: the folder (None = only in the rows) and the known job ids."""

    def __init__(self, folder: Folder | None, job_ids: Collection[str]) -> None:
        self.folder = folder
        self.job_ids = job_ids
        self._prefixed: dict[str, list[tuple[str, str]]] | None = None
        self._scored: dict[str, list[tuple[str | None, str]]] | None = None

    def file(self, name: str) -> Path | None:
        """The file of that plain name in the folder, if there is one."""
        if self.folder is None or "/" in name or "\\" in name:
            return None
        return self.folder.file(name)

    def prefixed(self, job_id: str) -> list[tuple[str, str]]:
        """(first characters of the photograph's stem, file name) of the files made for a job."""
        if self._prefixed is None:
            self._prefixed = defaultdict(list)
            for name in sorted(self.folder.names) if self.folder else ():
                if match := _PREFIXED.fullmatch(name):
                    self._prefixed[match[2].lower()].append((match[1], name))
        return self._prefixed.get(job_id[:6].lower(), [])

    def scored(self, job: Job, advisor: str) -> str | None:
        """The one line about a row in the folder's scored JSONL files, by job id or photograph."""
        if self._scored is None:
            self._scored = defaultdict(list)
            for name in self.folder.names if self.folder else ():
                # A link that leads out of the folder is no file of it.
                with suppress(LeftOut):
                    if name.lower().endswith(".jsonl") and (path := self.file(name)):
                        for key, of, line in _scored_lines(path):
                            self._scored[key].append((of, line))
        for key in (job.id, base_name(job.filename or "")):
            fitting = {
                line for of, line in self._scored.get(key or "", ()) if of in (None, advisor)
            }
            if len(fitting) == 1:
                return fitting.pop()
        return None


def _scored_lines(path: Path) -> Iterator[tuple[str, str | None, str]]:
    """(what it is about, whose it is, the line) of every line that is an object; others are not."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(MAX_CHARACTERS):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if not isinstance(value, dict):
                    continue
                whose = advisor_id(value["advisor"]) if _is_text(value.get("advisor")) else None
                for key in ("job_id", "id", "filename", "image", "image_path"):
                    if _is_text(value.get(key)):
                        yield base_name(value[key]), whose, line
    except OSError:
        # A file that cannot be read is named where a row asks for it by name.
        return


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def photograph_prefix(job: Job, shelf: Shelf) -> str | None:
    """The first 10 characters of the photograph's stem, as the name of the row's page tells them.

    Facts, "analysis_file": ``analysis-{first 10 characters of the photo's stem}-{first 6 of the job
    id}.{html|md}``. Taken from the row's own column, else from the one such file in the folder.
    """
    match = _PREFIXED.fullmatch(base_name((job.analysis_file or "").strip()))
    if match and match[2].lower() == (job.id or "")[:6].lower():
        return match[1]
    found = {prefix for prefix, _ in shelf.prefixed(job.id or "")}
    return found.pop() if len(found) == 1 else None


# -- files ---------------------------------------------------------------------------------------


def _by_job_id(job: Job, advisor: str, shelf: Shelf) -> Path | None:
    # The row may spell its advisor in another way than the id in use.
    spelt = (job.advisor or advisor).strip()
    return next(
        (
            path
            for end in ("md", "html")
            for name in (advisor, spelt)
            if (path := shelf.file(f"analysis-{name}-{job.id}.{end}"))
        ),
        None,
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
    return shelf.file(name) if name else None


def _by_prefix(job: Job, advisor: str, shelf: Shelf) -> Path | None:
    names = shelf.prefixed(job.id or "")
    begins = [stem[:10] for stem in stems(job.filename or "")]
    fitting = [name for prefix, name in names if prefix in begins or not begins]
    # Of one analysis as Markdown and as a page, the Markdown comes first.
    fitting.sort(key=lambda name: not name.lower().endswith(".md"))
    alike = {name.rpartition(".")[0] for name in fitting}
    return shelf.file(fitting[0]) if len(alike) == 1 else None


FILE_RULES: tuple[tuple[str, Callable[[Job, str, Shelf], Path | None]], ...] = (
    ("job_id", _by_job_id),
    ("bare_job_id", _by_bare_job_id),
    ("analysis_markdown_name", _named_in_markdown),
    ("analysis_file_name", _named_in_file),
    ("prefix", _by_prefix),
)
"""How a row's file is found, in this order."""


# -- sources -------------------------------------------------------------------------------------


def find_sources(
    job: Job, advisor: str, shelf: Shelf, profiles: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Source]:
    """Where a row's analysis may be, the best first.

    The model's raw answer, the text in ``analysis_markdown``, the row's files, pages stored in the
    row, a line of a scored JSONL file, and last the row of ``dimensional_profiles``, which holds
    the least.
    """
    wrapped = unwrap(job.llm_outputs or "", lambda key: advisor_id(key) == advisor)
    if raw := wrapped.get("llm_outputs.response"):
        yield Source("llm_outputs.response", raw)
    inline = job.analysis_markdown or ""
    if inline.strip() and not _file_name(inline):
        yield Source("inline", inline)
    seen: set[Path] = set()
    for rule, find in FILE_RULES:
        try:
            path = find(job, advisor, shelf)
        except LeftOut as error:
            yield Source(rule, problem=str(error))
            continue
        if path and path not in seen:
            seen.add(path)
            yield Source(rule, path=path)
    if page := wrapped.get("llm_outputs.html"):
        yield Source("llm_outputs.html", page)
    if job.analysis_html and job.analysis_html.strip():
        yield Source("analysis_html", job.analysis_html)
    if line := shelf.scored(job, advisor):
        yield Source("scored_jsonl", line)
    for row in profiles:
        yield Source("dimensional_profiles", profile_text(row))


def find_analysis(
    job: Job,
    advisor: str,
    shelf: Shelf,
    profiles: Sequence[Mapping[str, Any]] = (),
    *,
    accept: str = "mended",
) -> Analysis:
    """The best analysis of a row that ``accept`` (one of `ACCEPT`) lets pass.

    Raises:
        LeftOut: there is none, or none can be used; the reason is that of the best source.
    """
    refused: list[tuple[Source, LeftOut]] = []
    partial: Analysis | None = None
    for source in find_sources(job, advisor, shelf, profiles):
        try:
            text = _text_of(source, job)
            reading = _read(text, accept)
        except LeftOut as error:
            refused.append((source, error))
            continue
        found = Analysis(source, text, reading, _told(refused))
        if not reading.parsed.critique.missing():
            return found
        # A complete one further down is worth more.
        partial = partial or found
    if partial:
        return partial
    if refused:
        raise refused[0][1]
    if name := _file_name(job.analysis_markdown):
        where = shelf.folder.path if shelf.folder else "data.analysis_dir, which is not set,"
        raise LeftOut(Reason.ANALYSIS_MISSING, f"There is no analysis {name!r} in {where}.")
    raise LeftOut(Reason.NO_ANALYSIS, "The row has no analysis, as a file or as text.")


def _told(refused: Sequence[tuple[Source, LeftOut]]) -> list[dict[str, str]]:
    return [{"source": source.rule, "reason": error.reason.value} for source, error in refused]


def _read(text: str, accept: str) -> Reading:
    try:
        reading = read_analysis(text, partial=accept == "all")
    except CritiqueError as error:
        hint = ""
        if error.reason is Flaw.INCOMPLETE and accept != "all" and _is_usable(text):
            hint = " With data.accept=all the row is linked without it."
        raise LeftOut(Reason(error.reason.value), f"{error}{hint}") from None
    if accept == "strict" and reading.parsed.mends:
        detail = f"{reading.parsed.mends[0]} (data.accept is strict)"
        raise LeftOut(Reason.NEEDS_MENDING, f"{detail[0].upper()}{detail[1:]}.")
    return reading


def _is_usable(text: str) -> bool:
    try:
        read_analysis(text, partial=True)
    except CritiqueError:
        return False
    return True


def shelve(analysis: Analysis, job: Job, advisor: str, scratch: Path) -> Path:
    """The analysis as a file that holds JSON, as the workbook's own tools expect.

    That is the user's file where it does; else a text is written to ``<scratch>/analyses/``: the
    row's own JSON as it stands, or the critique that was read from another shape. The name there
    ends in a hash of id and text, so equal text means an equal, reused file.
    """
    is_json = analysis.reading.parser == "json"
    if analysis.source.path and is_json:
        return analysis.source.path
    critique = analysis.reading.parsed.critique
    text = analysis.text if is_json else f"```json\n{render(critique)}\n```\n"
    # Both come from the database, and neither may lead out of the folder.
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{advisor}-{job.id}")[:100]
    key = sha256(f"{job.id}\0{text}".encode("utf-8", "replace")).hexdigest()[:12]
    path = scratch / "analyses" / f"analysis-{plain}-{key}.md"
    content = text.encode("utf-8")
    # Not flushed to the disk file by file: an empty one of a power failure is told by its size.
    if not path.is_file() or path.stat().st_size != len(content):
        with replacing(path, durable=False) as temporary:
            temporary.write_bytes(content)
    return path


_FILE_NAME = re.compile(r"[^\n\r{}<>]{0,400}\.(?:md|json|txt|html?)", re.IGNORECASE)


def _file_name(value: str | None) -> str | None:
    """The base name in a cell that holds a path; None if it holds something else."""
    value = (value or "").strip()
    return base_name(value) if _FILE_NAME.fullmatch(value) else None


_COLUMN = {"inline": "analysis_markdown", "analysis_html": "analysis_html"}


def _text_of(source: Source, job: Job) -> str:
    if source.problem:
        raise LeftOut(Reason.ANALYSIS_UNREADABLE, source.problem)
    column = _COLUMN.get(source.rule, source.rule.partition(".")[0])
    if source.text is not None:
        if column in job.cut:
            raise LeftOut(Reason.ANALYSIS_TOO_LONG, f"{column} is too long to be a critique.")
        if column in job.undecodable:
            raise LeftOut(Reason.ANALYSIS_UNREADABLE, f"{column} is not UTF-8 text.")
        return source.text
    assert source.path is not None
    path = source.path
    try:
        # A character has at most four bytes, and no more is read of a runaway file.
        with path.open("rb") as file:
            raw = file.read(4 * MAX_CHARACTERS + 1)
        if len(raw) > 4 * MAX_CHARACTERS:
            detail = f"{path.name} has {path.stat().st_size:,} bytes, so it is no critique."
            raise LeftOut(Reason.ANALYSIS_TOO_LONG, detail)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"{path.name} is not UTF-8 text (byte {error.start})."
    except OSError as error:
        detail = f"{path.name} cannot be read: {error.strerror}."
    raise LeftOut(Reason.ANALYSIS_UNREADABLE, detail)
