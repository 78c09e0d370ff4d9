"""What the labels are worth: the whole audit, the short one of the main job, and what it drops."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ..data.rows import load_json
from ..errors import DataError
from ..files import atomic_write_json
from ..report import screen
from . import rows
from .words import command

if TYPE_CHECKING:
    from ..config import Config
    from ..data.audit import Audit, Entry
    from ..run import Run


def audit(config: Config, run: Run) -> None:
    """Measure the linked rows and show the findings: terminal, ``audit.json``, ``audit.html``.

    Links first unless ``data.manifest`` is given or the folder holds a manifest. Every linked row
    is looked at, those that ``data.drop`` leaves out later included.

    Raises:
        DataError: the labels are not informative and ``data.require_informative`` is set.
    """
    from ..data.audit import entries_of_manifest
    from ..data.link import MANIFEST_NAME
    from ..data.store import advisor_id
    from ..report import audit_page, audit_screen

    folder = rows.data_dir(config, run)
    path = folder / MANIFEST_NAME
    if config.data.manifest is None and not path.is_file():
        rows.link(config, run)
    manifest = load_json(
        path if config.data.manifest is None else _path(config.data.manifest), "manifest"
    )
    entries = entries_of_manifest(manifest, advisor_id(config.data.advisor))
    if not entries:
        raise DataError(
            f"The manifest has no rows of {config.data.advisor or 'any advisor'}; run task=link."
        )
    found = _look(config, run, entries)
    atomic_write_json(folder / "audit.json", found.as_dict())
    page = audit_page.write(
        found, entries, folder / "audit.html", advisor=config.data.advisor, settings=_facts(run)
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

    found = _look(config, run, entries_of_rows([*parts.train, *parts.val, *parts.test]))
    counts = {finding.name: len(finding.rows) for finding in found.findings}
    run.record(audit=found.verdict.as_dict() | {"findings": counts})
    run.console.print(f"Labels:   {found.verdict.sentence}", markup=False)
    _require(config, found)
    return found.verdict.sentence


def left_out(config: Config, run: Run, manifest: Any) -> dict[str, str]:
    """Rows that ``data.drop`` keeps out of preparing, by job id; the counts are shown."""
    if not config.data.drop:
        return {}
    from ..data.audit import entries_of_manifest, rows_to_drop
    from ..data.store import advisor_id

    content = load_json(_path(manifest), "manifest")
    entries = entries_of_manifest(content, advisor_id(config.data.advisor))
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


def _look(config: Config, run: Run, entries: list[Entry]) -> Audit:
    from ..data.audit import audit as look

    with screen.counting(run.console, "comparing photographs") as progress:
        return look(
            entries,
            min_pixels=config.data.min_pixels,
            max_pixels=config.data.max_pixels,
            cache=rows.PERCEPTUAL_HASHES.absolute(),
            progress=progress,
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


def _path(path: Any) -> Any:
    from pathlib import Path

    return Path(path)
