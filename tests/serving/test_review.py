"""The review's server: what it tells, what it writes, and whom it refuses."""

from __future__ import annotations

import io
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mondrian_ft.data import corrections
from mondrian_ft.data.audit import audit, entries_of_manifest
from mondrian_ft.data.corrections import CORRECTIONS_NAME
from mondrian_ft.errors import ServerError
from mondrian_ft.serving import local
from mondrian_ft.serving.pages import SIDE
from mondrian_ft.serving.review import Desk, cases_of, make_app
from tests.data.world import World, fenced

from .conftest import ROWS, SCRIPT, manifest_of

HERE = "http://127.0.0.1:5110"


def desk_of(world: World) -> Desk:
    entries = entries_of_manifest(json.loads(manifest_of(world).read_text()))
    found = audit(entries, min_pixels=3136, max_pixels=1_310_720)
    path = world.output / CORRECTIONS_NAME
    return Desk(cases_of(entries, found.findings), corrections.read(path))


def client_of(desk: Desk, **headers: str) -> TestClient:
    app = make_app(desk)
    return TestClient(app, base_url=HERE, headers={"Origin": HERE, **headers})


@pytest.fixture
def client(world: World) -> TestClient:
    return client_of(desk_of(world))


def decide(client: TestClient, index: int, decision: str, **more: Any) -> Any:
    """A decision about the row as it is."""
    row = client.get(f"/api/rows/{index}").json()
    body = {name: row[name] for name in ("job_id", "analysis_sha256")}
    return client.post(f"/api/rows/{index}/decision", json={**body, "decision": decision, **more})


def lines_of(world: World) -> list[dict[str, Any]]:
    path = world.output / CORRECTIONS_NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- what it tells


def test_the_list_has_flags_scores_and_decisions(client: TestClient) -> None:
    """Findings about prompts are not told beside a row: there is nothing to do about them there."""
    found = client.get("/api/rows").json()
    assert found["counts"] == {"accept": 0, "correct": 0, "reject": 0, "left": ROWS, "all": ROWS}
    first = found["rows"][0]
    flags = {flag["name"]: flag for flag in first["flags"]}
    assert flags["template_scores"]["grave"]
    assert "filled example" in flags["template_scores"]["explanation"]
    assert first["scores"]["Lighting"] == 7
    assert (first["advisor"], first["overall_score"], first["decision"]) == ("ansel", 7.43, None)
    assert "template_scores" not in {flag["name"] for flag in found["rows"][3]["flags"]}


def test_a_photograph_is_upright_and_of_moderate_size(world: World) -> None:
    """EXIF orientation 6 lies on its side; the page shows what the model sees."""
    image = Image.new("RGB", (2400, 1200), "white")
    image.paste("black", (0, 0, 300, 1200))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(world.source / "large.jpg", exif=exif)
    content = json.loads(manifest_of(world).read_text())
    record = content["by_advisor"]["ansel"]["records"][0]
    record["image_path"] = str(world.source / "large.jpg")
    del record["image_sha256"]
    manifest_of(world).write_text(json.dumps(content))
    client = client_of(desk_of(world))
    sha256 = client.get("/api/rows/0").json()["image_sha256"]
    answer = client.get(f"/photographs/{sha256}")
    shown = Image.open(io.BytesIO(answer.content))
    assert (shown.format, shown.size) == ("JPEG", (SIDE // 2, SIDE))
    assert answer.headers["content-type"] == "image/jpeg"
    # The dark left edge of the stored picture is the upper edge of the upright one.
    pixels = shown.convert("L")
    assert pixels.getpixel((400, 20)) < 50  # pyright: ignore[reportOperatorIssue]
    assert pixels.getpixel((20, 1500)) > 200  # pyright: ignore[reportOperatorIssue]


def test_a_photograph_that_changed_is_not_shown(world: World, client: TestClient) -> None:
    """A decision would be about another picture than the one on the page."""
    sha256 = client.get("/api/rows/2").json()["image_sha256"]
    assert client.get(f"/photographs/{sha256}").status_code == 200
    (world.source / "2.jpg").write_bytes((world.source / "3.jpg").read_bytes())
    answer = client.get(f"/photographs/{sha256}")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("The photograph 2.jpg changed since it was linked")
    (world.source / "2.jpg").unlink()
    assert "cannot be read" in client.get(f"/photographs/{sha256}").json()["error"]


def test_the_page_is_whole_and_holds_no_data(client: TestClient) -> None:
    """One file: its policy lets its own script run and nothing else; data come as JSON only."""
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "/*script*/" not in answer.text
    for outside in ("http://", "https://", "//cdn", "@import", "innerHTML", "insertAdjacentHTML"):
        assert outside not in answer.text
    assert SCRIPT not in answer.text
    script = Path(local.__file__).parent / "templates" / "review.js"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 400
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404


# -- what it writes


def test_decisions_are_written_and_survive_a_restart(world: World) -> None:
    """Accept, correct, reject, undo: the file has four lines, and a new server knows three."""
    before = world.db.read_bytes()
    client = client_of(desk_of(world))
    assert decide(client, 0, "accept", remark=" fine ").status_code == 200
    critique = client.get("/api/rows/1").json()["critique"]
    critique["dimensions"][1]["score"] = 2.5
    critique["key_strengths"] = ["Light", "Line"]
    answer = decide(client, 1, "correct", critique=critique, reviewer="Ada").json()
    assert answer["row"]["decision"] == "correct"
    assert answer["row"]["scores"]["Lighting"] == 2.5
    assert answer["row"]["critique"]["dimensions"][1]["score"] != 2.5
    assert answer["counts"]["left"] == ROWS - 2
    decide(client, 2, "reject")
    decide(client, 2, "undo")
    lines = lines_of(world)
    assert [line["decision"] for line in lines] == ["accept", "correct", "reject", "undo"]
    assert (lines[0]["remark"], lines[1]["reviewer"]) == ("fine", "Ada")
    assert lines[1]["critique"] == critique
    again = client_of(desk_of(world)).get("/api/rows").json()
    assert [row["decision"] for row in again["rows"]][:3] == ["accept", "correct", None]
    assert again["counts"]["left"] == ROWS - 2
    assert world.db.read_bytes() == before


def test_undo_of_nothing_writes_nothing(world: World, client: TestClient) -> None:
    assert decide(client, 0, "undo").status_code == 200
    assert not (world.output / CORRECTIONS_NAME).exists()


def test_an_earlier_decision_about_another_text_is_told(world: World) -> None:
    """It does not count any more, and the page says why."""
    client = client_of(desk_of(world))
    decide(client, 0, "accept")
    path = next(world.analyses.glob("*job-0*"))
    value = client.get("/api/rows/0").json()["critique"] | {"technical_notes": "Other notes."}
    path.write_text(fenced(value), encoding="utf-8")
    row = client_of(desk_of(world)).get("/api/rows/0").json()
    assert row["decision"] is None
    assert "the analysis changed since" in row["stale"]


def test_a_row_that_cannot_be_read_can_only_be_rejected(world: World) -> None:
    next(world.analyses.glob("*job-0*")).write_text("Failed to parse model response")
    client = client_of(desk_of(world))
    row = client.get("/api/rows/0").json()
    assert row["critique"] is None
    assert row["text"] == "Failed to parse model response"
    refused = decide(client, 0, "accept")
    assert refused.status_code == 422
    assert "it can be rejected" in refused.json()["error"]
    assert decide(client, 0, "reject").status_code == 200


def changed(**changes: Any) -> Any:
    return lambda critique: {**critique, **changes}


def one_dimension(**changes: Any) -> Any:
    return lambda critique: {
        **critique,
        "dimensions": [{**critique["dimensions"][0], **changes}, *critique["dimensions"][1:]],
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (one_dimension(score=10.5), "dimensions[0].score is 10.5; a score lies within 0 and 10."),
        (one_dimension(score="8"), "dimensions[0].score is '8', which is not a number."),
        (one_dimension(name="Mood"), "a correction keeps Composition"),
        (changed(overall_score=-1), "overall_score is -1"),
        (changed(colour="red"), "The key colour is not part of the schema."),
        (changed(key_strengths="Light"), "it should be a list"),
        (lambda c: {k: v for k, v in c.items() if k != "technical_notes"}, "technical_notes is"),
        (lambda c: None, "correct has one"),
    ],
)
def test_a_correction_that_is_none_is_refused_with_a_sentence(
    world: World, client: TestClient, change: Any, sentence: str
) -> None:
    critique = change(client.get("/api/rows/2").json()["critique"])
    answer = decide(client, 2, "correct", critique=critique)
    assert answer.status_code == 422
    assert sentence in answer.json()["error"]
    assert not (world.output / CORRECTIONS_NAME).exists()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"decision": "accept"}', b'{"decision": "maybe"}', b'{"path": "/etc"}'],
)
def test_a_body_that_is_no_decision_is_refused(
    world: World, client: TestClient, body: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/rows/0/decision", content=body, headers=headers)
    assert answer.status_code == 422
    assert isinstance(answer.json()["error"], str)
    assert not (world.output / CORRECTIONS_NAME).exists()


def test_a_page_of_another_start_cannot_decide(world: World, client: TestClient) -> None:
    """Row 3 of another data set is another job; a decision is about what was on the page."""
    seen = client.get("/api/rows/3").json()
    body = {"job_id": seen["job_id"], "decision": "accept", "analysis_sha256": "0" * 64}
    answer = client.post("/api/rows/3/decision", json=body)
    assert answer.status_code == 409
    assert "load the page again" in answer.json()["error"]
    assert not (world.output / CORRECTIONS_NAME).exists()


def test_a_disk_that_refuses_is_told_and_nothing_counts(world: World) -> None:
    desk = desk_of(world)
    desk.path.mkdir()
    client = client_of(desk)
    answer = decide(client, 0, "accept")
    assert answer.status_code == 500
    assert "cannot write" in answer.json()["error"]
    assert client.get("/api/rows").json()["counts"]["left"] == ROWS


def test_decisions_from_many_threads_give_whole_lines(world: World, client: TestClient) -> None:
    """The last line of each row is what the server says of it."""
    wrong: list[int] = []

    def press(number: int) -> None:
        for step in range(6):
            answer = decide(client, step % 3, ("accept", "reject")[(number + step) % 2])
            if answer.status_code != 200:
                wrong.append(answer.status_code)

    threads = [threading.Thread(target=press, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    lines = lines_of(world)
    assert len(lines) == 30
    last = {line["job_id"]: line["decision"] for line in lines}
    rows = client.get("/api/rows").json()["rows"]
    assert {row["job_id"]: row["decision"] for row in rows if row["decision"]} == last


# -- whom it refuses


@pytest.mark.parametrize(
    "path",
    [
        "/photographs/../../etc/passwd",
        "/photographs/..%2f..%2fetc%2fpasswd",
        "/photographs/%2fetc%2fpasswd",
        "/photographs/0.jpg",
        "/photographs/" + "0" * 64,
        "/templates/review.js",
        "/api/rows/99",
        "/api/rows/-1",
        "/api/rows/x",
    ],
)
def test_no_path_of_a_request_reaches_the_disk(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert "error" in answer.json()
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5110", "127.0.0.1.evil.example", "10.0.0.1", "", ":5110"]
)
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    """A site that resolves its own name to 127.0.0.1 sends that name."""
    for path in ("/", "/api/rows"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 400
        assert "is not this server's" in answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:5110", "localhost:9", "LOCALHOST", "[::1]:5110"])
def test_this_machine_is_answered(client: TestClient, host: str) -> None:
    answer = client.get("/api/rows", headers={"Host": host})
    assert answer.status_code == 200
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers


def test_on_every_interface_any_address_but_no_name_is_answered(world: World) -> None:
    client = TestClient(make_app(desk_of(world), host="0.0.0.0"), base_url=HERE)
    assert client.get("/api/rows", headers={"Host": "192.168.1.7:5110"}).status_code == 200
    assert client.get("/api/rows", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8888"}, 403),
        ({"Origin": "https://127.0.0.1:5110"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Length": "2000000"}, 413),
        ({"Content-Length": "x"}, 411),
    ],
)
def test_a_decision_of_another_origin_or_kind_is_refused(
    world: World, client: TestClient, headers: dict[str, str], status: int
) -> None:
    """What another page in the browser can send, it sends with its own origin."""
    row = client.get("/api/rows/0").json()
    body = {name: row[name] for name in ("job_id", "analysis_sha256")} | {"decision": "accept"}
    sent = {"Content-Type": "application/json", **headers}
    answer = client.post("/api/rows/0/decision", content=json.dumps(body), headers=sent)
    assert answer.status_code == status
    assert isinstance(answer.json()["error"], str)
    assert not (world.output / CORRECTIONS_NAME).exists()
    del client.headers["Origin"]
    assert client.post("/api/rows/0/decision", json=body).status_code == 403


# -- the port


def test_a_taken_port_is_one_sentence() -> None:
    with local.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^Port {port} of 127.0.0.1 cannot be used: .*"):
            local.listen("127.0.0.1", port)
    with local.listen("127.0.0.1", port) as second:
        assert local.url_of("127.0.0.1", second) == f"http://127.0.0.1:{port}/"


def test_a_host_that_is_none_is_one_sentence() -> None:
    with pytest.raises(ServerError, match=r"task.host is not a host, which is no address"):
        local.listen("not a host", 0)


def test_a_socket_listens_before_its_address_is_told() -> None:
    """Whoever reads the address may connect at once."""
    with (
        local.listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname(), timeout=5),
    ):
        assert local.is_loopback("127.0.0.1")
        assert not local.is_loopback("0.0.0.0")
