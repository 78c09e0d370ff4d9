"""One database with every quirk that real ones were seen to have, and what becomes of each row.

The schema is the sample's copy of a real one. Every case names the quirk as the users' facts do;
rows that cannot be used have the reason that is expected, the others what must be true of their
record. No row may be left over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from sqlite3 import connect
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.data.audit import audit, entries_of_manifest
from mondrian_ft.data.link import LinkResult, link

from .shapes import cards, dimensional, markdown, thinking
from .world import ANSEL_PROMPT, SYSTEM_PROMPT, World, critique, fenced

UUID = "0a1b2c3d-0000-4000-8000-00112233aabb"
PHOTO = "photo-B5352222-1111-4222-8333-444455556666-0552bf0a.jpg"
TEMPLATE = (8, 7, 9, 6, 7, 8, 7)


@dataclass
class Quirk:
    """A row: its columns, what else it needs on disk, and what must become of it."""

    columns: dict[str, Any]
    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    setup: Callable[[World], object] = lambda world: None


def text(score: float = 7, **changes: Any) -> dict[str, Any]:
    """Columns of a row whose analysis stands in it."""
    return {"filename": "plain.jpg", "analysis_markdown": fenced(critique(score, **changes))}


def without(key: str) -> str:
    value = critique(7)
    del value[key]
    return fenced(value)


def scores(*given: float, overall: float = 7.4) -> str:
    value = critique(overall)
    for dimension, score in zip(value["dimensions"], given, strict=True):
        dimension["score"] = score
    return fenced(value)


def renamed(**names: str) -> str:
    """The critique with keys spelled as models have spelled them."""
    said = json.dumps(critique(7))
    for right, wrong in names.items():
        said = said.replace(f'"{right}"', f'"{wrong}"')
    return said


def sideways(world: World) -> None:
    """A phone's picture: wide on disk, orientation 6, so upright it is tall."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48), "olive").save(world.source / "phone.jpg", exif=exif)


def profile(job: str, **scores_of: float) -> Callable[[World], None]:
    """A row of dimensional_profiles for a job."""

    def setup(world: World) -> None:
        columns = {f"{name}_score": score for name, score in scores_of.items()}
        values = {
            "id": f"profile-{job}",
            "job_id": job,
            "advisor_id": "ansel",
            "image_path": f"/tmp/{job}.jpg",
            "overall_grade": "7.4",
            **columns,
        }
        with closing(connect(world.db)) as connection:
            marks = ", ".join("?" * len(values))
            connection.execute(
                f"INSERT INTO dimensional_profiles ({', '.join(values)}) VALUES ({marks})",
                list(values.values()),
            )
            connection.commit()

    return setup


def scan(world: World) -> None:
    Image.new("L", (48, 40), 99).save(world.source / "scan.jpg")


def dot(world: World) -> None:
    Image.new("RGBA", (1, 1)).save(world.source / "dot.png")


def thumbnail(world: World) -> None:
    Image.new("RGB", (237, 304), "navy").save(world.source / "thumb.jpg")


def prefixed(world: World) -> None:
    name = "analysis-photo-B535-0552bf.html"
    (world.analyses / name).write_text(cards(critique(5)))
    world.photo(PHOTO, 7)


FINISHED = ("done", "completed", " Done ")
UNFINISHED = ("error", "failed", "analyzing", "queued", "started", "pending", "processing", None)
DATES = (None, "2026-01-15 15:19:14", "2026-01-15T15:19:14.171701", "1768490354")
SHAPES_OF_OUTPUTS = {
    "a page": ({"ansel": cards(critique(4))}, "html"),
    "a page and its mode": ({"ansel": {"html": cards(critique(4)), "mode_used": "rag"}}, "html"),
    "the raw answer": ({"prompt": "p", "response": json.dumps(critique(4)), "model": "m"}, "json"),
}

QUIRKS: dict[str, Quirk] = {
    **{f"status {s!r}": Quirk({**text(), "status": s}) for s in FINISHED},
    **{f"status {s!r}": Quirk({**text(), "status": s}, "not_finished") for s in UNFINISHED},
    **{
        f"finished, but holds {told[:24]!r}": Quirk(
            {"filename": "plain.jpg", "analysis_markdown": told}, "analysis_failed"
        )
        for told in (
            "Failed to parse model response",
            "<html><h1>500 Internal Server Error</h1></html>",
            "Cannot connect to AI service",
        )
    },
    **{
        f"created and completed {date!r}": Quirk(
            {**text(), "created_at": date, "completed_at": date}, facts={"completed_at": date}
        )
        for date in DATES
    },
    # filename
    "filename with the upload's id": Quirk(
        {**text(), "filename": f"uploads/{UUID}_plain.jpg"},
        facts={"photograph_rule": "upload_name", "photograph_confidence": "high"},
    ),
    "filename that is a long photo name": Quirk(
        {**text(), "filename": PHOTO}, facts={"photograph_rule": "exact_name"}
    ),
    "filename of another machine": Quirk(
        {**text(), "filename": "C:\\Users\\x\\plain.jpg"}, facts={"photograph_rule": "base_name"}
    ),
    "absolute filename": Quirk(
        {**text(), "filename": "/Users/x/plain.jpg"}, facts={"photograph_rule": "base_name"}
    ),
    "filename that climbs": Quirk({**text(), "filename": "../plain.jpg"}, "unsafe_filename"),
    "filename with NUL": Quirk({**text(), "filename": "plain\0.jpg"}, "unsafe_filename"),
    "filename of no file": Quirk({**text(), "filename": "gone.jpg"}, "photograph_missing"),
    "no filename": Quirk({**text(), "filename": None}, "no_filename"),
    "empty filename": Quirk({**text(), "filename": ""}, "no_filename"),
    "an id with a suffix (rag)": Quirk(text(), facts={"analysis_rule": "inline"}),
    # analysis_file
    "0552bf00-page of another machine": Quirk(
        {
            "filename": PHOTO,
            "analysis_file": "/Users/x/analysis/analysis-photo-B535-0552bf.html",
        },
        facts={"analysis_rule": "analysis_file_name", "analysis_parser": "html"},
        setup=prefixed,
    ),
    "analysis_file of Windows": Quirk(
        {"filename": "plain.jpg", "analysis_file": "C:\\Users\\x\\theirs.md"},
        facts={"analysis_rule": "analysis_file_name"},
        setup=lambda world: (world.analyses / "theirs.md").write_text(fenced(critique(5))),
    ),
    "analysis_file NULL and nothing else": Quirk({"filename": "plain.jpg"}, "no_analysis"),
    "analysis_file empty and nothing else": Quirk(
        {"filename": "plain.jpg", "analysis_file": "", "analysis_markdown": ""}, "no_analysis"
    ),
    # analysis_markdown
    "analysis_markdown as cards": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": cards(critique(5))},
        facts={"analysis_parser": "html"},
    ),
    "analysis_markdown as Markdown": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": markdown(critique(5))},
        facts={"analysis_parser": "markdown"},
    ),
    "analysis_markdown as bare JSON": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": json.dumps(critique(5))},
        facts={"analysis_parser": "json", "mends": []},
    ),
    "analysis_markdown as a file name": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": "named.md"},
        facts={"analysis_rule": "analysis_markdown_name"},
        setup=lambda world: (world.analyses / "named.md").write_text(fenced(critique(5))),
    ),
    "analysis_markdown names no file": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": "nowhere.md"}, "analysis_missing"
    ),
    # llm_outputs
    **{
        f"llm_outputs is {name}": Quirk(
            {"filename": "plain.jpg", "llm_outputs": json.dumps(value)},
            facts={"analysis_parser": parser, "overall_score": 4},
        )
        for name, (value, parser) in SHAPES_OF_OUTPUTS.items()
    },
    "llm_outputs of another advisor": Quirk(
        {"filename": "plain.jpg", "llm_outputs": json.dumps({"watkins": cards(critique(4))})},
        "no_analysis",
    ),
    # prompt
    "its own prompt": Quirk(
        {**text(), "prompt": "Judge this, as you were asked in January."},
        facts={"prompt_source": "jobs.prompt"},
    ),
    "no prompt": Quirk(text(), facts={"prompt_source": "config.system_prompt + advisors.prompt"}),
    # advisor
    "advisor all": Quirk({**text(), "advisor": "all"}, "advisor_unclear"),
    "advisor random": Quirk({**text(), "advisor": "random"}, "advisor_unclear"),
    "advisor list": Quirk({**text(), "advisor": "ansel,watkins"}, "advisor_unclear"),
    "advisor NULL": Quirk({**text(), "advisor": None}, "advisor_unclear"),
    "advisor okeeffe": Quirk({**text(), "advisor": "okeeffe"}, "other_advisor"),
    **{
        f"mode {mode}": Quirk({**text(), "mode": mode})
        for mode in ("baseline", "lora", "rag", "lora+rag", "rag_lora", "ab_test")
    },
    # dimensional_profiles
    "a profile alone": Quirk(
        {"filename": "plain.jpg"},
        "incomplete",
        setup=profile("a profile alone", composition=8, lighting=6, visual_balance=7),
    ),
    "a profile of all tens": Quirk(
        {"filename": "plain.jpg"},
        "wrong_shape",
        setup=profile("a profile of all tens", composition=10, lighting=10, visual_balance=10),
    ),
    # the analysis
    "eight dimensions": Quirk(
        text(
            dimensions=[
                *critique(7)["dimensions"],
                {**critique(7)["dimensions"][0], "name": "Subject Isolation"},
            ]
        ),
        facts={"mends": []},
    ),
    "five dimensions": Quirk(text(dimensions=critique(7)["dimensions"][:5])),
    "a grade as text": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": dimensional(critique(9))},
        facts={"analysis_parser": "dimensional", "overall_score": 9},
    ),
    "a letter for a grade": Quirk(
        {
            "filename": "plain.jpg",
            "analysis_markdown": dimensional(critique(9)).replace(
                '"overall_grade": "9"', '"overall_grade": "A-"'
            ),
        },
        "score_not_a_number",
    ),
    "thinking before the JSON": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": thinking(critique(6))},
        facts={"analysis_parser": "json"},
    ),
    "misspelled keys": Quirk(
        {
            "filename": "plain.jpg",
            "analysis_markdown": renamed(dimensions="dimsions", score="scroe"),
        },
        facts={"overall_score": 7},
    ),
    "a prompt echoed with a schema of its own": Quirk(
        {
            "filename": "plain.jpg",
            "analysis_markdown": 'user\nJudge.\nassistant\n{"tonal_range": "wide", "mood": "calm"}',
        },
        "wrong_shape",
    ),
    "a loop up to the token limit": Quirk(
        {
            "filename": "plain.jpg",
            "analysis_markdown": json.dumps(critique(7))[:-60] + "**peace**" * 674,
        },
        "broken_json",
    ),
    "word salad": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": "<thought>\n" + "calm spirit essence " * 99},
        "no_json",
    ),
    "an object where a list belongs": Quirk(
        {
            "filename": "plain.jpg",
            "analysis_markdown": fenced(critique(7, dimensions={"Composition": 8})),
        },
        "wrong_shape",
    ),
    "two different blocks": Quirk(
        {
            "filename": "plain.jpg",
            "analysis_markdown": fenced(critique(3)) + "\n" + fenced(critique(8)),
        },
        "two_json_blocks",
    ),
    "a key is missing": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": without("key_strengths")}, "incomplete"
    ),
    "an empty text is a value": Quirk(text(technical_notes="")),
    "a score out of range": Quirk(text(11), "score_out_of_range"),
    "the template's scores": Quirk(
        {"filename": "plain.jpg", "analysis_markdown": scores(*TEMPLATE)}
    ),
    "Chinese": Quirk(
        text(image_description="日落时分的山丘景观，天空被橙黄色和紫色的云彩染色。" * 4)
    ),
    # photographs
    "a phone's picture lies on its side": Quirk(
        {**text(), "filename": "phone.jpg"},
        facts={"image_orientation": 6, "image_size": [48, 64]},
        setup=sideways,
    ),
    "a grey scan": Quirk({**text(), "filename": "scan.jpg"}, setup=scan),
    "one transparent pixel": Quirk(
        {**text(), "filename": "dot.png"}, "photograph_too_small", setup=dot
    ),
    "a thumbnail of 237 x 304": Quirk({**text(), "filename": "thumb.jpg"}, setup=thumbnail),
}


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, LinkResult]:
    """The database with all of them, linked once."""
    schema = resources.files("mondrian_ft.sample").joinpath("schema.sql").read_text("utf-8")
    world = World(tmp_path_factory.mktemp("quirks"), schema)
    world.photo("plain.jpg", 1)
    for job, quirk in QUIRKS.items():
        quirk.setup(world)
        world.row(f"{job} (rag)" if "suffix" in job else job, **quirk.columns)
    return world, link(
        world.db, world.source, world.analyses, "ansel", scratch=world.output, accept="mended"
    )


def test_every_row_is_accounted_for(linked: tuple[World, LinkResult]) -> None:
    """The counts add up, and every reason is the one a person gave beforehand."""
    _, result = linked
    report = result.report
    assert report["rows"] == len(QUIRKS)
    assert report["linked"] + len(report["left_out"]) == report["rows"]
    expected = {job: quirk.reason for job, quirk in QUIRKS.items() if quirk.reason}
    assert {entry["job_id"]: entry["reason"] for entry in report["left_out"]} == expected
    # A person reads the detail: a sentence, never a traceback or an empty text.
    assert all(entry["detail"].endswith((".", ".)")) for entry in report["left_out"])


def test_what_links_says_how(linked: tuple[World, LinkResult]) -> None:
    """Source, rule, parser, prompt and picture of each linked row are those of its quirk."""
    _, result = linked
    records = {r["job_id"]: r for r in result.manifest["by_advisor"]["ansel"]["records"]}
    usable = {job: quirk for job, quirk in QUIRKS.items() if quirk.reason is None}
    assert {job.removesuffix(" (rag)") for job in records} == set(usable)
    for job, quirk in usable.items():
        record = records.get(job) or records[f"{job} (rag)"]
        assert {key: record[key] for key in quirk.facts} == quirk.facts, job
        assert Path(record["image_path"]).is_file()
        assert Path(record["analysis_path"]).is_file()
        assert len(record["image_sha256"]) == 64
        prompt = result.manifest["prompts"][record["prompt_id"]]
        if prompt["source"] != "jobs.prompt":
            assert prompt["text"].startswith(SYSTEM_PROMPT)
            assert ANSEL_PROMPT in prompt["text"]


def test_the_audit_names_what_linking_could_not_know(linked: tuple[World, LinkResult]) -> None:
    """Valid, but bad: the template's scores, another language, an empty text, another era."""
    _, result = linked
    found = audit(entries_of_manifest(result.manifest), min_pixels=3_136, max_pixels=1_310_720)
    rows = {finding.name: set(finding.rows) for finding in found.findings}
    assert rows["template_scores"] == {"the template's scores"}
    assert "Chinese" in rows["non_english"]
    assert "an empty text is a value" in rows["empty_texts"]
    assert {"eight dimensions", "five dimensions"} <= rows["dimension_drift"]
    assert rows["thinking_text"] == {"thinking before the JSON"}
