"""The inspected batches as a person asks for them: the trainer's own, and refused where wrong."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, complaints

from .conftest import Finished, command, finished, read_json, refused, run_folders, succeed
from .world import World

MINE = ("data=mondrian", "tracking=none", "data.output_dir=./training_data")
TRAIN = "training_data_ansel_train.json"


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The sample, inspected in an empty folder."""
    return finished(tmp_path_factory.mktemp("inspected"), "task=inspect", "tracking=none")


def prepared(world: World) -> list[dict[str, Any]]:
    """Links and prepares, and returns the training rows."""
    succeed("task=prepare", *MINE, cwd=world.cwd)
    return read_json(world.cwd / "training_data" / TRAIN)


def broken(world: World, response: str) -> Path:
    """A file of training rows, by hand, of which the second answers with ``response``."""
    rows = prepared(world)
    rows[1]["response"] = response
    path = world.cwd / "by_hand.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_the_sample(inspected: Finished) -> None:
    """Done: a page and its numbers, every row checked, no weight trained, a command to go on."""
    found = read_json(inspected.folder / "inspect.json")
    rows = inspected.rows("train")
    assert {row["job_id"] for row in found["rows"]} == {row["job_id"] for row in rows}
    assert found["faults"] == []
    assert len(found["checks"]) >= 5
    assert {check["passed"] for check in found["checks"].values()} == {len(rows)}
    for row in found["rows"]:
        assert row["part"] == "train"
        assert row["first_trained"]["text"].startswith("{")
        assert row["first_trained"]["at"] == row["prompt_tokens"]
        assert row["last_trained"]["text"] == "<|im_end|>"
        assert row["tokens"] == row["prompt_tokens"] + row["trained_tokens"]
        assert 4 * row["image_tokens"] == np.prod(row["grid"])
    summary = found["summary"]
    lengths = [row["tokens"] for row in found["rows"]]
    assert (summary["tokens"]["min"], summary["tokens"]["max"]) == (min(lengths), max(lengths))
    said = " ".join(inspected.stdout.split())
    assert f"The first epoch: {len(rows)} rows in {summary['batches']} batches." in said
    assert summary["longest"] in said
    assert "Every row passed every check." in said
    assert "task=train data.output_dir=" in said
    page = (inspected.folder / "inspect.html").read_text(encoding="utf-8")
    assert len(page) < 2_000_000
    assert f"{len(rows)} training rows" in page
    assert not (inspected.folder / "adapter").exists()


def test_it_is_what_training_gets(world: World) -> None:
    """The batches of the page are those of the updates: the log counts the same trained tokens."""
    prepared(world)
    options = ("trainer.batch_size=3", "trainer.seed=11")
    succeed("task=inspect", "task.batches=null", *MINE, *options, cwd=world.cwd)
    folder = run_folders(world.cwd)[-1]
    found = read_json(folder / "inspect.json")
    beside = world.cwd / "training_data"
    for name in ("inspect.html", "inspect.json"):
        assert (beside / name).read_bytes() == (folder / name).read_bytes()
    batches: dict[int, int] = {}
    for row in found["rows"]:
        batches[row["batch"]] = batches.get(row["batch"], 0) + row["trained_tokens"]
    succeed("task=train", *MINE, *options, "trainer.epochs=1", cwd=world.cwd)
    log = (run_folders(world.cwd)[-1] / "training_log.jsonl").read_text(encoding="utf-8")
    steps = [line for line in map(json.loads, log.splitlines()) if line["kind"] == "step"]
    assert [step["trained_tokens"] for step in steps] == [batches[n] for n in sorted(batches)]
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("response", "told"),
    [
        (
            "The light is soft.",
            "tokens are 'The light is soft', not the start of a JSON",
        ),
        ('\n{"overall_score": 5}', "has to begin with {"),
        ('{"technical_notes": "a <|im_end|> inside"}', "its answer holds <|im_end|>"),
    ],
    ids=["prose", "blank", "control"],
)
def test_a_wrong_answer_is_refused_and_shown(world: World, response: str, told: str) -> None:
    """Exit 1, one sentence with the row and the page, which shows that row first."""
    path = broken(world, response)
    bad = read_json(path)[1]["job_id"]
    done = command("task=inspect", *MINE, f"data.train_data={path}", cwd=world.cwd)
    sentence = refused(done)
    assert sentence.startswith(f"row {bad}: ")
    assert told in sentence
    folder = run_folders(world.cwd)[-1]
    assert "1 of 8 rows did not pass" in sentence
    assert "inspect.html shows it" in sentence
    page = html.unescape((folder / "inspect.html").read_text(encoding="utf-8"))
    assert "1 row would be trained wrongly" in page
    assert page.index(f"row {bad}: ") < page.index("Longest row")
    assert [bad] == [
        f.split(": ")[0].removeprefix("row ") for f in read_json(folder / "inspect.json")["faults"]
    ]
    assert "Next" not in done.stdout

    trained = command("task=train", *MINE, f"data.train_data={path}", cwd=world.cwd)
    assert refused(trained) == sentence.split(" (1 of 8 rows")[0]


def test_a_photograph_that_is_gone(world: World) -> None:
    """Deleted between preparing and looking: its path, and what to do."""
    gone = Path(prepared(world)[0]["image_path"])
    gone.unlink()
    sentence = refused(command("task=inspect", *MINE, cwd=world.cwd))
    assert gone.name in sentence
    assert "put it back" in sentence
    assert not list(run_folders(world.cwd)[-1].glob("inspect.*"))


def test_no_rows(world: World) -> None:
    """An empty file, and a split that gives training nothing."""
    path = world.cwd / "none.json"
    path.write_text("[]", encoding="utf-8")
    done = command("task=inspect", *MINE, f"data.train_data={path}", cwd=world.cwd)
    assert "holds no example" in refused(done)
    shares = ("data.train_split=0", "data.val_split=0.5", "data.test_split=0.5")
    done = command("task=inspect", "data=mondrian", "tracking=none", *shares, cwd=world.cwd)
    assert "there are no rows to train on; give data.train_split a share" in refused(done)


@pytest.mark.parametrize("value", ["-1", "some"])
def test_batches_that_cannot_be(tmp_path: Path, value: str) -> None:
    """A config error, before anything is read."""
    sentence = refused(command("task=inspect", f"task.batches={value}", cwd=tmp_path), 2)
    assert f"task.batches is {value}, but it must be" in sentence


@pytest.mark.full
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(inspected: Finished, width: int, tmp_path: Path) -> None:
    """No complaint, nothing wider than the screen, every picture there, every token in its place:
    the tokens drawn as trained are, row by row, those of the batch."""
    found = {
        (row["batch"], row["row"]): row
        for row in read_json(inspected.folder / "inspect.json")["rows"]
    }
    with chromium(width) as browser:
        # A window is never as narrow as a phone, so the phone is emulated.
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.get((inspected.folder / "inspect.html").as_uri())
        assert complaints(browser) == []
        across = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert across == [width, width]
        broken = "return [...document.images].filter(i => !i.naturalWidth).length"
        assert browser.execute_script(broken) == 0
        cards = browser.execute_script(
            """return [...document.querySelectorAll('article')].map(card => ({
              batch: +card.dataset.batch, row: +card.dataset.row,
              trained: [...card.querySelectorAll('.trained div i')].reduce(
                (n, token) => n + (+token.dataset.n || 1), 0),
              seen: ['first', 'last'].map(
                name => card.querySelector('i.' + name).getClientRects().length > 0),
              shown: card.querySelector('img').getBoundingClientRect().width,
            }))"""
        )
        assert len(cards) == 2 + 4 * 2
        for card in cards:
            assert card["trained"] == found[card["batch"], card["row"]]["trained_tokens"]
            assert card["seen"] == [True, True]
            assert card["shown"] >= 300
        # Squares are drawn when asked for, by the keyboard too: it is a checkbox.
        box = browser.find_element("css selector", "article input")
        drawn = "return getComputedStyle(document.querySelector('.squares')).display"
        assert browser.execute_script(drawn) == "none"
        browser.execute_script("arguments[0].focus()", box)
        box.send_keys(" ")
        assert browser.execute_script(drawn) == "block"
        shot = tmp_path / f"inspect-{width}.png"
        assert browser.save_screenshot(str(shot))
        assert shot.stat().st_size > 20_000
