"""The real service's page without a mouse: by keys alone, and with no photograph chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium, complaints

from .conftest import Finished, read_json
from .service import Serving, serving, until

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def service(sample_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The sample's adapter as a directory, as it is typed right after the training."""
    words = (f"task.adapter={sample_run.adapter}", "task.model_mode=fine_tuned")
    with serving(tmp_path_factory.mktemp("keys"), *words) as running:
        yield running
        assert running.stop() == 0


def test_by_keys_alone(service: Serving, sample_run: Finished, tmp_path: Path) -> None:
    """Every control is reached in the order in which it stands, and does its work."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    rows = read_json(sample_run.folder / "data" / "training_data_ansel_test.json")
    picture = tmp_path / "evening.jpg"
    shutil.copy(rows[0]["image_path"], picture)
    kept = service.out.parent / "outputs" / "service" / "preferences.jsonl"
    with chromium(1360, 1000) as browser:
        browser.get(service.url)

        def focused() -> Any:
            return browser.switch_to.active_element

        def press(key: str) -> None:
            # Not `send_keys` of an element, which for a file's would be a path.
            ActionChains(browser).send_keys(key).perform()

        def tab(*, back: bool = False) -> str:
            """Go to the next control; its id, or what it is called."""
            if back:
                ActionChains(browser).key_down(Keys.SHIFT).perform()
            press(Keys.TAB)
            if back:
                ActionChains(browser).key_up(Keys.SHIFT).perform()
            here = focused()
            return here.get_attribute("id") or here.get_attribute("aria-label") or here.text

        def status() -> str:
            return browser.find_element("id", "status").text

        until(lambda: status() == "", "the model")
        assert [tab() for _ in range(4)] == ["file", "advisor", "compare", "go"]
        press(Keys.ENTER)
        assert not browser.find_elements("css selector", "article"), "a photograph is asked for"
        assert focused().get_attribute("id") == "file", "and the keys are where it is chosen"
        ring = "return getComputedStyle(document.getElementById('drop')).outlineStyle"
        assert browser.execute_script(ring) == "solid"
        # What a person's keys do in the system's own window is not the page's.
        focused().send_keys(str(picture))
        until(lambda: browser.find_element("id", "photo").is_displayed(), "the photograph")
        tab()
        assert tab() == "compare"
        press(Keys.SPACE)
        assert tab() == "go"
        press(Keys.ENTER)
        until(lambda: status() == "Both critiques are complete.", "both critiques")
        assert browser.execute_script("return document.activeElement.id") == "go", "not lost"
        reached = [tab() for _ in range(6)]
        assert reached == ["The model’s own text", "A good critique", "A bad critique"] * 2
        tab(back=True)
        press(Keys.SPACE)
        until(lambda: focused().get_attribute("aria-pressed") == "true", "the vote")
        browser.save_screenshot(str(tmp_path / "keys.png"))
        (vote,) = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
        assert (vote["vote"], vote["model_used"]) == ("up", "fine_tuned")
        press(Keys.SPACE)
        until(lambda: focused().get_attribute("aria-pressed") == "false", "it to be taken back")
        assert complaints(browser) == []
    votes = [json.loads(line)["vote"] for line in kept.read_text(encoding="utf-8").splitlines()]
    assert votes == ["up", "none"]
