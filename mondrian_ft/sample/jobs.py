"""What the service did with a seed's photographs: the plan of a sample database, nothing on disk.

Good rows and, beside them, a handful of every kind of dirt that real databases hold (facts: "The
jobs table", "The analysis"). Each row knows its kind and what linking should make of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ..data.reasons import Reason
from .critics import ANSEL, GENERIC, WATKINS
from .prompts import ADVISORS, CLOSING, SYSTEM_PROMPT, Advisor
from .scenes import Scene

if TYPE_CHECKING:
    import numpy as np

PHOTOGRAPHS = 118
"""Photographs with a good analysis by ansel; 0.15 of them, the sample's test part, are 18."""
WATKINS_OWN, WATKINS_SHARED = 14, 6

ADVISOR_ROWS = (
    *ADVISORS,
    Advisor("weston", "Edward Weston", "1886-1958", "photographer", ("tone", "order", "calm")),
    Advisor("okeefe", "Georgia O'Keeffe", "1887-1986", "painter", ("colour", "balance", "mood")),
)
_CRITICS = {"ansel": ANSEL, "watkins": WATKINS}
_PROMPTS = {
    advisor.id: f"{SYSTEM_PROMPT}\n\n{advisor.prompt}\n\n{CLOSING}" for advisor in ADVISOR_ROWS
}
_BEGIN = datetime(2026, 1, 2, 8, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Photograph:
    """A file of ``source/``.

    Attributes:
        name: the file's name.
        column: how rows spell it in ``jobs.filename``.
        orientation: the EXIF orientation it is stored with: 1 upright, 3, 6 or 8 turned.
        grey: stored in one channel (facts: "mode-L scans"); only monochrome scenes are.
        quality: of the JPEG, 86 to 93.
        damage: ``""``, ``truncated``, ``pixel`` (a 1x1 RGBA PNG) or ``text``.
        copy_of: name of the file whose bytes it repeats, or ``""``.
    """

    name: str
    column: str
    scene: Scene
    orientation: int = 1
    grey: bool = False
    quality: int = 90
    damage: str = ""
    copy_of: str = ""


@dataclass
class Job:
    """A row of ``jobs`` to be.

    Attributes:
        columns: what the row holds; columns not named are NULL.
        kind: why it is there: ``good``, ``shared``, or the kind of dirt.
        reason: why linking leaves it out, told that its own advisor is wanted; None if it links.
        analysis: (name, text) of its file in ``analysis_md/``, if it has one.
    """

    columns: dict[str, Any]
    kind: str
    reason: Reason | None = None
    analysis: tuple[str, str] | None = None


@dataclass
class Plan:
    """Everything a sample database holds."""

    photographs: list[Photograph] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


def plan(seed: int) -> Plan:
    """The photographs and jobs of a seed; the same seed gives the same plan."""
    service = _Service(seed)
    _good_rows(service)
    _bad_analyses(service)
    _bad_photographs(service)
    _bad_rows(service)
    return service.finish()


def fenced(critique: Mapping[str, Any]) -> str:
    """An analysis as the service writes it to a file."""
    return f"```json\n{json.dumps(critique, indent=2, ensure_ascii=False)}\n```"


def cards(critique: Mapping[str, Any]) -> str:
    """An analysis as the service's older HTML cards."""
    made = (
        f'<div class="dimension-card"><h3>{d["name"]} '
        f'<span class="dimension-score">({d["score"]}/10)</span></h3>'
        f"<p>{d['comment']}</p><p><strong>Recommendation:</strong> {d['recommendation']}</p></div>"
        for d in critique["dimensions"]
    )
    return f'<div class="analysis"><p>{critique["image_description"]}</p>{"".join(made)}</div>'


class _Service:
    """Takes photographs and runs jobs on them, one random stream for each purpose."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self.seed = seed
        self.rng = np.random.default_rng([seed, 0])
        self.plan = Plan()
        self.scenes = 0

    def photograph(self, **changes: Any) -> Photograph:
        """A new photograph of a new scene."""
        import numpy as np

        self.scenes += 1
        scene = Scene.draw(np.random.default_rng([self.seed, self.scenes]))
        name, column = self._names()
        rng = self.rng
        turned = rng.random() < 0.2
        taken = Photograph(
            name,
            column,
            scene,
            orientation=int(rng.choice([3, 6, 6, 8])) if turned else 1,
            grey=bool(rng.random() < 0.4) and scene.colour == "monochrome",
            quality=int(rng.integers(86, 94)),
        )
        taken = replace(taken, **changes)
        self.plan.photographs.append(taken)
        return taken

    def uuid(self) -> str:
        return str(UUID(bytes=self.rng.bytes(16), version=4))

    def critique(self, shown: Photograph, advisor: str) -> dict[str, Any]:
        """What an advisor says about a photograph, this time."""
        return _CRITICS.get(advisor, GENERIC).critique(shown.scene, self.rng)

    def job(
        self,
        kind: str,
        shown: Photograph,
        advisor: str = "ansel",
        *,
        text: str | None = "",
        inline: bool = False,
        reason: Reason | None = None,
        job_id: str | None = None,
        **columns: Any,
    ) -> Job:
        """A finished job on a photograph.

        Args:
            text: its analysis; ``""`` is a good one, fenced, and None is none at all.
            inline: whether the analysis stands in the row rather than in a file.
            columns: what to write instead of the usual.
        """
        job_id = job_id or self.uuid()
        critique = self.critique(shown, advisor)
        text = fenced(critique) if text == "" else text
        name = f"analysis-{advisor}-{job_id}.md"
        row: dict[str, Any] = {
            "id": job_id,
            "filename": shown.column,
            "advisor": advisor,
            "thinking": 0,
            "status": "completed" if self.rng.random() < 0.15 else "done",
            "analysis_file": self._analysis_file(shown.name, job_id),
            "analysis_markdown": text if inline else name if self.rng.random() < 0.7 else "",
            "current_step": "Completed",
            "current_advisor": 1,
            "total_advisors": 1,
            "llm_thinking": "",
            "type": "image",
            "prompt": _PROMPTS[advisor]
            if advisor in _PROMPTS and self.rng.random() < 0.6
            else None,
            "progress_percentage": 100,
            "enable_rag": 0,
            "mode": "baseline",
            "retry_count": 0,
            "model": "Qwen/Qwen3-VL-4B-Instruct",
        }
        if kind in ("good", "shared"):
            row |= {"llm_outputs": self._outputs(critique, advisor)}
        made = Job({**row, **columns}, kind, reason)
        if text is not None and not inline:
            made.analysis = (name, text)
        self.plan.jobs.append(made)
        return made

    def finish(self) -> Plan:
        """Put the jobs in a random order and date them along it."""
        jobs = self.plan.jobs
        self.plan.jobs = [jobs[index] for index in self.rng.permutation(len(jobs))]
        moment = _BEGIN
        for job in self.plan.jobs:
            moment += timedelta(seconds=int(self.rng.integers(200, 7200)))
            job.columns |= self._dates(moment, job.columns["status"])
        return self.plan

    def _names(self) -> tuple[str, str]:
        """A file's name and a row's spelling of it; numbers make every name unique."""
        rng, number = self.rng, 1000 + 7 * self.scenes
        style = rng.random()
        if style < 0.55:
            name = f"photo-{self.uuid().upper()}-{rng.bytes(4).hex()}.jpg"
            return name, name
        if style < 0.75:
            return f"IMG_{number}.jpg", f"uploads/{self.uuid()}_IMG_{number}.jpg"
        if style < 0.85:
            name = f"{self.uuid()}_DSC_{number}.jpg"
            return name, f"uploads/{name}"
        if style < 0.90:
            return f"IMG_{number}.jpg", f"/Users/studio/mondrian/source/IMG_{number}.jpg"
        if style < 0.93:
            return f"IMG_{number}.jpg", rf"C:\Users\studio\Pictures\IMG_{number}.jpg"
        return f"scan {number} (ridge).jpeg", f"scan {number} (ridge).jpeg"

    def _analysis_file(self, photograph: str, job_id: str) -> str | None:
        """Where another machine kept the page: no use here, as in most real rows."""
        name = f"analysis-{photograph.rsplit('.', 1)[0][:10]}-{job_id[:6]}"
        options = (
            f"/Users/studio/mondrian/analysis/{name}.html",
            rf"C:\Users\studio\mondrian\analysis\{name}.md",
            "",
            None,
        )
        return options[self.rng.choice(4, p=[0.4, 0.1, 0.2, 0.3])]

    def _outputs(self, critique: Mapping[str, Any], advisor: str) -> str | None:
        """``llm_outputs`` in one of its shapes, or none."""
        shape = self.rng.integers(6)
        if shape == 0:
            return json.dumps({advisor: cards(critique)})
        if shape == 1:
            return json.dumps({advisor: {"html": cards(critique), "mode_used": "baseline"}})
        if shape == 2:
            raw = json.dumps(critique, ensure_ascii=False)
            return json.dumps(
                {
                    "prompt": _PROMPTS[advisor],
                    "response": raw,
                    "summary": critique["image_description"],
                    "model": "Qwen/Qwen3-VL-4B-Instruct",
                    "timestamp": _BEGIN.isoformat(),
                }
            )
        return None

    def _dates(self, moment: datetime, status: str) -> dict[str, Any]:
        """The row's times, in the forms that real ones have (facts: "created_at")."""
        forms = (
            moment.strftime("%Y-%m-%d %H:%M:%S"),
            moment.replace(tzinfo=None).isoformat(),
            str(int(moment.timestamp())),
            None,
        )
        ended = moment + timedelta(seconds=int(self.rng.integers(20, 160)))
        finished = status in ("done", "completed")
        history = [{"status": "queued", "at": forms[0]}, {"status": status, "at": forms[0]}]
        return {
            "created_at": forms[self.rng.choice(4, p=[0.5, 0.3, 0.1, 0.1])],
            "started_at": forms[0] if status not in ("queued", "pending") else None,
            # NULL on most finished rows.
            "completed_at": ended.isoformat() if finished and self.rng.random() < 0.3 else None,
            "last_activity": ended.strftime("%Y-%m-%d %H:%M:%S"),
            "status_history": json.dumps(history),
        }


# -- good rows -----------------------------------------------------------------------------------


def _good_rows(service: _Service) -> None:
    """Ansel's and Watkins's, photographs they share, second runs, and other advisors' few."""
    mended = (_string_scores, _string_scores, _out_of_ten, _out_of_ten, _thinking_first)
    shots = [service.photograph() for _ in range(PHOTOGRAPHS)]
    plain, others = shots[: -len(mended) - 1], shots[-len(mended) - 1 :]
    first_runs = [
        service.job("good", shown, inline=index % 15 == 14) for index, shown in enumerate(plain)
    ]
    for shown, spoil in zip(others, mended, strict=False):
        text = spoil(service.critique(shown, "ansel"))
        service.job(spoil.__name__.strip("_"), shown, text=text)
    # An id with a suffix whose file has the bare id.
    bare = service.uuid()
    alone = service.job("rag_only", others[-1], job_id=bare, mode="rag", enable_rag=1)
    alone.columns["id"] = f"{bare} (rag)"

    for shown, first in zip(plain[20:22], first_runs[20:22], strict=True):
        again = f"{first.columns['id']} (rag)"
        service.job("second_run", shown, job_id=again, mode="rag", enable_rag=1)
    for shown in plain[30:33]:
        name = f"IMG_{service.rng.bytes(3).hex()}.jpg"
        twin = replace(shown, name=name, column=name, copy_of=shown.name)
        service.plan.photographs.append(twin)
        service.job("duplicate_upload", twin)

    for shown in plain[:WATKINS_SHARED]:
        service.job("shared", shown, "watkins")
    for _ in range(WATKINS_OWN):
        service.job("good", service.photograph(), "watkins")

    # Valid, but no good: what an audit should find (facts: "Valid but bad").
    for shown, advisor, spoil in (
        (plain[40], "weston", _template_scores),
        (plain[41], "weston", _one_advice),
        (plain[42], "okeefe", _one_advice),
        (plain[43], "okeeffe", _chinese),
    ):
        text = fenced(spoil(service.critique(shown, advisor)))
        service.job(spoil.__name__.strip("_"), shown, advisor, text=text)


def _string_scores(critique: dict[str, Any]) -> str:
    for dimension in critique["dimensions"]:
        dimension["score"] = str(dimension["score"])
    return fenced(critique)


def _out_of_ten(critique: dict[str, Any]) -> str:
    for dimension in critique["dimensions"]:
        dimension["score"] = f"{dimension['score']}/10"
    critique["overall_score"] = f"{critique['overall_score']}/10"
    return fenced(critique)


def _thinking_first(critique: dict[str, Any]) -> str:
    return f"Okay, let me look at the photograph as Ansel would.\n\n{fenced(critique)}"


def _template_scores(critique: dict[str, Any]) -> dict[str, Any]:
    for dimension, score in zip(critique["dimensions"], (8, 7, 9, 6, 7, 8, 7), strict=True):
        dimension["score"] = score
    return {**critique, "overall_score": 7.4}


def _one_advice(critique: dict[str, Any]) -> dict[str, Any]:
    for dimension in critique["dimensions"]:
        dimension["recommendation"] = critique["dimensions"][0]["recommendation"]
    return critique


def _chinese(critique: dict[str, Any]) -> dict[str, Any]:
    for dimension in critique["dimensions"]:
        dimension |= {"comment": "画面平衡。", "recommendation": "调整光线。"}
    return {**critique, "image_description": "一幅风景照片。", "technical_notes": "曝光适中。"}


# -- dirt ----------------------------------------------------------------------------------------


def _two_blocks(critique: dict[str, Any]) -> str:
    second = copy.deepcopy(critique)
    second["dimensions"][0]["score"] = (second["dimensions"][0]["score"] + 3) % 11
    return f"{fenced(critique)}\n\nOn reflection:\n\n{fenced(second)}"


def _above_ten(critique: dict[str, Any]) -> str:
    critique["dimensions"][2]["score"] = 85
    return fenced(critique)


def _below_zero(critique: dict[str, Any]) -> str:
    return fenced({**critique, "overall_score": -1})


def _word_score(critique: dict[str, Any]) -> str:
    critique["dimensions"][1]["score"] = "high"
    return fenced(critique)


def _misspelled(critique: dict[str, Any]) -> str:
    return fenced(critique).replace('"dimensions"', '"dimsions"').replace('"score"', '"scroe"', 1)


def _cut_off(critique: dict[str, Any]) -> str:
    text = fenced(critique)
    return text[: len(text) * 3 // 5]


def _blank_comment(critique: dict[str, Any]) -> str:
    critique["dimensions"][4]["comment"] = ""
    return fenced(critique)


def _markdown(critique: dict[str, Any]) -> str:
    parts = (f"### {d['name']} ({d['score']}/10)\n{d['comment']}" for d in critique["dimensions"])
    return "## Full Analysis\n\n" + "\n\n".join(parts)


def _unparsed(critique: dict[str, Any]) -> str:
    return "Failed to parse model response"


def _http_500(critique: dict[str, Any]) -> str:
    return (
        "<!doctype html>\n<html lang=en>\n<title>500 Internal Server Error</title>\n"
        "<h1>Internal Server Error</h1>\n<p>The server encountered an internal error.</p>\n"
    )


def _no_service(critique: dict[str, Any]) -> str:
    return "Cannot connect to AI service on port 5100"


_BAD_ANALYSES: tuple[tuple[Callable[[dict[str, Any]], str], bool, int, Reason | None], ...] = (
    # (what is wrong, whether it stands in the row, how many, why it is left out if it is)
    (_unparsed, False, 2, Reason.ANALYSIS_FAILED),
    (_unparsed, True, 1, Reason.ANALYSIS_FAILED),
    (_http_500, True, 2, Reason.ANALYSIS_FAILED),
    (_no_service, True, 2, Reason.ANALYSIS_FAILED),
    (_markdown, False, 2, Reason.INCOMPLETE),
    (cards, True, 3, Reason.INCOMPLETE),
    (_two_blocks, False, 2, Reason.TWO_JSON_BLOCKS),
    (_above_ten, False, 2, Reason.SCORE_OUT_OF_RANGE),
    (_below_zero, False, 1, Reason.SCORE_OUT_OF_RANGE),
    (_word_score, False, 1, Reason.SCORE_NOT_A_NUMBER),
    (_misspelled, False, 2, None),
    (_cut_off, False, 2, Reason.BROKEN_JSON),
    (_blank_comment, False, 1, None),
)


def _bad_analyses(service: _Service) -> None:
    """Jobs that say they are done but whose analysis is none, or is not quite one."""
    photographs = [service.photograph() for _ in range(6)] + service.plan.photographs[50:75]
    shots = iter(photographs)
    for spoil, inline, count, reason in _BAD_ANALYSES:
        for _ in range(count):
            shown = next(shots)
            text = spoil(service.critique(shown, "ansel"))
            kind = spoil.__name__.strip("_")
            # A blank text is linked as it is, and would be an answer that ansel's model learns.
            advisor = "weston" if spoil is _blank_comment else "ansel"
            service.job(kind, shown, advisor, text=text, inline=inline, reason=reason)
    for value in (None, ""):
        missing: dict[str, Any] = {"analysis_file": value, "analysis_markdown": value}
        reason = Reason.NO_ANALYSIS
        service.job("no_analysis", next(shots), text=None, reason=reason, **missing)
    for _ in range(2):
        service.job(
            "analysis_gone",
            next(shots),
            text=None,
            reason=Reason.ANALYSIS_MISSING,
            analysis_markdown=f"analysis-ansel-{service.uuid()}.md",
        )


def _bad_photographs(service: _Service) -> None:
    """Jobs whose analysis is good but whose photograph is not, or is gone."""
    for damage, count, reason in (
        ("truncated", 2, Reason.PHOTOGRAPH_UNREADABLE),
        ("text", 1, Reason.PHOTOGRAPH_UNREADABLE),
        ("pixel", 1, Reason.PHOTOGRAPH_TOO_SMALL),
    ):
        for number in range(count):
            name = f"{damage}_{number}.{'png' if damage == 'pixel' else 'jpg'}"
            shown = service.photograph(name=name, column=name, damage=damage)
            service.job(f"{damage}_photograph", shown, reason=reason)
    shown = service.plan.photographs[0]
    for column in (
        f"photo-{service.uuid().upper()}-{service.rng.bytes(4).hex()}.jpg",
        f"uploads/{service.uuid()}_IMG_0001.jpg",
        "/Users/studio/Desktop/IMG_0002.HEIC",
    ):
        reason = Reason.PHOTOGRAPH_MISSING
        service.job("photograph_gone", shown, reason=reason, filename=column)
    for column in (None, ""):
        named: dict[str, Any] = {"filename": column, "analysis_file": None}
        service.job("no_filename", shown, reason=Reason.NO_FILENAME, **named)
    unsafe = Reason.UNSAFE_FILENAME
    service.job("unsafe_filename", shown, reason=unsafe, filename="../../private/IMG_0003.jpg")


def _bad_rows(service: _Service) -> None:
    """Jobs that never finished, and jobs asked of several advisors at once."""
    shots = iter(service.plan.photographs[80:])
    for status, count in (
        ("failed", 2),
        ("error", 2),
        ("queued", 1),
        ("pending", 1),
        ("started", 1),
        ("processing", 1),
        ("analyzing", 2),
    ):
        failed = status in ("failed", "error")
        for _ in range(count):
            service.job(
                status,
                next(shots),
                text=None,
                reason=Reason.NOT_FINISHED,
                status=status,
                analysis_file=None,
                analysis_markdown="Cannot connect to AI service" if failed else None,
                error="HTTPConnectionPool: read timed out" if failed else None,
                current_step="Error" if failed else "Analyzing",
                progress_percentage=0 if failed else 40,
                retry_count=3 if failed else 0,
            )
    for several in ("all", "random", "ansel,watkins"):
        job = service.job("advisor_list", next(shots), reason=Reason.ADVISOR_UNCLEAR)
        job.columns |= {"advisor": several, "total_advisors": 2}


def profiles(planned: Plan, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of ``dimensional_profiles``: eight dimensions, and two odd rows as real ones are."""
    rows = []
    photographs = [shown for shown in planned.photographs if not shown.damage][:12]
    for index, shown in enumerate(photographs):
        critique = ANSEL.critique(shown.scene, rng)
        scores = [dimension["score"] for dimension in critique["dimensions"]]
        isolation = round(sum(scores) / len(scores))
        values = [*scores[:4], isolation, *scores[4:]]
        overall = critique["overall_score"]
        path = f"/Users/studio/mondrian/source/{shown.name}"
        if index == 10:
            path = "/var/folders/8x/T/tmpk3v0q1.jpg"
        if index == 11:
            values, overall = [10] * len(values), 7.4
        rows.append(
            {
                "id": str(UUID(bytes=rng.bytes(16), version=4)),
                "advisor_id": "ansel",
                "image_path": path,
                **dict(zip(_PROFILE_SCORES, values, strict=True)),
                "overall_grade": str(overall),
                "image_description": critique["image_description"],
                "created_at": _BEGIN.strftime("%Y-%m-%d %H:%M:%S"),
            }
        )
    return rows


_PROFILE_SCORES = tuple(
    f"{name}_score"
    for name in (
        "composition",
        "lighting",
        "focus_sharpness",
        "color_harmony",
        "subject_isolation",
        "depth_perspective",
        "visual_balance",
        "emotional_impact",
    )
)
