"""Where the numbers of a run go: always a JSONL file, and Weights & Biases when it can.

A run never waits for, asks for, or fails with W&B. Whatever goes wrong there becomes one warning,
and the JSONL file, which has the same numbers, goes on.
"""

from __future__ import annotations

import io
import json
import math
import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from .errors import MondrianError

if TYPE_CHECKING:
    from .registry import Version
    from .report.tables import Table
    from .run import Run
    from .schema import TrackingConfig

Number = float | int | None


class Tracker(Protocol):
    """Takes the numbers of a run; observes, and changes nothing of it."""

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Records ``metrics`` of update ``step``; ``kind`` is ``step`` or ``eval``."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Records the closing figures of the run."""
        ...

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Records the evaluation's tables, made only where they are wanted, and its page."""
        ...

    def publish(self, name: str, version: Version) -> None:
        """Keeps a copy of a version registered under ``name``, or moves its copy's channels."""
        ...

    def close(self) -> None:
        """Flushes and lets go; safe to call twice."""
        ...


class JsonlTracker:
    """One JSON object a line: ``{"kind": "step", "step": 3, "loss": 1.25, …}``.

    Each line is out as soon as it is written, so the file can be followed while training. A number
    that is not finite is written as null, since JSON has no other form for it. The closing
    figures are not part of the log; they stand in run.json.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: Any = None

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Appends one line; the file is made when the first one is written.

        Raises:
            MondrianError: the file cannot be written, for one because the disk is full.
        """
        line = {"kind": kind, "step": step} | {key: _finite(v) for key, v in metrics.items()}
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a line is out when this returns, and a full disk leaves nothing
                # behind that closing would trip over again.
                self._file = self.path.open("ab", buffering=0)
            self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise MondrianError(
                f"cannot write {self.path}: {error.strerror or error}; free some space or choose "
                "another run folder with hydra.run.dir=…"
            ) from error

    def summary(self, values: Mapping[str, Any]) -> None:
        """Does nothing; see the class."""

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Does nothing: tables and page are files of the run already."""

    def publish(self, name: str, version: Version) -> None:
        """Does nothing: the registry is files already."""

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class WandbTracker:
    """Weights & Biases, imported and started at the first number and not before.

    Args:
        mode: ``online`` or ``offline``, as ``wandb_mode`` found.
        folder: the run folder; W&B writes ``wandb/`` into it.
        settings: keyword arguments of ``wandb.init`` (project, entity, group, name, tags, config).
        warn: called once, with a sentence, if W&B fails; after that nothing more is sent.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._mode = mode
        self._folder = folder
        self._settings = dict(settings)
        self._warn = warn
        self._run: Any = None
        self._failed = False
        self._online = False

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Sends ``metrics``, prefixed ``train/`` or ``eval/``."""
        prefix = "train" if kind == "step" else kind
        named = {f"{prefix}/{key}": value for key, value in metrics.items()}
        self._guarded(lambda run: run.log(named, step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sends the closing figures; they start W&B if no number has."""
        self._guarded(lambda run: run.summary.update(dict(values)))

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Sends each table as ``evaluation/<name>`` and the page, to look at and to keep."""
        if self._failed:
            return
        # Made outside the guard: a fault of ours is not W&B's.
        made = tables()

        def send(run: Any) -> None:
            with _kept_in(self._folder / "wandb"):
                _send(run, made, page)

        self._guarded(send)

    def publish(self, name: str, version: Version) -> None:
        """Mirrors a version as an artifact, online; offline it is in the registry's files alone.

        Its aliases are ``registry-v3`` (W&B counts ``v0``, ``v1``, … for itself) and the channels;
        W&B takes an alias from the version that had it before. The run that made the adapter has it
        as output, one that only promoted it as input: the lineage W&B draws.
        """
        if self._mode != "online":
            return
        self._guarded(lambda run: _publish(run, name, version) if self._online else None)

    def close(self) -> None:
        """Finishes the W&B run, so that the next job of a sweep gets one of its own."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish()
        except Exception as error:
            self._give_up(error)

    def _guarded(self, send: Callable[[Any], None]) -> None:
        if self._failed:
            return
        try:
            if self._run is None:
                self._run = self._start()
            send(self._run)
        # W&B raises its own errors, its transport's and plain OSError; none may stop a run.
        except Exception as error:
            self._give_up(error)

    def _start(self) -> Any:
        import wandb

        if self._mode == "online":
            try:
                started = self._init(wandb, "online")
                self._online = True
                return started
            except Exception as error:
                self._warn(
                    f"W&B cannot be reached ({_short(error)}); this run is kept offline in "
                    f"{self._folder / 'wandb'}, send it later with 'wandb sync'."
                )
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            # A dead network must cost seconds, not the minutes these wait by default.
            init_timeout=30.0,
            login_timeout=10.0,
            finish_timeout=60.0,
            x_graphql_retry_max=3,
            x_graphql_timeout_seconds=10.0,
        )
        return wandb.init(mode=mode, dir=str(self._folder), settings=settings, **self._settings)

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            self._warn(
                f"W&B failed and is left out of the rest of this run ({_short(error)}); "
                "training_log.jsonl has every number."
            )


class Trackers:
    """Several trackers as one, told in order."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.log(metrics, step, kind)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.summary(values)

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.show(tables, page)

    def publish(self, name: str, version: Version) -> None:
        """Tells every tracker."""
        for tracker in self._trackers:
            tracker.publish(name, version)

    def close(self) -> None:
        """Closes every tracker."""
        for tracker in self._trackers:
            tracker.close()


def make_tracker(tracking: TrackingConfig, run: Run) -> Tracker:
    """Builds the trackers of ``run``: the JSONL file, and W&B unless it is disabled."""
    from .config import as_dict

    log = JsonlTracker(run.folder / "training_log.jsonl")
    mode, warning = wandb_mode(str(tracking.mode), os.environ)
    if warning:
        run.warn(warning)
    if mode == "disabled":
        return log
    settings = {
        "project": tracking.project,
        "entity": tracking.entity,
        "group": tracking.group or run.group,
        "name": run.name,
        "tags": list(tracking.tags) or None,
        "config": as_dict(run.config),
    }
    return Trackers(log, WandbTracker(mode, run.folder, settings, run.warn))


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


def logged_in(environ: Mapping[str, str]) -> bool:
    """Says whether W&B would find a key, without importing it (that takes a second).

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


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Has W&B keep what waits to be sent in ``folder``, unless a person said where.

    By default it would be the home folder, where photographs of an offline run outlive the run.
    """
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder.absolute())
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _send(run: Any, tables: Mapping[str, Table], page: Path) -> None:
    """An evaluation to a W&B run; bytes in a table are JPEGs."""
    import wandb
    from PIL import Image

    def cell(value: Any) -> Any:
        if not isinstance(value, bytes):
            return value
        with Image.open(io.BytesIO(value)) as picture:
            return wandb.Image(picture, file_type="jpg")

    shown: dict[str, Any] = {
        f"evaluation/{name}": wandb.Table(
            columns=list[Any](table.columns),
            data=[[cell(value) for value in row] for row in table.rows],
        )
        for name, table in tables.items()
    }
    # Not injected into: the page's policy would refuse what W&B adds.
    shown["evaluation/report"] = wandb.Html(str(page), inject=False)
    run.log(shown)
    kept = wandb.Artifact(f"evaluation-{run.id}", type="evaluation")
    kept.add_file(str(page), name=page.name)
    run.log_artifact(kept)


def _publish(run: Any, name: str, version: Version) -> None:
    """A version to W&B, where one with its contents is not stored twice."""
    import wandb

    alias = f"registry-{version.version}"
    aliases = [alias, *version.channels]
    if not version.fresh:
        try:
            kept = run.use_artifact(f"{name}:{alias}")
        except (wandb.Error, ValueError):
            kept = None  # It was registered without W&B, and gets there now.
        if kept is not None:
            if kept.metadata.get("hash") != version.hash:
                raise MondrianError(f"{name}:{alias} is another adapter there")
            kept.aliases = sorted({*kept.aliases, *aliases})
            kept.save()
            return
    facts = {k: v for k, v in version.as_dict().items() if k not in ("path", "channels")}
    made = wandb.Artifact(name, type="adapter", metadata=facts)
    made.add_dir(str(version.path))
    run.log_artifact(made, aliases=aliases)


def _finite(value: Number) -> Number:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(error: Exception) -> str:
    """The first line of an error, without the stop that would end our own sentence."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return text if len(text) <= 160 else text[:157] + "…"
