"""Training files: from a manifest to train, validation and test rows, and back from disk.

A prepared row holds what training and evaluation need and nothing that has to be looked up
again: an absolute ``image_path``, the ``prompt`` as it will be served, and the ``response`` as the
canonical one-line JSON. Its keys ``image_path``, ``prompt`` and ``response`` are the workbook's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest
from ..files import atomic_write_json
from .corrections import Correction, Corrections, Fit, Seen, analysis_hash, facts_of
from .critique import Critique, CritiqueError, parse_analysis, rename_dimensions, render
from .example import strip_example
from .lock import locked_folds, locked_parts, new_entry, read_locks
from .prompt import build_prompt, fingerprint
from .rows import Row, check_disjoint, data_lock, hash_photograph, load_json, read_rows
from .similar import near_groups
from .split import PARTS, assign, assign_folds
from .store import advisor_id

__all__ = [
    "LOCK_NAME",
    "Prepared",
    "Row",
    "check_disjoint",
    "data_lock",
    "load_prepared",
    "part_path",
    "prepare",
    "read_rows",
]

LOCK_NAME = "split.lock.json"


@dataclass(frozen=True)
class Prepared:
    """The rows of each part, and what the meta file holds; ``test`` is empty if none was asked for.

    ``meta["data_lock"]`` is `data_lock` of these very rows.
    """

    train: list[Row]
    val: list[Row]
    test: list[Row]
    meta: dict[str, Any]


def part_path(output_dir: str | Path, advisor: str | None, part: str) -> Path:
    """``training_data_<advisor>_<part>.json`` in ``output_dir``; ``all`` stands for every advisor.

    ``part`` is ``train``, ``val``, ``test`` or ``meta``.
    """
    return Path(output_dir) / f"training_data_{advisor_id(advisor) or 'all'}_{part}.json"


def prepare(
    manifest: Mapping[str, Any] | str | Path,
    *,
    advisor: str | None,
    train_split: float,
    val_split: float,
    test_split: float,
    seed: int,
    output_dir: str | Path,
    folds: int | None = None,
    limit: int | None = None,
    dimension_map: Mapping[str, str | None] | None = None,
    leave_out: Mapping[str, str] | None = None,
    corrections: Corrections | None = None,
    strip_prompt_example: bool = False,
    cache: Path | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Prepared:
    """Turn a manifest into the training files of one advisor (None: of all of them together).

    Writes ``training_data_<advisor>_{train,val,meta}.json``, the test file if ``test_split`` is
    above 0, and this advisor's entry of ``split.lock.json``. A manifest of the users' own linker,
    with no hashes and no prompts, is accepted: photographs are hashed, the prompt is the template.

    Args:
        manifest: what `link.link` returned, or the path of its file.
        train_split, val_split, test_split: fractions of the photographs; see `split.assign`.
        folds: deal the rows outside the test part into so many folds as well, by
            `split.assign_folds`.
        limit: use only the first ``limit`` records.
        dimension_map: what to call a dimension instead, or None to leave it out of the critiques;
            see `critique.rename_dimensions`.
        leave_out: job ids not to use, and the audit's finding that says so; ``meta["dropped"]``.
        corrections: what a person decided: a corrected critique takes the place of the stored one,
            rejected rows are left out (``meta["rejected"]``, each with its reason), and decisions
            about what is another analysis or photograph by now are not applied
            (``meta["corrections"]``).
        strip_prompt_example: take the scores out of filled examples in prompts.
        cache, progress: of the photographs that are decoded, as of `similar.near_groups`.

    A ``split.lock.json`` in ``output_dir`` is honoured: see `lock`. Files that show one photograph
    (`similar`), and records with the same ``shoot``, are dealt together.

    Raises:
        DataError: the manifest is unreadable or has no record of ``advisor``, a photograph or an
            analysis is gone or changed since it was linked, a photograph is damaged, there are too
            few photographs, or the split lock does not fit.
    """
    source = None if isinstance(manifest, Mapping) else Path(manifest).absolute()
    content = manifest if isinstance(manifest, Mapping) else load_json(Path(manifest), "manifest")
    dropped = dict(leave_out or {})
    found = _records(content, advisor, source)
    fit = _fit(corrections, found, content)
    out = {*dropped, *fit.rejected}
    records = [record for record in found if record["job_id"] not in out][:limit]
    if not records:
        names = " and ".join(
            (["data.drop"] if dropped else []) + (["the corrections"] if fit.rejected else [])
        )
        raise DataError(
            f"Of the {len(found)} rows none is left by {names}; drop or reject fewer of them."
        )
    prompts = content.get("prompts") or {}
    if strip_prompt_example:
        prompts = _stripped(prompts)
    rows: dict[str, Row] = {}
    mapped: Counter[str] = Counter(dict.fromkeys(dimension_map or {}, 0))
    facts: list[dict[str, Any]] = []
    hashes: dict[Path, str] = {}
    for record in records:
        correction = fit.corrected.get(record["job_id"])
        row, critique, renamed = _row(record, prompts, hashes, correction, dimension_map or {})
        mapped.update(renamed)
        rows[row.job_id] = row
        facts.append(
            {
                "job_id": row.job_id,
                "advisor": row.advisor,
                "image_sha256": row.image_sha256,
                "shoot": record.get("shoot"),
                "overall_score": critique.overall_score,
                "dimensions": [dimension.name for dimension in critique.dimensions],
            }
        )
    splits = {"train": train_split, "val": val_split, "test": test_split}
    locks = read_locks(Path(output_dir) / LOCK_NAME)
    earlier = locks["advisors"].get(advisor_id(advisor) or "all")
    locked = locked_parts(
        earlier, facts, seed=seed, splits=splits, path=Path(output_dir) / LOCK_NAME
    )
    _group(list(rows.values()), facts, cache, progress)
    parts = assign(
        facts, train=train_split, val=val_split, test=test_split, seed=seed, locked=locked
    )
    if folds is not None:
        inside = [fact for fact in facts if parts[fact["job_id"]] != "test"]
        known = locked_folds(earlier, folds, path=Path(output_dir) / LOCK_NAME)
        for job, fold in assign_folds(inside, folds=folds, seed=seed, locked=known).items():
            rows[job] = replace(rows[job], fold=fold)
    dealt = {part: [row for key, row in rows.items() if parts[key] == part] for part in PARTS}
    meta = {
        "advisor": advisor_id(advisor) or "all",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "manifest": str(source) if source else None,
        "seed": seed,
        "splits": splits,
        "folds": folds,
        "total_examples": len(rows),
        "total_photographs": len({row.image_sha256 for row in rows.values()}),
        "total_groups": len({fact["group"] for fact in facts}),
        "parts": {part: _part_facts(dealt[part], facts) for part in PARTS},
        "prompts": _prompt_facts(list(rows.values()), prompts),
        "dimensions": _dimension_facts(facts),
        "longest_response": max(len(row.response) for row in rows.values()),
        "dropped": dropped,
        "mapped_dimensions": dict(mapped),
        "rejected": {
            job: "rejected in review" + (f": {one.remark}" if one.remark.strip() else "")
            for job, one in fit.rejected.items()
        },
        "corrections": facts_of(corrections, fit) if corrections else None,
        "data_lock": data_lock(dealt),
    }
    prepared = Prepared(**dealt, meta=meta)
    locks["advisors"][meta["advisor"]] = new_entry(earlier, dealt, meta)
    _write(prepared, Path(output_dir), advisor, locks)
    return prepared


def load_prepared(output_dir: str | Path, advisor: str | None) -> Prepared:
    """Read what `prepare` wrote; files edited by hand since are taken as they are now.

    ``meta["data_lock"]`` is computed anew from the rows, and ``meta["edited"]`` says whether it
    differs from the one that was written.

    Raises:
        DataError: a file is missing or malformed, a photograph is gone, or one photograph is in
            two parts.
    """
    meta = load_json(part_path(output_dir, advisor, "meta"), "prepared data")
    try:
        wanted = [part for part in PARTS if meta["splits"][part] > 0]
        written = str(meta["data_lock"])
    except (KeyError, TypeError):
        path = part_path(output_dir, advisor, "meta")
        raise DataError(f"{path} is not a meta file of this program; prepare again.") from None
    dealt: dict[str, list[Row]] = {part: [] for part in PARTS}
    for part in wanted:
        dealt[part] = read_rows(part_path(output_dir, advisor, part))
    check_disjoint(dealt)
    lock = data_lock(dealt)
    return Prepared(**dealt, meta={**meta, "data_lock": lock, "edited": lock != written})


# -- manifest records to rows --------------------------------------------------------------------


def _records(
    manifest: Mapping[str, Any], advisor: str | None, source: Path | None
) -> list[dict[str, Any]]:
    where = str(source) if source else "The manifest"
    by_advisor = manifest.get("by_advisor") if isinstance(manifest, Mapping) else None
    if not isinstance(by_advisor, Mapping):
        raise DataError(f"{where} has no `by_advisor`; make one with task=link.")
    wanted = advisor_id(advisor)
    if wanted is not None and wanted not in by_advisor:
        meant = nearest(wanted, by_advisor)
        hint = f"; did you mean {meant}?" if meant else "."
        known = ", ".join(by_advisor) or "nobody"
        raise DataError(f"{where} has no records of advisor {wanted!r}, but of {known}{hint}")
    names = [wanted] if wanted is not None else list(by_advisor)
    try:
        found = [
            {"advisor": name, **record} for name in names for record in by_advisor[name]["records"]
        ]
        for record in found:
            for key in ("job_id", "image_path", "analysis_path"):
                if not isinstance(record[key], str):
                    raise TypeError(f"{key} is {record[key]!r}")
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} has a malformed record ({error}); run task=link again.") from None
    if not found:
        raise DataError(f"{where} has no records of {', '.join(names) or 'any advisor'}.")
    return found


def _row(
    record: Mapping[str, Any],
    prompts: Mapping[str, Any],
    hashes: dict[Path, str],
    correction: Correction | None,
    dimension_map: Mapping[str, str | None],
) -> tuple[Row, Critique, list[str]]:
    """A record's row, its critique, and the names that ``dimension_map`` changed in it.

    ``hashes`` remembers the photographs that were hashed.
    """
    job, path = str(record["job_id"]), Path(record["image_path"]).absolute()
    analysis = Path(record["analysis_path"])
    sha256 = hash_photograph(path, f"job {job}", hashes)
    if sha256 != record.get("image_sha256", sha256):
        raise DataError(f"The photograph {path} changed since it was linked; run task=link again.")
    try:
        critique = parse_analysis(_text(analysis), partial=True).critique
    except (OSError, UnicodeDecodeError, CritiqueError) as error:
        raise DataError(
            f"The analysis {analysis} of job {job} can no longer be used: {error} "
            "Run task=link again."
        ) from error
    if correction and correction.critique:
        critique = correction.critique
    try:
        critique, renamed = rename_dimensions(critique, dimension_map)
    except CritiqueError as error:
        raise DataError(f"data.dimension_map does not fit job {job}: {error}") from None
    known = prompts.get(record.get("prompt_id", ""))
    prompt = known["text"] if known else build_prompt(None, record["advisor"])[0]
    row = Row(job, str(record["advisor"]), path, prompt, render(critique), sha256)
    return row, critique, renamed


def _text(analysis: Path) -> str:
    return analysis.read_bytes().decode("utf-8-sig")


def _fit(
    corrections: Corrections | None, records: Sequence[dict[str, Any]], content: Mapping[str, Any]
) -> Fit:
    """The decisions that hold for these records; none without corrections."""
    if corrections is None:
        return Fit()
    known = {
        str(record["job_id"])
        for group in content["by_advisor"].values()
        for record in group["records"]
    }
    decided = [record for record in records if record["job_id"] in corrections.latest]
    return corrections.fit(map(_seen, decided), known)


def _seen(record: Mapping[str, Any]) -> Seen:
    """A record as a reviewer met it, see `audit.Entry.seen`; what is gone was never seen so."""
    job, image = record["job_id"], Path(record["image_path"]).absolute()
    try:
        text = _text(Path(record["analysis_path"]))
    except (OSError, UnicodeDecodeError):
        text = ""
    sha256 = record.get("image_sha256") or hash_photograph(image, f"job {job}", {})
    return Seen(job, sha256, analysis_hash(text))


def _group(
    rows: Sequence[Row],
    facts: Sequence[dict[str, Any]],
    cache: Path | None,
    progress: Callable[[int, int], Any],
) -> None:
    """Give each fact its ``group``: one photograph in all its files, and all of a shoot."""
    paths = {row.image_sha256: row.image_path for row in rows}
    groups = near_groups(paths, cache=cache, progress=progress)
    if groups.unreadable:
        damaged = len(groups.unreadable)
        others = f" (and {damaged - 1} more photographs)" if damaged > 1 else ""
        raise DataError(
            f"A photograph is damaged{others}: {next(iter(groups.unreadable.values()))}, or leave "
            "such rows out with data.drop=[damaged_photographs]."
        )
    leader = groups.leader
    shoots: dict[str, str] = {}

    def find(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    for fact in facts:
        if fact["shoot"]:
            own = find(fact["image_sha256"])
            first, second = sorted((own, find(shoots.setdefault(str(fact["shoot"]), own))))
            leader[second] = first
    for fact in facts:
        fact["group"] = find(fact["image_sha256"])


def _stripped(prompts: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts without their examples' scores, under their ids and under their new fingerprints."""
    found: dict[str, Any] = {}
    for key, prompt in prompts.items():
        text = strip_example(prompt["text"])
        told = prompt["source"] + (", example stripped" if text != prompt["text"] else "")
        found[key] = found[fingerprint(text)] = {**prompt, "text": text, "source": told}
    return found


# -- meta and files ------------------------------------------------------------------------------


def _part_facts(rows: Sequence[Row], facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ids = {row.job_id for row in rows}
    scores = [fact["overall_score"] for fact in facts if fact["job_id"] in ids]
    return {
        "examples": len(rows),
        "photographs": len({row.image_sha256 for row in rows}),
        "mean_overall_score": sum(scores) / len(scores) if scores else None,
    }


def _prompt_facts(rows: Sequence[Row], prompts: Mapping[str, Any]) -> list[dict[str, Any]]:
    used = Counter(fingerprint(row.prompt) for row in rows)
    return [
        {
            "fingerprint": key,
            "source": prompts.get(key, {"source": "template"})["source"],
            "examples": n,
        }
        for key, n in used.most_common()
    ]


def _dimension_facts(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    used = Counter(tuple(fact["dimensions"]) for fact in facts)
    return [{"names": list(names), "examples": n} for names, n in used.most_common()]


def _write(
    prepared: Prepared, output_dir: Path, advisor: str | None, locks: Mapping[str, Any]
) -> None:
    meta = prepared.meta
    parts = {part: getattr(prepared, part) for part in PARTS}
    # First: rows that were dealt without their lock could be dealt otherwise next time.
    atomic_write_json(output_dir / LOCK_NAME, locks)
    for part, rows in parts.items():
        path = part_path(output_dir, advisor, part)
        if meta["splits"][part] > 0:
            atomic_write_json(path, [_entry(row) for row in rows])
        else:
            # A part of an earlier split would overlap with the parts of this one.
            path.unlink(missing_ok=True)
    atomic_write_json(part_path(output_dir, advisor, "meta"), meta)


def _entry(row: Row) -> dict[str, Any]:
    fold = {} if row.fold is None else {"fold": row.fold}
    return fold | {
        "image_path": str(row.image_path),
        "prompt": row.prompt,
        "response": row.response,
        "job_id": row.job_id,
        "advisor": row.advisor,
        "image_sha256": row.image_sha256,
    }
