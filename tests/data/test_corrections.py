"""Corrections: appended and never lost, applied to what they were made for and to nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mondrian_ft.data import corrections
from mondrian_ft.data.audit import corrected, entries_of_manifest, jobs_of, rows_to_drop
from mondrian_ft.data.corrections import CORRECTIONS_NAME, Corrections, Decision, Seen
from mondrian_ft.data.critique import Critique, parse_analysis, render, validate
from mondrian_ft.data.dataset import Prepared, prepare
from mondrian_ft.data.example import KNOWN_VECTOR
from mondrian_ft.data.link import MANIFEST_NAME, link_into
from mondrian_ft.data.rows import Row
from mondrian_ft.errors import DataError, MondrianError

from .world import World, critique, fenced

A, B = "a" * 64, "b" * 64
SEEN = Seen("job-1", A, B)


def better(score: float = 3.5) -> Critique:
    """A critique that was corrected to ``score`` everywhere."""
    return validate(critique(score, image_description="A pier – “after” rain."))


def reject(job: str, **more: Any) -> corrections.Correction:
    return corrections.decide(Seen(job, A, B), Decision.REJECT, **more)


# -- the file


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    """Every field survives, the critique as the canonical one."""
    path = tmp_path / "deep" / CORRECTIONS_NAME
    one = corrections.decide(
        SEEN, Decision.CORRECT, critique=better(), remark="köln\n2", reviewer="Ada"
    )
    corrections.append(path, one)
    found = corrections.read(path)
    assert found.latest == {"job-1": one}
    assert found.notice == ""
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    line = json.loads(path.read_text(encoding="utf-8"))
    assert json.dumps(line["critique"], ensure_ascii=False, separators=(",", ":")) == render(
        better()
    )
    assert line["timestamp"].endswith("+00:00")


def test_no_file_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / CORRECTIONS_NAME
    assert corrections.read(path) == Corrections(path)
    assert corrections.read(path).sha256 is None


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(Decision)), max_size=12))
def test_the_last_line_of_a_job_holds(steps: list[tuple[int, Decision]]) -> None:
    """Whatever the order, and ``undo`` leaves no decision; the file only ever grows."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CORRECTIONS_NAME
        before = b""
        for job, decision in steps:
            made = better() if decision is Decision.CORRECT else None
            corrections.append(
                path, corrections.decide(Seen(f"job-{job}", A, B), decision, critique=made)
            )
            assert path.read_bytes().startswith(before)
            before = path.read_bytes()
        last = {f"job-{job}": decision for job, decision in steps}
        found = {job: one.decision for job, one in corrections.read(path).latest.items()}
        assert found == {job: d for job, d in last.items() if d is not Decision.UNDO}


@pytest.mark.parametrize("kept", [1, 60, -2])
def test_a_line_cut_short_by_a_crash_is_told_and_passed_over(tmp_path: Path, kept: int) -> None:
    """It was never acknowledged; the next decision takes its place, and nothing else is lost."""
    path = tmp_path / CORRECTIONS_NAME
    corrections.append(path, reject("job-1"))
    whole = path.read_bytes()
    torn = reject("job-2").line().encode()[:kept]
    path.write_bytes(whole + torn)
    found = corrections.read(path)
    assert list(found.latest) == ["job-1"]
    assert "cut short" in found.notice
    corrections.append(path, reject("job-3"))
    assert path.read_bytes().startswith(whole)
    again = corrections.read(path)
    assert (list(again.latest), again.notice) == (["job-1", "job-3"], "")


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    """An editor may leave the newline away; the next line does not run into it."""
    path = tmp_path / CORRECTIONS_NAME
    path.write_text(reject("job-1").line(), encoding="utf-8")
    assert list(corrections.read(path).latest) == ["job-1"]
    corrections.append(path, reject("job-2"))
    assert list(corrections.read(path).latest) == ["job-1", "job-2"]


DAMAGE = {
    "{": "Expecting property name",
    "[1]": "no object",
    '{"job_id": "x"}': "image_sha256",
    "BAD_SCORE": "dimensions[0].score is 11",
    "NO_CRITIQUE": "correct has one, the others none",
    "BAD_HASH": "image_sha256",
    "EXTRA": "colour",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    """Passing over a line in the middle would lose a decision in silence."""
    good = json.loads(reject("job-1").line())
    value = critique()
    value["dimensions"][0]["score"] = 11
    lines = {
        "BAD_SCORE": json.dumps({**good, "decision": "correct", "critique": value}),
        "NO_CRITIQUE": json.dumps({**good, "decision": "correct"}),
        "BAD_HASH": json.dumps({**good, "image_sha256": "../../etc/passwd"}),
        "EXTRA": json.dumps({**good, "colour": 1}),
    }
    path = tmp_path / CORRECTIONS_NAME
    corrections.append(path, reject("job-0"))
    with path.open("a", encoding="utf-8") as file:
        file.write(lines.get(damage, damage) + "\n" + reject("job-2").line() + "\n")
    with pytest.raises(DataError, match=r"^Line 2 of the corrections .*; mend or remove") as told:
        corrections.read(path)
    assert DAMAGE[damage] in str(told.value)


def test_threads_that_append_at_once_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / CORRECTIONS_NAME

    def write(number: int) -> None:
        for step in range(10):
            corrections.append(path, reject(f"{number}-{step}", remark="x" * 3000))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(corrections.read(path).latest) == 60


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MondrianError, match="cannot write"):
        corrections.append(tmp_path / "file" / CORRECTIONS_NAME, reject("job-1"))


def test_an_analysis_is_known_by_what_it_says() -> None:
    """Linking again may store the same critique in another file; another score is another text."""
    text = fenced(critique(7))
    same = f"Sure!\n{json.dumps(critique(7.0))}"
    assert corrections.analysis_hash(text) == corrections.analysis_hash(same)
    assert corrections.analysis_hash(text) != corrections.analysis_hash(fenced(critique(8)))
    assert corrections.analysis_hash("no json") != corrections.analysis_hash("none either")


# -- applying them


def fill(world: World, rows: int = 10) -> Path:
    """Rows on photographs of their own, linked; returns the manifest's path."""
    for index in range(rows):
        world.good(f"job-{index}", index, index % 9)
    link_into(world.output, world.db, world.source, world.analyses, "ansel")
    return world.output / MANIFEST_NAME


def seen_in(manifest: Path) -> dict[str, Seen]:
    """What a reviewer meets, by job."""
    entries = entries_of_manifest(json.loads(manifest.read_text()))
    return {entry.job_id: entry.seen() for entry in entries}


def run(world: World, manifest: Path, **changes: Any) -> Prepared:
    options: dict[str, Any] = {"train_split": 0.8, "val_split": 0.2, "test_split": 0.0, "seed": 0}
    found = corrections.read(manifest.parent / CORRECTIONS_NAME)
    options |= {"output_dir": world.output, "corrections": found, **changes}
    return prepare(manifest, advisor="ansel", **options)


def rows_of(prepared: Prepared) -> dict[str, Row]:
    return {row.job_id: row for row in [*prepared.train, *prepared.val]}


def test_prepare_applies_what_was_decided(world: World) -> None:
    """Corrected answers are learnt, rejected rows are not, and the meta file says all of it."""
    manifest = fill(world)
    seen = seen_in(manifest)
    before = run(world, manifest)
    assert before.meta["corrections"] is None
    path = world.output / CORRECTIONS_NAME
    for job, decision, made in (
        ("job-1", Decision.ACCEPT, None),
        ("job-2", Decision.CORRECT, better()),
        ("job-3", Decision.REJECT, None),
        ("job-4", Decision.REJECT, None),
        ("job-4", Decision.UNDO, None),
    ):
        remark = "blurred" if job == "job-3" else ""
        line = corrections.decide(seen[job], decision, critique=made, remark=remark)
        corrections.append(path, line)
    after = run(world, manifest)
    rows, old = rows_of(after), rows_of(before)
    assert set(old) - set(rows) == {"job-3"}
    assert rows["job-2"].response == render(better())
    assert all(rows[job] == old[job] for job in rows if job != "job-2")
    meta = after.meta
    assert meta["rejected"] == {"job-3": "rejected in review: blurred"}
    assert meta["total_examples"] == 9
    facts = meta["corrections"]
    assert [facts[name] for name in ("accepted", "corrected", "rejected")] == [1, 1, 1]
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert meta["data_lock"] != before.meta["data_lock"]
    assert after.meta["parts"]["train"]["examples"] == len(after.train)


@pytest.mark.parametrize("what", ["the analysis", "the photograph"])
def test_a_decision_about_something_else_is_not_applied(world: World, what: str) -> None:
    """The text or the picture changed since: whoever decided did not see this one."""
    manifest = fill(world)
    seen = seen_in(manifest)
    line = corrections.decide(seen["job-2"], Decision.CORRECT, critique=better())
    corrections.append(world.output / CORRECTIONS_NAME, line)
    corrections.append(world.output / CORRECTIONS_NAME, reject("gone"))
    if what == "the analysis":
        world.analysis("job-2", fenced(critique(5)))
    else:
        world.photo("2.jpg", 77)
    link_into(world.output, world.db, world.source, world.analyses, "ansel")
    prepared = run(world, manifest)
    facts = prepared.meta["corrections"]
    assert facts["jobs"]["stale"] == {"job-2": what}
    assert facts["jobs"]["unknown"] == ["gone"]
    assert (facts["corrected"], facts["stale"], facts["unknown"]) == (0, 1, 1)
    score = parse_analysis(rows_of(prepared)["job-2"].response).critique.overall_score
    assert score == (5 if what == "the analysis" else 2)


def test_a_limit_counts_rows_that_are_used(world: World) -> None:
    manifest = fill(world)
    path = world.output / CORRECTIONS_NAME
    corrections.append(path, corrections.decide(seen_in(manifest)["job-0"], Decision.REJECT))
    assert set(rows_of(run(world, manifest, limit=5))) == {f"job-{n}" for n in range(1, 6)}


def test_rejecting_all_is_an_error(world: World) -> None:
    manifest = fill(world, 3)
    for seen in seen_in(manifest).values():
        line = corrections.decide(seen, Decision.REJECT)
        corrections.append(world.output / CORRECTIONS_NAME, line)
    with pytest.raises(DataError, match="Of the 3 rows none is left by the corrections"):
        run(world, manifest)


def test_a_row_that_cannot_be_read_can_be_rejected(world: World) -> None:
    """It would stop `prepare`; rejecting it is how a person goes on."""
    manifest = fill(world)
    world.analysis("job-2", "Failed to parse model response")
    with pytest.raises(DataError, match="job-2 can no longer be used"):
        run(world, manifest)
    line = corrections.decide(seen_in(manifest)["job-2"], Decision.REJECT)
    corrections.append(world.output / CORRECTIONS_NAME, line)
    assert "job-2" not in rows_of(run(world, manifest))


def test_a_manifest_without_hashes_is_reviewed_as_well(world: World) -> None:
    """The users' own linker writes none; both sides then hash the photograph itself."""
    manifest = fill(world)
    content = json.loads(manifest.read_text())
    for record in content["by_advisor"]["ansel"]["records"]:
        del record["image_sha256"]
    manifest.write_text(json.dumps(content))
    seen = seen_in(manifest)["job-2"]
    assert seen.image_sha256 == hashlib.sha256((world.source / "2.jpg").read_bytes()).hexdigest()
    line = corrections.decide(seen, Decision.CORRECT, critique=better())
    corrections.append(world.output / CORRECTIONS_NAME, line)
    assert rows_of(run(world, manifest))["job-2"].response == render(better())


def test_the_audit_looks_at_corrected_labels(world: World) -> None:
    """Template scores that a person corrected are no template scores any more."""
    value = critique()
    for dimension, score in zip(value["dimensions"], KNOWN_VECTOR, strict=True):
        dimension["score"] = float(score)
    for index in range(3):
        world.good(f"job-{index}", index)
        world.analysis(f"job-{index}", fenced(value))
    link_into(world.output, world.db, world.source, world.analyses, "ansel")
    manifest = world.output / MANIFEST_NAME
    content = json.loads(manifest.read_text())
    entries = entries_of_manifest(content)
    assert set(rows_to_drop(entries, ["template_scores"])) == {"job-0", "job-1", "job-2"}
    path = world.output / CORRECTIONS_NAME
    seen = seen_in(manifest)
    corrections.append(path, corrections.decide(seen["job-0"], Decision.CORRECT, critique=better()))
    corrections.append(path, corrections.decide(seen["job-1"], Decision.REJECT))
    after, fit = corrected(entries, corrections.read(path), jobs_of(content))
    assert set(rows_to_drop(after, ["template_scores"])) == {"job-2"}
    assert fit.counts() == {
        "accepted": 0,
        "corrected": 1,
        "rejected": 1,
        "stale": 0,
        "unknown": 0,
    }
