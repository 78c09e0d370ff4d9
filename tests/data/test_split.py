"""Splits: by photograph, whatever the order of rows, close to the fractions asked for."""

import random
import statistics
from typing import Any

import pytest

from mondrian_ft.data.split import PARTS, assign, assign_folds, part_sizes
from mondrian_ft.errors import DataError


def records(photographs: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """``rows`` records on exactly ``photographs`` photographs."""
    draw = random.Random(seed)
    shown = [*range(photographs), *(draw.randrange(photographs) for _ in range(rows - photographs))]
    return [
        {
            "job_id": f"job-{index}",
            "image_sha256": f"{photograph:064x}",
            "overall_score": draw.choice([None, round(draw.uniform(2, 10), 1)]),
        }
        for index, photograph in enumerate(shown)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_a_photograph_is_in_one_part_only_and_the_order_of_rows_does_not_matter(seed):
    """No photograph is trained on and judged; a re-linked database splits alike."""
    draw = random.Random(seed)
    photographs = draw.randrange(3, 120)
    rows = records(photographs, photographs + draw.randrange(60), seed)
    fractions = draw.choice([(0.7, 0.15, 0.15), (0.8, 0.2, 0.0), (0.5, 0.25, 0.25), (1.0, 0, 0)])
    asked = dict(zip(PARTS, fractions, strict=True))
    dealt = assign(rows, **asked, seed=seed)  # pyright: ignore[reportArgumentType]
    assert set(dealt) == {row["job_id"] for row in rows}
    parts = {}
    for row in rows:
        parts.setdefault(row["image_sha256"], set()).add(dealt[row["job_id"]])
    assert all(len(where) == 1 for where in parts.values())
    counts = {part: sum(where == {part} for where in parts.values()) for part in PARTS}
    assert counts == part_sizes(photographs, asked)
    for _ in range(3):
        draw.shuffle(rows)
        assert assign(rows, **asked, seed=seed) == dealt  # pyright: ignore[reportArgumentType]


def test_sizes_are_nearest_to_the_fractions_and_a_part_asked_for_is_never_empty():
    for photographs in range(3, 400):
        for fractions in [(0.7, 0.15, 0.15), (0.8, 0.2, 0.0), (0.71, 0.29, 0.0)]:
            asked = dict(zip(PARTS, fractions, strict=True))
            sizes = part_sizes(photographs, asked)
            assert sum(sizes.values()) == photographs
            for part in PARTS:
                assert (sizes[part] > 0) == (asked[part] > 0)
                if photographs >= 7:
                    assert abs(sizes[part] - asked[part] * photographs) < 1
            if photographs >= 104 and asked["test"]:
                assert sizes["test"] >= 16


def test_another_seed_is_another_deal():
    rows = records(60, 60, 0)
    deals = {tuple(assign(rows, train=0.8, val=0.2, test=0, seed=s).values()) for s in range(10)}
    assert len(deals) == 10


def test_the_parts_have_like_scores():
    """Dealing by bands of score keeps a small test part from being all good or all bad."""
    for seed in range(20):
        rows = [r for r in records(104, 104, seed) if r["overall_score"] is not None]
        dealt = assign(rows, train=0.6, val=0.2, test=0.2, seed=seed)
        means = [
            statistics.mean(r["overall_score"] for r in rows if dealt[r["job_id"]] == part)
            for part in PARTS
        ]
        assert max(means) - min(means) < 1.5


def test_fewer_photographs_than_parts_is_said():
    """Ten rows of two photographs cannot fill three parts."""
    with pytest.raises(DataError, match="2 distinct photographs cannot fill 3 parts"):
        assign(records(2, 10, 0), train=0.7, val=0.15, test=0.15, seed=0)


def test_a_job_id_in_the_data_twice_is_said():
    rows = records(5, 5, 0)
    with pytest.raises(DataError, match="twice"):
        assign([*rows, rows[0]], train=0.8, val=0.2, test=0, seed=0)


@pytest.mark.parametrize("seed", range(25))
def test_folds_share_no_photograph_and_are_of_like_size(seed):
    """Whatever the order of the rows, folds differ in size by one photograph at most."""
    draw = random.Random(seed)
    photographs, folds = draw.randrange(20, 90), draw.randrange(2, 8)
    rows = records(photographs, photographs + draw.randrange(60), seed)
    dealt = assign_folds(rows, folds=folds, seed=seed)
    where = {}
    for row in rows:
        where.setdefault(row["image_sha256"], set()).add(dealt[row["job_id"]])
    assert all(len(found) == 1 for found in where.values())
    sizes = [sum(found == {fold} for found in where.values()) for fold in range(folds)]
    assert max(sizes) - min(sizes) <= 1
    for _ in range(3):
        draw.shuffle(rows)
        assert assign_folds(rows, folds=folds, seed=seed) == dealt


def test_folds_have_like_scores_and_keep_groups_together():
    """100 photographs with scores from 0 to 10, four of them crops of one."""
    rows = [
        {"job_id": str(n), "image_sha256": f"{n:064x}", "overall_score": n / 10} for n in range(100)
    ]
    for row in rows[48:52]:
        row["group"] = "crops"
    dealt = assign_folds(rows, folds=5, seed=1)
    means = [
        statistics.fmean(r["overall_score"] for r in rows if dealt[r["job_id"]] == fold)
        for fold in range(5)
    ]
    assert max(means) - min(means) < 0.5
    assert len({dealt[str(n)] for n in range(48, 52)}) == 1
    assert assign_folds(rows, folds=5, seed=2) != dealt


def test_locked_folds_stay_and_new_photographs_go_where_fewest_are():
    rows = records(20, 30, 0)
    dealt = assign_folds(rows, folds=4, seed=0)
    locked = {row["image_sha256"]: dealt[row["job_id"]] for row in rows}
    more = rows + [{**row, "job_id": f"new-{row['job_id']}"} for row in records(26, 26, 1)]
    again = assign_folds(more, folds=4, seed=0, locked=locked)
    assert {job: again[job] for job in dealt} == dealt
    shown = {row["image_sha256"]: again[row["job_id"]] for row in more}
    assert sorted(list(shown.values()).count(fold) for fold in range(4)) == [6, 6, 7, 7]
    one, other = rows[0], next(r for r in rows if dealt[r["job_id"]] != dealt[rows[0]["job_id"]])
    pair = (one["image_sha256"], other["image_sha256"])
    joined = [row | ({"group": "one"} if row["image_sha256"] in pair else {}) for row in rows]
    with pytest.raises(DataError, match=r"\(fold \d\) and .* \(fold \d\) belong together now"):
        assign_folds(joined, folds=4, seed=0, locked=locked)


def test_too_few_photographs_for_the_folds():
    with pytest.raises(DataError, match="3 independent photographs cannot fill 5 folds"):
        assign_folds(records(3, 9, 0), folds=5, seed=0)
    rows = records(6, 6, 0)
    locked = {row["image_sha256"]: 0 for row in rows}
    with pytest.raises(DataError, match="Fold 1 of 5 would have no photograph"):
        assign_folds(rows, folds=5, seed=0, locked=locked)
