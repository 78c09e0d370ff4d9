"""Training files: the workbook's names and keys, one photograph in one part, edits noticed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.data.critique import parse_analysis, strict_format_error
from mondrian_ft.data.dataset import (
    LOCK_NAME,
    Prepared,
    check_disjoint,
    data_lock,
    load_prepared,
    part_path,
    prepare,
    read_rows,
)
from mondrian_ft.data.link import MANIFEST_NAME, link_into
from mondrian_ft.errors import DataError

from .world import SHARED, World, critique, fenced


def fill(world: World, photographs: int = 12) -> None:
    """Two rows a photograph, one by another advisor for the first three."""
    for index in range(photographs):
        world.good(f"{index}-a", index, index % 9)
        world.good(f"{index}-b", index, index % 9 + 1)
        if index < 3:
            world.good(f"{index}-w", index, advisor="watkins")


def linked(world: World, advisor: str | None = "ansel") -> Path:
    """Link into ``world.output``; returns the manifest's path."""
    link_into(world.output, world.db, world.source, world.analyses, advisor)
    return world.output / MANIFEST_NAME


def run(world: World, manifest: Any, advisor: str | None = "ansel", **changes: Any) -> Prepared:
    """`prepare` with the sample's splits unless told otherwise."""
    arguments: dict[str, Any] = {
        "train_split": 0.7,
        "val_split": 0.15,
        "test_split": 0.15,
        "seed": 0,
        "output_dir": world.output,
        **changes,
    }
    return prepare(manifest, advisor=advisor, **arguments)


def parts(prepared: Prepared) -> dict[str, list]:
    return {"train": prepared.train, "val": prepared.val, "test": prepared.test}


def test_prepared_rows_are_complete_and_read_back_alike(world: World):
    """What training reads is what was prepared, and the response is the canonical critique."""
    fill(world)
    prepared = run(world, linked(world))
    rows = [*prepared.train, *prepared.val, *prepared.test]
    assert len(rows) == 24
    for row in rows:
        assert row.image_path.is_absolute()
        assert row.image_path.is_file()
        assert strict_format_error(row.response) is None
        assert "\n" not in row.response
        assert row.prompt.endswith("Analyze the provided image.")
        file = (world.analyses / f"analysis-ansel-{row.job_id}.md").read_text()
        assert parse_analysis(row.response).critique == parse_analysis(file).critique
    again = load_prepared(world.output, "ansel")
    assert parts(again) == parts(prepared)
    assert again.meta == {**prepared.meta, "edited": False}


def test_no_photograph_is_in_two_parts_even_for_all_advisors_together(world: World):
    """Photographs shared by rows and by advisors stay together."""
    fill(world)
    prepared = run(world, linked(world, None), None)
    check_disjoint(parts(prepared))
    assert prepared.meta["total_examples"] == 27
    assert prepared.meta["total_photographs"] == 12
    assert part_path(world.output, None, "train").name == "training_data_all_train.json"
    assert load_prepared(world.output, None).test


def test_equal_data_gives_equal_files_and_equal_locks(world: World, tmp_path: Path):
    """Preparing is a function of manifest, splits and seed; the lock knows nothing of folders."""
    fill(world)
    manifest = linked(world)
    first = run(world, manifest)
    names = [part_path(world.output, "ansel", part) for part in ("train", "val", "test")]
    before = [path.read_bytes() for path in [*names, world.output / LOCK_NAME]]
    second = run(world, json.loads(manifest.read_text()))
    assert [path.read_bytes() for path in [*names, world.output / LOCK_NAME]] == before
    assert first.meta["data_lock"] == second.meta["data_lock"] == data_lock(parts(first))
    other = run(world, manifest, seed=1, output_dir=tmp_path / "other")
    assert other.meta["data_lock"] != first.meta["data_lock"]


def test_the_meta_file_states_what_was_prepared(world: World):
    fill(world)
    meta = run(world, linked(world)).meta
    on_disk = json.loads(part_path(world.output, "ansel", "meta").read_text())
    assert on_disk == meta
    assert sum(part["examples"] for part in meta["parts"].values()) == meta["total_examples"] == 24
    assert [part["photographs"] for part in meta["parts"].values()] == [8, 2, 2]
    assert meta["prompts"][0]["source"] == "config.system_prompt + advisors.prompt"
    assert meta["dimensions"][0]["examples"] == 24
    lock = json.loads((world.output / LOCK_NAME).read_text())["advisors"]["ansel"]
    assert lock["data_lock"] == meta["data_lock"]
    assert len(lock["photographs"]) == 12


def test_without_a_test_split_there_is_no_test_file_not_even_an_old_one(world: World):
    """The test part of an earlier split would overlap with this one's training part."""
    fill(world)
    manifest = linked(world)
    run(world, manifest)
    assert part_path(world.output, "ansel", "test").exists()
    # Another split than the locked one: the person has to move the lock away.
    (world.output / LOCK_NAME).unlink()
    prepared = run(world, manifest, train_split=0.8, val_split=0.2, test_split=0.0)
    assert not part_path(world.output, "ansel", "test").exists()
    assert load_prepared(world.output, "ansel").test == prepared.test == []


def test_preparing_one_advisor_keeps_the_lock_of_another(world: World):
    fill(world)
    manifest = linked(world, None)
    run(world, manifest, "ansel")
    run(world, manifest, "watkins")
    lock = json.loads((world.output / LOCK_NAME).read_text())
    assert set(lock["advisors"]) == {"ansel", "watkins"}


def test_a_limit_takes_the_first_records(world: World):
    fill(world)
    prepared = run(world, linked(world), limit=10)
    assert prepared.meta["total_examples"] == 10


def test_a_file_edited_by_hand_is_taken_and_said_to_be_edited(world: World):
    """People drop bad examples by hand; that is allowed, and the data lock changes."""
    fill(world)
    written = run(world, linked(world)).meta["data_lock"]
    path = part_path(world.output, "ansel", "train")
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    meta = load_prepared(world.output, "ansel").meta
    assert meta["edited"] is True
    assert meta["data_lock"] != written


def test_a_photograph_copied_into_a_second_part_is_refused(world: World):
    fill(world)
    run(world, linked(world))
    train, val = (part_path(world.output, "ansel", part) for part in ("train", "val"))
    val.write_text(json.dumps(json.loads(val.read_text()) + json.loads(train.read_text())[:1]))
    with pytest.raises(DataError, match="is in both train and val"):
        load_prepared(world.output, "ansel")


def test_a_manifest_of_the_users_own_linker_is_accepted(world: World):
    """Only job_id, image_path and analysis_path: photographs are hashed, the template is used."""
    fill(world, 4)
    content = json.loads(linked(world).read_text())
    users = {
        "by_advisor": {
            "ansel": {
                "records": [
                    {key: record[key] for key in ("job_id", "image_path", "analysis_path")}
                    for record in content["by_advisor"]["ansel"]["records"]
                ]
            }
        }
    }
    prepared = run(world, users)
    assert prepared.meta["total_examples"] == 8
    assert prepared.meta["prompts"][0]["source"] == "template"


def test_what_changed_since_linking_is_said(world: World):
    """A photograph or an analysis that is gone or changed is an error, not a silent other label."""
    fill(world, 4)
    manifest = linked(world)
    photograph = world.source / "0.jpg"
    content = photograph.read_bytes()
    world.photo("0.jpg", 99)
    with pytest.raises(DataError, match="changed since it was linked; run task=link again"):
        run(world, manifest)
    photograph.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        run(world, manifest)
    photograph.write_bytes(content)
    (world.analyses / "analysis-ansel-0-a.md").write_text("{}")
    with pytest.raises(DataError, match="job 0-a can no longer be used"):
        run(world, manifest)
    assert not part_path(world.output, "ansel", "train").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", "has no `by_advisor`"),
        ('{"by_advisor": {"ansel": {"records": [{"job_id": "a"}]}}}', "malformed record"),
        ('{"by_advisor": {"ansel": {"records": []}}}', "no records of ansel"),
        ('{"by_advisor": {"anselm": {"records": []}}}', "did you mean anselm?"),
    ],
)
def test_a_bad_manifest_is_said(world: World, content: str | None, message: str):
    path = world.folder / "manifest.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        run(world, path)


def test_too_few_photographs_for_the_parts(world: World):
    """Ten rows of two photographs leave the folder as it was."""
    fill(world, 2)
    with pytest.raises(DataError, match="2 distinct photographs"):
        run(world, linked(world))
    assert not part_path(world.output, "ansel", "train").exists()


def test_reading_before_preparing_says_what_to_run(tmp_path: Path):
    with pytest.raises(DataError, match="run task=link and task=prepare first"):
        load_prepared(tmp_path, "ansel")


def test_a_workbook_file_made_by_hand_is_accepted(world: World, monkeypatch: pytest.MonkeyPatch):
    """Only image_path, prompt and response, with a relative path and a response as an object."""
    world.photo("1.jpg")
    path = world.folder / "small.json"
    entry = {"image_path": "source/1.jpg", "prompt": "Judge.", "response": critique(7.0)}
    path.write_text(json.dumps([entry, {**entry, "response": "{}"}]))
    monkeypatch.chdir(world.folder)
    first, second = read_rows(path)
    assert first.image_path == world.source / "1.jpg"
    assert strict_format_error(first.response) is None
    assert second.response == "{}"
    assert (first.job_id, second.job_id) == ("small-0001", "small-0002")
    assert len(first.image_sha256) == 64


GOOD = {"image_path": "1.jpg", "prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no list"),
        ([], "holds no example"),
        ([1], "Example 1 of"),
        ([GOOD, {"image_path": "1.jpg", "prompt": "p"}], "Example 2 of"),
        ([{**GOOD, "prompt": " "}], "' ' as `prompt`"),
        ([{**GOOD, "response": ["x"]}], "as `response`"),
        ([{**GOOD, "response": {"a": 1}}], "response that is no critique"),
        ([{**GOOD, "image_path": "none.jpg"}], "none.jpg"),
        ([{**GOOD, "image_sha256": "0" * 64}], "changed since it was linked"),
    ],
)
def test_a_bad_training_file_is_said(
    world: World, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
):
    world.photo("1.jpg")
    monkeypatch.chdir(world.source)
    path = world.folder / "train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=re.escape(message)):
        read_rows(path)


@pytest.mark.skipif(not (SHARED / "workbook.md").is_file(), reason="needs the workbook")
def test_the_workbooks_own_checks_run_unchanged(world: World):
    """The snippets of phases 0.2, 1.1 and 1.2 print what the workbook expects."""
    fill(world)
    world.output = world.folder / "training_data"
    run(world, linked(world), train_split=0.8, val_split=0.2, test_split=0.0)
    workbook = (SHARED / "workbook.md").read_text(encoding="utf-8")
    wanted = workbook[workbook.index("#### Task 0.2") : workbook.index("## Phase 2")]
    snippets = re.findall(r'^python -c "\n.*?\n"$', wanted, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 3
    printed = [
        subprocess.run(
            ["bash", "-c", snippet.replace("python", f"'{sys.executable}' -I", 1)],
            cwd=world.folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for snippet in snippets
    ]
    assert "ansel: 24 examples" in printed[0]
    assert re.search(r"train: \d+ examples\nval: \d+ examples", printed[1])
    lengths = [int(n) for n in re.findall(r"len: (\d+)", printed[2])]
    assert len(lengths) == 6
    assert min(lengths) > 100


def test_the_data_room_imports_neither_mlx_nor_hydra_nor_pillow():
    """`task=link` is quick because nothing heavy is imported before it is needed."""
    code = (
        "import sys, mondrian_ft.data.link, mondrian_ft.data.dataset; "
        "print({'mlx', 'hydra', 'omegaconf', 'transformers', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_analyses_with_a_byte_order_mark_are_prepared_like_any_other(world: World):
    """An editor's mark at the start of a file does not cost the row."""
    fill(world, 4)
    (world.analyses / "analysis-ansel-0-a.md").write_text(
        "\ufeff" + fenced(critique(3)), encoding="utf-8"
    )
    assert run(world, linked(world)).meta["total_examples"] == 8


def test_folds_are_in_the_rows_the_lock_and_the_meta_file(world: World):
    """A fold for every row outside the test part; more data leave the earlier folds as they are."""
    fill(world, 14)
    prepared = run(world, linked(world), folds=3)
    dealt = {r.job_id: r.fold for r in [*prepared.train, *prepared.val]}
    assert set(dealt.values()) == {0, 1, 2}
    assert {r.fold for r in prepared.test} == {None}
    assert prepared.meta["folds"] == 3
    assert parts(load_prepared(world.output, "ansel")) == parts(prepared)
    lock = json.loads((world.output / LOCK_NAME).read_text())["advisors"]["ansel"]["folds"]["3"]
    assert lock == {r.image_sha256: r.fold for r in [*prepared.train, *prepared.val]}

    for index in range(14, 20):
        world.good(f"{index}-a", index, index % 9)
    grown = run(world, linked(world), folds=3)
    now = {r.job_id: r.fold for r in [*grown.train, *grown.val]}
    assert {job: now[job] for job in dealt} == dealt
    assert len(now) == len(dealt) + 6
    # Another number of folds is another deal, and both are kept.
    run(world, linked(world), folds=2)
    kept = json.loads((world.output / LOCK_NAME).read_text())["advisors"]["ansel"]["folds"]
    assert set(kept) == {"2", "3"}


def test_a_fold_that_is_no_number_is_said(world: World):
    fill(world)
    run(world, linked(world), folds=2)
    path = part_path(world.output, "ansel", "train")
    path.write_text(path.read_text().replace('"fold": 1', '"fold": "one"'))
    with pytest.raises(DataError, match="has 'one' as `fold`"):
        load_prepared(world.output, "ansel")


def test_other_eras_dimensions_are_called_as_the_config_says(world: World):
    """Eight names become seven; the rows that were changed are counted, and a misfit is named."""
    fill(world)
    value = critique(6)
    value["dimensions"].append({**value["dimensions"][0], "name": "Subject Isolation"})
    (world.analyses / "analysis-ansel-0-a.md").write_text(fenced(value))
    manifest = linked(world)
    plain = run(world, manifest)
    assert len(plain.meta["dimensions"]) == 2
    mapped = run(world, manifest, dimension_map={"subject isolation": None, "Mood": "X"})
    assert mapped.meta["mapped_dimensions"] == {"subject isolation": 1, "Mood": 0}
    assert len(mapped.meta["dimensions"]) == 1
    assert mapped.meta["data_lock"] != plain.meta["data_lock"]
    with pytest.raises(DataError, match=r"data\.dimension_map does not fit job 0-a: two of its"):
        run(world, manifest, dimension_map={"Subject Isolation": "Lighting"})
