"""The review as a person uses it: in Chromium, by keyboard, and what `prepare` makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mondrian_ft.data.corrections import CORRECTIONS_NAME
from mondrian_ft.serving import local
from mondrian_ft.serving.review import make_app
from tests.browser import chromium, complaints
from tests.data.world import World

from .conftest import ROWS, SCRIPT, manifest_of
from .test_review import desk_of, lines_of

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def url(world: World) -> Iterator[str]:
    """A running server on a free port of the loopback interface."""
    listening = local.listen("127.0.0.1", 0)
    config = uvicorn.Config(
        make_app(desk_of(world)), log_config=None, access_log=False, lifespan="off", ws="none"
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

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.text("decision"))

    def text(self, element: str) -> str:
        return self.browser.execute_script(
            "return document.getElementById(arguments[0]).textContent", element
        )

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def wait(self, holds: Callable[[], Any]) -> None:
        """Waits for something of the page to hold, 20 seconds at most."""
        until = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < until, self.text("status")
            time.sleep(0.05)

    def at(self, place: int, status: str = "") -> None:
        """Waits until a row (from 1) is shown, and the status line says ``status``."""
        self.wait(lambda: self.text("place") == f"{place} of {ROWS}")
        self.wait(lambda: status in self.text("status"))

    def slider(self, key: str) -> Any:
        return self.browser.find_element("css selector", f"[data-key='{key}']")

    def colours(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_a_review_by_keyboard(world: World, url: str, tmp_path: Path) -> None:
    """Accept, correct with a slider, reject, undo, reload: the file and `prepare` agree."""
    from selenium.webdriver.common.keys import Keys

    database = world.db.read_bytes()
    with chromium(1200, 900) as browser:
        page = Page(browser, url)
        page.at(1)
        page.wait(lambda: browser.execute_script("return photo.complete && photo.naturalWidth"))
        assert "The prompt's example scores." in page.text("flags")
        browser.save_screenshot(str(tmp_path / "first.png"))
        page.press("a")
        page.at(2, f"Accepted. {ROWS - 1} left.")

        # A critique that holds a script shows it and does not run it.
        area = browser.find_element("css selector", "textarea")
        assert area.get_property("value") == SCRIPT
        assert browser.title == "Review of the labels"

        # The second dimension up by one step and the overall score to the mean, then a text.
        before = page.slider("2").get_property("value")
        page.press("2", Keys.ARROW_RIGHT)
        assert page.slider("2").get_attribute("aria-valuetext").startswith(f"{float(before) + 0.5}")
        page.press("m", Keys.ESCAPE)
        area.send_keys(Keys.END, " More.")
        page.press("a")  # typed, not pressed: the text has the focus
        area.send_keys(Keys.ESCAPE)
        browser.save_screenshot(str(tmp_path / "changed.png"))
        page.press("a")
        page.at(2, "There are unsaved changes")
        page.press("j")
        page.at(3)
        page.press("k")
        page.at(2)
        assert page.slider("2").get_property("value") == str(float(before) + 0.5), "a draft is kept"
        page.press("c")
        page.at(3, "Corrected.")

        page.press("r")
        page.at(4, "Rejected.")
        page.press("r")
        page.at(5, "Rejected.")
        page.press("u")
        page.at(4, "Taken back.")
        assert page.text("decision") == "Undecided"

        # The same file after a reload, and the same place.
        browser.refresh()
        page.wait(lambda: page.text("decision"))
        page.at(4)
        assert page.text("counts") == "1 accepted, 1 corrected, 1 rejected"
        page.press("k", "k")
        page.at(2)
        assert page.text("decision") == "Corrected"
        assert page.slider("2").get_property("value") == str(float(before) + 0.5)

        page.press("?")
        assert browser.find_element("id", "help").get_property("open")
        browser.save_screenshot(str(tmp_path / "help.png"))
        page.press("r")  # keys do nothing behind the help, which has the focus
        page.press(Keys.ESCAPE)
        assert not browser.find_element("id", "help").get_property("open")
        page.press("z")
        assert "scale" in browser.execute_script("return photo.style.transform")
        page.press("z")
        assert complaints(browser) == []

    lines = lines_of(world)
    assert [(line["job_id"], line["decision"]) for line in lines] == [
        ("job-0", "accept"),
        ("job-1", "correct"),
        ("job-2", "reject"),
        ("job-3", "reject"),
        ("job-3", "undo"),
    ]
    made = lines[1]["critique"]
    assert made["image_description"] == f"{SCRIPT} More.a"
    assert made["dimensions"][1]["score"] == float(before) + 0.5
    mean = sum(dimension["score"] for dimension in made["dimensions"]) / 7
    assert made["overall_score"] == round(mean, 1)
    stored = json.loads(next(world.analyses.glob("*job-1*")).read_text()[8:-4])
    same = ("key_strengths", "priority_improvements", "technical_notes")
    assert [made[key] for key in same] == [stored[key] for key in same]
    assert world.db.read_bytes() == database

    done = subprocess.run(
        [
            *(sys.executable, "-m", "mondrian_ft", "task=prepare", "tracking=none"),
            f"data.output_dir={world.output}",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Reviewed: 1 accepted, 1 corrected, 1 rejected" in done.stdout
    rows = {
        row["job_id"]: row
        for part in ("train", "val", "test")
        for row in json.loads(
            (world.output / f"training_data_ansel_{part}.json").read_text(encoding="utf-8")
        )
    }
    assert set(rows) == {f"job-{n}" for n in range(ROWS)} - {"job-2"}
    assert json.loads(rows["job-1"]["response"]) == made


def test_with_the_mouse_in_the_dark_and_on_a_phone(world: World, url: str, tmp_path: Path) -> None:
    """Buttons and sliders do what keys do; nothing is wider than the screen; scores between steps
    stay as they are until they are touched."""
    with chromium(1200, 900) as browser:
        page = Page(browser, url)
        page.colours("dark")
        browser.save_screenshot(str(tmp_path / "dark.png"))
        browser.find_element("css selector", "[value=flagged] + span").click()
        flagged = int(page.text("n-flagged"))
        assert flagged > 0
        assert page.slider("0").get_property("value") == "7.43"
        assert not browser.find_element("id", "correct").is_enabled()
        page.slider("3").click()
        assert page.slider("3").get_property("value") == "5"
        page.wait(browser.find_element("id", "correct").is_enabled)
        browser.find_element("id", "discard").click()
        assert page.slider("3").get_property("value") == "9"
        page.slider("3").click()
        browser.find_element("id", "correct").click()
        page.wait(lambda: "Corrected." in page.text("status"))
        assert lines_of(world)[0]["critique"]["overall_score"] == 7.43

        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page.colours("light")
        for name in ("phone", "phone-sliders"):
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide == 390
            browser.save_screenshot(str(tmp_path / f"{name}.png"))
            page.press("2")
        unnamed = browser.execute_script(
            "return [...document.querySelectorAll('button, input, textarea')].filter(e =>"
            " !(e.ariaLabel || e.textContent.trim() || e.closest('label'))).length"
        )
        assert unnamed == 0
        assert complaints(browser) == []


def test_a_server_that_is_gone_loses_nothing_typed(world: World, url: str) -> None:
    """The page says so, and keeps what was changed."""
    with chromium(1200, 900) as browser:
        page = Page(browser, url)
        page.press("1")
        page.press("\ue012")
        browser.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        page.press("c")
        page.wait(lambda: "The server does not answer" in page.text("status"))
        assert page.slider("1").get_property("value") == "7.5"
        assert not (world.output / CORRECTIONS_NAME).exists()
        browser.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {**offline, "offline": False, "downloadThroughput": -1, "uploadThroughput": -1},
        )
        page.press("c")
        page.at(2, "Corrected.")
    assert manifest_of(world).is_file()
