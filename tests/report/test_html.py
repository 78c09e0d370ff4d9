"""``report.html``: self-contained, safe, complete, and honest in every awkward case."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.errors import DataError
from mondrian_ft.report import html, page, view

from .conftest import MODELS, critique

VOID = {"meta", "link", "img", "br", "line", "polyline", "circle", "path", "rect"}


class Page(HTMLParser):
    """Reads a page and fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what the tests ask for."""
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.images.append(found)
        if tag == "a":
            self.links.append(found["href"] or "")
        if found.get("id"):
            self.ids.append(str(found["id"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """SVG's own way to close at once."""
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        """Close the tag that is open."""
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """All text, style included."""
        self.text += data


def write(finished, **photos) -> str:
    """The page of a finished run, as text."""
    out = html.write(
        finished.report, finished.log, finished.facts, finished.folder / "report.html", **photos
    )
    return out.read_text(encoding="utf-8")


def test_the_page_is_self_contained(finish) -> None:
    """One file: no address but data URIs, and a policy that lets its one script run, no other."""
    text = write(finish())
    (script,) = re.findall("<script>(.*?)</script>", text, flags=re.DOTALL)
    assert f"script-src '{page.hashed(script)}'" in text
    assert text.count("<script") == 1
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_the_page_is_well_formed_and_accessible(finish) -> None:
    """Tags close, ids are unique, anchors lead somewhere, pictures have texts, headings descend."""
    page = Page(write(finish()))
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert page.images
    assert all(image["alt"] for image in page.images)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    steps = zip(page.headings, page.headings[1:], strict=False)
    assert all(after - before <= 1 for before, after in steps)


def test_the_verdict_comes_first_with_its_numbers(finish) -> None:
    """The first words are the verdict; the sentence under it has both errors and n."""
    finished = finish(12)
    text = write(finished)
    arms = finished.report["evidence"]["arms"]
    assert text.index("Fine-tuning helped.</h1>") < text.index('id="training"')
    said = text[text.index('class="said"') : text.index('class="lede"')]
    for told in ("12 photographs", f"{arms['tuned']['score_mae']:.2f}", "Ansel’s"):
        assert told in said
    assert f"{arms['base']['score_mae']:.2f}" in said


def test_everything_that_was_evaluated_is_there(finish) -> None:
    """Each photograph has its card, each answer stands whole, settings and warnings at the end."""
    finished = finish(base=[critique(8, f"Lake number {i}.") for i in range(8)])
    page = Page(write(finished))
    assert sum(name.startswith("p") and name[1:].isdigit() for name in page.ids) == 8
    for sample in finished.report["sample_results"]:
        for voice in ("reference", "base_model", "fine_tuned_model"):
            assert sample[voice]["full_output"] in page.text
    for told in ("abc123", "cafe01", "1.2.3", "never comes", "2 min 21 s", "rank", "updates"):
        assert told in page.text


def test_what_a_model_wrote_is_text(finish) -> None:
    """Markup in an answer is shown, never run, in the critique and in the raw text alike."""
    evil = critique(7, "<script>alert(1)</script> A <b>lake</b>.")
    text = write(finish(2, base=[evil] * 2, tuned=["<img src=x onerror=alert(1)>"] * 2))
    assert text.count("<script") == 1
    assert "<img src=x" not in text
    assert "&lt;script&gt;" in text


def test_arms_that_cannot_be_read(finish) -> None:
    """An arm without one readable answer has its reason on every card, and no invented numbers."""
    finished = finish(tuned=["**peace** "] * 8)
    page = Page(write(finished))
    assert page.text.count("Not readable.") == 8
    assert "gave no scores that could be read" in page.text
    assert "None" not in page.text
    assert "nan" not in re.findall(r"\w+", page.text)


def test_base_alone_and_one_photograph(finish) -> None:
    """A report of one arm on one photograph is a page too."""
    finished = finish(1)
    for sample in finished.report["sample_results"]:
        del sample["fine_tuned_model"]
    evidence = finished.report["evidence"]
    del evidence["arms"]["tuned"], evidence["change"]
    page = Page(write(finished))
    assert "Base, measured alone." in page.text
    assert "tuned one" not in page.text


def test_references_without_scores(finish) -> None:
    """Where references hold no scores the page says so instead of comparing."""
    finished = finish(2)
    rebuilt = finished.report
    for sample in rebuilt["sample_results"]:
        sample["reference"] |= {"full_output": "Lovely.", "score": None, "scores": {}}
    evidence = rebuilt["evidence"]
    evidence["n_references_with_scores"] = 0
    for arm in evidence["arms"].values():
        arm |= {"score_mae": None, "score_mae_interval": None, "per_dimension": {}}
    assert "hold no scores" in Page(write(finished)).text


def test_photographs_that_are_gone(finish) -> None:
    """A missing or broken photograph leaves a card that says so."""
    finished = finish(3)
    Path(finished.report["sample_results"][0]["image_path"]).unlink()
    Path(finished.report["sample_results"][1]["image_path"]).write_bytes(b"not a picture")
    assert Page(write(finished)).text.count("not where it was") == 2


def test_thumbnails_are_upright_small_and_without_metadata(finish) -> None:
    """Sideways phone pictures stand up, and their place and time stay out of the page."""
    finished = finish(1)
    path = finished.report["sample_results"][0]["image_path"]
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Secret Camera"
    Image.new("RGB", (3000, 2000), "teal").save(path, exif=exif)
    data = html.thumbnails(finished.report, side=300)[path]
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (200, 300)
        assert not image.getexif()
    assert b"Secret" not in data


def test_given_photographs_are_used(finish) -> None:
    """Pictures that the caller hands in are shown, and files are not opened again."""
    finished = finish(1)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG")
    path = finished.report["sample_results"][0]["image_path"]
    Path(path).unlink()
    assert html.data_uri(buffer.getvalue()) in write(finished, photos={path: buffer.getvalue()})


def test_without_training_and_with_a_broken_log(finish) -> None:
    """No log means that nothing was trained; a broken line is named; one that a kill cut is not."""
    finished = finish(1)
    whole = finished.log.read_text(encoding="utf-8")
    finished.log.write_text(whole + '{"kind": "st', encoding="utf-8")
    assert "Lowest held-out loss" in write(finished)
    finished.log.write_text("oops\n" + whole, encoding="utf-8")
    with pytest.raises(DataError, match="Line 1"):
        write(finished)
    finished.log.unlink()
    assert "Nothing was trained" in write(finished)


def test_the_same_input_gives_the_same_page(finish) -> None:
    """The page holds no time of its own making: written twice, it is the same."""
    finished = finish()
    assert write(finished) == write(finished)


def test_many_arms(finish) -> None:
    """Another arm beside base and tuned gets its column, its dot and its voice."""
    page = Page(write(finish(tuned_v3=[critique(5)] * 8, tuned_shuffled=[critique(7)] * 8)))
    assert page.text.count("Tuned v3") > 8
    assert "shown another photograph" in page.text


def test_every_arm_has_its_row(many) -> None:
    """Models and guesses stand in the table, with intervals; memory where it is known."""
    text = write(many)
    table = text[text.index('<table class="arms">') : text.index("</table>")]
    for arm in ("Base", "Tuned", "Production", "Constrained base", "Few-shot base"):
        assert f"</i>{arm}</th>" in table
    assert table.index("Few-shot base") < table.index("Constant guess") < table.index("Prompt’s")
    assert "1.60 to 2.30" in table
    assert "9.4" in table
    assert "107\u00a0%" in text[text.index("Held to the schema") :]


def test_a_failed_arm_is_named_at_the_verdict(many) -> None:
    """The reason stands before any number of the arms that could answer, and is text."""
    text = write(many)
    said = text.index("could not be evaluated: its adapter is of &lt;another&gt; base.")
    assert text.index("</h1>") < said < text.index('id="errors"')
    assert "Against production: better" in text


def test_many_arms_are_folded_but_whole(many) -> None:
    """Base and tuned stand beside the reference, the rest is folded below, nothing is left out."""
    text = write(many)
    shown = Page(text)
    first = text[text.index('id="p1"') : text.index('id="p2"')]
    beside, _, folded = first.partition('<details class="folded">')
    assert "4 more arms: Production, Constrained base" in folded
    assert "Production" not in beside
    assert "Not readable." in beside
    for sample in many.report["sample_results"]:
        for arm in MODELS:
            assert sample[arm]["full_output"] in shown.text
    assert len(shown.ids) == len(set(shown.ids))


def test_three_arms_stand_side_by_side(finish) -> None:
    """Up to three arms nothing is folded, and bars are drawn of two of them."""
    text = write(finish(production=[critique(5)] * 8))
    assert "folded" not in text[text.index("<main>") :]
    card = text[text.index('id="p1"') : text.index('id="p2"')]
    assert card.count('class="end') == 2 * 8


def test_what_photographs_are_sorted_by(many) -> None:
    """The largest error of tuned, change and disagreement each find the photograph that has it."""
    cards = view.page(many.report, {})["cards"]

    def largest(key: str) -> int:
        return max(cards, key=lambda card: card["keys"][key])["index"]

    # Base's first answer has no scores, which is as far from tuned and from all as can be.
    assert largest("change") == largest("spread") == 1
    keys = cards[2]["keys"]
    assert keys["tuned"] == pytest.approx(0.4)
    assert keys["change"] == pytest.approx(2.6)
    assert keys["spread"] == pytest.approx(10 - 5)
    many.report["sample_results"][4]["fine_tuned_model"]["score_error"] = 3.0
    cards = view.page(many.report, {})["cards"]
    assert largest("tuned") == 5


def test_without_scores_there_is_no_order_but_the_files(finish) -> None:
    """References without scores give nothing to sort by, and then that is not offered."""
    finished = finish(2)
    for sample in finished.report["sample_results"]:
        sample["reference"] |= {"full_output": "Lovely.", "score": None, "scores": {}}
    assert [key for key, _ in view.page(finished.report, {})["sorts"]] == ["index"]


def test_pairs_are_of_photographs(finish) -> None:
    """Rows of one photograph are one pair, their mean; an answer without scores makes none."""
    samples = finish(3).report["sample_results"]
    samples[1]["image_sha256"] = samples[0]["image_sha256"]
    samples[2]["base_model"]["score_error"] = None
    (pair,) = view.pairs(samples)
    errors = [sample["base_model"]["score_error"] for sample in samples[:2]]
    assert pair.card == 1
    assert pair.base == pytest.approx(sum(errors) / 2)


def test_the_other_curves_of_a_training_are_drawn() -> None:
    """Each that was logged, folded away; with one point, or none, there is no curve."""
    log = [
        {"kind": "step", "step": n, "loss": 1.0, "grad_norm": 0.1 * n, "learning_rate": 1e-4}
        for n in range(1, 5)
    ]
    assert [name for name, _ in html.figures(log)] == [
        "Gradient norm, before clipping",
        "Learning rate",
    ]
    (_, drawn), _ = html.figures(log)
    assert [css for css, _ in drawn] == ["wide", "narrow"]
    assert "It ends at 0.4." in drawn[0][1]
    assert html.figures(log[:1]) == []
    assert html.figures([]) == []


def test_settings_stand_as_they_are_typed() -> None:
    """The page once told where the program lay on the machine, and Python's braces and quotes."""
    report: Any = {
        "base_model": "b",
        "lora_path": "a",
        "validation_data": "v",
        "evaluation_date": "2026-11-29",
        "evidence": {"settings": {"answers_reused": {"base": 19, "tuned": 0}}},
    }
    facts: Any = {
        "provenance": {"argv": ["/home/me/mondrian_ft/__main__.py", "lora.rank=8"]},
        "config": {"data": {"generated": False, "dimension_map": {}, "limit": None}},
    }
    shown = dict(html.settings(report, facts))
    assert dict(shown["This comparison"])["answers_reused"] == "base 19, tuned 0"
    assert dict(shown["The run"])["command"] == "python -m mondrian_ft lora.rank=8"
    assert shown["Data"] == [("generated", "false")]
