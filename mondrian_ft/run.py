"""One run: its folder, where it came from, its console and its trackers, from start to end.

    with Run.open(config) as run:
        config.task.run(config, run)

``run.json`` is there from the first moment, says ``running``, and ends as ``done``, ``failed``,
``interrupted`` or, a trial of a search, ``pruned``, so a folder always tells what became of it.
Nothing here needs Hydra.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import __version__
from .config import as_dict, config_hash, secret_keys
from .errors import Interrupted, MondrianError, Pruned
from .files import atomic_write_json, atomic_write_text
from .tracking import JsonlTracker, Tracker, make_tracker

if TYPE_CHECKING:
    from rich.console import Console

    from .config import Config

_PACKAGES = (
    "mlx",
    "mlx-vlm",
    "mlx-lm",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "pillow",
    "pydantic",
    "hydra-core",
    "omegaconf",
    "wandb",
)


class Run:
    """A run that is open; made by ``Run.open``.

    Attributes:
        config: the whole config, paths absolute.
        config_hash: SHA-256 of every key that can change a number (``config.config_hash``).
        folder: the run folder, absolute; it exists.
        name: the run's name, ``<experiment>/<timestamp>``.
        group: the sweep the run belongs to, or None.
        first: whether this process speaks; of several that train together only one does.
        console: what a person reads, on standard output.
        tracker: takes the numbers; see ``tracking``.
        trial: told the figure, the update and the number of every evaluation, where the run is a
            trial of a search; it raises ``Pruned`` to give the run up.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        group: str | None = None,
        trial: Callable[[float | None, int, int], None] | None = None,
        *,
        first: bool = True,
    ) -> None:
        from rich.console import Console

        self.config = config
        self.config_hash = config_hash(config)
        self.folder = folder
        self.group = group
        self.trial = trial
        self.first = first
        self.name = f"{config.experiment_name}/{folder.name}"
        # Into a file or a pipe lines are not folded at 80 columns, which would cut paths in two.
        width = None if sys.stdout.isatty() else 120
        self.console: Console = Console(width=width, highlight=False, quiet=not first)
        self._stderr: Console = Console(
            stderr=True, highlight=False, soft_wrap=True, quiet=not first
        )
        self._clock = time.perf_counter()
        self._state: dict[str, Any] = {
            "status": "running",
            "task": as_dict(config)["task"]["name"],
            "experiment": config.experiment_name,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "config_hash": self.config_hash,
            "provenance": provenance(),
            "config": as_dict(config),
            "warnings": [],
        }
        self._write()
        log = self.folder / "training_log.jsonl"
        self.tracker: Tracker = make_tracker(config.tracking, self) if first else JsonlTracker(log)

    @classmethod
    @contextmanager
    def open(
        cls,
        config: Config,
        folder: str | Path | None = None,
        *,
        group: str | None = None,
        trial: Callable[[float | None, int, int], None] | None = None,
        first: bool = True,
    ) -> Iterator[Run]:
        """Opens the run, and closes it however the block ends.

        SIGTERM is turned into KeyboardInterrupt meanwhile, so that being asked to stop and Ctrl-C
        leave the same things behind.

        Args:
            config: the whole config.
            folder: the run folder, made if it is missing; None makes
                ``outputs/<experiment>/<timestamp>`` where the process stands.
            group: name of the sweep this run belongs to.
            trial: see the class.
            first: whether it is the process that speaks, of those that train together.

        Raises:
            MondrianError: the folder cannot be written.
        """
        if folder is None:
            stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
            folder = Path("outputs") / config.experiment_name / stamp
        run = cls(config, Path(folder).absolute(), group, trial, first=first)
        with _sigterm_interrupts():
            try:
                yield run
            except BaseException as error:
                run._close_after(error)
                raise
            else:
                run._close("done")

    def within(self, config: Config, name: str) -> AbstractContextManager[Run]:
        """A run of its own below this one's folder, in its group; see :meth:`open`."""
        return type(self).open(config, self.folder / name, group=self.group or self.name)

    @property
    def resolved(self) -> dict[str, Any]:
        """The whole config as plain values, the way run.json shows it."""
        return as_dict(self.config)

    def record(self, **facts: Any) -> None:
        """Adds facts (JSON types) to run.json at once, so that a kill cannot lose them.

        Raises:
            ValueError: a name that run.json uses itself.
        """
        if taken := sorted(set(facts) & {*_OWN_KEYS}):
            raise ValueError(f"run.json keeps {', '.join(taken)} itself; choose another name")
        self._state |= facts
        self._write()

    @property
    def versions(self) -> dict[str, str | None]:
        """Of this package and those that it computes with."""
        return self._state["provenance"]["versions"]

    def abandon(self, sentence: str) -> None:
        """Tells why the process is about to be ended from outside its main thread."""
        if not self.first:
            return  # the first one waits in vain as well, and says so
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        self._state |= {"status": "failed", "error": sentence}
        self._write()

    def warn(self, sentence: str) -> None:
        """Shows ``sentence`` in yellow on standard error and keeps it in run.json."""
        self._stderr.print(f"warning: {sentence}", style="yellow", markup=False)
        self._state["warnings"].append(sentence)
        self._write()

    def _close_after(self, error: BaseException) -> None:
        """Closes the run that ``error`` ended, which the caller goes on raising."""
        # What rich raises where it cannot print.
        unread = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
        if isinstance(error, KeyboardInterrupt | Interrupted):
            status, sentence = "interrupted", str(error) or "interrupted"
        elif isinstance(error, Pruned):
            status, sentence = "pruned", str(error)
        elif isinstance(error, MondrianError):
            status, sentence = "failed", str(error)
        elif unread:
            status, sentence = "failed", _UNREAD
        else:
            status, sentence = "failed", f"{type(error).__name__}: {error}"
        if not unread and not isinstance(error, MondrianError | KeyboardInterrupt):
            self._state["traceback"] = "traceback.txt"
            text = "".join(traceback.format_exception(error))
            try:
                atomic_write_text(self.folder / "traceback.txt", text)
            except MondrianError:
                # The disk may be what failed; the error itself still reaches the person.
                del self._state["traceback"]
        try:
            self._close(status, error=sentence)
        except MondrianError as second:
            self._stderr.print(f"warning: {second}", style="yellow", markup=False)

    def _close(self, status: str, **facts: Any) -> None:
        try:
            self.tracker.close(status == "done")
        finally:
            self._state |= {
                "status": status,
                "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - self._clock, 3),
                **facts,
            }
            self._write()

    def _write(self) -> None:
        atomic_write_json(self.folder / "run.json", self._state)


_UNREAD = (
    "what read this program's output has ended, mlx.launch or a pager for one, and so did the run; "
    "start it again"
)

_OWN_KEYS = (
    "status",
    "task",
    "experiment",
    "started",
    "ended",
    "seconds",
    "error",
    "traceback",
    "config_hash",
    "provenance",
    "config",
    "warnings",
)


def provenance() -> dict[str, Any]:
    """What it takes to repeat a run: the code, the command, the machine's kind, the versions.

    Versions are read from the installed packages' metadata, so nothing is imported for them.
    ``git`` is None outside a checkout, as for an installed wheel; its ``commit`` is None before
    the first commit, and ``dirty`` says whether tracked files differ from it.
    """
    versions: dict[str, str | None] = {"mondrian_ft": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "git": _git(Path(__file__).resolve().parent.parent),
        "argv": [without_secret(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def without_secret(argument: str) -> str:
    """A word of the command line; the value of a key that is a secret is told as ``***``."""
    key = argument.partition("=")[0]
    return f"{key}=***" if key.lstrip("+") in secret_keys() else argument


def _git(root: Path) -> dict[str, Any] | None:
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch"]
    try:
        out = subprocess.run(
            [*command, "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        # No git here, or a checkout it will not read: the version still names the code.
        return None
    lines = out.splitlines()
    oid = next((line.split()[2] for line in lines if line.startswith("# branch.oid")), "(initial)")
    return {
        "commit": None if oid == "(initial)" else oid,
        "dirty": any(not line.startswith("#") for line in lines),
    }


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside the block; only a main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # Ignored, another process was lost and the launcher is not to cut short what follows.
        if signal.getsignal(signal.SIGTERM) is interrupt:
            signal.signal(signal.SIGTERM, before)
