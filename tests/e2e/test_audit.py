"""The audit as it is typed: its files, its refusal, and what the main job says of the labels."""

from __future__ import annotations

import html
import json

from .conftest import command, read_json, refused, run_folders, succeed
from .world import World

MINE = ("data=mondrian", "tracking=none")
SENTENCE = "Training on these labels cannot teach scoring"
TEMPLATE = (8, 7, 9, 6, 7, 8, 7)


def template_labels(world: World) -> None:
    """Gives every row the example's scores, and a prompt with an example."""
    for path in world.analyses.values():
        text = path.read_text(encoding="utf-8")
        value = json.loads(text[text.index("{") : text.rindex("}") + 1])
        for dimension, score in zip(value["dimensions"], TEMPLATE, strict=True):
            dimension["score"] = score
        value["overall_score"] = 7.4
        path.write_text(f"```json\n{json.dumps(value)}\n```", encoding="utf-8")
    shown = json.dumps({"dimensions": [{"name": "Lighting", "score": 8}], "overall_score": 7.4})
    prompt = f"Judge the photograph. Answer like this: {shown}"
    world.sql("UPDATE jobs SET prompt = ?", prompt)


def test_labels_that_all_echo_the_example(world: World) -> None:
    """Done when 3: the verdict says so and exits 0; required, it is a refusal of every task."""
    template_labels(world)
    done = succeed("task=audit", *MINE, cwd=world.cwd)
    assert SENTENCE in " ".join(done.stdout.split())
    folder = run_folders(world.cwd)[-1] / "data"
    found = read_json(folder / "audit.json")
    assert found["verdict"]["code"] == "cannot_teach_scoring"
    names = {finding["name"]: finding for finding in found["findings"]}
    assert sorted(names["template_scores"]["rows"]) == sorted(world.jobs)
    assert SENTENCE in (folder / "audit.html").read_text(encoding="utf-8")

    for task in ("audit", "experiment"):
        asked = command(f"task={task}", *MINE, "data.require_informative=true", cwd=world.cwd)
        assert refused(asked).startswith(SENTENCE)


def test_the_main_job_repeats_the_verdict(world: World) -> None:
    """The closing screen and report.html hold the audit's sentence."""
    template_labels(world)
    done = succeed(*MINE, "trainer.max_steps=1", "eval.max_tokens=8", cwd=world.cwd)
    after = done.stdout[done.stdout.index("Registered") :]
    assert SENTENCE in " ".join(after.split())
    page = (run_folders(world.cwd)[-1] / "report.html").read_text(encoding="utf-8")
    assert SENTENCE in html.unescape(page)


def test_drop_and_strip(world: World) -> None:
    """Rows of a named finding stay out and are counted; a stripped prompt has no example."""
    prompt = 'Judge. Answer like {"score": 8, "overall_score": 7.4}.'
    world.sql("UPDATE jobs SET prompt = ?", prompt)
    path = world.analyses[world.jobs[0]]
    text = path.read_text(encoding="utf-8")
    path.write_text(f"Okay, let me look at it.\n{text}", encoding="utf-8")
    done = succeed(
        "task=prepare",
        *MINE,
        "data.drop=[thinking_text]",
        "data.prompt_example=strip",
        cwd=world.cwd,
    )
    assert "Dropped 1 of 10 rows, by data.drop: 1 thinking_text." in " ".join(done.stdout.split())
    folder = run_folders(world.cwd)[-1] / "data"
    rows = [
        row
        for part in ("train", "val")
        for row in read_json(folder / f"training_data_ansel_{part}.json")
    ]
    assert {row["job_id"] for row in rows} == set(world.jobs[1:])
    assert all('"score": <0-10>, "overall_score": <0-10>' in row["prompt"] for row in rows)
    meta = read_json(folder / "training_data_ansel_meta.json")
    assert [fact["source"] for fact in meta["prompts"]] == ["jobs.prompt, example stripped"]
    assert meta["dropped"] == {world.jobs[0]: "thinking_text"}

    emptied = command(
        "task=prepare", *MINE, "data.drop=[thinking_text]", "data.limit=1", cwd=world.cwd
    )
    assert "data.drop=thinking_text leaves none of the 1 rows" in refused(emptied)
    wrong = command("task=prepare", "data.drop=[template_score]", cwd=world.cwd)
    assert "did you mean template_scores?" in refused(wrong, 2)


def test_tokens_are_counted_as_they_will_be_trained(world: World) -> None:
    """What the audit says a row costs is what training then takes."""
    succeed("task=audit", *MINE, cwd=world.cwd)
    counted = read_json(run_folders(world.cwd)[-1] / "data" / "audit.json")["facts"]["tokens"]
    from mondrian_ft.data.batches import encode
    from mondrian_ft.data.pixels import PixelSettings
    from mondrian_ft.data.rows import read_rows
    from mondrian_ft.model.base import load_base, load_encoder
    from mondrian_ft.sample import model_dir

    succeed("task=prepare", *MINE, "data.output_dir=./rows", cwd=world.cwd)
    base, light = load_base(model_dir()), load_encoder(model_dir())
    settings = PixelSettings(3_136, 1_310_720)
    lengths = {}
    for part in ("train", "val"):
        for row in read_rows(world.cwd / "rows" / f"training_data_ansel_{part}.json"):
            example = encode(row, base, base.image_processor, settings, base.backbone.image_token)
            lengths[row.job_id] = len(example.tokens)
            assert light.prompt_tokens(row.prompt, 3) == base.prompt_tokens(row.prompt, 3)
            assert light.answer_tokens(row.response) == base.answer_tokens(row.response)
    assert counted["row"]["max"] == max(lengths.values()) == lengths[counted["longest_row"]]
    assert counted["row"]["min"] == min(lengths.values())


def test_an_audit_does_not_download_the_model(world: World) -> None:
    """Without the model the tokens are not counted, which is said, and all else is."""
    done = succeed("task=audit", *MINE, "model.path=nobody/nothing-4b", cwd=world.cwd)
    assert (
        "the rows' tokens are not counted: nobody/nothing-4b has not been downloaded"
        in " ".join(done.stderr.split())
    )
    folder = run_folders(world.cwd)[-1] / "data"
    assert read_json(folder / "audit.json")["facts"]["tokens"] is None
    assert (folder / "audit.html").is_file()
