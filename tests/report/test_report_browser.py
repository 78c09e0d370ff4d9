"""``report.html`` as a person meets it: in Chromium, on a desk and on a phone, and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.report import html
from tests.browser import chromium, complaints

pytestmark = pytest.mark.full


@pytest.fixture
def page(many) -> Path:
    """The page of six models on eight photographs."""
    return html.write(many.report, many.log, many.facts, many.folder / "report.html")


@contextmanager
def opened(page: Path, width: int, *, script: bool = True) -> Iterator[Any]:
    """The page in a window, or on a phone, of that width."""
    with chromium(width, 900) as browser:
        # A window cannot be made as narrow as a phone.
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get(page.as_uri())
        yield browser


def sideways(browser: Any) -> int:
    """By how many pixels the page is wider than what shows it."""
    return browser.execute_script("return document.documentElement.scrollWidth - innerWidth")


def shot(browser: Any) -> Image.Image:
    """The whole page as it looks."""
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
    told = {"clip": clip, "captureBeyondViewport": True}
    data = browser.execute_cdp_cmd("Page.captureScreenshot", told)["data"]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def order(browser: Any, selector: str) -> list[int]:
    """The numbers of the cards, or of the strip's frames, from the top."""
    from selenium.webdriver.common.by import By

    found = browser.find_elements(By.CSS_SELECTOR, selector)
    return [int(float(element.get_attribute("data-index"))) for element in found]


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_nothing_complains(page: Path, width: int) -> None:
    """No script error, no refused style, no sideways scroll, all folds opened too; and it shows."""
    with opened(page, width) as browser:
        assert complaints(browser) == []
        for _ in range(2):
            assert sideways(browser) <= 0
            picture = shot(browser)
            assert picture.width == width
            assert len(picture.getcolors(1 << 24) or ()) > 200
            browser.execute_script(
                "document.querySelectorAll('details').forEach(d => d.open = true)"
            )


def test_photographs_can_be_put_in_order(page: Path) -> None:
    """Each order sorts cards and strip alike, largest first, and the file's order comes back."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    with opened(page, 1280) as browser:
        control = browser.find_element(By.ID, "sort")
        assert control.is_displayed()
        select = Select(control.find_element(By.TAG_NAME, "select"))
        keys = [str(option.get_attribute("value")) for option in select.options]
        assert keys == ["index", "tuned", "change", "spread"]
        for key in keys[1:]:
            select.select_by_value(key)
            values = [
                float(card.get_attribute(f"data-{key}"))
                for card in browser.find_elements(By.CSS_SELECTOR, "article.card")
            ]
            assert values == sorted(values, reverse=True)
            assert order(browser, "article.card") == order(browser, ".strip li")
            assert control.find_element(By.TAG_NAME, "output").text == "Largest first."
        assert order(browser, "article.card") != list(range(1, 9))
        select.select_by_value("index")
        assert order(browser, "article.card") == list(range(1, 9))
        assert complaints(browser) == []


def test_without_scripts_everything_is_there(many, page: Path) -> None:
    """No control that would do nothing; every card in the file's order, with every answer."""
    from selenium.webdriver.common.by import By

    with opened(page, 1280, script=False) as browser:
        assert not browser.find_element(By.ID, "sort").is_displayed()
        assert order(browser, "article.card") == list(range(1, 9))
        source = browser.find_element(By.TAG_NAME, "body").get_attribute("textContent")
        for sample in many.report["sample_results"]:
            for block in ("reference", "base_model", "fine_tuned_model", "production"):
                assert sample[block]["full_output"] in source


def test_it_can_be_printed(page: Path) -> None:
    """Paper gets pages of its own width, without the control that paper cannot work."""
    from selenium.webdriver.common.by import By

    with opened(page, 1280) as browser:
        data = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
        assert data.startswith(b"%PDF-")
        assert data.count(b"/Type /Page\n") > 2
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert not browser.find_element(By.ID, "sort").is_displayed()
        # What a sheet of A4 leaves between its margins.
        sheet = {"width": 688, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sheet)
        assert sideways(browser) <= 0


def test_a_comparison_of_runs_on_a_desk_and_on_a_phone(tmp_path: Path) -> None:
    """Nothing is wider than the screen, no text lies on another, and every run is there."""
    from mondrian_ft.report import compare
    from tests.report.test_compare import SWEEP

    page = compare.write("ranks", SWEEP, tmp_path / "compare.html")
    for width in (1200, 390):
        with opened(page, width) as browser:
            assert sideways(browser) <= 0
            assert complaints(browser) == []
            shown = browser.execute_script(
                "return [...document.querySelectorAll('.curves svg')]"
                ".filter(s => s.checkVisibility())"
                ".map(s => [s.clientWidth, s.querySelectorAll('.way').length])"
            )
            # Held-out losses of one evaluation each are dots; two drawings have lines.
            assert [lines for _, lines in shown] == [0, 6, 6]
            assert all(wide <= width for wide, _ in shown)
            covered = browser.execute_script(
                """
                const found = [];
                for (const svg of document.querySelectorAll('.curves svg')) {
                  if (!svg.checkVisibility()) continue;
                  const boxes = [...svg.querySelectorAll('text')].map(
                    t => [t.textContent, t.getBoundingClientRect()]);
                  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
                    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                    const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                    if (across > 1 && down > 5) found.push(a + ' on ' + b);
                  }));
                }
                return found;
                """
            )
            assert covered == []
            rows = browser.execute_script(
                "return [...document.querySelectorAll('.runs tbody tr')].map(r => r.innerText)"
            )
            assert len(rows) == 6
