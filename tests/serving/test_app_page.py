"""The service's page as a person uses it: in Chromium, on a desk and on a telephone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.serving.protocol import State
from tests.browser import chromium, complaints

from .fake_model import FakeModel, critique_of
from .made import Made, listening, make, photograph

pytestmark = pytest.mark.full


class Page:
    """The page in a browser, and a person's fingers."""

    def __init__(self, browser: Any, url: str, shots: Path) -> None:
        self.browser, self.shots = browser, shots
        browser.get(url)

    def text(self, selector: str) -> str:
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join('|')",
            selector,
        )

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def wait(self, holds: Callable[[], Any]) -> None:
        until = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < until, (self.text("#status"), self.text("#answers"))
            time.sleep(0.02)

    def choose(self, path: Path) -> None:
        self.find("#file").send_keys(str(path))
        self.wait(lambda: self.find("#photo").is_displayed())

    def shot(self, name: str) -> None:
        self.browser.save_screenshot(str(self.shots / f"{name}.png"))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path / "service", model=FakeModel(delay=0.6, pieces=30))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "evening.jpg"
    path.write_bytes(photograph(4))
    return path


def votes(made: Made) -> list[dict[str, Any]]:
    text = (made.service.state / "preferences.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_upload_stream_compare_and_vote(made: Made, picture: Path, tmp_path: Path) -> None:
    with listening(made) as url, chromium(1360, 950) as browser:
        page = Page(browser, url, tmp_path)
        page.shot("empty")
        page.find("#go").click()
        assert not made.model.asked, "the form asks for a photograph itself"
        page.choose(picture)
        page.find("#advisor option[value=weston]").click()
        made.model.hold = 12
        page.find("#go").click()
        page.wait(lambda: len(page.all(".dimension")) >= 2)
        page.shot("coming")
        coming = page.text(".description")
        assert page.text("#status") == "Asking…"
        made.model.hold = None
        page.wait(lambda: "complete" in page.text("#status"))
        ask = made.model.asked[-1]
        value = json.loads(critique_of(ask))
        assert coming == value["image_description"], "it is read while it is written"
        assert page.text("article h2") == "Edward Weston"
        assert page.text(".overall").startswith(str(value["overall_score"]).removesuffix(".0"))
        bars = [bar.get_attribute("aria-valuenow") for bar in page.all("[role=meter]")]
        assert bars == [str(one["score"]) for one in value["dimensions"]]
        assert page.text(".who").startswith("base · fake-vlm · ")
        page.shot("answer")
        page.find(".vote[data-vote=up]").click()
        page.wait(lambda: page.text(".kept") == "Kept, thank you.")
        assert votes(made)[0]["vote"] == "up"
        assert votes(made)[0]["advisor"] == "weston"
        # Base and tuned, side by side.
        page.find("#compare").click()
        page.find("#go").click()
        page.wait(lambda: page.text("#status") == "Both critiques are complete.")
        assert page.text("article h2") == "The base model|The tuned model"
        base, tuned = page.all("article")
        assert abs(base.rect["y"] - tuned.rect["y"]) < 2
        assert "adapter v2 aaaaaaaaaaaa" in page.text("article.tuned .who")
        tuned.find_element("css selector", ".vote[data-vote=down]").click()
        page.wait(lambda: len(votes(made)) == 2)
        assert (votes(made)[1]["vote"], votes(made)[1]["model_used"]) == ("down", "fine_tuned")
        page.shot("compared")
        assert complaints(browser) == []


def test_on_a_telephone(made: Made, picture: Path, tmp_path: Path) -> None:
    """Nothing to scroll sideways, and fingers find the buttons."""
    with listening(made) as url, chromium(390, 844) as browser:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        page = Page(browser, url, tmp_path)
        page.shot("phone-empty")
        page.choose(picture)
        page.find("#compare").click()
        page.find("#go").click()
        page.wait(lambda: page.text("#status") == "Both critiques are complete.")
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 390
        assert min(vote.rect["height"] for vote in page.all(".vote")) >= 44
        browser.execute_script("document.querySelector('article').scrollIntoView()")
        page.shot("phone-answer")
        assert complaints(browser) == []


def test_failures_are_told(made: Made, picture: Path, tmp_path: Path) -> None:
    """Loading, an answer that is no critique, a stop, and a service that is gone."""
    made.model.state, made.model.progress = State.loading, 0.4
    with chromium() as browser:
        with listening(made) as url:
            page = Page(browser, url, tmp_path)
            page.wait(lambda: "loading: reading the base model, 40 %" in page.text("#status"))
            made.model.state = State.ready
            page.wait(lambda: page.text("#status") == "")
            page.choose(picture)
            made.model.text = "<b>I think</b> the sky is blue."
            page.find("#go").click()
            page.wait(lambda: "is no critique" in page.text(".failed"))
            assert page.text("article pre") == "<b>I think</b> the sky is blue."
            page.shot("failed")
            made.model.text, made.model.delay = None, 30
            page.find("#go").click()
            page.wait(lambda: made.model.running)
            page.find("#stop").click()
            page.wait(lambda: page.text(".failed") == "Stopped.")
            page.wait(lambda: made.model.cancelled == 1)
            assert complaints(browser) == []
        page.find("#go").click()
        page.wait(lambda: "may have been stopped" in page.text(".failed"))


def test_a_token_is_asked_for(tmp_path: Path, picture: Path) -> None:
    made = make(tmp_path / "service", token="s3cret")
    with listening(made) as url, chromium() as browser:
        page = Page(browser, url, tmp_path)
        page.choose(picture)
        page.find("#go").click()
        page.wait(lambda: "asks for a token" in page.text(".failed"))
        page.find("#token").send_keys("s3cret")
        page.find("#go").click()
        page.wait(lambda: "complete" in page.text("#status"))


def test_without_javascript(made: Made, picture: Path, tmp_path: Path) -> None:
    """The form works by itself: the answer is a page of its own."""
    with listening(made) as url, chromium() as browser:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        browser.get(url)
        browser.find_element("id", "file").send_keys(str(picture))
        browser.find_element("id", "go").click()
        until = time.monotonic() + 60
        while "Overall Score" not in browser.page_source:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert browser.find_elements("css selector", "section[data-advisor=ansel] h3")


def test_the_page_loads_nothing_from_elsewhere(made: Made) -> None:
    answer = made.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in answer.text.replace("http-equiv", "")
    assert '<option value="ansel" selected>Ansel Adams</option>' in answer.text
