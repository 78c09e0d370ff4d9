"""The data side of a run: linking, preparing, and the rows it works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.corrections import CORRECTIONS_NAME, Corrections
from ..data.corrections import read as read_corrections
from ..data.dataset import Prepared, load_prepared, part_path
from ..data.dataset import prepare as prepare_rows
from ..data.link import MANIFEST_NAME, NoUsableRows, link_into
from ..data.rows import Row, check_disjoint, data_lock, read_rows
from ..errors import DataError
from ..report import screen, wording

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run

PARTS = ("train", "val", "test")
PHOTOGRAPHS_KNOWN = Path("outputs/cache/photographs.json")
"""Hashes and sizes of photographs, kept until a file changes."""
PERCEPTUAL_HASHES = Path("outputs/cache/perceptual_hashes.npz")
"""What tells that two files show one photograph, kept until a file changes."""


@dataclass(frozen=True)
class Parts:
    """The rows of a run, and where the held-out ones were read from."""

    train: list[Row]
    val: list[Row]
    test: list[Row]
    lock: str
    source: str

    @property
    def judged(self) -> list[Row]:
        """The rows an evaluation uses: the test part if there is one, else the validation part."""
        return self.test or self.val


def link(config: Config, run: Run) -> None:
    """Write the manifest and the link report, and show what was left out and why."""
    data = config.data
    if data.db_path is None:
        from ..sample import sample_data

        sample = sample_data(data.seed, Path("outputs/cache/sample").absolute())
        db_path, source, analyses = sample.db_path, sample.source_dir, sample.analysis_dir
    else:
        db_path, source, analyses = data.db_path, Path(data.source_dir or ""), data.analysis_dir
    folder = data_dir(config, run)
    try:
        with screen.counting(run.console, "checking photographs") as progress:
            result = link_into(
                folder,
                db_path,
                source,
                analyses,
                data.advisor,
                limit=data.limit,
                accept=data.accept.value,
                generated=data.generated,
                cache=PHOTOGRAPHS_KNOWN.absolute(),
                progress=progress,
            )
    except NoUsableRows as error:
        screen.show_link(run.console, error.report)
        raise
    run.record(link={"rows": result.report["rows"], "linked": result.report["linked"]})
    screen.show_link(run.console, result.report, folder / MANIFEST_NAME)


def prepare(config: Config, run: Run) -> Parts:
    """Write the rows of each part and the split lock."""
    data = config.data
    folder = data_dir(config, run)
    manifest = manifest_path(config, run)
    corrected = corrections(config, run)
    dropped: dict[str, str] = {}
    if data.drop:
        from .auditing import left_out

        dropped = left_out(config, run, manifest)
    with screen.counting(run.console, "comparing photographs") as progress:
        prepared = prepare_rows(
            manifest,
            advisor=data.advisor,
            train_split=data.train_split,
            val_split=data.val_split,
            test_split=data.test_split,
            seed=data.seed,
            output_dir=folder,
            folds=data.folds or config.eval.folds,
            limit=data.limit,
            dimension_map=data.dimension_map,
            leave_out=dropped,
            corrections=corrected,
            strip_prompt_example=data.prompt_example.value == "strip",
            cache=PERCEPTUAL_HASHES.absolute(),
            progress=progress,
        )
    tell_corrections(run, corrected, prepared.meta["corrections"])
    for name, rows in prepared.meta["mapped_dimensions"].items():
        if not rows:
            run.warn(f"data.dimension_map names {name}, which is a dimension of no row")
    parts = _parts(config, run, prepared, folder)
    counts = ", ".join(f"{len(getattr(parts, part))} {part}" for part in PARTS)
    run.record(rows={part: len(getattr(parts, part)) for part in PARTS}, data_lock=parts.lock)
    run.console.print(f"Prepared {counts}, split by photograph.", markup=False)
    where = screen.near(part_path(folder, data.advisor, "train"))
    run.console.print(f"Rows:     {where}", soft_wrap=True, markup=False)
    return parts


def linked_and_prepared(config: Config, run: Run) -> Parts:
    """From the job database to rows, or from what the config names further down the line."""
    if config.data.train_data is not None:
        return load(config, run)
    if config.data.manifest is None:
        link(config, run)
    return prepare(config, run)


def load(config: Config, run: Run) -> Parts:
    """The rows that were prepared, or that ``data.train_data`` and ``data.val_data`` name."""

    data = config.data
    if data.train_data is None and data.val_data is None:
        if data.output_dir is None:
            # Nothing was prepared that could be meant, so this run prepares for itself.
            return linked_and_prepared(config, run)
        parts = _parts(
            config, run, load_prepared(data.output_dir, data.advisor), Path(data.output_dir)
        )
    else:
        prepared = None
        if (
            data.output_dir is not None
            and part_path(data.output_dir, data.advisor, "train").is_file()
        ):
            prepared = load_prepared(data.output_dir, data.advisor)
        train_rows = read_rows(data.train_data) if data.train_data else []
        val_rows = read_rows(data.val_data) if data.val_data else []
        if prepared is not None:
            train_rows = train_rows or prepared.train
            val_rows = val_rows or prepared.val
        named = {"train": train_rows, "val": val_rows, "test": []}
        check_disjoint(named)
        source = data.val_data or data.train_data or ""
        parts = Parts(train_rows, val_rows, [], data_lock(named), str(source))
    run.record(rows={part: len(getattr(parts, part)) for part in PARTS}, data_lock=parts.lock)
    return parts


def _parts(config: Config, run: Run, prepared: Prepared, folder: Path) -> Parts:
    """The prepared parts, or those that ``data.fold`` makes of training and validation rows."""
    advisor, fold = config.data.advisor, config.data.fold
    judged = str(part_path(folder, advisor, "test" if prepared.test else "val"))
    if fold is None:
        return Parts(
            prepared.train, prepared.val, prepared.test, prepared.meta["data_lock"], judged
        )
    count = config.data.folds
    if prepared.meta.get("folds") != count:
        was = prepared.meta.get("folds") or "no"
        raise DataError(
            f"The rows in {folder} were prepared with {was} folds, but data.folds is {count}; run "
            f"task=prepare with data.folds={count}."
        )
    inside = [*prepared.train, *prepared.val]
    named = {
        "train": [row for row in inside if row.fold != fold],
        "val": [row for row in inside if row.fold == fold],
        "test": prepared.test,
    }
    check_disjoint(named)
    run.console.print(
        f"Fold {fold} of 0 to {count - 1 if count else 0} is the validation part.", markup=False
    )
    return Parts(**named, lock=data_lock(named), source=judged)


def manifest_path(config: Config, run: Run) -> Path:
    """The manifest to prepare from: ``data.manifest``, else the one of the data's folder."""
    if config.data.manifest is not None:
        return Path(config.data.manifest)
    return data_dir(config, run) / MANIFEST_NAME


def corrections(config: Config, run: Run) -> Corrections:
    """What a person decided about the rows of the manifest: the corrections file beside it."""
    return read_corrections(manifest_path(config, run).parent / CORRECTIONS_NAME)


def tell_corrections(run: Run, found: Corrections, facts: Mapping[str, Any] | None) -> None:
    """Show what became of the corrections, and warn of those that are not applied.

    Args:
        facts: ``meta["corrections"]`` of the prepared rows, None without a corrections file.
    """
    if found.notice:
        run.warn(found.notice)
    if facts is None:
        return
    run.record(corrections={key: value for key, value in facts.items() if key != "jobs"})
    told = ", ".join(f"{facts[name]} {name}" for name in ("accepted", "corrected", "rejected"))
    run.console.print(
        f"Reviewed: {told}, by {screen.near(found.path)}.", soft_wrap=True, markup=False
    )
    if stale := facts["jobs"]["stale"]:
        verb = "is" if len(stale) == 1 else "are"
        reasons = set(stale.values())
        changed = reasons.pop() if len(reasons) == 1 else "the analysis or the photograph"
        run.warn(
            f"{wording.count(len(stale), 'decision')} of {screen.near(found.path)} {verb} not "
            f"applied, because {changed} changed since: {_some(stale)}; look at them again with "
            "task=review"
        )
    if unknown := facts["jobs"]["unknown"]:
        verb = "is about a job that is" if len(unknown) == 1 else "are about jobs that are"
        run.warn(
            f"{wording.count(len(unknown), 'decision')} of {screen.near(found.path)} {verb} not in "
            f"the manifest: {_some(unknown)}"
        )


def _some(jobs: Iterable[str], most: int = 8) -> str:
    """Job ids for a sentence, the first few of many."""
    names = list(jobs)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def data_dir(config: Config, run: Run) -> Path:
    return Path(config.data.output_dir) if config.data.output_dir else run.folder / "data"
