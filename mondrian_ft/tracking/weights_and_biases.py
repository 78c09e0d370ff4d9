"""Weights & Biases: one run of ours is one run there, and never waits for it.

All that W&B does happens on a thread of its own: importing it takes a second, reaching a server
that is not there half a minute, and sending one number more time than a GPU's update may lose.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import secrets
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MondrianError
from ..files import atomic_write_json
from . import sending
from .background import Background
from .offline import EMPTY, closed

if TYPE_CHECKING:
    from ..registry import Version
    from ..report.tables import Table
    from . import Number

STEP = "train/step"
"""The axis of every curve: updates done."""
IDENTITY = "wandb.json"
"""Beside a training's checkpoints: which W&B run it is, so that a resumed one goes on with it."""
CLOSING = {"offline": 30.0, "online": 120.0}
"""Seconds that the end of a run waits for W&B, by mode."""
SENDING = 60.0
"""Seconds of those for what is still to be sent."""
WRITTEN = 5.0
"""Seconds after which a file that W&B has finished, and is not whole, will not become so."""
REFUSED: set[tuple[Any, Any]] = set()
"""(Project, entity) that W&B took no run of in this process: a sweep's next job asks no more."""
_ALPHABET = string.ascii_lowercase + string.digits


class WandbTracker:
    """One W&B run, imported and started at the first number and not before.

    Args:
        mode: ``online`` or ``offline``, as ``wandb_mode`` found.
        folder: the run folder; W&B writes ``wandb/`` into it.
        settings: keyword arguments of ``wandb.init`` (project, entity, group, job_type, name, tags,
            config).
        warn: called with a sentence, by the thread that calls the tracker, if W&B fails; after
            that nothing more is sent.
        say: called with what a person should know at the end: the run's page, or how to send it.
        record: called with facts for run.json.
        versions_alone: whether a version of the registry may start W&B, where there are no numbers.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
        *,
        say: Callable[[str], None] = lambda sentence: None,
        record: Callable[[dict[str, Any]], None] = lambda facts: None,
        versions_alone: bool = True,
    ) -> None:
        self._mode = mode
        self._folder = folder
        self._settings = {"id": _new_id(), **settings}
        self._warn = warn
        self._say = say
        self._record = record
        self._versions_alone = versions_alone
        self._worker = Background("wandb")
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._held: list[Callable[[Any], None]] = []
        self._taken: set[str] = set()
        self._earlier: list[str] = []
        self._resumed = False
        self._failed = False
        self._ended = False
        # These belong to the worker until it has ended.
        self._run: Any = None
        self._online = False
        self._kept: Path | None = None
        self._url: str | None = None

    def log(self, metrics: Mapping[str, Number], step: int, kind: str = "step") -> None:
        """Sends ``metrics``, prefixed ``train/`` or ``eval/``, with `STEP`."""
        prefix = "train" if kind == "step" else kind
        named = {f"{prefix}/{key}": value for key, value in metrics.items()} | {STEP: step}
        self._send(lambda run: run.log(named, step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sends the closing figures; they start W&B if no number has."""
        kept = dict(values)
        self._send(lambda run: run.summary.update(kept))

    def show(self, tables: Callable[[], Mapping[str, Table]], page: Path) -> None:
        """Sends each table as ``evaluation/<name>`` and the page, to look at and to keep."""
        if self._failed:
            return
        # Made here and now: a fault of ours is not W&B's.
        made = tables()
        self._send(lambda run: sending.evaluation(run, made, page))

    def takes(
        self, name: str, kind: str, files: Sequence[Path], facts: Mapping[str, Any], alias: str
    ) -> None:
        """Keeps the files that the run works on as an artifact, its input; once each.

        They do not start W&B: a task without numbers, such as prepare, sends nothing.
        """
        if name in self._taken:
            return
        self._taken.add(name)
        kept = dict(facts)

        def send(run: Any) -> None:
            sending.inputs(run, name, kind, files, kept, alias)

        if self._worker.started:
            self._send(send)
        else:
            self._held.append(send)

    def publish(self, name: str, version: Version) -> None:
        """Keeps a version as an artifact.

        Its aliases are ``registry-v3`` (W&B counts ``v0``, ``v1``, … for itself) and the channels;
        W&B takes an alias from the version that had it before. The run that made the adapter has it
        as output, any other as input: the lineage W&B draws.
        """
        if self._worker.started or self._versions_alone:
            self._send(lambda run: sending.adapter(run, name, version))

    def follow(self, folder: Path, start: Path | None) -> None:
        """Goes on with the W&B run that the checkpoint ``start`` is of, and notes it in ``folder``.

        Both are of one training, so they are one run: its curve goes on where it stopped.
        """
        if self._worker.started or self._failed:
            return
        own = {key: self._settings.get(key) for key in ("project", "entity")}
        if start is not None:
            try:
                kept = json.loads((start.parent / IDENTITY).read_text(encoding="utf-8"))
                if {key: kept[key] for key in own} == own:
                    self._settings |= {"id": str(kept["id"]), "name": str(kept["name"])}
                    self._earlier = [str(path) for path in kept["folders"]]
                    self._resumed = True
            except (OSError, ValueError, KeyError, TypeError):
                # It was trained without W&B, and starts there now.
                pass
        facts = {
            "id": self._settings["id"],
            "name": self._settings.get("name"),
            **own,
            "folders": [*dict.fromkeys([*self._earlier, str(self._folder / "wandb")])],
        }
        try:
            atomic_write_json(folder / IDENTITY, facts)
        except MondrianError as error:
            self._warn(f"a resumed run will be another one in W&B: {error}")

    def close(self, ok: bool = True) -> None:
        """Finishes the W&B run, so that the next job of a sweep gets one of its own.

        Args:
            ok: whether the run did what it was to do.
        """
        if self._ended or not self._worker.started:
            return
        self._ended = True
        seconds = CLOSING[self._mode]
        if not self._worker.end(partial(self._finish, 0 if ok else 1), seconds):
            self._give_up(f"it has not finished within {seconds:.0f} seconds")
            _end_service()
            self._worker.wait(5.0)
        self._deliver()
        self._report()

    def _send(self, send: Callable[[Any], None]) -> None:
        self._deliver()
        if self._failed or self._ended:
            return
        held, self._held = self._held, []
        for one in (*held, send):
            if not self._worker.put(partial(self._guarded, one)):
                self._give_up("it no longer takes what it is sent")
        self._deliver()

    def _deliver(self) -> None:
        """Warns, on the caller's thread, of what the worker met."""
        while not self._warnings.empty():
            self._warn(self._warnings.get())

    def _report(self) -> None:
        """Says where the run is to be found, once it is finished."""
        if self._kept is None:
            return
        facts: dict[str, Any] = {"id": self._settings["id"], "folder": str(self._kept)}
        if self._url:
            facts["url"] = self._url
            self._say(f"W&B:      {self._url}")
        if not self._online or self._failed:
            # Of a run that was stopped and went on offline, every piece.
            pieces = [
                piece
                for folder in self._earlier
                for piece in sorted(Path(folder).glob(f"offline-run-*-{self._settings['id']}"))
            ]
            # One that was killed early has written nothing.
            if there := [path for path in dict.fromkeys([*pieces, self._kept]) if _holds(path)]:
                facts["sync"] = _sync_command(there)
                self._say(f"W&B:      kept on disk; send it with: {facts['sync']}")
        self._record(facts)

    # --- on the worker's thread -----------------------------------------------------------------

    def _guarded(self, send: Callable[[Any], None]) -> None:
        if self._failed:
            return
        try:
            with _kept_in(self._folder / "wandb"):
                if self._run is None:
                    self._run = self._start()
                send(self._run)
        # W&B raises its own errors, its transport's and plain OSError; none may stop a run.
        except Exception as error:
            self._give_up(_short(error))
            self._let_go()

    def _start(self) -> Any:
        # Its telemetry tells of its own failures through a logger that nobody reads.
        logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
        import wandb

        run, target = None, (self._settings.get("project"), self._settings.get("entity"))
        if self._mode == "online" and target in REFUSED:
            self._warnings.put(
                "W&B took no run of an earlier job of this sweep, so this one is kept in "
                f"{self._folder / 'wandb'} at once."
            )
        elif self._mode == "online":
            try:
                run = self._init(wandb, "online")
                self._online = True
                self._url = getattr(run, "url", None)
            except Exception as error:
                REFUSED.add(target)
                self._warnings.put(
                    f"{_cause(error, self._settings)}; training goes on, and this run is kept in "
                    f"{self._folder / 'wandb'}."
                )
                # Its process would go on to hold the run's id for itself.
                self._let_go()
        if run is None:
            run = self._init(wandb, "offline")
        files = getattr(run, "dir", None)
        self._kept = Path(files).parent if files else None
        for glob in ("train/*", "eval/*"):
            run.define_metric(glob, step_metric=STEP)
        # One point each: figures, and no curves.
        run.define_metric("end/*", step_metric=STEP, hidden=True)
        # The best so far beside the last, for tables and sweeps.
        run.define_metric("eval/val_loss", step_metric=STEP, summary="min,last")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            # Never the run of an earlier job of this process, even if that did not finish.
            reinit="create_new",
            # A dead network must cost seconds, not the minutes these wait by default.
            init_timeout=30.0,
            login_timeout=10.0,
            finish_timeout=SENDING,
            # Else a server that went away in mid-run would look as if it had everything.
            finish_timeout_raises=True,
            x_graphql_retry_max=3,
            x_graphql_timeout_seconds=10.0,
        )
        # Logging in happens before the settings of a run are looked at.
        wandb.setup(settings=wandb.Settings(silent=True))
        # Offline there is nothing to ask: pieces of one id come together when they are sent.
        resume = {"resume": "allow"} if mode == "online" else {}
        return wandb.init(
            mode=mode, dir=str(self._folder), settings=settings, **resume, **self._settings
        )

    def _finish(self, code: int) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish(exit_code=code)
        except Exception as error:
            late = isinstance(error, TimeoutError)
            told = f"it has not taken everything within {SENDING:.0f} seconds"
            self._give_up(told if late else _short(error))
            self._let_go()
            return
        if self._kept is None or self._failed:
            return
        # What is finished may still be on its way to the disk.
        until = time.monotonic() + WRITTEN
        while not closed(self._kept / f"run-{self._settings['id']}.wandb"):
            if time.monotonic() > until:
                self._give_up(f"{self._kept} was not written to its end, as on a full disk")
                return
            time.sleep(0.02)

    def _give_up(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._warnings.put(
                f"W&B failed and is left out of the rest of this run ({reason.rstrip('.')}); "
                "training_log.jsonl has every number."
            )

    def _let_go(self) -> None:
        """Leaves a W&B that failed, so that the next job of this process starts it afresh."""
        self._run = None
        teardown = getattr(sys.modules.get("wandb"), "teardown", None)
        if teardown is None:
            return
        try:
            teardown()
        # Its process is gone, which is why we are here; what matters comes before it finds out.
        except (Exception, SystemExit) as error:
            logging.getLogger(__name__).debug("W&B's own clean-up failed: %s", error)


def _new_id() -> str:
    """A run id of W&B's kind."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(8))


def _end_service() -> None:
    """Kills W&B's own process, which no longer answers; the thread that waits for it goes on."""
    try:
        from wandb.sdk import wandb_setup

        process = wandb_setup.singleton()._connection._proc._process  # pyright: ignore
        process.kill()
    except (ImportError, AttributeError, OSError) as error:
        # Another version of W&B keeps it elsewhere; then the process may end late, not wrong.
        logging.getLogger(__name__).debug("W&B's process was not ended: %s", error)


def _holds(folder: Path) -> bool:
    """Whether a run of W&B on disk holds anything."""
    return any(path.stat().st_size > EMPTY for path in folder.glob("run-*.wandb"))


def _sync_command(folders: list[Path]) -> str:
    """What to type to send these later, from the folder that the run was started in."""
    from ..report.screen import near

    program = "wandb" if shutil.which("wandb") else f"{near(sys.executable)} -m wandb"
    return " ".join([program, "sync", *map(near, folders)])


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
        os.environ.pop("WANDB_DATA_DIR", None)


def _cause(error: Exception, settings: Mapping[str, Any]) -> str:
    """Why W&B does not take a run, and what helps, as the beginning of a sentence."""
    said = _short(error)
    text = f"{type(error).__name__} {error}"
    if re.search(r"\b401\b|AuthenticationError|[Aa]pi.?[Kk]ey|not logged in", text):
        return f"W&B does not take the key ({said}); log in again with 'wandb login --relogin'"
    if re.search(r"\b(403|404)\b|not found|[Pp]ermission", text):
        entity = settings.get("entity") or "the account's default"
        return (
            f"W&B does not let this run into entity {entity}, project {settings.get('project')} "
            f"({said}); look at tracking.entity and tracking.project"
        )
    return f"W&B cannot be reached ({said})"


def _short(error: BaseException) -> str:
    """What an error says in a line, without the stop that would end our own sentence."""
    whole = str(error).strip() or type(error).__name__
    if asked := re.search(r"POST (\S+) giving up after", whole):
        # The reason comes last: a status, or what the socket said.
        return f"{asked[1]}: {whole.splitlines()[-1].split(': ')[-1].rstrip('.')}"
    text = whole.splitlines()[0].rstrip(".")
    if answer := re.search(r'"message":"([^"]+)"', text):
        text = f"{text[: text.index('{')].rstrip(': ')}: {answer[1]}"
    # Which of its questions failed is of no use to who reads it.
    text = re.sub(r"^Failed to \w[\w ]*: ", "", text)
    return text if len(text) <= 160 else text[:157] + "…"
