"""A file for Locust: so many clients put a list of requests, each the next when it has its answer.

``PLAN`` names a JSON file: ``path`` of the route, ``requests`` (each the fields of a chat request
beside the messages, and its ``picture``), ``prompt``, and ``out``, where a line is written for
each: its number, when it was sent, how long it took, and what came back.
"""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import gevent  # pyright: ignore  (of the extra bench)
from locust import FastHttpUser, constant, events, task  # pyright: ignore
from locust.exception import StopUser  # pyright: ignore

PLAN = json.loads(Path(os.environ["PLAN"]).read_text())
_urls = {
    path: "data:image/jpeg;base64," + base64.b64encode(Path(path).read_bytes()).decode()
    for path in {one["picture"] for one in PLAN["requests"]}
}
_left = iter(enumerate(PLAN["requests"]))
_out = Path(PLAN["out"]).open("w")  # noqa: SIM115  (until the process ends)


def _body(fields: dict[str, Any]) -> str:
    """The same bytes for whoever is asked, but for the name of the model."""
    fields = dict(fields)
    url = _urls[fields.pop("picture")]
    content = [
        {"type": "text", "text": PLAN["prompt"]},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return json.dumps({**fields, "messages": [{"role": "user", "content": content}]})


class Client(FastHttpUser):
    """Asks until nothing is left."""

    wait_time = constant(0)
    network_timeout = connection_timeout = 900.0

    @task
    def ask(self) -> None:
        """The next of the requests."""
        numbered = next(_left, None)
        if numbered is None:
            raise StopUser
        number, fields = numbered
        body = _body(fields)
        sent, started = time.time(), time.perf_counter()
        with self.client.post(
            PLAN["path"],
            data=body,
            headers={"Content-Type": "application/json"},
            name=str(fields.get("adapter_path") or fields["model"]),
            catch_response=True,
        ) as response:
            seconds = time.perf_counter() - started
            found: dict[str, Any] = {"number": number, "sent": sent, "seconds": seconds}
            found["status"] = response.status_code
            if response.status_code == 200:
                answer: Any = response.json()
                found["text"] = answer["choices"][0]["message"]["content"]
                found["tokens"] = answer["usage"]["completion_tokens"]
                found["who"] = answer.get("system_fingerprint")
                response.success()
            else:
                found["text"] = (response.text or "")[:300]
                response.failure(f"status {response.status_code}")
        _out.write(json.dumps(found) + "\n")
        _out.flush()


@events.test_start.add_listener
def _end_with_the_last(environment, **_) -> None:
    def watch() -> None:
        while environment.runner.user_count == 0:
            gevent.sleep(0.05)
        while environment.runner.user_count:
            gevent.sleep(0.05)
        environment.runner.quit()

    gevent.spawn(watch)
