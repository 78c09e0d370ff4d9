"""The service on a real socket: streams, clients that go away, are slow, or are very many."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mondrian_ft.serving import patience
from mondrian_ft.serving.protocol import Fault

from .fake_model import HASHES, FakeModel, critique_of
from .made import data_url, listening, make, photograph

FILES = {"image": ("a.jpg", photograph())}


def until(holds: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a whole answer."""
    found = []
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_comes_in_pieces_and_says_what_the_answer_says(tmp_path: Path) -> None:
    made = make(tmp_path, model=FakeModel(delay=0.2))
    with listening(made) as url, httpx.Client(base_url=url) as client:
        waited = client.post("/analyze", files=FILES, data={"mode": "fine_tuned"}).json()
        times, text = [], ""
        with client.stream(
            "POST", "/analyze_stream", files=FILES, data={"mode": "fine_tuned"}
        ) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for chunk in answer.iter_text():
                times.append(time.monotonic())
                text += chunk
        names = [name for name, _ in events(text)]
        assert names == ["start", *["piece"] * 5, "answer", "done"]
        assert times[-1] - times[0] > 0.1, "as they came, not at the end"
        found = events(text)
        assert "".join(body["text"] for name, body in found if name == "piece") == waited["raw"]
        same = ("analysis", "raw", "model_used", "adapter", "prompt_fingerprint")
        assert {key: found[-2][1][key] for key in same} == {key: waited[key] for key in same}
        made.model.text = "no critique"
        failed = events(client.post("/analyze_stream", files=FILES).text)
        assert [name for name, _ in failed][-2:] == ["error", "done"]
        assert (failed[-2][1]["status"], failed[-2][1]["raw"]) == (422, "no critique")
        several = client.post("/analyze_stream", files=FILES, data={"advisor": "all"}).text
        assert [name for name, _ in events(several)].count("error") == 3


@pytest.mark.parametrize("route", ["/analyze", "/analyze_stream", "/v1/chat/completions"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_stops_the_generation(
    tmp_path: Path, route: str, streams: bool
) -> None:
    made = make(tmp_path, model=FakeModel(delay=30, pieces=3000), database=True)
    made.world.row("job-1", filename="x.jpg", status="queued")
    options: dict[str, Any] = {"files": FILES, "data": {"job_id": "job-1"}}
    if route.startswith("/v1"):
        options = {"json": chat("base", stream=streams)}
    with listening(made) as url:
        with (
            httpx.Client(base_url=url, timeout=0.6) as client,
            pytest.raises(httpx.HTTPError),
            client.stream("POST", route, **options) as answer,
        ):
            for _ in answer.iter_raw():
                assert answer.status_code == 200
                raise httpx.ReadError("the person closed the page")
        until(lambda: made.model.cancelled == 1 and made.model.running == 0)
        until(lambda: made.desk.waiting == 0)
        if not route.startswith("/v1"):
            until(lambda: made.rows()["job-1"]["status"] == "failed")


def test_slow_clients_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not come whole, and a body that does not: neither holds a place for long."""
    monkeypatch.setattr(patience, "HEAD_SECONDS", 0.3)
    made = make(tmp_path, seconds=0.5)
    with listening(made) as url:
        place = (url.rpartition(":")[0].removeprefix("http://"), int(url.rpartition(":")[2]))
        with socket.create_connection(place, timeout=5) as silent:
            assert silent.recv(100) == b"", "closed without a word"
        with socket.create_connection(place, timeout=5) as half:
            half.sendall(b"POST /analyze HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            assert half.recv(100) == b""
        with socket.create_connection(place, timeout=5) as slow:
            slow.sendall(
                b"POST /analyze HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            answer = slow.recv(2000)
            assert answer.startswith(b"HTTP/1.1 408"), answer
            assert b"was not sent within 0.5 seconds" in answer
        # A request is logged once its answer has gone out, so the line may come after the answer.
        until(lambda: [line["status"] for line in made.lines] == [408])
        assert httpx.post(f"{url}/analyze", files=FILES).status_code == 200
        until(lambda: [line["status"] for line in made.lines] == [408, 200])


def test_a_connection_that_is_kept_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer may take longer than the head of a request may."""
    monkeypatch.setattr(patience, "HEAD_SECONDS", 0.2)
    made = make(tmp_path, model=FakeModel(delay=0.7))
    with listening(made) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):
            assert client.post("/analyze", files=FILES).status_code == 200


def test_200_megabytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    made = make(tmp_path)
    with listening(made) as url:
        place = (url.rpartition(":")[0].removeprefix("http://"), int(url.rpartition(":")[2]))
        with socket.create_connection(place, timeout=5) as client:
            client.sendall(
                b"POST /analyze HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 200000000\r\n\r\n"
            )
            assert client.recv(2000).startswith(b"HTTP/1.1 413")
        # Without a length, what comes is counted.
        parts = (b"x" * 100_000 for _ in range(2_000))
        head = {"content-type": "application/json"}
        try:
            answer = httpx.post(f"{url}/analyze", content=parts, headers=head)
            assert answer.status_code == 413
        except httpx.WriteError:
            assert made.lines[-1]["status"] == 413
        until(lambda: made.lines[-1]["status"] == 413)
    assert not made.model.asked


async def all_at_once(url: str, count: int) -> list[int]:
    """The status of each of so many requests."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        asked = [client.post("/analyze", files=FILES) for _ in range(count)]
        return [one.status_code for one in await asyncio.gather(*asked)]


def test_five_hundred_at_once(tmp_path: Path) -> None:
    """Some are answered and the others told to come again; nothing fails, nothing is left."""
    made = make(tmp_path, model=FakeModel(delay=0.05), max_queue=16)
    with listening(made) as url:
        found = asyncio.run(all_at_once(url, 500))
        assert set(found) == {200, 429}, set(found)
        assert found.count(200) >= 16
        assert found.count(200) == made.model.answered
        assert made.model.most <= 16
        until(lambda: made.desk.waiting == 0)
        assert httpx.post(f"{url}/analyze", files=FILES).status_code == 200


def test_more_requests_than_may_be_under_way(tmp_path: Path) -> None:
    """The others are answered as ever. Uvicorn's own limit counts open connections and would
    refuse all of them, the first as well, so it is not used."""
    made = make(tmp_path, model=FakeModel(delay=0.3), requests=20)
    with listening(made) as url:
        found = asyncio.run(all_at_once(url, 60))
        assert set(found) == {200, 503}, set(found)
        assert found.count(200) >= 20
        assert httpx.post(f"{url}/analyze", files=FILES).status_code == 200


# -- OpenAI's clients


def chat(model: str, **more: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": data_url(photograph())}}
    content = [{"type": "text", "text": "Judge it."}, image]
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def test_the_openai_client(tmp_path: Path) -> None:
    """Its own client, awaited and streamed, with a channel for a model."""
    made = make(tmp_path)
    with (
        listening(made) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        names = [model.id for model in client.models.list().data]
        assert names == ["base", "candidate", "production", "v1", "v2"]
        answer = client.chat.completions.create(
            **chat("production", max_tokens=9_000, temperature=0.5, seed=3)
        )
        ask = made.model.asked[0]
        assert answer.choices[0].message.content == critique_of(ask)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 100
        assert (ask.arm, ask.prompt, ask.max_tokens) == ("production", "Judge it.", 9_000)
        assert (ask.temperature, ask.seed, ask.constrained) == (0.5, 3, True)
        assert answer.model_dump()["adapter"]["hash"] == HASHES["production"]
        chunks = list(
            client.chat.completions.create(
                **chat("v1", stream=True, stream_options={"include_usage": True})
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == critique_of(made.model.asked[1])
        assert chunks[-1].usage is not None
        cut = client.chat.completions.create(**chat("base", max_completion_tokens=5))
        assert cut.choices[0].finish_reason == "length"
        made.model.text = "Free words."
        free = client.chat.completions.create(**chat("base", response_format={"type": "text"}))
        assert free.choices[0].message.content == "Free words."
        assert made.model.asked[-1].constrained is False
        with pytest.raises(openai.BadRequestError, match="There is no version or channel 'v9'"):
            client.chat.completions.create(**chat("v9"))
        made.model.faults = [Fault.busy]
        with pytest.raises(openai.RateLimitError, match="It failed on purpose"):
            client.chat.completions.create(**chat("base"))


BAD_CHATS = {
    "no model": ({"messages": []}, "model is missing"),
    "no messages": ({"model": "base"}, "messages should be a list"),
    "no image": (
        {"model": "base", "messages": [{"role": "user", "content": "hello"}]},
        "hold 0 photographs",
    ),
    "elsewhere": (
        {
            "model": "base",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://169.254.1.1/"}}],
                }
            ],
        },
        "never fetched from elsewhere",
    ),
    "conversation": (
        {"model": "base", "messages": [{"role": "assistant", "content": "x"}]},
        "conversation is not supported",
    ),
    "tokens": (chat("base", max_tokens=-1), "max_tokens is -1"),
    "true": (chat("base", max_tokens=True), "max_tokens is True"),
    "temperature": (chat("base", temperature="hot"), "temperature is hot"),
    "n": (chat("base", n=2), "n is more than 1"),
    "tools": (chat("base", tools=[{}]), "tools are not supported"),
    "format": (chat("base", response_format="json"), r"response_format.type"),
    "part": ({"model": "base", "messages": [{"role": "user", "content": [7]}]}, "neither text"),
    "content": ({"model": "base", "messages": [{"role": "user", "content": 7}]}, "neither text"),
    "message": ({"model": "base", "messages": ["x"]}, "messages hold"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_chat_is_told_in_their_form(tmp_path: Path, name: str) -> None:
    made = make(tmp_path)
    body, words = BAD_CHATS[name]
    answer = made.ask("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not made.model.asked
