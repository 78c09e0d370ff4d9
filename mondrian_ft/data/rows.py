"""The rows of a training file: the type, reading them from JSON, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import sha256_file
from .critique import CritiqueError, mend, render, validate


@dataclass(frozen=True)
class Row:
    """One training example: a photograph, the prompt, and the answer to learn.

    ``image_path`` is absolute and existed when the row was read; ``response`` is the canonical
    JSON text; ``image_sha256`` is the hash of the photograph's bytes (64 hex digits). ``fold``
    counts from 0; None where no folds were dealt, and in the test part.
    """

    job_id: str
    advisor: str
    image_path: Path
    prompt: str
    response: str
    image_sha256: str
    fold: int | None = None


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSON list of rows, prepared or made by hand.

    A row needs ``image_path`` (relative: to the current folder), ``prompt`` and ``response`` (a
    text, or a critique as an object, which is rendered). Without ``job_id`` a row is named after
    its place in the file; without ``advisor`` it is ``unknown``; a missing hash is computed.

    Raises:
        DataError: the file is missing, not JSON, not a list of rows, or empty, a key is missing
            or of a wrong type, or a photograph does not exist.
    """
    path = Path(path).absolute()
    content = load_json(path, "training data")
    if not isinstance(content, list):
        raise DataError(f"{path} holds no list of examples; it should begin with '['.")
    if not content:
        raise DataError(f"{path} holds no example; prepare the data again.")
    hashes: dict[Path, str] = {}
    return [_read_row(entry, number, path, hashes) for number, entry in enumerate(content, 1)]


def data_lock(parts: Mapping[str, Sequence[Row]]) -> str:
    """A SHA-256 (64 hex digits) of which example is in which part, whatever their order or folder.

    It covers ids, photographs, prompts and responses: equal locks mean equal training data.
    """
    lines = sorted(
        json.dumps([part, row.job_id, row.image_sha256, row.prompt, row.response])
        for part, rows in parts.items()
        for row in rows
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_disjoint(parts: Mapping[str, Sequence[Row]]) -> None:
    """Raises `DataError` if two parts share a photograph, naming one and both parts."""
    seen: dict[str, str] = {}
    for part, rows in parts.items():
        for row in rows:
            other = seen.setdefault(row.image_sha256, part)
            if other != part:
                raise DataError(
                    f"The photograph {row.image_path.name} is in both {other} and {part}, so the "
                    "evaluation would judge what was trained on; remove it from one, or prepare "
                    "again."
                )


def hash_photograph(path: Path, whose: str, known: dict[Path, str]) -> str:
    """A photograph's SHA-256; ``whose`` names its row in the `DataError` if it cannot be read.

    ``known`` keeps the hashes of one reading: most photographs are those of several rows.
    """
    try:
        if path not in known:
            known[path] = sha256_file(path)
        return known[path]
    except OSError as error:
        raise DataError(
            f"The photograph {path} of {whose} cannot be read: {error.strerror}; put it back, or "
            "run task=link and task=prepare again."
        ) from error


def _read_row(entry: Any, number: int, path: Path, hashes: dict[Path, str]) -> Row:
    where = f"Example {number} of {path}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no object with image_path, prompt and response.")
    for key in ("image_path", "prompt", "response"):
        if key not in entry:
            raise DataError(f"{where} has no `{key}`.")
    response = entry["response"]
    if isinstance(response, dict):
        try:
            response = render(validate(mend(response)[0]))
        except CritiqueError as error:
            raise DataError(f"{where} has a response that is no critique: {error}") from error
    texts = {"image_path": entry["image_path"], "prompt": entry["prompt"], "response": response}
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} has {text!r} as `{key}`; it should be a text.")
    image = Path(texts["image_path"]).expanduser().absolute()
    sha256 = hash_photograph(image, where, hashes)
    if entry.get("image_sha256", sha256) != sha256:
        raise DataError(
            f"{where}: the photograph {image} changed since it was linked; run task=link and "
            "task=prepare again."
        )
    fold = entry.get("fold")
    if not (fold is None or (type(fold) is int and fold >= 0)):
        raise DataError(f"{where} has {fold!r} as `fold`; it should be a number from 0 up.")
    return Row(
        job_id=str(entry.get("job_id") or f"{path.stem}-{number:04d}"),
        advisor=str(entry.get("advisor") or "unknown"),
        image_path=image,
        prompt=entry["prompt"],
        response=response,
        image_sha256=sha256,
        fold=fold,
    )


def load_json(path: Path, what: str) -> Any:
    """A JSON file's content; ``what`` names it in the `DataError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(
            f"The {what} {path} does not exist; run task=link and task=prepare first."
        ) from None
    except OSError as error:
        raise DataError(f"The {what} {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"The {what} {path} is not JSON: {error}.") from error
