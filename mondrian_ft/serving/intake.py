"""From an HTTP request to a photograph's bytes and what is asked about it.

Photographs come in three forms (facts: "The service"): as a file of a form, as ``image_path`` in
JSON, and as ``image`` in JSON, which is a path, a data URL or base64. They stay in memory: nothing
is written, and no name that a client gives is ever opened, but for paths that lead, links
followed, into a folder that is served from.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import difflib
import io
import json
import os
import re
import stat
import struct
import warnings
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ..data.pixels import MAX_ASPECT, MAX_FILE_PIXELS, MIN_SIDE
from .pages import Refused

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
"""What is read: what cameras, phones and browsers write (a phone's MPO is a JPEG to Pillow). The
readers of other formats are little used and little looked at, so no upload reaches them."""
SUFFIXES = {"PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "GIF": ".gif", "BMP": ".bmp"}
"""Of files; all else is a JPEG."""
TEXTS = ("advisor", "job_id", "mode", "version", "user", "response_format", "replace")
MOST_TEXT = 200
"""Characters of a field that is no photograph."""
MOST_PATH = 4_096
"""Characters of a path; Linux takes no more, and macOS a quarter of them."""
HINT = "send it as the form's file `image`, or as JSON with image_path or image."


@dataclass(frozen=True)
class Photograph:
    """A photograph as it came: its bytes, its path within a served folder if it has one, and the
    suffix of files of its kind."""

    data: bytes
    path: PurePath | None = None
    suffix: str = ".jpg"


@dataclass(frozen=True)
class Asked:
    """The fields of a request, texts as they were sent; None where there is none."""

    photograph: Photograph
    advisor: str | None = None
    job_id: str | None = None
    mode: str | None = None
    version: str | None = None
    user: str | None = None
    response_format: str = "json"
    replace: bool = False


@dataclass(frozen=True)
class Folders:
    """Where ``image_path`` may lead: absolute folders.

    A relative path is looked for in each, and then taken from ``base``, where the service was
    started: it must lead into one of them all the same.
    """

    served: Sequence[Path]
    base: Path | None = None

    def read(self, name: str, most: int) -> Photograph:
        """The photograph at a path.

        Raises:
            Refused: it leads elsewhere (403), is not there (404), too long (413) or no file (400).
        """
        if not name.strip() or "\0" in name:
            raise Refused(400, f"image_path is {name[:80]!r}, which is no path.")
        if len(name) > MOST_PATH:
            raise Refused(400, f"image_path has more than {MOST_PATH:,} characters.")
        found = None
        for place in self._candidates(name):
            found = found or place
            # Unlike Path.exists it raises nothing, whatever is wrong; reading tells that.
            if os.path.exists(place[0]):  # noqa: PTH110
                found = place
                break
        if found is None:
            raise Refused(
                403,
                f"image_path {name[:200]!r} lies in no folder that photographs are read from; put "
                "it below data.source_dir or serve.upload_dir, or send the photograph itself.",
            )
        return Photograph(_read(found[0], name, most), found[1])

    def _candidates(self, name: str) -> Iterator[tuple[Path, PurePath]]:
        """What a path may mean, links followed, so that one inside cannot lead out; whole, and
        within its folder."""
        roots = [folder.resolve() for folder in self.served]
        for start in (*roots, *([self.base] if self.base else [])):
            try:
                path = (start / name).resolve()
            except (OSError, ValueError, RuntimeError):
                continue
            for root in roots:
                if path != root and path.is_relative_to(root):
                    yield path, path.relative_to(root)
                    break


def _read(path: Path, name: str, most: int) -> bytes:
    try:
        state = path.stat()
        # Reading a pipe or a device would never end.
        if not stat.S_ISREG(state.st_mode):
            raise Refused(400, f"image_path {name[:200]!r} is not a file.")
        if state.st_size > most:
            raise Refused(413, f"{name[:200]!r} has more than {most:,} bytes.")
        with path.open("rb") as file:
            return file.read(most + 1)
    except FileNotFoundError:
        raise Refused(404, f"There is no photograph at image_path {name[:200]!r}.") from None
    except OSError as error:
        raise Refused(
            400, f"The photograph {name[:200]!r} cannot be read: {error.strerror}."
        ) from None


async def read_request(request: Request, folders: Folders, most: int) -> Asked:
    """A request to analyse, in any of its forms.

    Args:
        request: the HTTP request; its body is read.
        folders: where paths may lead.
        most: bytes of a photograph.

    Raises:
        Refused: with the status and the sentence.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, most)
    if kind == "application/json":
        fields = await read_json(request)
        return _asked(fields, await _json_photograph(fields, folders, most))
    raise Refused(415, f"The content type {kind[:80]!r} is not read; {HINT}")


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refused: it is none (400).
    """
    try:
        value = json.loads(await request.body(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not JSON; see /openapi.json for examples.") from None
    if not isinstance(value, dict):
        raise Refused(400, f"The body is a {_kind(value)}; it should be an object.")
    return value


async def _form(request: Request, most: int) -> Asked:
    parser = _InMemory(request.headers, request.stream(), max_files=2, max_fields=20)
    parser.spool_max_size = most + 1_000_000
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"The form cannot be read: {error.message}") from None
    except (ValueError, KeyError, LookupError):
        raise Refused(400, "The form cannot be read; its parts are malformed.") from None
    try:
        files = [one for name in ("image", "file") for one in form.getlist(name)]
        if not files or not isinstance(files[0], UploadFile):
            raise Refused(400, f"There is no photograph in the form; {HINT}")
        if len(files) > 1:
            raise Refused(400, f"The form holds {len(files)} photographs; send one.")
        data = await files[0].read()
        fields = {name: form[name] for name in form if name not in ("image", "file")}
        for name in fields:
            if len(form.getlist(name)) > 1:
                raise Refused(400, f"The form's field {name[:80]!r} is there twice; send it once.")
        return _asked(fields, checked(data, most))
    finally:
        await form.close()


class _InMemory(MultiPartParser):
    """Starlette's parser with its files kept in memory; see ``spool_max_size``."""

    def __init__(
        self,
        headers: Headers,
        stream: AsyncGenerator[bytes, None],
        *,
        max_files: int,
        max_fields: int,
    ) -> None:
        super().__init__(headers, stream, max_files=max_files, max_fields=max_fields)


async def _json_photograph(fields: Mapping[str, Any], folders: Folders, most: int) -> Photograph:
    named = [name for name in ("image_path", "image") if fields.get(name) is not None]
    if not named:
        raise Refused(400, f"There is no photograph in the request; {HINT}")
    if len(named) > 1:
        raise Refused(400, "The request holds both image_path and image; send one photograph.")
    (name,) = named
    value = fields[name]
    if not isinstance(value, str):
        raise Refused(400, f"{name} is a {_kind(value)}; it should be a text.")
    if name == "image":
        if (data := decoded(value, most)) is not None:
            return checked(data, most)
        if len(value) > MOST_PATH:
            # Nothing of it is repeated: it is a photograph, if a broken one.
            raise Refused(400, "image is not valid base64, and too long for a path.")
    # A disk may be slow, or in another machine; others are answered meanwhile.
    found = await asyncio.to_thread(folders.read, value, most)
    return checked(found.data, most, found.path)


_DATA_URL = re.compile(r"data:[\w.+/-]{0,80}(?:;[\w.=+-]{0,80}){0,4}?;base64,", re.IGNORECASE)
# Possessive: nothing is tried twice, or a long run of spaces would take hours.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]++={0,2}+\s*+")
SHORTEST = 100
"""Characters of base64 at least: no photograph has fewer bytes, and names are shorter."""


def decoded(text: str, most: int) -> bytes | None:
    """The bytes of a data URL or of bare base64; None where the text is a path.

    Raises:
        Refused: a data URL that is not base64 (400), or one too long (413).
    """
    is_url = text[:5].lower() == "data:"
    match = _DATA_URL.match(text)
    if is_url and match is None:
        raise Refused(400, "The data URL is not base64; write data:image/jpeg;base64,…")
    body = text[match.end() :] if match else text
    if not is_url and (len(text) < SHORTEST or not _BASE64.fullmatch(text)):
        return None
    if len(body) * 3 // 4 > most + 3:
        raise Refused(413, f"The photograph has more than {most:,} bytes.")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        if not is_url:
            return None
        raise Refused(400, "The data URL is not valid base64.") from None


def checked(data: bytes, most: int, path: PurePath | None = None) -> Photograph:
    """A photograph whose head says that it can be read, and without harm.

    Only its head is looked at; whether all of it can be decoded is told by the model's process.

    Raises:
        Refused: it is empty, no picture, too small or a bomb (400), or too long (413).
    """
    if not data:
        raise Refused(400, f"The photograph is empty (0 bytes); {HINT}")
    if len(data) > most:
        raise Refused(413, f"The photograph has more than {most:,} bytes; send a smaller one.")
    width, height, kind = _head(data)
    if width * height > MAX_FILE_PIXELS:
        raise Refused(
            400,
            f"The photograph claims {width}×{height} pixels, more than the {MAX_FILE_PIXELS:,} "
            "that are read; send a smaller one.",
        )
    if min(width, height) < MIN_SIDE:
        raise Refused(
            400,
            f"The photograph has {width}×{height} pixels; a side needs at least {MIN_SIDE}.",
        )
    if max(width, height) / min(width, height) > MAX_ASPECT:
        raise Refused(
            400,
            f"The photograph has {width}×{height} pixels, a strip longer than {MAX_ASPECT:.0f}:1; "
            "crop it.",
        )
    return Photograph(data, path, SUFFIXES.get(kind, ".jpg"))


def _head(data: bytes) -> tuple[int, int, str]:
    """Width, height and format."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Our own limit is lower than Pillow's error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return *image.size, image.format or ""
    except UnidentifiedImageError:
        raise Refused(
            400, f"The photograph is no picture of a kind that is read ({', '.join(FORMATS)})."
        ) from None
    except Image.DecompressionBombError:
        raise Refused(
            400, f"The photograph claims more than the {MAX_FILE_PIXELS:,} pixels that are read."
        ) from None
    except (OSError, ValueError, SyntaxError, struct.error, OverflowError) as error:
        raise Refused(400, f"The photograph cannot be read: {str(error)[:200]}.") from None


def _asked(fields: Mapping[str, Any], photograph: Photograph) -> Asked:
    _check_names(fields)
    texts = {name: text_field(fields, name) for name in TEXTS if name != "replace"}
    form = texts.pop("response_format") or "json"
    if form not in ("json", "html"):
        raise Refused(400, f"response_format is {form[:80]!r}; it is json or html.")
    return Asked(photograph, response_format=form, replace=_flag(fields.get("replace")), **texts)  # pyright: ignore[reportArgumentType]


def _check_names(fields: Mapping[str, Any]) -> None:
    """A misspelt name is refused, because its default would answer in its place. Other names are
    let pass: older clients send fields that this service has no use for.

    Raises:
        Refused: a name is almost one of ours (400).
    """
    known = [*TEXTS, "image", "file", "image_path"]
    for name in fields:
        if name in known:
            continue
        if meant := difflib.get_close_matches(name[:80].lower(), known, n=1, cutoff=0.8):
            raise Refused(400, f"There is no field {name[:80]!r}; did you mean {meant[0]}?")


def text_field(fields: Mapping[str, Any], name: str) -> str | None:
    """A field as text, None if it is absent or blank.

    Raises:
        Refused: it is no text, too long, or holds what no name does (400).
    """
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Refused(400, f"{name} is a {_kind(value)}; it should be a text.")
    if len(value) > MOST_TEXT:
        raise Refused(400, f"{name} has more than {MOST_TEXT} characters.")
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise Refused(400, f"{name} holds control characters.")
    return value.strip() or None


def _flag(value: Any) -> bool:
    if value in (None, False, "", "false", "0"):
        return False
    if value in (True, "true", "1"):
        return True
    raise Refused(400, f"replace is {str(value)[:80]!r}; it is true or false.")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    if isinstance(value, UploadFile):
        return "file"
    kinds = {dict: "object", list: "list", str: "text", bool: "true or false"}
    return "JSON " + ("null" if value is None else kinds.get(type(value), "number"))
