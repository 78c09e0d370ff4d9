"""What the local pages share: one self-contained file each, errors as JSON, photographs by hash."""

from __future__ import annotations

import base64
import hashlib
import io
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from ..data.pixels import open_photograph
from ..errors import DataError, MondrianError
from ..files import sha256_file

SIDE = 1600
"""Most pixels of a served photograph's longer side: enough to judge sharpness on a screen."""


class Refused(MondrianError):
    """A request that is not done: ``status`` is the HTTP status, ``str()`` the sentence."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def make_page_app(name: str) -> FastAPI:
    """An application that serves the page ``name`` at ``/`` and tells every error as JSON.

    `local.Guard` is still to be put around it.
    """
    content, policy = page(name)
    # No generated documentation: it would load scripts from elsewhere.
    app = FastAPI(title=f"mondrian_ft {name}", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    @app.exception_handler(MondrianError)
    def failed(request: Request, error: MondrianError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 500)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:]) or "The request"
        return JSONResponse({"error": f"{where}: {problem['msg']}."}, 422)

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.get("/", response_class=HTMLResponse)
    def index() -> HTMLResponse:
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return HTMLResponse(content, headers=headers)

    return app


def check_picture(path: Path, sha256: str | None, hint: str) -> None:
    """Whether a photograph is still the one that ``sha256`` names; None asks only for the file.

    Raises:
        DataError: it is gone or changed; ``hint`` ends the sentence and says what to do.
    """
    try:
        now = sha256_file(path)
    except OSError as error:
        raise DataError(f"The photograph {path.name} cannot be read: {error.strerror}.") from None
    if sha256 is not None and now != sha256:
        raise DataError(f"The photograph {path.name} changed {hint}")


def picture(path: Path, sha256: str | None, hint: str) -> bytes:
    """A photograph upright, as JPEG, its longer side at most `SIDE` pixels.

    Raises:
        DataError: as `check_picture`, or the file is no picture.
    """
    check_picture(path, sha256, hint)
    image = open_photograph(path)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def fresh(content: Any) -> JSONResponse:
    """JSON that no browser may keep."""
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


@cache
def page(name: str, *scripts: str) -> tuple[str, str]:
    """A page, and the policy that lets exactly its own style and script run.

    ``scripts`` are the shared ones it has; none named is all of them.
    """
    folder = Path(__file__).parent / "templates"
    content, *styles = _read(folder, f"{name}.html", "common.css", f"{name}.css")
    named = [f"{one}.js" for one in (*(scripts or ("basics", "common")), name)]
    style, script = "".join(styles), "".join(_read(folder, *named))
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash_of(style)}",
            f"script-src {_hash_of(script)}",
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return content.replace("/*style*/", style).replace("/*script*/", script), policy


def _read(folder: Path, *names: str) -> list[str]:
    return [(folder / name).read_text(encoding="utf-8") for name in names]


def _hash_of(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
