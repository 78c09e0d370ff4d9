"""The split lock: near duplicates stay together, and what was dealt once stays where it is."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mondrian_ft.data.dataset import LOCK_NAME, Prepared, prepare
from mondrian_ft.data.similar import near_groups
from mondrian_ft.data.split import PARTS, assign
from mondrian_ft.errors import DataError

from .world import critique, fenced

SPLITS = {"train_split": 0.7, "val_split": 0.15, "test_split": 0.15}


def scene(key: int) -> Image.Image:
    """A picture with structure at every scale, as photographs have it."""
    draw = np.random.default_rng(key)
    total = np.zeros((192, 256, 3))
    for cells in (3, 6, 12, 24, 48):
        values = draw.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(values).resize((256, 192), Image.Resampling.BICUBIC)
        total += np.asarray(layer, float) / 5
    return Image.fromarray(total.astype(np.uint8)).filter(ImageFilter.SHARPEN)


def variant(picture: Image.Image, number: int, draw: random.Random) -> bytes:
    """The picture saved again: as it is, smaller, grey, or cropped, at another quality."""
    width, height = picture.size
    if number % 4 == 1:
        picture = picture.resize((width * 3 // 4, height * 3 // 4))
    if number % 4 == 2:
        share = draw.uniform(0.75, 0.95)
        left, top = draw.uniform(0, 1 - share), draw.uniform(0, 1 - share)
        box = (left, top, left + share, top + share)
        picture = picture.crop(
            tuple(round(v * s) for v, s in zip(box, (width, height) * 2, strict=True))  # type: ignore[arg-type]
        )
    if number % 4 == 3:
        picture = picture.convert("L")
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=draw.randint(40, 90))
    return stream.getvalue()


def record(folder: Path, job: str, name: str, data: bytes, **more: Any) -> dict[str, Any]:
    """A manifest record of the users' own linker."""
    photograph, analysis = folder / f"{name}.jpg", folder / f"{job}.md"
    photograph.write_bytes(data)
    score = int.from_bytes(job.encode()[-1:], "big") % 9
    analysis.write_text(fenced(critique(score)))
    return {"job_id": job, "image_path": str(photograph), "analysis_path": str(analysis), **more}


def manifest(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {"by_advisor": {"ansel": {"count": len(records), "records": records}}}


def deal(records: list[dict[str, Any]], folder: Path, **changes: Any) -> Prepared:
    options: dict[str, Any] = {**SPLITS, "seed": 0, "output_dir": folder, **changes}
    return prepare(manifest(records), advisor="ansel", **options)


def where(prepared: Prepared) -> dict[str, str]:
    """Job id to part."""
    return {row.job_id: part for part in PARTS for row in getattr(prepared, part)}


@pytest.fixture(scope="module")
def seventy(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """70 rows over 13 photographs, most of them saved again or cropped (the real ratio)."""
    folder, draw = tmp_path_factory.mktemp("seventy"), random.Random(0)
    return [
        record(folder, f"{n % 13:02d}-{n:02d}", f"p{n}", variant(scene(n % 13), n // 13 % 4, draw))
        for n in range(70)
    ]


def test_no_photograph_has_rows_in_two_parts(seventy: list[dict[str, Any]], tmp_path: Path):
    """Over 200 seeds; 70 files of 13 photographs are 13 groups, whatever was done to them."""
    paths = {r["job_id"]: Path(r["image_path"]) for r in seventy}
    groups = near_groups(paths).leader
    assert {job[:2]: leader[:2] for job, leader in groups.items()} == {
        job[:2]: job[:2] for job in groups
    }
    assert len(set(groups.values())) == 13
    facts = [
        {"job_id": job, "image_sha256": job, "group": groups[job], "overall_score": None}
        for job in groups
    ]
    for seed in range(200):
        parts = assign(facts, train=0.7, val=0.15, test=0.15, seed=seed)
        assert {parts[job] for job in parts} == set(PARTS)
        shown = {(job[:2], part) for job, part in parts.items()}
        assert len(shown) == 13
        random.Random(seed).shuffle(facts)
        assert assign(facts, train=0.7, val=0.15, test=0.15, seed=seed) == parts
    prepared = deal(seventy, tmp_path / "out")
    assert prepared.meta["total_groups"] == 13
    assert len({(job[:2], part) for job, part in where(prepared).items()}) == 13


def test_when_data_grow_test_photographs_stay_and_new_ones_train(
    seventy: list[dict[str, Any]], tmp_path: Path
):
    """Also a new crop of a test photograph is in test, and no other new photograph is."""
    before = where(deal(seventy, tmp_path / "out"))
    draw, grown = random.Random(1), list(seventy)
    for n in range(26):
        data = variant(scene(n), 2, draw)
        grown.append(record(tmp_path, f"{n:02d}-new", f"new{n}", data))
    draw.shuffle(grown)
    after = where(deal(grown, tmp_path / "out"))
    assert {job: after[job] for job in before} == before
    tested = {job[:2] for job, part in before.items() if part == "test"}
    assert {job[:2] for job, part in after.items() if part == "test"} == tested
    assert {after[f"{n:02d}-new"] for n in range(13, 26)} == {"train", "val"}


def test_a_photograph_that_was_away_comes_back_to_its_part(
    seventy: list[dict[str, Any]], tmp_path: Path
):
    before = where(deal(seventy, tmp_path / "out"))
    deal([r for r in seventy if before[r["job_id"]] != "test"], tmp_path / "out")
    assert where(deal(seventy, tmp_path / "out")) == before


def test_a_shoot_stays_together(tmp_path: Path):
    """Pictures of one afternoon are no independent evidence, unlike as they may look."""
    records = [
        record(tmp_path, f"job{n:02d}", f"p{n}", variant(scene(n), 0, random.Random(n)))
        | ({"shoot": f"walk {n // 3}"} if n < 12 else {})
        for n in range(20)
    ]
    for seed in range(5):
        parts = where(deal(records, tmp_path / f"out{seed}", seed=seed))
        for walk in range(4):
            assert len({parts[f"job{n:02d}"] for n in range(3 * walk, 3 * walk + 3)}) == 1


def test_a_lock_that_does_not_fit_says_what_to_do(seventy: list[dict[str, Any]], tmp_path: Path):
    deal(seventy, tmp_path / "out")
    with pytest.raises(DataError, match=r"data\.seed=0, but the config says data\.seed=1; set"):
        deal(seventy, tmp_path / "out", seed=1)
    with pytest.raises(DataError, match=r"data\.test_split=0\.15.*move the lock away"):
        deal(seventy, tmp_path / "out", train_split=0.85, test_split=0.0)
    lock = json.loads((tmp_path / "out" / LOCK_NAME).read_text())
    lock["advisors"]["ansel"] = {"seed": 0}
    (tmp_path / "out" / LOCK_NAME).write_text(json.dumps(lock))
    with pytest.raises(DataError, match="is not a split lock"):
        deal(seventy, tmp_path / "out")


def test_a_changed_picture_is_said(seventy: list[dict[str, Any]], tmp_path: Path):
    deal(seventy, tmp_path / "out")
    other = record(tmp_path, seventy[0]["job_id"], "other", variant(scene(99), 0, random.Random(1)))
    with pytest.raises(DataError, match=r"another picture than when .* put the old file back"):
        deal([other, *seventy[1:]], tmp_path / "out")


def test_a_picture_that_joins_two_locked_parts_is_said(tmp_path: Path):
    draw = random.Random(0)
    records = [
        record(tmp_path, f"job{n:02d}", f"p{n}", variant(scene(n), 0, draw)) for n in range(12)
    ]
    parts = where(deal(records, tmp_path / "out"))
    trained, tested = (next(j for j, p in parts.items() if p == part) for part in ("train", "test"))
    joined = [r | {"shoot": "one"} if r["job_id"] in (trained, tested) else r for r in records]
    with pytest.raises(DataError, match=r"belong together now.* move split\.lock\.json away"):
        deal(joined, tmp_path / "out")


def test_a_photograph_damaged_since_linking_is_named(seventy: list[dict[str, Any]], tmp_path: Path):
    """Preparing decodes every photograph: what linking could not see is not met in training."""
    spoilt = record(tmp_path, "bad", "spoilt", variant(scene(40), 0, random.Random(0))[:2000])
    with pytest.raises(DataError, match=r"spoilt\.jpg cannot be decoded .* data\.drop=\[damaged_"):
        deal([*seventy, spoilt], tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_NAME).exists()
