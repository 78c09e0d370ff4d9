"""``report.html``: one self-contained page that shows what fine-tuning changed.

It needs no network and no font of its own, and it follows the reader's light or dark setting, the
width of the screen, and paper. Its one script puts the photographs in another order; without it
they are all there, in that of the file, and the page's policy lets no other script run.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation import assessments, judge
from ..files import atomic_write_text
from . import compare_plots, experiment, page, plots, view, wording

if TYPE_CHECKING:
    from jinja2 import Environment

STRIP_SIDE = 132
FIGURES = (
    ("token_accuracy", "Share of trained tokens right"),
    ("grad_norm", "Gradient norm, before clipping"),
    ("learning_rate", "Learning rate"),
    ("tokens_per_second", "Tokens a second"),
    ("peak_memory_gb", "Peak memory, GB"),
    ("data_wait_seconds", "Seconds waiting for data"),
)
"""What is drawn besides the losses, of the log's ``kind: step``."""
PEOPLE = ("<!-- people -->", "<!-- /people -->")
"""What stands around the part of a page about preferences: people's come later than the page, and
with them how far a judge agrees."""


def write(
    report: Mapping[str, Any],
    log_path: Path | str | None,
    run_facts: Mapping[str, Any],
    out: Path | str,
    *,
    photos: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the page of one ``comparison_report.json`` to ``out`` and return its path.

    ``log_path`` is the run's ``training_log.jsonl``; None or a missing file means that nothing was
    trained, and the page says so. ``run_facts`` are the facts of ``run.json``; whatever of them is
    missing is left out. ``photos`` maps the ``image_path`` of ``sample_results`` to upright JPEG
    bytes; None makes them from those files.

    Raises:
        DataError: the log holds a line that is not a JSON object.
        MondrianError: ``out`` cannot be written.
    """
    out = Path(out)
    log = plots.read_log(Path(log_path)) if log_path else []
    shown = thumbnails(report) if photos is None else photos
    atomic_write_text(out, render(report, log, run_facts, shown))
    return out


def render(
    report: Mapping[str, Any],
    log: list[dict[str, Any]],
    run_facts: Mapping[str, Any],
    photos: Mapping[str, bytes],
) -> str:
    """The page as text. All that a model or a database wrote is escaped."""
    from markupsafe import Markup

    environment = _environment()
    shown = view.page(report, {path: picture(data) for path, data in photos.items()})
    sizes = (("wide", 1040, 300), ("narrow", 343, 230))
    curves = [(css, plots.loss_curves(log, width=w, height=h)) for css, w, h in sizes]
    paired = [(css, plots.paired(shown["pairs"], width=w, height=h)) for css, w, h in sizes]
    script = page.source(environment, "report.js")
    return environment.get_template("report.html.j2").render(
        **shown,
        style=page.source(environment, "report.css"),
        script=script,
        script_hash=page.hashed(script),
        curves=[(css, Markup(drawn)) for css, drawn in curves if drawn],
        paired=[(css, Markup(drawn)) for css, drawn in paired if drawn],
        figures=figures(log),
        training=training(log),
        settings=settings(report, run_facts),
        warnings=list(run_facts.get("warnings") or []),
        version=((run_facts.get("provenance") or {}).get("versions") or {}).get("mondrian_ft"),
        people=Markup(people_part(*(report["evidence"].get(key) for key in ("people", "judge")))),
    )


def figures(log: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(heading, drawings by the width of the screen) of each of `FIGURES` that was logged."""
    from markupsafe import Markup

    found: list[tuple[str, list[tuple[str, Any]]]] = []
    for key, name in FIGURES:
        points = plots.series(log, "step", key)
        if len(points) < 2:
            continue
        line = compare_plots.Curve("", "one", name, points)
        sizes = (("wide", 500, 190), ("narrow", 343, 190))
        drawn = [
            (css, Markup(compare_plots.curves([line], name, width=width, height=height)))
            for css, width, height in sizes
        ]
        found.append((name, drawn))
    return found


def _environment() -> Environment:
    environment = page.environment()
    environment.filters |= {
        "points": wording.points,
        "seconds": wording.seconds,
        "duration": wording.duration,
    }
    return environment


def people_part(people: Mapping[str, Any] | None, judged: Mapping[str, Any] | None = None) -> str:
    """The part of the page about ``evidence.people`` and ``evidence.judge``, between its marks."""
    parts: list[str] = []
    if people:
        shares = [(arm, wording.label(arm), people[arm]) for arm in ("tuned", "equal", "base")]
        said, notes = assessments.sentence(people), assessments.notes(people)
        template = _environment().get_template("people.html.j2")
        parts.append(template.render(sentence=said, notes=notes, shares=shares))
    if judged:
        names = ("tuned", "equal", "order_dependent", "unreadable", "base")
        template = _environment().get_template("judge.html.j2")
        parts.append(
            template.render(
                model=judged["model"],
                url=judged["url"],
                sentence=judge.sentence(judged),
                notes=judge.notes(judged),
                shares=[(name, wording.label(name), judged[name]) for name in names]
                if "error" not in judged
                else None,
            )
        )
    return "\n".join(parts).join(PEOPLE)


def set_people(
    source: Path,
    out: Path,
    people: Mapping[str, Any] | None,
    judged: Mapping[str, Any] | None = None,
) -> bool:
    """Write a page that `write` made to ``out``, with other preferences in it and else the same.

    Returns False, and writes nothing, where ``source`` has no place for them.

    Raises:
        OSError: ``source`` cannot be read.
        MondrianError: ``out`` cannot be written.
    """
    # All that a model or a database wrote is escaped, so that it cannot hold the marks.
    before, start, rest = source.read_text(encoding="utf-8").partition(PEOPLE[0])
    _, end, after = rest.partition(PEOPLE[1])
    if not (start and end):
        return False
    atomic_write_text(out, before + people_part(people, judged) + after)
    return True


def picture(data: bytes) -> dict[str, Any]:
    """A JPEG as the page holds it: data URIs of it and of a small copy, and its size in pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
        small = opened.convert("RGB")
        small.thumbnail((STRIP_SIDE, STRIP_SIDE))
    return {
        "src": data_uri(data),
        "small": data_uri(jpeg(small, quality=78)),
        "width": width,
        "height": height,
    }


def thumbnails(report: Mapping[str, Any], *, side: int | None = None) -> dict[str, bytes]:
    """Upright JPEGs of the photographs by ``image_path``, their longer side at most ``side``.

    By default 800 pixels, fewer where there are many, to keep the page light. A photograph that is
    gone or cannot be opened is left out, and its card says so.
    """
    from PIL import Image, ImageOps

    paths = dict.fromkeys(sample["image_path"] for sample in report["sample_results"])
    side = side or (800 if len(paths) <= 30 else 560 if len(paths) <= 120 else 320)
    found: dict[str, bytes] = {}
    for path in paths:
        try:
            with Image.open(path) as opened:
                # Decoding at a fraction of the size spares seconds on 12-megapixel photographs.
                opened.draft("RGB", (2 * side, 2 * side))
                upright = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        upright.thumbnail((side, side))
        found[path] = jpeg(upright, quality=82)
    return found


def jpeg(image: Any, *, quality: int) -> bytes:
    """An RGB image as JPEG, without metadata: a photograph's place and time stay private."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    """JPEG bytes as a ``data:`` address."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"


def training(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A few closing figures of the training, as (name, value)."""
    steps = [line for line in log if line.get("kind") == "step"]
    held = plots.series(log, "eval", "val_loss")
    found: list[tuple[str, str]] = []
    if steps:
        found.append(("Updates", f"{steps[-1]['step']}"))
    if held:
        step, loss = min(held, key=lambda point: point[1])
        found.append(("Lowest held-out loss", f"{loss:.3f} after {step:.0f} updates"))
    for key, name, unit, pick in (
        ("learning_rate", "Peak learning rate", "", max),
        ("tokens_per_second", "Speed", " tokens/s", median),
        ("peak_memory_gb", "Peak memory", " GB", max),
    ):
        values = [value for _, value in plots.series(log, "step", key)]
        if values:
            value = pick(values)
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            found.append((name, text + unit))
    return found


def median(values: list[float]) -> float:
    """The middle value: the first updates compile, and are no measure of speed."""
    return sorted(values)[len(values) // 2]


def settings(
    report: Mapping[str, Any], run_facts: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """The page's last section, (heading, [(name, value)]): all it takes to repeat the run."""
    evidence = report["evidence"]
    provenance = run_facts.get("provenance") or {}
    git = provenance.get("git") or {}
    commit = (
        f"{git['commit']}{' + changes' if git.get('dirty') else ''}" if git.get("commit") else None
    )
    groups: list[tuple[str, dict[str, Any]]] = [
        (
            "This comparison",
            {
                "base model": report["base_model"],
                "adapter": report["lora_path"],
                "adapter hash": evidence.get("adapter_hash"),
                "evaluated": report["validation_data"],
                "date": report["evaluation_date"],
            }
            | evidence.get("settings", {}),
        ),
        (
            "The run",
            {
                "experiment": run_facts.get("experiment"),
                "started": run_facts.get("started"),
                "took": wording.duration(run_facts["seconds"]) if "seconds" in run_facts else None,
                "command": experiment.typed(provenance) if provenance.get("argv") else None,
                "config hash": run_facts.get("config_hash"),
                "commit": commit,
                "python": provenance.get("python"),
                "platform": provenance.get("platform"),
            }
            | dict(provenance.get("versions") or {}),
        ),
    ]
    for group, values in (run_facts.get("config") or {}).items():
        if group in ("data", "model", "lora", "optimizer", "trainer", "eval"):
            groups.append((group.capitalize(), values))
    return [
        (heading, [(name, plain(value)) for name, value in values.items() if told(value)])
        for heading, values in groups
    ]


def told(value: Any) -> bool:
    """Whether a setting says anything: null and empty ones are defaults that nobody chose."""
    return value is not None and value != "" and value not in ([], {})


def plain(value: Any) -> str:
    """A setting as text: a list by commas, a number without noise, true and false as one types."""
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(held)}" for key, held in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
