"""The service's routes: what is asked in any form is answered by the model that it says."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mondrian_ft.data.parsers import read_analysis
from mondrian_ft.data.prompt import fingerprint
from mondrian_ft.serving import front
from mondrian_ft.serving.app import make_app
from mondrian_ft.serving.protocol import Ask, Fault, State

from .fake_model import HASHES, FakeModel, critique_of
from .made import Made, bomb, data_url, make, photograph


@pytest.fixture
def made(tmp_path) -> Made:
    return make(tmp_path)


# -- the three forms


def test_the_three_forms_give_one_answer(made: Made) -> None:
    """A file of a form under either name, a path, and an image as path, data URL and base64."""
    data = photograph()
    (made.world.source / "ridge.jpg").write_bytes(data)
    forms = [
        {"files": {"image": ("x.jpg", data)}, "data": {"advisor": "ansel"}},
        {"files": {"file": ("x.jpg", data)}, "data": {"advisor": "Ansel "}},
        {"json": {"image_path": "ridge.jpg", "advisor": "ansel"}},
        {"json": {"image_path": str(made.world.source / "ridge.jpg")}},
        {"json": {"image": "ridge.jpg", "advisor": "ansel"}},
        {"json": {"image": data_url(data)}},
        {"json": {"image": base64.b64encode(data).decode()}},
    ]
    answers = [made.ask("POST", "/analyze", **form) for form in forms]
    assert [one.status_code for one in answers] == [200] * len(forms), [a.text for a in answers]
    assert len({json.dumps(one.json()["analysis"]) for one in answers}) == 1
    assert {ask.image for ask in made.model.asked} == {data}


def test_an_answer_says_who_gave_it(made: Made) -> None:
    body = made.analyze(mode="fine_tuned").json()
    ask = made.model.asked[0]
    assert (ask.arm, ask.constrained, ask.deadline) == ("production", True, 20.0)
    assert body["raw"] == critique_of(ask)
    assert body["analysis"] == json.loads(body["raw"])
    assert body["model_used"] == body["mode"] == "fine_tuned"
    assert body["adapter"] == {"version": "v2", "hash": HASHES["production"]}
    assert body["prompt_fingerprint"] == fingerprint(ask.prompt)
    assert body["prompt_source"] == "config.system_prompt + advisors.prompt"
    assert body["pixel_fingerprint"] == "0123456789abcdef"
    assert body["parse_success"] is True
    assert {"queued", "first_token", "total", "service"} <= body["seconds"].keys()
    base = made.analyze(mode="base").json()
    assert (base["model_used"], base["adapter"]) == ("base", None)
    assert base["analysis"] != body["analysis"]


def test_what_does_not_parse_is_a_failure(made: Made) -> None:
    """422 with the raw text; never 200 with a score of 0."""
    made.model.text = "Okay, let me think about the sky."
    answer = made.analyze()
    body = answer.json()
    assert answer.status_code == 422
    assert body["raw"] == made.model.text
    assert body["parse_success"] is False
    assert "analysis" not in body
    assert body["error"].startswith("The model's answer is no critique: ")
    assert made.analyze(response_format="html").status_code == 422


def test_several_advisors_give_a_list(made: Made) -> None:
    body = made.analyze(advisor="weston, ansel").json()
    assert [one["advisor"] for one in body] == ["weston", "ansel"]
    assert [one["advisor"] for one in made.analyze(advisor="all").json()] == [
        "ansel",
        "watkins",
        "weston",
    ]
    assert made.model.most == 3, "they are asked together"
    chosen = {made.analyze(advisor="random", user=f"u{n}").json()["advisor"] for n in range(20)}
    assert len(chosen) > 1
    again = {made.analyze(advisor="random", user="u1").json()["advisor"] for _ in range(4)}
    assert len(again) == 1
    made.model.faults = [Fault.worker]
    answer = made.analyze(advisor="ansel,weston")
    assert answer.status_code == 503
    assert sorted(one["parse_success"] for one in answer.json()) == [False, True]


def test_html_is_what_linking_reads(made: Made) -> None:
    """The cards have the shape of the users' own pages, and lose nothing."""
    answer = made.analyze(response_format="html", mode="fine_tuned")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["x-model-used"] == "fine_tuned"
    assert answer.headers["x-adapter-hash"] == HASHES["production"]
    found = read_analysis(answer.text).parsed.critique
    assert found.scores() == {
        one["name"]: one["score"]
        for one in json.loads(critique_of(made.model.asked[0]))["dimensions"]
    }


def test_a_text_of_the_model_is_never_markup(made: Made) -> None:
    value = json.loads(critique_of(Ask("x", b"", "", "base")))
    value["image_description"] = "<script>alert(1)</script>"
    made.model.text = json.dumps(value)
    assert "<script" not in made.analyze(response_format="html").text


# -- bad input

BAD = {
    "no image": ({"data": {"advisor": "ansel"}, "files": {"x": ("x", b"")}}, 400, "no photograph"),
    "empty file": ({"files": {"image": ("x.jpg", b"")}}, 400, "empty"),
    "text as jpg": ({"files": {"image": ("x.jpg", b"hello" * 99)}}, 400, "no picture"),
    "bomb": (
        {"files": {"image": ("x.png", bomb())}},
        400,
        "claims more than the 170,000,000 pixels",
    ),
    "truncated": ({"files": {"image": ("x.jpg", photograph()[:900])}}, 400, "cannot be decoded"),
    "svg": ({"files": {"image": ("x.svg", b"<svg/>")}}, 400, "no picture"),
    "traversal": ({"json": {"image_path": "../mondrian.db"}}, 403, "no folder"),
    "absolute": ({"json": {"image_path": "/etc/passwd"}}, 403, "no folder"),
    "not there": ({"json": {"image_path": "nowhere.jpg"}}, 404, "no photograph"),
    "nul": ({"json": {"image_path": "a\0b.jpg"}}, 400, "no path"),
    "long name": ({"json": {"image_path": "a" * 300}}, 400, "cannot be read: File name too long"),
    "long path": ({"json": {"image_path": "a/" * 5_000}}, 400, "more than 4,096 characters"),
    "broken photograph": ({"json": {"image": "/9j-" * 5_000}}, 400, "image is not valid base64"),
    "two": ({"json": {"image_path": "a.jpg", "image": "b.jpg"}}, 400, "send one photograph"),
    "two files": (
        {"files": {"image": ("a.jpg", photograph()), "file": ("b.jpg", photograph())}},
        400,
        "holds 2 photographs",
    ),
    "a file for a field": (
        {"files": {"image": ("a.jpg", photograph()), "advisor": ("b.jpg", b"ansel")}},
        400,
        "advisor is a file; it should be a text",
    ),
    "a field twice": (
        {"files": {"image": ("a.jpg", photograph())}, "data": {"advisor": ["ansel", "weston"]}},
        400,
        "'advisor' is there twice",
    ),
    "misspelt": (
        {"files": {"image": ("a.jpg", photograph())}, "data": {"advsior": "weston"}},
        400,
        "There is no field 'advsior'; did you mean advisor?",
    ),
    "folder": ({"json": {"image_path": "sub"}}, 400, "not a file"),
    "number": ({"json": {"image_path": 7}}, 400, "number"),
    "list": ({"json": ["a.jpg"]}, 400, "list"),
    "no json": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "JSON"),
    "nan": (
        {"content": b'{"image": NaN}', "headers": {"content-type": "application/json"}},
        400,
        "JSON",
    ),
    "data url": ({"json": {"image": "data:image/png,abc"}}, 400, "base64"),
    "broken base64": ({"json": {"image": "data:image/png;base64,&&&"}}, 400, "base64"),
    "no type": ({"content": b"abc"}, 415, "content type"),
    "no boundary": (
        {"content": b"abc", "headers": {"content-type": "multipart/form-data"}},
        400,
        "form",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("route", ["/analyze", "/analyze_stream"])
def test_bad_input(made: Made, name: str, route: str) -> None:
    """A sentence and the right status; the model is not asked but for what only it can see."""
    options, status, words = BAD[name]
    (made.world.source / "sub").mkdir()
    answer = made.ask("POST", route, **options)
    if name == "truncated" and route == "/analyze_stream":
        assert "cannot be decoded" in answer.text
        return
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert name == "truncated" or not made.model.asked


FIELDS = {
    "advisor": ("picasso", "There is no advisor 'picasso'; there are ansel, watkins, weston."),
    "mode": ("rag", "There is no mode 'rag'; there are base, fine_tuned, ab_test."),
    "version": (
        "v9",
        "There is no version or channel 'v9'; there are base, candidate, production, v1, v2.",
    ),
    "response_format": ("xml", "response_format is 'xml'; it is json or html."),
    "replace": ("perhaps", "replace is 'perhaps'; it is true or false."),
    "user": ("x" * 201, "user has more than 200 characters."),
}


def test_a_run_of_spaces_takes_no_time(made: Made) -> None:
    """Looking for base64 in it took time with the square of its length: hours for a megabyte, in
    which nobody else was answered."""
    started = time.perf_counter()
    answer = made.ask("POST", "/analyze", json={"image": "A" + " " * 200_000 + "!"})
    assert answer.status_code == 400
    assert time.perf_counter() - started < 5


def test_fields_of_older_clients_are_let_pass(made: Made) -> None:
    assert made.analyze(enable_rag="false", filename="x.jpg", user_id="7").status_code == 200


@pytest.mark.parametrize("field", FIELDS)
def test_a_bad_field_is_named(made: Made, field: str) -> None:
    value, sentence = FIELDS[field]
    answer = made.analyze(**{field: value})
    assert (answer.status_code, answer.json()["error"]) == (400, sentence)
    assert not made.model.asked


def test_paths_of_clients_are_never_arms(made: Made) -> None:
    """A version is one of the registry's; a directory that exists is none."""
    answer = made.analyze(version=str(made.world.folder))
    assert answer.status_code == 400


def test_relative_paths_are_also_taken_from_where_the_service_was_started(
    tmp_path: Path,
) -> None:
    """As elsewhere; only into a served folder, though. A second folder is looked in as well."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    made = make(tmp_path, folders=[uploads])
    (made.world.source / "ridge.jpg").write_bytes(photograph())
    (uploads / "new.jpg").write_bytes(photograph(1))
    (tmp_path / "mine.jpg").write_bytes(photograph(2))
    for name, status in {
        "mondrian/source/ridge.jpg": 200,
        "new.jpg": 200,
        "uploads/new.jpg": 200,
        "mine.jpg": 404,
        "./mine.jpg": 404,
        "../mine.jpg": 403,
        "mondrian/mondrian.db": 404,
        "": 400,
        "..": 403,
        "uploads": 404,
    }.items():
        answer = made.ask("POST", "/analyze", json={"image_path": name})
        assert answer.status_code == status, (name, answer.text)


def test_a_link_does_not_lead_out(made: Made, tmp_path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(photograph())
    (made.world.source / "link.jpg").symlink_to(secret)
    assert made.ask("POST", "/analyze", json={"image_path": "link.jpg"}).status_code == 403


def test_a_file_name_of_a_client_is_never_used(made: Made) -> None:
    """Traversal in the form's file name: nothing is written, and the answer is as ever."""
    before = sorted(made.world.folder.rglob("*"))
    files = {"image": ("../../../../etc/x.jpg", photograph())}
    assert made.ask("POST", "/analyze", files=files).status_code == 200
    assert sorted(made.world.folder.rglob("*")) == before


def test_an_upload_that_is_too_long(made: Made) -> None:
    """Refused by its head, without reading it; and while it comes, where the head says nothing."""
    files = {"image": ("x.jpg", b"x" * 4_000_000)}
    answer = made.ask("POST", "/analyze", files=files)
    assert answer.status_code == 413
    url = data_url(b"x" * 2_100_000)
    assert made.ask("POST", "/analyze", json={"image": url}).status_code == 413
    head = {"content-type": "application/json", "content-length": "200000000"}
    assert made.ask("POST", "/analyze", content=b"{}", headers=head).status_code == 413


def test_bodies_together_have_a_limit(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that do not say how long they are; and one that is refused takes no room."""
    monkeypatch.setattr(front, "MOST_IN_MEMORY", 1_000_000)

    async def go() -> list[int]:
        going = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield b" " * 900_000
            await going.wait()
            yield b"{}"

        async with made.client() as client:
            head = {"content-type": "application/json"}
            slow = asyncio.create_task(client.post("/analyze", content=parts(), headers=head))
            while made.app._held < 900_000:  # pyright: ignore[reportFunctionMemberAccess]
                await asyncio.sleep(0.01)
            known = await client.post("/analyze", content=b" " * 200_000, headers=head)
            more = (b" " * 100_000 for _ in range(3))
            unknown = await client.post("/analyze", content=_later(more), headers=head)
            going.set()
            return [known.status_code, unknown.status_code, (await slow).status_code]

    assert asyncio.run(go()) == [503, 503, 400]
    assert made.app._held == 0  # pyright: ignore[reportFunctionMemberAccess]
    files = {"image": ("a.jpg", photograph())}
    assert made.ask("POST", "/analyze", files=files).status_code == 200


async def _later(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# -- modes


def test_per_advisor_adapters(tmp_path) -> None:
    made = make(tmp_path, mode="fine_tuned", adapters={"watkins": "watkins-arm"})
    body = made.analyze(advisor="ansel,watkins").json()
    assert [one["adapter"]["hash"] for one in body] == [
        HASHES["production"],
        HASHES["watkins-arm"],
    ]


def test_old_names_of_modes(made: Made) -> None:
    assert made.analyze(mode="lora").json()["model_used"] == "fine_tuned"
    assert made.analyze(mode="baseline").json()["model_used"] == "base"


def test_a_version_may_be_asked_for(made: Made) -> None:
    body = made.analyze(version="v1").json()
    assert (body["model_used"], body["adapter"]["version"]) == ("fine_tuned", "v1")
    assert made.analyze(version="base").json()["model_used"] == "base"
    assert made.analyze(version="base", mode="fine_tuned").status_code == 400


def test_no_adapter_is_no_base(tmp_path) -> None:
    """Asked for the tuned model without one, the base does not answer in its place."""
    made = make(tmp_path, adapter=None)
    answer = made.analyze(mode="fine_tuned")
    assert answer.status_code == 400
    assert "task.adapter" in answer.json()["error"]
    assert not made.model.asked


def test_an_ab_test_is_sticky_and_labelled(tmp_path) -> None:
    """Both arms answer; one user gets one arm, after a restart too, and may ask for the other."""
    made = make(tmp_path, mode="ab_test")
    used = {f"u{n}": made.analyze(user=f"u{n}").json()["model_used"] for n in range(16)}
    assert set(used.values()) == {"ab_test_base", "ab_test_fine_tuned"}
    for ask, name in zip(made.model.asked, used.values(), strict=True):
        assert ask.arm == ("production" if name == "ab_test_fine_tuned" else "base")
    again = make(tmp_path / "again", mode="ab_test")
    assert used == {name: again.analyze(user=name).json()["model_used"] for name in used}
    report = made.ask("GET", "/ab").json()
    counts = {name: arm["answers"] for name, arm in report["arms"].items()}
    assert counts == {name: list(used.values()).count(name) for name in set(used.values())}
    share = report["share_tuned"]
    assert share["of"] == 16
    assert share["low"] < share["share"] < share["high"]
    assert report["arms"]["ab_test_fine_tuned"]["adapters"] == {
        HASHES["production"]: counts["ab_test_fine_tuned"]
    }
    assert made.ask("GET", "/ab?since=2100-01-01").json()["arms"] == {}
    assert made.ask("GET", "/ab?since=2000-01-01T00:00:00Z").json()["arms"] == report["arms"]
    wrong = made.ask("GET", "/ab?since=yesterday")
    assert (wrong.status_code, "since is 'yesterday'" in wrong.json()["error"]) == (400, True)
    assert made.analyze(user="u1", mode="base").json()["model_used"] == "base"
    assert made.ask("GET", "/ab").json()["share_tuned"]["of"] == 16, "no part of the test"


# -- faults

FAULTS = {
    Fault.picture: 400,
    Fault.prompt: 400,
    Fault.adapter: 503,
    Fault.model: 500,
    Fault.deadline: 504,
    Fault.worker: 503,
    Fault.busy: 429,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_has_its_status(made: Made, fault: Fault) -> None:
    made.model.faults = [fault]
    answer = made.analyze()
    assert answer.status_code == FAULTS[fault]
    assert answer.json()["error"] == f"It failed on purpose ({fault})."
    assert answer.json()["fault"] == fault
    assert ("retry-after" in answer.headers) == (answer.status_code in (429, 503))
    assert made.desk.waiting == 0


def test_a_version_that_does_not_load_is_the_callers(made: Made) -> None:
    made.model.faults = [Fault.adapter]
    assert made.analyze(version="v1").status_code == 400


def test_a_fault_of_the_service_tells_no_traceback(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 and a request id; what happened is in the log under that id."""

    def broken() -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(made.model, "status", broken)
    answer = made.ask("GET", "/health")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    line = made.lines[-1]
    assert line["id"] == answer.json()["request_id"]
    assert "a secret of the inside" in line["error"]
    assert "a secret of the inside" in capsys.readouterr().err


def test_a_log_on_a_full_disk_takes_no_answer_away(tmp_path: Path) -> None:
    made = make(tmp_path)

    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    service = dataclasses.replace(made.service, log=full)
    made.app = make_app(service)
    assert made.analyze().status_code == 200


# -- status


def test_health(made: Made) -> None:
    """200 ready, 202 loading, 503 failed with its reason; nobody is asked before it is ready."""
    assert made.ask("GET", "/health").json() == {
        "status": "ready",
        "model_mode": "base",
        "fine_tuned": True,
        "adapter": "production",
    }
    assert made.ask("HEAD", "/health").status_code == 200, "as some balancers ask"
    made.model.state, made.model.progress = State.loading, 0.25
    loading = made.ask("GET", "/health")
    assert loading.status_code == 202
    assert loading.json()["progress"] == 0.25
    answer = made.analyze()
    assert answer.status_code == 503
    assert "25%" in answer.json()["error"]
    made.model.state, made.model.reason = State.failed, "The weights are damaged."
    failed = made.ask("GET", "/health")
    assert (failed.status_code, failed.json()["reason"]) == (503, "The weights are damaged.")
    assert not made.model.asked


def test_status_advisors_and_metrics(made: Made) -> None:
    made.analyze(mode="fine_tuned")
    made.model.text = "no critique"
    made.analyze()
    status = made.ask("GET", "/model-status").json()
    assert status["state"] == "ready"
    assert [arm["arm"] for arm in status["arms"]] == ["base", "production"]
    listed = made.ask("GET", "/advisors").json()
    assert [one["id"] for one in listed["advisors"]] == ["ansel", "watkins", "weston"]
    text = made.ask("GET", "/metrics").text
    assert 'mondrian_answers_total{model_used="fine_tuned",parsed="true"} 1.0' in text
    assert 'mondrian_answers_total{model_used="base",parsed="false"} 1.0' in text
    assert 'mondrian_requests_total{route="/analyze",status="422"} 1.0' in text
    assert "mondrian_model_ready 1.0" in text


def test_openapi_has_examples(made: Made) -> None:
    document = made.ask("GET", "/openapi.json").json()
    body = document["paths"]["/analyze"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    assert "examples" in body["application/json"]
    assert made.ask("GET", "/docs").status_code == 404


def test_the_log_holds_ids_and_no_photograph_or_prompt(made: Made) -> None:
    """One line a request: route, status, arm, hash, time."""
    answer = made.ask(
        "POST",
        "/analyze?secret=in-the-query",
        files={"image": ("holiday.jpg", photograph())},
        data={"mode": "fine_tuned", "user": "someone"},
        headers={"x-request-id": "mine-1", "authorization": "Bearer tell-nobody"},
    )
    assert answer.headers["x-request-id"] == "mine-1"
    line = made.lines[-1]
    assert {key: line[key] for key in ("id", "route", "status", "arm", "hash")} == {
        "id": "mine-1",
        "route": "/analyze",
        "status": 200,
        "arm": ["fine_tuned"],
        "hash": [HASHES["production"]],
    }
    text = json.dumps(line)
    for word in ("holiday", "someone", "in-the-query", "tell-nobody", "Judge the photograph"):
        assert word not in text
    made.ask("GET", "/health", headers={"x-request-id": 'x"\n'})
    assert made.lines[-1]["id"] != 'x"\n'


# -- who may ask


def test_a_token_is_asked_for(tmp_path) -> None:
    made = make(tmp_path, token="s3cret")
    assert made.analyze().status_code == 401
    assert made.ask("GET", "/metrics").status_code == 401
    assert made.ask("GET", "/health").status_code == 200
    assert made.ask("GET", "/").status_code == 200
    for given, status in (("Bearer s3cret", 200), ("Bearer S3cret", 401), ("Basic s3cret", 401)):
        headers = {"authorization": given}
        assert made.ask("GET", "/advisors", headers=headers).status_code == status
    assert "s3cret" not in json.dumps(made.lines)
    assert "s3cret" not in repr(made.service.limits)


def test_other_sites_may_not_ask(made: Made) -> None:
    """Neither with their own origin, nor under a name that was made to mean this machine."""
    files = {"image": ("a.jpg", photograph())}
    answer = made.ask("POST", "/analyze", files=files, headers={"origin": "http://evil.example"})
    assert answer.status_code == 403
    assert made.ask("GET", "/health", headers={"host": "evil.example"}).status_code == 400
    own = {"origin": "http://127.0.0.1"}
    assert made.ask("POST", "/analyze", files=files, headers=own).status_code == 200


# -- votes


def test_a_vote_is_kept_with_what_it_is_about(made: Made) -> None:
    answer = made.analyze(mode="fine_tuned").json()
    body = {"answer_id": answer["answer_id"], "vote": "up"}
    assert made.ask("POST", "/preference", json=body).status_code == 201
    made.ask("POST", "/preference", json={**body, "vote": "none"})
    path = made.service.state / "preferences.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["vote"] for line in lines] == ["up", "none"]
    assert lines[0]["adapter"] == answer["adapter"]
    assert lines[0]["raw"] == answer["raw"]
    assert made.ask("POST", "/preference", json={**body, "vote": "so-so"}).status_code == 400
    assert made.ask("POST", "/preference", json={**body, "answer_id": "x"}).status_code == 404


def test_a_vote_that_cannot_be_kept_is_told(made: Made) -> None:
    answer = made.analyze().json()
    made.service.state.write_text("a file in the folder's place", encoding="utf-8")
    body = {"answer_id": answer["answer_id"], "vote": "up"}
    refused = made.ask("POST", "/preference", json=body)
    assert refused.status_code == 503
    assert "cannot write" in refused.json()["error"]


def test_the_queue_is_bounded(tmp_path) -> None:
    """More advisors at once than there is room for is no use in waiting."""
    made = make(tmp_path, max_queue=2, model=FakeModel())
    answer = made.analyze(advisor="all")
    assert answer.status_code == 400
    made.desk.waiting = 2
    full = made.analyze()
    assert full.status_code == 429
    assert full.headers["retry-after"] == "2", "nothing was measured yet"
    made.desk.waiting = 0
    made.model.delay = 1.2
    made.analyze()
    made.desk.waiting = 2
    assert made.analyze().headers["retry-after"] == "2", "an answer takes 1.2 seconds"
    made.desk._seconds = 500.0
    assert made.analyze().headers["retry-after"] == "60"
