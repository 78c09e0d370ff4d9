"""What the labels are worth: the whole audit, the short one of the main job, and what it drops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.corrections import facts_of
from ..data.rows import load_json
from ..errors import DataError, ModelError
from ..files import atomic_write_json
from ..report import screen
from . import rows
from .words import command

if TYPE_CHECKING:
    from ..config import Config
    from ..data.audit import Audit, Entry
    from ..data.corrections import Corrections, Fit
    from ..model.encoder import Encoder
    from ..run import Run


def audit(config: Config, run: Run) -> None:
    """Measure the linked rows and show the findings: terminal, ``audit.json``, ``audit.html``.

    Links first unless ``data.manifest`` is given or the folder holds a manifest. Every linked row
    is looked at, those that ``data.drop`` leaves out later included; of what a person decided with
    ``task=review``, corrected labels count as corrected, and rejected ones not at all.

    Raises:
        DataError: the labels are not informative and ``data.require_informative`` is set.
    """
    from ..report import audit_page, audit_screen

    folder = rows.data_dir(config, run)
    path = rows.manifest_path(config, run)
    if config.data.manifest is None and not path.is_file():
        rows.link(config, run)
    linked, manifest = entries_of(config, path)
    check_some(config, linked)
    corrections = rows.corrections(config, run)
    entries, decided = _corrected(config, linked, corrections, manifest)
    rows.tell_corrections(run, corrections, facts_of(corrections, decided))
    if not entries:
        raise DataError(
            f"All {len(linked)} rows were rejected by {corrections.path}; take some of that back "
            "with task=review."
        )
    found = look(config, run, entries, _encoder(config, run))
    facts = _facts(run)
    counts = decided.counts() if corrections.latest else {}
    facts |= {f"{name} rows": n for name, n in counts.items() if n}
    atomic_write_json(folder / "audit.json", found.as_dict() | {"corrections": counts})
    page = audit_page.write(
        found, entries, folder / "audit.html", advisor=config.data.advisor, settings=facts
    )
    run.record(audit=found.verdict.as_dict())
    audit_screen.show(run.console, found, page=page, next_command=_next(found))
    _require(config, found)


def brief(config: Config, run: Run, parts: rows.Parts) -> str:
    """The verdict on the rows of a run, in one sentence; its findings are counted in run.json.

    Raises:
        DataError: the labels are not informative and ``data.require_informative`` is set.
    """
    from ..data.audit import entries_of_rows

    found = look(config, run, entries_of_rows([*parts.train, *parts.val, *parts.test]))
    counts = {finding.name: len(finding.rows) for finding in found.findings}
    run.record(audit=found.verdict.as_dict() | {"findings": counts})
    run.console.print(f"Labels:   {found.verdict.sentence}", markup=False)
    _require(config, found)
    return found.verdict.sentence


def left_out(config: Config, run: Run, manifest: Any) -> dict[str, str]:
    """Rows that ``data.drop`` keeps out of preparing, by job id; the counts are shown."""
    if not config.data.drop:
        return {}
    from ..data.audit import rows_to_drop

    linked, content = entries_of(config, manifest)
    # What a person corrected or rejected needs no finding to leave it out.
    entries, _ = _corrected(config, linked, rows.corrections(config, run), content)
    with screen.counting(run.console, "comparing photographs") as progress:
        dropped = rows_to_drop(
            entries,
            config.data.drop,
            cache=rows.PERCEPTUAL_HASHES.absolute(),
            progress=progress,
        )
    counts = Counter(dropped.values())
    told = ", ".join(f"{counts[name]} {name}" for name in config.data.drop)
    run.record(dropped={name: counts[name] for name in config.data.drop})
    run.console.print(
        f"Dropped {len(dropped)} of {len(entries)} rows, by data.drop: {told}.", markup=False
    )
    if entries and len(dropped) == len(entries):
        raise DataError(
            f"data.drop={','.join(config.data.drop)} leaves none of the {len(entries)} rows; "
            "drop less, or correct the labels."
        )
    return dropped


def _encoder(config: Config, run: Run) -> Encoder | None:
    """What counts tokens; None, and a notice, while the model is not on this machine."""
    from ..model.base import load_encoder
    from ..sample import model_dir

    try:
        return load_encoder(config.model.path or model_dir())
    except ModelError as error:
        run.warn(f"the rows' tokens are not counted: {error}")
        return None


def entries_of(config: Config, manifest: Any) -> tuple[list[Entry], dict[str, Any]]:
    """The rows of a manifest's file that ``data.advisor`` chooses, and its content.

    Raises:
        DataError: the file cannot be read or is malformed.
    """
    from ..data.audit import entries_of_manifest
    from ..data.store import advisor_id

    content = load_json(Path(manifest), "manifest")
    return entries_of_manifest(content, advisor_id(config.data.advisor)), content


def check_some(config: Config, entries: list[Entry]) -> None:
    """Raises `DataError` unless there are entries."""
    if not entries:
        raise DataError(
            f"The manifest has no rows of {config.data.advisor or 'any advisor'}; run task=link."
        )


def _corrected(
    config: Config, entries: list[Entry], corrections: Corrections, manifest: dict[str, Any]
) -> tuple[list[Entry], Fit]:
    """Rows as they will be learnt: as a person decided, with the names that the config gives."""
    from ..data.audit import corrected, jobs_of, renamed

    decided, fit = corrected(entries, corrections, jobs_of(manifest))
    return renamed(decided, config.data.dimension_map), fit


def look(config: Config, run: Run, entries: list[Entry], encoder: Encoder | None = None) -> Audit:
    """All findings about the rows, with a line in the terminal while photographs are compared."""
    from ..data.audit import audit as measure

    with screen.counting(run.console, "comparing photographs") as progress:
        return measure(
            entries,
            min_pixels=config.data.min_pixels,
            max_pixels=config.data.max_pixels,
            cache=rows.PERCEPTUAL_HASHES.absolute(),
            progress=progress,
            encoder=encoder,
        )


def _require(config: Config, found: Audit) -> None:
    if config.data.require_informative and found.verdict.code == "cannot_teach_scoring":
        raise DataError(
            f"{found.verdict.sentence} Correct the labels, or set data.require_informative=false "
            "to go on all the same."
        )


def _next(found: Audit) -> str | None:
    """The command that prepares without the rows that teach nothing, if any rows remain."""
    names = [f.name for f in found.findings if f.droppable and f.spoils]
    if not names or not found.verdict.informative_rows:
        return None
    return command("task=prepare", f"'data.drop=[{','.join(names)}]'")


def _facts(run: Run) -> dict[str, Any]:
    return {"config hash": run.config_hash, "data": run.resolved["data"]}
