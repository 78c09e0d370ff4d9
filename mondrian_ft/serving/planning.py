"""A request once it is understood, and how its answers are told: to the caller, to the database."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.critique import CritiqueError, parse_analysis, render
from ..data.prompt import fingerprint
from ..files import atomic_write_bytes
from .ab import Choice, Mode
from .intake import Asked
from .jobs import DONE, FAILED, Outcome
from .protocol import Answer


@dataclass(frozen=True)
class Persona:
    """An advisor: id, name, what is asked for them, and where that came from."""

    id: str
    name: str
    prompt: str
    source: str

    @property
    def prompt_fingerprint(self) -> str:
        return fingerprint(self.prompt)


@dataclass(frozen=True)
class Plan:
    """What will be asked: one choice an advisor. ``id`` is drawn, ``request_id`` may be a client's
    own and need not be unique."""

    asked: Asked
    request_id: str
    id: str
    mode: Mode
    personas: tuple[Persona, ...]
    choices: tuple[Choice, ...]
    several: bool

    @property
    def request_sha256(self) -> str:
        """Equal for equal requests: what a job's answer belongs to."""
        asked = self.asked
        facts = [
            hashlib.sha256(asked.photograph.data).hexdigest(),
            [one.id for one in self.personas],
            [one.prompt_fingerprint for one in self.personas],
            str(self.mode),
            asked.version,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class Slot:
    """The events of one advisor while they come in."""

    place: int
    body: dict[str, Any] = field(default_factory=dict)
    status: int = 0


def start(plan: Plan, job_id: str | None) -> dict[str, Any]:
    """The first event of a stream: who will answer."""
    return {
        "request_id": plan.request_id,
        "job_id": job_id,
        "mode": str(plan.mode),
        "advisors": [
            {"advisor": persona.id, "model_used": choice.used}
            for persona, choice in zip(plan.personas, plan.choices, strict=True)
        ],
    }


def told(answer: Answer, persona: Persona, seconds: float) -> dict[str, Any]:
    """An answer as it is sent: who gave it, the critique or why there is none, and the text."""
    identity = answer.identity
    shown: dict[str, Any] = {
        "model": identity.base,
        "base_weights": identity.base_weights,
        "adapter": None
        if identity.hash is None
        else {"version": identity.version, "hash": identity.hash},
        "prompt_fingerprint": persona.prompt_fingerprint,
        "prompt_source": persona.source,
        "pixel_fingerprint": identity.pixels,
        "raw": answer.text,
        "finished": answer.finished,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "seconds": {**answer.seconds, "service": round(seconds, 4)},
    }
    try:
        parsed = parse_analysis(answer.text)
    except CritiqueError as error:
        cut = "" if answer.finished else " It was cut at the token limit."
        return {
            "parse_success": False,
            "error": f"The model's answer is no critique: {error}{cut}",
            "fault": "parse",
            **shown,
        }
    return {
        "parse_success": True,
        "analysis": parsed.critique.model_dump(),
        "mends": parsed.mends,
        **shown,
    }


def outcome(plan: Plan, slots: Sequence[Slot]) -> Outcome:
    """What the database keeps of a request's answers."""
    errors = [slot.body["error"] for slot in slots if "error" in slot.body]
    bodies = [slot.body for slot in slots if "raw" in slot.body]
    used = sorted({slot.body["model_used"] for slot in slots})
    adapters = [_adapter(body) for body in bodies]
    outputs: dict[str, Any]
    if len(slots) == 1 and bodies:
        outputs = {
            "prompt": plan.personas[0].prompt,
            "response": bodies[0]["raw"],
            "summary": (bodies[0].get("analysis") or {}).get("image_description", ""),
            "model": bodies[0]["model"],
            "timestamp": time.time(),
        }
    else:
        outputs = {
            body["advisor"]: {"response": body["raw"], "mode_used": body["model_used"]}
            for body in bodies
        }
    whole = [body for body in bodies if body["parse_success"]]
    return Outcome(
        status=FAILED if errors else DONE,
        model_used=",".join(used),
        mode=str(plan.mode),
        model=bodies[0]["model"] if bodies else None,
        adapter=",".join(dict.fromkeys(one for one in adapters if one)) or None,
        analysis=None if errors else "\n\n".join(map(_markdown, whole)),
        outputs={**outputs, "answers": bodies} if bodies else None,
        prompt=plan.personas[0].prompt if len(slots) == 1 else None,
        error=" ".join(errors) or None,
    )


def _adapter(body: Mapping[str, Any]) -> str | None:
    adapter = body["adapter"]
    if adapter is None:
        return None
    return f"{adapter['version']}@{adapter['hash']}" if adapter["version"] else adapter["hash"]


def _markdown(body: Mapping[str, Any]) -> str:
    """As the workbook's analysis files hold it."""
    text = render(parse_analysis(body["raw"]).critique)
    return f"```json\n{json.dumps(json.loads(text), indent=2, ensure_ascii=False)}\n```"


def file_name(asked: Asked) -> str:
    """``jobs.filename`` of a new row: never a client's own name, which may be another picture's."""
    if asked.photograph.path is not None:
        return asked.photograph.path.as_posix()
    digest = hashlib.sha256(asked.photograph.data).hexdigest()
    return f"upload-{digest[:32]}{asked.photograph.suffix}"


def keep_upload(asked: Asked, folder: Path) -> None:
    """Write an uploaded photograph under the name that its row gets, once however often it comes.

    Raises:
        MondrianError: it cannot be written.
    """
    path = folder / file_name(asked)
    if asked.photograph.path is None and not path.exists():
        atomic_write_bytes(path, asked.photograph.data)
