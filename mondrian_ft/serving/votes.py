"""Thumbs up and down: what a person thought of an answer, appended to a file at once."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..files import append_line

FILE = "preferences.jsonl"


class Vote(StrEnum):
    """``none`` takes an earlier vote on the same answer back; of several, the last counts."""

    up = "up"
    down = "down"
    none = "none"


def keep(folder: Path, answer: Mapping[str, Any], vote: Vote) -> None:
    """Append a vote with what it is about; when this returns it is on the disk.

    A line holds ``time, vote, answer_id, advisor, model_used, model, adapter, prompt_fingerprint,
    pixel_fingerprint, image_sha256, raw``.

    Raises:
        MondrianError: the file cannot be written.
    """
    kept = {
        name: answer[name]
        for name in (
            "answer_id",
            "job_id",
            "advisor",
            "model_used",
            "model",
            "adapter",
            "prompt_fingerprint",
            "pixel_fingerprint",
            "image_sha256",
            "raw",
        )
    }
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {"time": stamp, "vote": str(vote), **kept}
    append_line(folder / FILE, json.dumps(line, ensure_ascii=False))
