"""The audit: each finding on rows made to have it, and the verdict on what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mondrian_ft.data.audit import (
    DROPPABLE,
    SIMPLE,
    Audit,
    audit,
    entries_of_manifest,
    entries_of_rows,
    rows_to_drop,
)
from mondrian_ft.data.audit.pictures import image_tokens
from mondrian_ft.data.audit.texts import longest_loop
from mondrian_ft.data.audit.verdict import judge, smallest_shown
from mondrian_ft.data.critique import DIMENSIONS
from mondrian_ft.data.example import KNOWN_VECTOR
from mondrian_ft.data.link import link
from mondrian_ft.data.rows import Row
from mondrian_ft.data.similar import near_groups
from mondrian_ft.sample.scenes import Scene, render

from .world import SHARED, World, critique, fenced

TEMPLATE = list(KNOWN_VECTOR)


def label(scores: list[float], words: str, **changes: Any) -> dict[str, Any]:
    """A critique with those scores whose texts mention ``words``."""
    dimensions = [
        {
            "name": name,
            "score": score,
            "comment": f"The {name.lower()} of this one is like {words} in the evening.",
            "recommendation": f"For {name.lower()}, try {words} from the left.",
        }
        for name, score in zip(DIMENSIONS, scores, strict=False)
    ]
    overall = round(sum(scores) / len(scores), 1)
    said = f"This is a picture of {words} in the light of the morning."
    made = critique(dimensions=dimensions, overall_score=overall, image_description=said)
    return {**made, **changes}


def varied(key: int) -> list[float]:
    """Seven scores of their own for each key."""
    return [float((key * (2 * d + 1) + d * d + key // 8) % 8 + 1) for d in range(7)]


def add(world: World, key: int, value: Any, photo: int | None = None, **columns: Any) -> str:
    """A row with a label, on a photograph of its own unless told otherwise; returns its id."""
    job = f"job-{key:02d}"
    name = f"{key if photo is None else photo}.png"
    world.photo(name, key if photo is None else photo)
    world.analysis(job, value if isinstance(value, str) else fenced(value))
    world.row(job, filename=name, **columns)
    return job


def look(world: World) -> Audit:
    linked = link(world.db, world.source, world.analyses, "ansel", scratch=world.output)
    entries = entries_of_manifest(linked.manifest)
    return audit(entries, min_pixels=3136, max_pixels=1_310_720)


def named(found: Audit) -> dict[str, tuple[str, ...]]:
    return {finding.name: finding.rows for finding in found.findings}


def test_good_labels_have_no_findings(world: World) -> None:
    """Labels that differ as they should are not objected to, and are all counted."""
    for key in range(6):
        add(world, key, label(varied(key), f"stone number {key}"))
    found = look(world)
    assert named(found) == {}
    assert found.verdict.informative == found.verdict.independent == 6
    assert found.verdict.code == "too_few"
    json.dumps(found.as_dict())


def test_all_template_scores_cannot_teach_scoring(world: World) -> None:
    """A database whose labels are all the template vector: the verdict says so, with an exit 0."""
    for key in range(6):
        add(world, key, label(TEMPLATE, f"stone number {key}"))
    found = look(world)
    assert len(named(found)["template_scores"]) == 6
    assert found.verdict.code == "cannot_teach_scoring"
    assert found.verdict.informative == 0
    assert found.verdict.sentence.startswith("Training on these labels cannot teach scoring")


def test_each_finding_names_its_rows(world: World) -> None:
    """One row a fault: the finding of that name holds that row, and says what to drop."""
    for key in range(8):
        add(world, key, label(varied(key), f"stone number {key}"))
    mute = label(varied(20), "a fence")
    for dimension in mute["dimensions"]:
        dimension["recommendation"] = "Use a tripod."
    german = label(varied(21), "x")
    german["image_description"] = (
        "Das Bild zeigt einen Baum und ein Haus, die in der Sonne stehen, mit dem Licht von der "
        "Seite, das auf die Wand und den Weg fällt, und es ist nicht zu hell für das Motiv."
    )
    for dimension in german["dimensions"]:
        dimension["comment"] = "Die Linien sind klar und das Licht ist sehr schön auf der Wand."
        dimension["recommendation"] = f"Bei {dimension['name']} ist es mit der Zeit zu üben."
    chinese = label(varied(22), "x", image_description="这张照片展示了山脉和天空的壮丽景色" * 30)
    expected = {
        "template_scores": add(world, 10, label(TEMPLATE, "a gate")),
        "flat_scores": add(world, 11, label([4.0] * 7, "a road")),
        "overall_mismatch": add(world, 12, label(varied(12), "a mill", overall_score=0.5)),
        "repeated_advice": add(world, 13, mute),
        "thinking_text": add(
            world, 15, "Okay, so the user wants a critique.\n" + fenced(label(varied(15), "a pond"))
        ),
        "token_loops": add(world, 16, label(varied(16), "y", technical_notes="peace " * 40)),
        "truncated": add(
            world,
            17,
            label(varied(17), "w", technical_notes="The exposure holds both ends well, and the"),
        ),
        "error_pages": add(
            world, 18, "Internal Server Error\n" + fenced(label(varied(18), "a wall"))
        ),
        "dimension_drift": add(world, 19, label(varied(19)[:5], "a barn")),
        "exact_duplicates": add(world, 23, label(varied(23), "a roof"), photo=0),
    }
    both = (add(world, 21, german), add(world, 22, chinese))
    found = look(world)
    rows = named(found)
    for name, job in expected.items():
        assert job in rows.get(name, ()), name
    assert set(rows["non_english"]) == set(both)
    for finding in found.findings:
        assert finding.explanation.endswith("."), finding.name
        assert not finding.droppable or f"data.drop=[{finding.name}]" in finding.action


def test_texts_and_scores_that_repeat_between_photographs(world: World) -> None:
    """One text or one score vector for many photographs spoils all of them."""
    for key in range(5):
        add(world, key, label(varied(3), "the very same words"))
    rows = named(look(world))
    assert len(rows["identical_texts"]) == len(rows["repeated_scores"]) == 5
    assert look(world).verdict.code == "cannot_teach_scoring"


def test_a_prompt_with_an_example_or_a_table(world: World) -> None:
    """Prompts that hold a filled example, or ask for a Markdown table, are flagged."""
    prompt = 'Answer like {"dimensions": [{"name": "Light", "score": 3}]} in a Markdown table.'
    row = Row("a", "gilpin", world.photo("a.png"), prompt, json.dumps(critique(5)), "0" * 64)
    found = audit(entries_of_rows([row]), min_pixels=3136, max_pixels=10**6)
    assert named(found)["prompt_example"] == ("a",)
    assert named(found)["prompt_table"] == ("a",)


def test_dropping(world: World) -> None:
    """Every droppable finding can be asked for by name; a row counts for the first that has it."""
    for key in range(4):
        add(world, key, label(TEMPLATE, f"stone {key}"))
    linked = link(world.db, world.source, world.analyses, "ansel", scratch=world.output)
    entries = entries_of_manifest(linked.manifest)
    assert set(rows_to_drop(entries, DROPPABLE).values()) == {"template_scores"}
    assert rows_to_drop(entries, ["non_english"]) == {}
    assert set(DROPPABLE) - {"near_duplicates", "damaged_photographs"} <= set(SIMPLE)


def test_an_analysis_that_is_gone_is_a_finding(world: World) -> None:
    """A file deleted since linking is reported, never skipped."""
    job = add(world, 1, label(varied(1), "a tree"))
    linked = link(world.db, world.source, world.analyses, "ansel", scratch=world.output)
    for path in (*world.analyses.glob("*"), *world.output.rglob("*.md")):
        path.unlink()
    found = audit(entries_of_manifest(linked.manifest), min_pixels=3136, max_pixels=10**6)
    assert named(found)["unreadable"] == (job,)


# -- photographs ---------------------------------------------------------------------------------


def test_a_copy_is_found_and_a_damaged_photograph_is_named(world: World) -> None:
    """The audit's groups are those of the split; what cannot be decoded is in none of them."""
    for key in range(4):
        add(world, key, label(varied(key), f"stone number {key}"))
    for key in range(4):
        render(Scene.draw(np.random.default_rng(key))).save(world.source / f"{key}.png")
    with Image.open(world.source / "0.png") as picture:
        width, height = picture.size
        box = (width // 8, height // 8, width, height)
        picture.crop(box).save(world.source / "1.png")
    linked = link(world.db, world.source, world.analyses, "ansel", scratch=world.output)
    entries = entries_of_manifest(linked.manifest)
    (world.source / "3.png").write_bytes((world.source / "3.png").read_bytes()[:3000])
    cache = world.folder / "looks.npz"
    told: list[tuple[int, int]] = []
    found = audit(
        entries,
        min_pixels=3136,
        max_pixels=10**6,
        cache=cache,
        progress=lambda *count: told.append(count),
    )
    assert named(found)["near_duplicates"] == ("job-01",)
    assert named(found)["damaged_photographs"] == ("job-03",)
    damaged = next(f for f in found.findings if f.name == "damaged_photographs")
    assert "3.png" in damaged.explanation
    assert "data.drop=[damaged_photographs]" in damaged.action
    groups = found.facts["similar_photographs"]
    photographs = {e.job_id: e.photograph for e in entries}
    assert groups == [sorted([photographs["job-00"], photographs["job-01"]])]
    assert told[-1] == (4, 4)
    dropped = rows_to_drop(entries, ["damaged_photographs", "near_duplicates"], cache=cache)
    assert dropped == {"job-03": "damaged_photographs", "job-01": "near_duplicates"}
    paths = {entry.photograph: entry.image for entry in entries}
    assert [sorted(group) for group in near_groups(paths, cache=cache).several()] == groups


@pytest.mark.parametrize("size", [(4032, 3024), (4000, 3000), (237, 304), (320, 240), (40, 900)])
def test_image_tokens_are_the_processors(size: tuple[int, int]) -> None:
    """The count without decoding is what the model's own processor makes."""
    from mondrian_ft.model.processor import image_processor
    from mondrian_ft.sample import model_dir

    processor = image_processor(Path(model_dir()))
    picture = np.zeros((3, size[1], size[0]), np.uint8)
    for least, most in ((4096, 24576), (3136, 131_072)):
        made = processor([picture], min_pixels=least, max_pixels=most)["image_grid_thw"][0]
        assert image_tokens(*size, least, most) == int(np.prod(made)) // 4


def test_an_uncapped_photograph_costs_what_the_facts_say() -> None:
    """4000 x 3000 pixels are 11,750 image tokens in Qwen3-VL (facts: "Photographs")."""
    assert image_tokens(4000, 3000, 3136, 10**9) == 11_750


def test_loops_and_verdicts() -> None:
    """A phrase in a row is counted; verdicts grow milder with the photographs."""
    assert longest_loop("**peace****peace** " * 30) == 60
    assert longest_loop("light and shade, light and shape") < 8

    def code(n: int) -> str:
        return judge(rows=n, photographs=n, independent=n, informative=n, informative_rows=n).code

    assert [code(n) for n in (0, 1, 2, 19, 20, 99, 100)] == [
        "cannot_teach_scoring",
        "cannot_teach_scoring",
        "too_few",
        "too_few",
        "limited",
        "limited",
        "sound",
    ]
    assert smallest_shown(25) == pytest.approx(0.56)


@pytest.mark.skipif(not (SHARED / "real").is_dir(), reason="the shared folder is not there")
def test_real_responses(tmp_path: Path) -> None:
    """Of 17 real responses, the eight with template scores, the Chinese one, the loop and the
    thinking are found, and what is left teaches no scoring."""
    lines = (SHARED / "real" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    records = []
    for index, line in enumerate(lines):
        path = tmp_path / f"{index}.md"
        path.write_text(json.loads(line)["response"], encoding="utf-8")
        records.append(
            {
                "job_id": f"{index:02d}",
                "image_path": str(tmp_path / f"{index}.jpg"),
                "analysis_path": str(path),
                "image_sha256": f"{index}",
                "image_size": [3024, 4032],
            }
        )
    manifest = {"by_advisor": {"ansel": {"count": len(records), "records": records}}}
    found = audit(entries_of_manifest(manifest), min_pixels=3136, max_pixels=1_310_720)
    rows = named(found)
    assert rows["template_scores"] == ("01", "02", "03", "04", "05", "06", "07", "08")
    assert rows["non_english"] == ("16",)
    assert rows["token_loops"] == ("09",)
    assert rows["thinking_text"] == ("12", "13", "14", "15")
    assert found.verdict.code == "cannot_teach_scoring"
