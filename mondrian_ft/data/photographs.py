"""Finding a row's photograph by name, and checking that it is one.

A file name in ``jobs`` came from a client, so it is never followed out of the photograph folder.
Each rule is a function from the name to a path or None; the first that finds a file wins, and its
name is recorded in the manifest.
"""

from __future__ import annotations

import os.path
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..files import sha256_file
from .reasons import LeftOut, Reason

MIN_SIDE = 32
"""The shortest side, in pixels, below which a picture is a placeholder and no photograph."""


@dataclass(frozen=True)
class Photograph:
    """A checked photograph: SHA-256 of its bytes (64 hex digits) and (width, height) in pixels.

    The size is that of the upright picture, after the EXIF orientation.
    """

    path: Path
    sha256: str
    size: tuple[int, int]


def base_name(name: str) -> str:
    """The last part of a path of any system (facts: paths of other machines, also Windows)."""
    return re.split(r"[/\\]", name)[-1]


def _exact_name(name: str, folder: Path) -> Path | None:
    return None if name.startswith("/") else existing_file(folder / name)


def _base_name(name: str, folder: Path) -> Path | None:
    return existing_file(folder / base_name(name))


_UPLOAD = re.compile(r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}_(.+)")


def _upload_name(name: str, folder: Path) -> Path | None:
    match = _UPLOAD.fullmatch(base_name(name))
    return existing_file(folder / match[1]) if match else None


PHOTOGRAPH_RULES: tuple[tuple[str, Callable[[str, Path], Path | None]], ...] = (
    ("exact_name", _exact_name),
    ("base_name", _base_name),
    ("upload_name", _upload_name),
)
"""Tried in this order: the name as it is, its last part, its last part without the upload's id."""


def find_photograph(filename: str | None, folder: Path) -> tuple[Path, str]:
    """The file a row's ``filename`` means, inside ``folder``, and the rule that found it.

    Raises:
        LeftOut: the name is blank, leads out of the folder, or names no file.
    """
    name = (filename or "").strip()
    if not name:
        raise LeftOut(Reason.NO_FILENAME, "The row names no photograph.")
    if ".." in re.split(r"[/\\]", name) or "\0" in name:
        raise LeftOut(
            Reason.UNSAFE_FILENAME, f"The file name {name!r} leads out of the photograph folder."
        )
    for rule, find in PHOTOGRAPH_RULES:
        if path := find(name, folder):
            return path, rule
    raise LeftOut(Reason.PHOTOGRAPH_MISSING, f"There is no photograph {name!r} in {folder}.")


def existing_file(path: Path) -> Path | None:
    """``path`` if it is a file, else None, whatever characters a client put into its name."""
    # Path.is_file raises where this answers False: names too long or not encodable.
    return path if os.path.isfile(path) else None  # noqa: PTH113


def check_photograph(path: Path) -> Photograph:
    """Hash a photograph and decode all of it, so that a truncated one is found now.

    A JPEG is decoded at an eighth of its size: that reads every byte in a fraction of the time.

    Raises:
        LeftOut: the file is no picture, is truncated or damaged, or is smaller than `MIN_SIDE`.
    """
    from PIL import Image

    try:
        sha256 = sha256_file(path)
        with warnings.catch_warnings():
            # Odd EXIF and very large pictures make Pillow warn; what matters is whether it decodes.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                size = _upright(image.size, image.getexif().get(_ORIENTATION, 1))
                image.draft("RGB", (image.width // 8 or 1, image.height // 8 or 1))
                image.load()
    except Image.UnidentifiedImageError:
        detail = f"{path.name} is not a picture that Pillow can read."
        raise LeftOut(Reason.PHOTOGRAPH_UNREADABLE, detail) from None
    except Image.DecompressionBombError:
        detail = f"{path.name} declares more pixels than is safe to decode."
        raise LeftOut(Reason.PHOTOGRAPH_UNREADABLE, detail) from None
    # Pillow's decoders raise all of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        detail = f"{path.name} is damaged or truncated: {error}."
        raise LeftOut(Reason.PHOTOGRAPH_UNREADABLE, detail) from None
    if min(size) < MIN_SIDE:
        width, height = size
        detail = f"{path.name} is {width}x{height}; a side needs at least {MIN_SIDE} pixels."
        raise LeftOut(Reason.PHOTOGRAPH_TOO_SMALL, detail)
    return Photograph(path, sha256, size)


_ORIENTATION = 0x0112


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """EXIF orientations 5 to 8 lie on their side (Exif 2.32, tag 0x0112)."""
    width, height = size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


class Photographs:
    """Checks each photograph once, however many rows show it."""

    def __init__(self) -> None:
        self._seen: dict[Path, Photograph | LeftOut] = {}

    def check(self, path: Path) -> Photograph:
        """As `check_photograph`, remembered by path; raises the same `LeftOut` again."""
        if path not in self._seen:
            try:
                self._seen[path] = check_photograph(path)
            except LeftOut as error:
                self._seen[path] = error
        seen = self._seen[path]
        if isinstance(seen, LeftOut):
            raise LeftOut(seen.reason, str(seen))
        return seen
