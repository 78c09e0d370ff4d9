"""The sample's folder: the workbook's layout, real dirt, enough good rows, the same every time."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mondrian_ft.data.critique import DIMENSIONS, parse_analysis, render, strict_format_error
from mondrian_ft.data.dataset import prepare
from mondrian_ft.data.link import LinkResult, link
from mondrian_ft.errors import DataError
from mondrian_ft.sample import SampleData, sample_data
from mondrian_ft.sample.scenes import Scene
from mondrian_ft.sample.scenes import render as draw

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


def linked(data: SampleData, scratch: Path, advisor: str | None = "ansel") -> LinkResult:
    return link(data.db_path, data.source_dir, data.analysis_dir, advisor, scratch=scratch)


def truth(data: SampleData) -> dict:
    return json.loads(data.truth_path.read_text())


def digest(data: SampleData) -> dict[str, str]:
    folder = data.truth_path.parent
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_bytes(root: Path, tmp_path: Path) -> None:
    """Every file of a seed is the same wherever and whenever it is made."""
    assert digest(sample_data(0, root)) == digest(sample_data(0, tmp_path))


def test_other_seed_other_photographs(root: Path) -> None:
    """Two seeds have no photograph in common, nor a scene."""

    def sound(data: SampleData) -> set[str]:
        about = truth(data)["photographs"]
        hashes = digest(data)
        return {hashes[f"mondrian/source/{n}"] for n, p in about.items() if not p["damage"]}

    first, second = sample_data(0, root), sample_data(1, root)
    assert not sound(first) & sound(second)
    seeds = [
        {p["scene"]["seed"] for p in truth(d)["photographs"].values()} for d in (first, second)
    ]
    assert not seeds[0] & seeds[1]


def test_laid_out_as_the_workbook(root: Path) -> None:
    """mondrian.db, source/ and analysis_md/analysis-<advisor>-<job_id>.md, in one folder."""
    data = sample_data(0, root)
    home = data.db_path.parent
    assert data.db_path == home / "mondrian.db"
    assert data.source_dir == home / "source"
    assert data.analysis_dir == home / "analysis_md"
    assert home.name == "mondrian"
    assert sorted(path.name for path in home.iterdir()) == ["analysis_md", "mondrian.db", "source"]
    names = [path.name for path in data.analysis_dir.iterdir()]
    assert len(names) > 100
    assert all(name.startswith("analysis-") and name.endswith(".md") for name in names)
    assert 135 <= len(list(data.source_dir.iterdir())) <= 165


def test_tables_are_the_real_ones(root: Path) -> None:
    """The sample's tables have the columns of a real database, in the same order."""
    schema = SHARED / "real" / "schema.sql"
    if not schema.is_file():
        pytest.skip("the real schema is not beside this checkout")

    def columns(connection: sqlite3.Connection) -> dict[str, list[tuple]]:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall()
        return {n: connection.execute(f"PRAGMA table_info({n})").fetchall() for (n,) in tables}

    with (
        closing(sqlite3.connect(":memory:")) as real,
        closing(sqlite3.connect(sample_data(0, root).db_path)) as ours,
    ):
        real.executescript(schema.read_text())
        assert columns(ours) == columns(real)


@pytest.mark.parametrize("seed", range(4))
def test_enough_good_rows(root: Path, tmp_path: Path, seed: int) -> None:
    """At least 104 photographs by ansel, so that 0.15 of them are at least 16 to be tested on."""
    result = linked(sample_data(seed, root), tmp_path)
    records = result.manifest["by_advisor"]["ansel"]["records"]
    assert len({record["image_sha256"] for record in records}) >= 110
    parts = prepare(
        result.manifest,
        advisor="ansel",
        train_split=0.7,
        val_split=0.15,
        test_split=0.15,
        seed=seed,
        output_dir=tmp_path,
    )
    assert len({row.image_sha256 for row in parts.test}) >= 16
    assert len({row.image_sha256 for row in parts.val}) >= 16
    for row in parts.train + parts.val + parts.test:
        assert strict_format_error(row.response, DIMENSIONS) is None


def test_each_row_ends_as_planned(root: Path, tmp_path: Path) -> None:
    """Every dirty row is left out for the reason it was made for, and no other row is."""
    data = sample_data(0, root)
    planned = truth(data)["jobs"]
    report = linked(data, tmp_path).report
    left_out = {entry["job_id"]: entry["reason"] for entry in report["left_out"]}
    assert report["rows"] == len(planned) == report["linked"] + len(left_out)
    for job_id, job in planned.items():
        unclear = job["reason"] == "advisor_unclear"
        wanted = job["reason"] if unclear or job["advisor"] == "ansel" else "other_advisor"
        assert left_out.get(job_id) == wanted, job
    kinds = Counter(entry["reason"] for entry in report["left_out"])
    assert len(kinds) >= 16
    assert 4 <= len(report["mended"]) <= 8


def test_every_way_of_naming(root: Path, tmp_path: Path) -> None:
    """Photographs and analyses are found by every rule that real rows need."""
    result = linked(sample_data(0, root), tmp_path)
    records = result.manifest["by_advisor"]["ansel"]["records"]
    rules = Counter(record["photograph_rule"] for record in records)
    assert min(rules[rule] for rule in ("exact_name", "base_name", "upload_name")) >= 5
    wanted = {"job_id", "bare_job_id", "inline", "llm_outputs.response"}
    assert {record["analysis_rule"] for record in records} == wanted
    hashes = Counter(record["image_sha256"] for record in records)
    assert sum(count > 1 for count in hashes.values()) >= 4


def test_other_advisors(root: Path, tmp_path: Path) -> None:
    """Watkins has some 20 rows, a few of them on ansel's photographs."""
    found = linked(sample_data(0, root), tmp_path, None).manifest["by_advisor"]
    assert 18 <= found["watkins"]["count"] <= 24
    ansel, watkins = (
        {record["image_sha256"] for record in found[name]["records"]}
        for name in ("ansel", "watkins")
    )
    assert 3 <= len(ansel & watkins) <= 10


def test_analyses_are_about_their_photographs(root: Path, tmp_path: Path) -> None:
    """Ansel's scores follow the attributes of the photograph that the row names."""
    data = sample_data(0, root)
    about = truth(data)["photographs"]
    by_focus: dict[str, list[float]] = {"sharp": [], "soft": [], "blurred": []}
    for record in linked(data, tmp_path).manifest["by_advisor"]["ansel"]["records"]:
        critique = parse_analysis(Path(record["analysis_path"]).read_text()).critique
        assert strict_format_error(render(critique), DIMENSIONS) is None
        scene = about[Path(record["image_path"]).name]["scene"]
        by_focus[scene["focus"]].append(critique.scores()["Focus & Sharpness"])
        assert f"colour {scene['colour']}" in critique.image_description
    means = {level: float(np.mean(values)) for level, values in by_focus.items()}
    assert means["sharp"] > means["soft"] + 2 > means["blurred"] + 4


def test_stored_turned_seen_upright(root: Path) -> None:
    """Photographs stored with an EXIF orientation show their scene once it is undone."""
    data = sample_data(0, root)
    about = truth(data)["photographs"]
    turned = {n: p for n, p in about.items() if p["orientation"] != 1 and not p["damage"]}
    assert {p["orientation"] for p in turned.values()} == {3, 6, 8}
    for name, photograph in list(turned.items())[:8]:
        with Image.open(data.source_dir / name) as image:
            assert image.getexif()[0x0112] == photograph["orientation"]
            seen = ImageOps.exif_transpose(image).convert("RGB")
        wanted = draw(Scene(**photograph["scene"]))
        assert seen.size == wanted.size
        difference = np.asarray(seen, np.float32) - np.asarray(wanted, np.float32)
        assert np.abs(difference).mean() < 8


def test_dirty_columns(root: Path) -> None:
    """Times come in several forms or not at all; the system prompt is bytes."""
    with closing(sqlite3.connect(sample_data(0, root).db_path)) as connection:
        created = [c for (c,) in connection.execute("SELECT created_at FROM jobs")]
        done = "FROM jobs WHERE status IN ('done', 'completed')"
        ended = [c for (c,) in connection.execute(f"SELECT completed_at {done}")]
        (value,) = connection.execute(
            "SELECT value FROM config WHERE key = 'system_prompt'"
        ).fetchone()
    assert None in created
    assert any(text and "T" in text for text in created)
    assert any(text and text.isdigit() for text in created)
    assert ended.count(None) > len(ended) / 2
    assert isinstance(value, bytes)


def test_repaired_when_tidied_up(tmp_path: Path) -> None:
    """A folder that lost a file is made again; one that is whole is left as it is."""
    data = sample_data(2, tmp_path)
    before = digest(data)
    kept = data.db_path.stat().st_ino
    assert sample_data(2, tmp_path) == data
    assert data.db_path.stat().st_ino == kept
    next(data.source_dir.iterdir()).unlink()
    sample_data(2, tmp_path)
    assert digest(data) == before
    assert [path.name for path in tmp_path.iterdir()] == [data.truth_path.parent.name]


def test_two_at_once(tmp_path: Path) -> None:
    """Whoever comes second uses what the first has made, and nothing is left over."""
    found: list[SampleData] = []
    both = [threading.Thread(target=lambda: found.append(sample_data(3, tmp_path))) for _ in "ab"]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == [found[0].truth_path.parent.name]


def test_refused(tmp_path: Path) -> None:
    """A negative seed and a root that is no folder are named in a sentence."""
    with pytest.raises(DataError, match="seed is -1"):
        sample_data(-1, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        sample_data(0, tmp_path / "file")
