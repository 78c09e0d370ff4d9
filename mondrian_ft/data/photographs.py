"""Finding a row's photograph by name, and checking that it is one.

A file name in ``jobs`` came from a client, so it is never followed out of the photograph folder,
be it by ``..`` or by a symbolic link. Each rule gives the files that a row may mean; the first that
gives any decides, and its name and how sure it is are recorded in the manifest.
"""

from __future__ import annotations

import json
import os
import re
import stat
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import atomic_write_text, sha256_file
from .reasons import LeftOut, Reason

MIN_SIDE = 32
"""The shortest side, in pixels, below which a picture is a placeholder and no photograph."""


@dataclass(frozen=True)
class Photograph:
    """A checked photograph: SHA-256 of its bytes (64 hex digits) and (width, height) in pixels.

    The size is that of the upright picture, after the EXIF ``orientation`` (1 to 8, 1 upright).
    """

    path: Path
    sha256: str
    size: tuple[int, int]
    orientation: int = 1


@dataclass(frozen=True)
class Match:
    """A row's photograph, the rule that found it, and how sure that is (`CONFIDENCE`)."""

    path: Path
    rule: str
    confidence: str


def base_name(name: str) -> str:
    """The last part of a path of any system (facts: paths of other machines, also Windows)."""
    return re.split(r"[/\\]", name)[-1]


def stem_of(name: str) -> str:
    """The base name without its ending."""
    return os.path.splitext(base_name(name))[0]  # noqa: PTH122 - of any system


_UPLOAD = re.compile(
    r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}_(?P<name>.+)", re.DOTALL
)
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


def upload_name(name: str) -> str | None:
    """``x.jpg`` of ``uploads/<uuid>_x.jpg``; None of another name."""
    match = _UPLOAD.fullmatch(base_name(name))
    return match["name"] if match else None


def stems(name: str) -> list[str]:
    """The stem of a name, and that of the name without its upload's id, if they are not blank."""
    return [stem for stem in (stem_of(name), stem_of(upload_name(name) or "")) if stem]


class Folder:
    """A folder as a boundary: files are found in it by name, and none outside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real = os.path.realpath(path)

    @cached_property
    def names(self) -> list[str]:
        """The names of the files in it, sorted."""
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except OSError as error:
            raise DataError(
                f"The folder {self.path} cannot be listed: {error.strerror}; "
                "allow this program to read it."
            ) from error

    @cached_property
    def uploads(self) -> dict[str, list[str]]:
        """Names that carry an upload's id, by the name without it."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            if plain := upload_name(name):
                found[plain].append(name)
        return found

    def file(self, name: str) -> Path | None:
        """The file of that name or relative path, whatever characters a client put into it.

        Raises:
            LeftOut: it is a symbolic link, or lies behind one, that leads out of the folder.
        """
        path = self.path / name
        # What lies in the folder itself and is a plain file leads nowhere else.
        if os.sep not in name and _is_plain(path):
            return path
        # Path.is_file raises where this answers False: names too long or not encodable.
        if not os.path.isfile(path):  # noqa: PTH113
            return None
        real = os.path.realpath(path)
        if not real.startswith(self._real + os.sep):
            raise LeftOut(
                Reason.UNSAFE_FILENAME, f"{name!r} is a link that leads out of {self.path}."
            )
        return path

    def files(self, names: Iterable[str]) -> list[Path]:
        """`file` of each name, without those that are none."""
        return [path for name in names if (path := self.file(name))]


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


# -- rules ---------------------------------------------------------------------------------------


def _exact_name(name: str, prefix: str | None, folder: Folder) -> list[Path]:
    return [] if not name or name.startswith("/") else folder.files([name])


def _base_name(name: str, prefix: str | None, folder: Folder) -> list[Path]:
    return folder.files([base_name(name)]) if base_name(name) else []


def _upload_name(name: str, prefix: str | None, folder: Folder) -> list[Path]:
    plain = upload_name(name)
    return folder.files([plain]) if plain else []


def _stored_upload(name: str, prefix: str | None, folder: Folder) -> list[Path]:
    # Stored under an upload's id where the row has the plain name, or another upload's id.
    plain = upload_name(name) or base_name(name)
    return folder.files(folder.uploads.get(plain, []))


def _prefix(name: str, prefix: str | None, folder: Folder) -> list[Path]:
    if not prefix:
        return []
    if stems(name) and not any(stem.startswith(prefix) for stem in stems(name)):
        # The row's own name contradicts the page's.
        return []
    wanted = set(_UUID.findall(name.lower()))
    found = []
    for other in folder.names:
        # A shorter prefix than 10 characters is the whole stem.
        fits = str.startswith if len(prefix) == 10 else str.__eq__
        if not any(fits(stem, prefix) for stem in stems(other)):
            continue
        theirs = set(_UUID.findall(other.lower()))
        if not wanted or not theirs or wanted & theirs:
            found.append(other)
    return folder.files(found)


_RULES: tuple[tuple[str, str, Callable[[str, str | None, Folder], list[Path]]], ...] = (
    ("exact_name", "certain", _exact_name),
    ("base_name", "high", _base_name),
    ("upload_name", "high", _upload_name),
    ("stored_upload", "medium", _stored_upload),
    ("prefix", "low", _prefix),
)
CONFIDENCE = {rule: confidence for rule, confidence, _ in _RULES}
"""Rules in the order they are tried, and how sure each is: the name as it is; its last part; that
without the upload's id; a file stored with an upload's id; the first characters of the stem, as
the analysis file's name tells them. Several files of equal bytes are one photograph: the first by
name is taken, and the rule gets ``+content``."""


def find_photograph(
    filename: str | None,
    folder: Folder,
    prefix: str | None = None,
    hashed: Callable[[Path], str] = sha256_file,
) -> Match:
    """The file a row means, inside ``folder``.

    Args:
        filename: what the row says; may be blank if there is a ``prefix``.
        prefix: the first (up to 10) characters of the photograph's stem, from the name of the
            row's analysis file.
        hashed: the hash of a file's bytes, asked only when several files fit.

    Raises:
        LeftOut: the name is blank, leads out of the folder, names no file, or fits several
            different photographs (the detail names them).
    """
    name = (filename or "").strip()
    if not name and not prefix:
        raise LeftOut(Reason.NO_FILENAME, "The row names no photograph.")
    if ".." in re.split(r"[/\\]", name) or "\0" in name:
        raise LeftOut(
            Reason.UNSAFE_FILENAME, f"The file name {name!r} leads out of the photograph folder."
        )
    for rule, confidence, find in _RULES:
        found = find(name, prefix, folder)
        if len(found) == 1:
            return Match(found[0], rule, confidence)
        if found:
            return _one_of(found, rule, confidence, hashed)
    if not name:
        detail = f"The row names no photograph, and none in {folder.path} begins with {prefix!r}."
        raise LeftOut(Reason.NO_FILENAME, detail)
    raise LeftOut(Reason.PHOTOGRAPH_MISSING, f"There is no photograph {name!r} in {folder.path}.")


def _one_of(found: list[Path], rule: str, confidence: str, hashed: Callable[[Path], str]) -> Match:
    try:
        alike = len({hashed(path) for path in found}) == 1
    except OSError as error:
        detail = f"{error.filename} cannot be read: {error.strerror}."
        raise LeftOut(Reason.PHOTOGRAPH_UNREADABLE, detail) from None
    if alike:
        return Match(min(found), f"{rule}+content", confidence)
    names = ", ".join(path.name for path in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    detail = f"By the rule {rule} it may be any of {names}{more}; keep the one that is meant."
    raise LeftOut(Reason.PHOTOGRAPH_AMBIGUOUS, detail)


# -- checking ------------------------------------------------------------------------------------


def check_photograph(path: Path) -> Photograph:
    """Hash a photograph and check that it is whole, so that a truncated one is found now.

    A JPEG is whole that ends with its end marker: none of the bytes before can be taken for it, so
    a cut anywhere is noticed in a tenth of the time of decoding. What else may be damaged inside is
    found by those who decode (`similar.near_groups`). Other files, and JPEGs with something behind
    the marker, are decoded.

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
                orientation = _orientation(image.getexif().get(_ORIENTATION))
                size = _upright(image.size, orientation)
                if image.format not in ("JPEG", "MPO") or not _ends_as_jpeg(path):
                    # A JPEG at an eighth of its size: every byte is read in a third of the time.
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
    return Photograph(path, sha256, size, orientation)


def _ends_as_jpeg(path: Path) -> bool:
    """Whether a file has JPEG's segments up to its picture, and an end marker as its last bytes.

    ITU-T T.81, annex B: a segment is FF, its code and its length; the picture follows the segment
    DA, and in it every FF is followed by 00 or by a restart code, never by D9.
    """
    with path.open("rb") as file:
        if file.read(2) != b"\xff\xd8":
            return False
        while len(head := file.read(4)) == 4 and head[0] == 0xFF:
            # Before the picture there may be a thumbnail, with an end marker of its own.
            file.seek(int.from_bytes(head[2:], "big") - 2, os.SEEK_CUR)
            if head[1] == 0xDA:
                begin = file.tell()
                return file.seek(-2, os.SEEK_END) > begin and file.read() == b"\xff\xd9"
    return False


_ORIENTATION = 0x0112


def _orientation(value: Any) -> int:
    """What is no orientation (Exif 2.32: 1 to 8) is ignored, as every viewer does."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """EXIF orientations 5 to 8 lie on their side (Exif 2.32, tag 0x0112)."""
    width, height = size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


CACHE_VERSION = 1


class Photographs:
    """Checks each photograph once, however many rows show it, and remembers it for the next time.

    Args:
        cache: a JSON file of what was found, by path, size and time of change; None remembers
            nothing beyond this object. A cache that cannot be read is made anew.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache
        self._seen: dict[Path, Photograph | LeftOut] = {}
        self._kept: dict[str, list[Any]] = _load(cache) if cache else {}
        self._changed = False

    def check(self, path: Path) -> Photograph:
        """As `check_photograph`, remembered by path; raises the same `LeftOut` again."""
        if path not in self._seen:
            self._remember(path, self._look(path))
        seen = self._seen[path]
        if isinstance(seen, LeftOut):
            raise LeftOut(seen.reason, str(seen))
        return seen

    def check_all(
        self, paths: Iterable[Path], progress: Callable[[int, int], Any] = lambda done, total: None
    ) -> None:
        """Check many at once, on every core: hashing lets go of the interpreter's lock.

        ``progress`` is told how many are done, and of how many.
        """
        new = [path for path in dict.fromkeys(paths) if path not in self._seen]
        if new:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                pairs = zip(new, pool.map(self._look, new), strict=True)
                for done, (path, found) in enumerate(pairs, 1):
                    self._remember(path, found)
                    progress(done, len(new))

    def sha256(self, path: Path) -> str:
        """The hash of a photograph's bytes, or of a file that is none."""
        try:
            return self.check(path).sha256
        except LeftOut:
            return sha256_file(path)

    def save(self) -> None:
        """Write the cache, if there is one and something was added."""
        if self.cache and self._changed:
            content = {"version": CACHE_VERSION, "files": self._kept}
            atomic_write_text(self.cache, json.dumps(content))
            self._changed = False

    def _look(self, path: Path) -> Photograph | LeftOut:
        kept = self._kept.get(str(path))
        if kept and kept[:2] == _state(path):
            return _restored(path, kept)
        try:
            return check_photograph(path)
        except LeftOut as error:
            return error

    def _remember(self, path: Path, found: Photograph | LeftOut) -> None:
        self._seen[path] = found
        state = _state(path)
        if self.cache and state:
            if isinstance(found, LeftOut):
                entry = [*state, found.reason.value, str(found)]
            else:
                entry = [*state, found.sha256, *found.size, found.orientation]
            if self._kept.get(str(path)) != entry:
                self._kept[str(path)] = entry
                self._changed = True


def _state(path: Path) -> list[int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


def _restored(path: Path, kept: list[Any]) -> Photograph | LeftOut:
    if len(kept) == 4:
        return LeftOut(Reason(kept[2]), kept[3])
    return Photograph(path, kept[2], (kept[3], kept[4]), kept[5])


def _load(cache: Path) -> dict[str, list[Any]]:
    """What a cache holds; nothing if it is missing, damaged or of another version."""
    try:
        content = json.loads(cache.read_bytes())
        if content["version"] != CACHE_VERSION:
            return {}
        files = dict(content["files"])
        for path, kept in files.items():
            _restored(Path(path), kept)
        return files
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
