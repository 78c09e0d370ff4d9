"""Whether Weights & Biases would find a key, and the mode that follows from it.

W&B is not imported for this: that takes a second, and most tasks send it nothing.
"""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from pathlib import Path
from urllib.parse import urlsplit


def wandb_mode(mode: str, environ: Mapping[str, str]) -> tuple[str, str | None]:
    """Returns the mode W&B is started in and, where that is not what was asked, a warning.

    ``auto`` follows ``WANDB_MODE`` and ``WANDB_DISABLED`` where they are set, as W&B's users
    expect; otherwise it is online when a key is found and offline when not. ``online`` without a
    key becomes offline too, since W&B would otherwise stop and ask for one.
    """
    if mode == "auto":
        said = environ.get("WANDB_MODE", "").lower()
        if environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes") or said == "disabled":
            return "disabled", None
        if said in ("offline", "dryrun"):
            return "offline", None
        return ("online" if logged_in(environ) else "offline"), None
    if mode == "online" and not logged_in(environ):
        return "offline", (
            "tracking.mode is online, but no W&B key is found, so this run is kept offline; log in "
            "with 'wandb login' or set WANDB_API_KEY, and send it with 'wandb sync'."
        )
    return mode, None


def asked_offline(mode: str, environ: Mapping[str, str]) -> bool:
    """Says whether a person chose to keep runs offline, rather than having no key."""
    said = environ.get("WANDB_MODE", "").lower()
    return mode == "offline" or (mode == "auto" and said in ("offline", "dryrun"))


def logged_in(environ: Mapping[str, str]) -> bool:
    """Says whether W&B would find a key.

    Looked for where W&B looks: the environment, its settings file, and the netrc entry of its
    server.
    """
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environ.get("HOME") or Path.home())
    folder = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    settings = ConfigParser()
    try:
        settings.read(folder / "settings", encoding="utf-8")
        stored = dict(settings["default"]) if settings.has_section("default") else {}
    except (ConfigParserError, UnicodeDecodeError):
        stored = {}
    if stored.get("api_key"):
        return True
    server = environ.get("WANDB_BASE_URL") or stored.get("base_url") or "https://api.wandb.ai"
    named = environ.get("NETRC")
    places = [Path(named).expanduser()] if named else [home / ".netrc", home / "_netrc"]
    for place in places:
        try:
            entry = netrc.netrc(str(place)).authenticators(urlsplit(server).netloc)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            # No such file, or one that W&B could not read either.
            continue
        if entry and entry[2]:
            return True
    return False
