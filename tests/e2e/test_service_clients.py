"""The real service as its clients have it: OpenAI's own client, and a person at the page."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mondrian_ft import registry
from mondrian_ft.data.critique import DIMENSIONS, strict_format_error
from tests.browser import chromium, complaints

from .conftest import Finished, read_json
from .service import PATIENCE, Serving, serving

pytestmark = pytest.mark.full
NAME = "sample-ansel"


@pytest.fixture(scope="module")
def service(sample_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Base and the sample's adapter, which is v1 and in production."""
    cwd = tmp_path_factory.mktemp("clients")
    root = cwd / "outputs" / "registry"
    registry.register(root, NAME, sample_run.adapter, facts={}, channel="production")
    with serving(cwd, "task.adapter=production", "task.model_mode=fine_tuned") as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def picture(sample_run: Finished) -> Path:
    """A photograph that nothing was trained on."""
    rows = read_json(sample_run.folder / "data" / "training_data_ansel_test.json")
    return Path(rows[0]["image_path"])


def test_the_openai_client(service: Serving, picture: Path, sample_run: Finished) -> None:
    """A channel, a version and the base for a model; awaited and streamed; an unknown one."""
    row = read_json(sample_run.folder / "data" / "training_data_ansel_test.json")[0]
    data = base64.b64encode(picture.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    said = [{"role": "user", "content": [{"type": "text", "text": row["prompt"]}, image]}]
    messages: Any = said
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        assert {"base", "production", "v1"} <= {one.id for one in client.models.list().data}
        texts = {}
        for model in ("base", "production", "v1"):
            answer = client.chat.completions.create(model=model, messages=messages)
            (choice,) = answer.choices
            assert choice.finish_reason == "stop"
            assert strict_format_error(choice.message.content or "", DIMENSIONS) is None
            texts[model] = choice.message.content
            adapter = answer.model_dump()["adapter"]
            wanted = read_json(sample_run.adapter / "manifest.json")["hash"]
            assert (adapter and adapter["hash"]) == (None if model == "base" else wanted)
        assert texts["production"] == texts["v1"] != texts["base"]
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(
                model="production", messages=messages, stream=True
            )
            if chunk.choices
        ]
        assert len([piece for piece in pieces if piece]) > 3, "as it comes"
        assert "".join(pieces) == texts["production"]
        with pytest.raises(openai.BadRequestError, match="v7"):
            client.chat.completions.create(model="v7", messages=messages)
    files = {"image": (picture.name, picture.read_bytes())}
    asked = httpx.post(f"{service.url}/analyze", files=files, timeout=PATIENCE).json()
    assert asked["raw"] == texts["production"], "the same pixels and prompt on both ways"


class Person:
    """Somebody at the page, and what they see."""

    def __init__(self, browser: Any, url: str, shots: Path) -> None:
        self.browser, self.shots = browser, shots
        browser.get(url)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return "|".join(found.text for found in self.all(selector))

    def wait(self, holds: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, (self.text("#status"), self.text("#answers"))
            time.sleep(0.02)

    def choose(self, path: Path) -> None:
        self.one("#file").send_keys(str(path))
        self.wait(lambda: self.one("#photo").is_displayed())

    def shot(self, name: str) -> None:
        self.browser.save_screenshot(str(self.shots / f"{name}.png"))


def test_a_person_at_the_page(
    service: Serving, picture: Path, sample_run: Finished, tmp_path: Path
) -> None:
    """Upload, watch it come, compare, vote: what is shown is what the arms say by themselves."""
    files = {"image": (picture.name, picture.read_bytes())}
    alone = {
        mode: httpx.post(
            f"{service.url}/analyze", files=files, data={"mode": mode}, timeout=PATIENCE
        ).json()
        for mode in ("base", "fine_tuned")
    }
    digest = read_json(sample_run.adapter / "manifest.json")["hash"]
    with chromium(1360, 1000) as browser:
        page = Person(browser, service.url, tmp_path)
        page.choose(picture)
        page.one("#go").click()
        page.wait(lambda: page.all(".dimension"))
        page.shot("coming")
        page.wait(lambda: "complete" in page.text("#status"))
        shown = [float(bar.get_attribute("aria-valuenow")) for bar in page.all("[role=meter]")]
        tuned = alone["fine_tuned"]["analysis"]["dimensions"]
        assert shown == [float(one["score"]) for one in tuned]
        assert digest[:12] in page.text(".who")
        page.shot("answer")
        page.one("#compare").click()
        page.one("#go").click()
        page.wait(lambda: page.text("#status") == "Both critiques are complete.")
        for article, mode in zip(page.all("article"), ("base", "fine_tuned"), strict=True):
            bars = article.find_elements("css selector", "[role=meter]")
            said = [float(bar.get_attribute("aria-valuenow")) for bar in bars]
            assert said == [float(one["score"]) for one in alone[mode]["analysis"]["dimensions"]]
        base, other = page.all("article")
        assert abs(base.rect["y"] - other.rect["y"]) < 2, "side by side"
        other.find_element("css selector", ".vote[data-vote=up]").click()
        base.find_element("css selector", ".vote[data-vote=down]").click()
        kept = service.out.parent / "outputs" / "service" / "preferences.jsonl"
        page.wait(lambda: kept.is_file() and len(kept.read_text().splitlines()) == 2)
        page.shot("compared")
        assert complaints(browser) == []
    votes = {one["model_used"]: one for one in map(json.loads, kept.read_text().splitlines())}
    assert {used: one["vote"] for used, one in votes.items()} == {
        "base": "down",
        "fine_tuned": "up",
    }
    assert votes["fine_tuned"]["adapter"]["hash"] == digest


def test_a_person_with_a_telephone(service: Serving, picture: Path, tmp_path: Path) -> None:
    with chromium(390, 844) as browser:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        page = Person(browser, service.url, tmp_path)
        page.choose(picture)
        page.one("#go").click()
        page.wait(lambda: "complete" in page.text("#status"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        browser.execute_script("document.querySelector('article').scrollIntoView()")
        page.shot("phone")
        assert complaints(browser) == []
