"""The blind comparison as a person uses it: in Chromium, by keyboard, to the reveal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mondrian_ft.serving import local
from mondrian_ft.serving.assess import make_app
from tests.browser import chromium, complaints

from .compared import SCRIPT, make_report
from .test_assess import desk_of, lines_of

pytestmark = pytest.mark.full
N = 5


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return make_report(tmp_path / "evaluation", N)


@pytest.fixture
def url(report: Path) -> Iterator[str]:
    """A running server on a free port of the loopback interface."""
    listening = local.listen("127.0.0.1", 0)
    config = uvicorn.Config(
        make_app(desk_of(report)), log_config=None, access_log=False, lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    # Not the main thread: uvicorn leaves the signals alone.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield local.url_of("127.0.0.1", listening)
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()


class Page:
    """The page in a browser, and a person's fingers."""

    def __init__(self, browser: Any, url: str, shots: Path) -> None:
        self.browser, self.shots = browser, shots
        browser.get(url)
        self.at(1)

    def text(self, element: str) -> str:
        return self.browser.execute_script(
            "return document.getElementById(arguments[0]).textContent", element
        )

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def wait(self, holds: Callable[[], Any]) -> None:
        until = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < until, self.text("status")
            time.sleep(0.05)

    def at(self, place: int, status: str = "") -> None:
        """Waits until a pair (from 1) is shown, and the status line says ``status``."""
        self.wait(lambda: self.text("place") == f"{place} of {N}")
        self.wait(lambda: status in self.text("status"))

    def shot(self, name: str) -> None:
        self.wait(
            lambda: self.browser.execute_script(
                "return photo.offsetParent === null || photo.complete && photo.naturalWidth > 0"
            )
        )
        self.browser.save_screenshot(str(self.shots / f"{name}.png"))

    def emulate(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_by_keyboard_to_the_reveal(report: Path, url: str, tmp_path: Path) -> None:
    """Left, equal, a remark, undo, a reload, the reference, and which was which at the end."""
    from selenium.webdriver.common.keys import Keys

    with chromium(1440, 900) as browser:
        page = Page(browser, url, tmp_path)
        page.shot("first")
        page.press(Keys.ARROW_LEFT)
        page.at(2, f"Left is better: kept. {N - 1} left")
        page.press("r")
        page.press("not e or u, only words", Keys.ENTER)
        page.press(Keys.ARROW_DOWN)
        page.at(3, "Equal: kept.")
        page.press("u")
        page.at(2, "Taken back.")
        assert browser.find_element("id", "remark").get_property("value").startswith("not e or u")
        page.press("s")
        page.wait(lambda: "in sight" in page.text("status"))
        assert "Reference" in page.text("texts")
        page.shot("reference")
        page.press("e")
        page.at(3, "Equal")
        browser.refresh()
        page.at(3)
        assert page.text("counts") == f"2 of {N} judged"
        page.press("k")
        page.at(2)
        assert browser.find_element("id", "equal").get_attribute("class") == "chosen"
        # Another remark to a choice that stays.
        page.press("r")
        page.press("!", Keys.ENTER)
        page.wait(lambda: page.text("status") == "The remark is kept.")
        page.press("j")
        page.at(3)
        page.press("?")
        page.wait(lambda: browser.find_element("id", "help").get_property("open"))
        page.shot("help")
        page.press(Keys.ARROW_LEFT, Keys.ESCAPE)
        assert page.text("counts") == f"2 of {N} judged"
        page.press(Keys.ARROW_RIGHT)
        page.at(4, "Right is better")
        assert "tuned" not in browser.find_element("id", "texts").text
        page.press("e")
        page.at(5)
        page.press(Keys.ARROW_LEFT)
        page.wait(lambda: page.text("closing-title") == "Every photograph is judged.")
        page.shot("closing")
        assert "people" not in page.text("closing-said").lower()
        page.press(Keys.ENTER)
        page.wait(lambda: "exact sign test" in page.text("closing-said"))
        assert page.text("closing-title") == "No clear preference.", "two or three say nothing"
        page.shot("result")
        assert "not e or u, only words!" in page.text("result")
        page.press("k")
        page.at(5)
        page.press(Keys.ARROW_LEFT)
        page.wait(lambda: "nothing is judged any more" in page.text("status"))
        assert browser.title == "Which critique is better?", SCRIPT
        assert complaints(browser) == []
    lines = lines_of(report)
    assert [line["choice"] for line in lines] == [
        *("left", "equal", "undo", "equal", "equal", "right", "equal", "left")
    ]
    assert lines[1]["remark"] == "not e or u, only words"
    assert [line["reference_shown"] for line in lines[:4]] == [False, False, False, True]
    assert all(0 < line["seconds"] < 60 for line in lines[:2])


def test_dark_and_on_a_phone_with_fingers(report: Path, url: str, tmp_path: Path) -> None:
    """Nothing is wider than the screen, every control has a name, a lost photograph is told."""
    with chromium(1200, 800) as browser:
        page = Page(browser, url, tmp_path)
        page.emulate("dark")
        page.shot("dark")
        first = page.text("file")
        (report.parent / first).unlink()
        browser.refresh()
        page.at(1)
        page.wait(lambda: "cannot be read" in page.text("missing"))
        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page.emulate("light")
        browser.find_element("id", "right").click()
        page.at(2, "Right is better")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        page.shot("phone")
        clipped = "return [...document.querySelectorAll('footer button')].filter(e =>"
        clipped += " e.scrollWidth > e.clientWidth).length"
        assert browser.execute_script(clipped) == 0
        browser.execute_script("document.getElementById('texts').scrollIntoView()")
        page.shot("phone-texts")
        browser.find_element("id", "equal").click()
        page.at(3)
        unnamed = browser.execute_script(
            "return [...document.querySelectorAll('button, input')].filter(e =>"
            " !(e.ariaLabel || e.textContent.trim() || e.closest('label'))).length"
        )
        assert unnamed == 0
        assert complaints(browser) == []
    assert [line["choice"] for line in lines_of(report)] == ["right", "equal"]
