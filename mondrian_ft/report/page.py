"""The one set-up of the pages' templates: everything escaped, nothing undefined."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def environment() -> Environment:
    """Finds templates in ``report/templates``; all that is put into them is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("mondrian_ft.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source(of: Environment, *names: str) -> Markup:
    """Style sheets or scripts one after the other, to stand in a page as they are."""
    from markupsafe import Markup

    assert of.loader is not None
    return Markup("\n".join(of.loader.get_source(of, name)[0] for name in names))


def hashed(script: str) -> str:
    """What a page's policy calls a script, so that this one may run and no other."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
