"""The blind comparison's server: what it tells when, what it writes, and whom it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mondrian_ft.evaluation import assessments
from mondrian_ft.serving import local
from mondrian_ft.serving.assess import Desk, make_app

from .compared import BROKEN, SCRIPT, make_report, read_json

HERE = "http://127.0.0.1:5111"
N = 8


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return make_report(tmp_path / "evaluation", N)


def desk_of(report: Path, **more: Any) -> Desk:
    content = assessments.read_report(report)
    return Desk(
        assessments.pairs_of(content, report),
        assessments.read(report.parent / assessments.ASSESSMENTS_NAME),
        adapter=assessments.adapter_hash(content),
        **more,
    )


def client_of(desk: Desk, **headers: str) -> TestClient:
    return TestClient(make_app(desk), base_url=HERE, headers={"Origin": HERE, **headers})


def judge(client: TestClient, index: int, choice: str, **more: Any) -> Any:
    key = client.get(f"/api/pairs/{index}").json()["key"]
    body = {"key": key, "choice": choice, **more}
    return client.post(f"/api/pairs/{index}/judgement", json=body)


def lines_of(report: Path) -> list[dict[str, Any]]:
    path = report.parent / assessments.ASSESSMENTS_NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_tuned(shown: dict[str, Any]) -> bool:
    """Whether a side is the tuned answer, which only this test's own texts tell."""
    return "critique" in shown and shown["critique"]["description"].startswith("Fine")


# -- blindness


def test_nothing_tells_who_is_who_before_the_reveal(report: Path) -> None:
    """No name of an arm, no hash of one, and neither side's format in any answer or in the page's
    data; asked for early, the mapping is refused."""
    desk = desk_of(report)
    client = client_of(desk)
    told = [client.get("/api/pairs").text]
    for index in range(N):
        told.append(client.get(f"/api/pairs/{index}").text)
        told.append(client.post(f"/api/pairs/{index}/reference", json={}).text)
    for index in range(N - 1):
        told.append(judge(client, index, "left").text)
    answer = client.post("/api/reveal", json={})
    assert answer.status_code == 403
    told.append(answer.text)
    for text in told:
        assert not re.search(r"base|tuned|abc123|```|strict|mend|inference|token", text), text
    # An answer's hash would let a reader of the file beside the report find its arm.
    for pair in desk.pairs:
        for digest in pair.hashes:
            assert digest not in "".join(told)
    # The page is the same for every report, so nothing of this one is in it.
    page = client.get("/").text
    assert "job-" not in page
    assert "photo-" not in page


def test_sides_that_can_be_read_have_one_shape(report: Path) -> None:
    """Fences, spaces and the order of keys are gone; what cannot be read is shown as it came."""
    client = client_of(desk_of(report))
    broken = 0
    for index in range(N):
        row = client.get(f"/api/pairs/{index}").json()
        left, right = row["left"], row["right"]
        if "text" in left or "text" in right:
            broken += 1
            assert row["image"] == f"photo-{BROKEN}.jpg"
            continue
        assert list(left["critique"]) == list(right["critique"])
        assert [list(d) for d in left["critique"]["dimensions"]] == [
            list(d) for d in right["critique"]["dimensions"]
        ]
        assert is_tuned(left) != is_tuned(right)
    assert broken == 1


def test_the_draw_differs_and_outlives_a_restart(tmp_path: Path) -> None:
    """Left and right change within a session and are the same in the next; so is the order."""
    report = make_report(tmp_path, 24)
    seen = []
    for seed in (0, 0, 1):
        client = client_of(desk_of(report, seed=seed))
        rows = [client.get(f"/api/pairs/{index}").json() for index in range(24)]
        whole = [row for row in rows if "critique" in row["left"] and "critique" in row["right"]]
        seen.append([(row["image"], is_tuned(row["left"])) for row in whole])
        # Binomial(23, 1/2): outside 3 to 20 once in ten thousand.
        assert 3 <= sum(left for _, left in seen[-1]) <= 20
        assert [name for name, _ in seen[-1]] != sorted(name for name, _ in seen[-1])
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


# -- judging


def test_what_is_written(report: Path) -> None:
    """Choice, arm, time and whether the reference was in sight; undo, and the last one holds."""
    desk = desk_of(report, reviewer="Anna")
    client = client_of(desk)
    assert judge(client, 0, "undo").status_code == 200
    assert not desk.path.exists(), "a mistaken key is no event"
    assert judge(client, 0, "left", remark=" sees the light ", seconds=12.34).status_code == 200
    client.post("/api/pairs/1/reference", json={})
    answer = judge(client, 1, "equal").json()
    assert answer["counts"] == {"judged": 2, "left": N - 2, "all": N}
    assert answer["pair"]["choice"] == "equal"
    judge(client, 0, "undo")
    judge(client, 0, "right")
    lines = lines_of(report)
    assert [line["choice"] for line in lines] == ["left", "equal", "undo", "right"]
    first = client.get("/api/pairs/0").json()
    tuned = [s for s in ("left", "right") if is_tuned(first[s])]
    assert lines[0]["left"] == ("tuned" if tuned == ["left"] else "base")
    assert (lines[0]["remark"], lines[0]["seconds"]) == ("sees the light", 12.3)
    assert [line["reference_shown"] for line in lines] == [False, True, False, False]
    assert {line["reviewer"] for line in lines} == {"Anna"}
    assert {line["adapter_hash"] for line in lines} == {"abc123"}
    # Again at the next start; another person starts afresh; another seed keeps what was meant.
    assert desk_of(report, reviewer="Anna").brief(0)["choice"] == "right"
    assert desk_of(report).counts()["judged"] == 0
    for seed in range(1, 6):
        other = desk_of(report, reviewer="Anna", seed=seed)
        place = next(n for n, one in enumerate(other.pairs) if one.image == first["image"])
        shown = other.whole(place)
        assert shown[shown["choice"]] == first["right"]


def test_the_reveal_ends_the_judging(report: Path) -> None:
    desk = desk_of(report)
    told = []
    app = make_app(desk, on_reveal=lambda: told.append(1))
    client = TestClient(app, base_url=HERE, headers={"Origin": HERE})
    for index in range(N):
        row = client.get(f"/api/pairs/{index}").json()
        judge(client, index, "left" if is_tuned(row["left"]) else "right")
    answer = client.post("/api/reveal", json={}).json()
    assert told == [1]
    assert {one["preferred"] for one in answer["pairs"]} == {"tuned"}
    assert {one["left"] for one in answer["pairs"]} == {"base", "tuned"}
    assert answer["people"]["tuned"] == N
    assert answer["sentence"].endswith("exact sign test p = 0.008.")
    assert judge(client, 0, "equal").status_code == 409
    assert len(lines_of(report)) == N


def test_what_is_refused(report: Path) -> None:
    client = client_of(desk_of(report))
    key = client.get("/api/pairs/0").json()["key"]
    post = "/api/pairs/0/judgement"
    assert client.post(post, json={"key": "0", "choice": "left"}).status_code == 409
    assert client.post(post, json={"key": key, "choice": "both"}).status_code == 422
    assert client.post(post, json={"key": key, "choice": "left", "left": "base"}).status_code == 422
    assert client.post(post, json={"key": key, "choice": "left", "seconds": -1}).status_code == 422
    assert client.get("/api/pairs/99").status_code == 404
    assert client.get("/photographs/99").status_code == 404
    foreign = client_of(desk_of(report), Origin="http://evil.example")
    for path in (post, "/api/reveal", "/api/pairs/0/reference"):
        assert foreign.post(path, json={"key": key, "choice": "left"}).status_code == 403
    assert not (report.parent / assessments.ASSESSMENTS_NAME).exists()


def test_photographs_that_are_gone_or_changed(report: Path) -> None:
    """The card says so, and the critiques can be judged all the same."""
    client = client_of(desk_of(report))
    rows = [client.get(f"/api/pairs/{index}").json() for index in range(2)]
    assert client.get("/photographs/0").headers["content-type"] == "image/jpeg"
    assert rows[0]["problem"] == ""
    (report.parent / rows[0]["image"]).unlink()
    (report.parent / rows[1]["image"]).write_bytes(b"another")
    assert "cannot be read" in client.get("/api/pairs/0").json()["problem"]
    changed = client.get("/api/pairs/1").json()["problem"]
    assert (
        changed
        == f"The photograph {rows[1]['image']} changed since it was evaluated, so it "
        + ("is not shown.")
    )
    assert client.get("/photographs/1").status_code == 404
    assert judge(client, 0, "left").status_code == 200


def test_a_report_without_hashes_shows_its_photographs(report: Path) -> None:
    content = read_json(report)
    for sample in content["sample_results"]:
        del sample["image_sha256"]
    report.write_text(json.dumps(content), encoding="utf-8")
    assert client_of(desk_of(report)).get("/photographs/0").status_code == 200


def test_the_page_is_whole(report: Path) -> None:
    answer = client_of(desk_of(report)).get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    for outside in ("http://", "https://", "//cdn", "@import", "innerHTML", "insertAdjacentHTML"):
        assert outside not in answer.text
    assert SCRIPT not in answer.text
    script = Path(local.__file__).parent / "templates" / "assess.js"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_model_is_loaded() -> None:
    """Judging must start at once, and on a machine without MLX."""
    code = (
        "import sys, mondrian_ft.pipeline.assessing, mondrian_ft.serving.assess;"
        "sys.exit(bool({'mlx', 'mlx.core', 'transformers', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
