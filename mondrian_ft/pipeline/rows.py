"""The data side of a run: linking, preparing, and the rows it works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.dataset import load_prepared, part_path
from ..data.dataset import prepare as prepare_rows
from ..data.link import MANIFEST_NAME, NoUsableRows, link_into
from ..data.rows import Row, check_disjoint, data_lock, read_rows
from ..report import screen

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
    manifest = data.manifest or folder / MANIFEST_NAME
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
            limit=data.limit,
            leave_out=dropped,
            strip_prompt_example=data.prompt_example.value == "strip",
            cache=PERCEPTUAL_HASHES.absolute(),
            progress=progress,
        )
    parts = _parts(prepared, folder, data.advisor)
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
            load_prepared(data.output_dir, data.advisor), Path(data.output_dir), data.advisor
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


def _parts(prepared: Any, folder: Path, advisor: str | None) -> Parts:

    judged = "test" if prepared.test else "val"
    return Parts(
        prepared.train,
        prepared.val,
        prepared.test,
        prepared.meta["data_lock"],
        str(part_path(folder, advisor, judged)),
    )


def data_dir(config: Config, run: Run) -> Path:
    return Path(config.data.output_dir) if config.data.output_dir else run.folder / "data"
