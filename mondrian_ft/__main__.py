"""The entry point: ``python -m mondrian_ft``, and ``mondrian-ft`` once it is installed.

Hydra composes the config and makes the run folder; the task does the work. Every error ends as
one sentence on standard error and an exit code: 1 the run failed, 2 the config is wrong, 130
interrupted. ``HYDRA_FULL_ERROR=1`` shows the traceback as well.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from . import __version__, scratch
from . import help as help_page
from .config import conf_dir, load, register_schemas
from .errors import ConfigError, MondrianError, PeerLost, Pruned, SweepError
from .explain import COMPOSE_ERRORS, explain, flag
from .launched import ONLY, Launched, launched

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from .config import Config

# What a start imports and composes is some hundred thousand objects and no garbage, which Python's
# usual threshold of 700 (2,000 since 3.12) has its collector look through again and again.
gc.set_threshold(10_000, 10, 10)

register_schemas()


@dataclass
class _Outcome:
    """What became of the jobs of this process; Hydra returns none of it."""

    me: Launched = ONLY
    tracebacks: bool = False
    started: int = 0
    errors: list[BaseException] = field(default_factory=list)


_outcome = _Outcome()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """Validates one composed config and runs its task.

    Returns:
        What the task returns, which is what a sweeper minimises.
    """
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.runtime.output_dir)
    _outcome.started += 1
    try:
        config = _load(cfg, Path(hydra_config.runtime.cwd), folder, sweeping)
        if _outcome.me.size > 1:
            _check_together(config, folder, sweeping)
        from .run import Run

        if not sweeping:
            with Run.open(config, folder, first=_outcome.me.first) as run:
                return config.task.run(config, run)
        from .sweeping import clean

        words = list(hydra_config.overrides.task)
        print(f"job {folder.name}: {' '.join(words) or 'no overrides'}", file=sys.stderr)
        trial = clean.trial(folder)
        group = Path(hydra_config.sweep.dir).name
        with clean.slate(words), Run.open(config, folder, group=group, trial=trial) as run:
            result = config.task.run(config, run)
            if result is not None:
                run.record(result=result)
            return result
    except Pruned as error:
        print(f"job {folder.name}: pruned; {error}", file=sys.stderr)
        return None
    except Exception as error:
        if not sweeping:
            # Hydra would print a heading of its own; main() tells it in one sentence instead.
            _outcome.errors.append(error)
            return None
        if getattr(error, "exit_code", 1) == 130:
            # Ctrl-C ends the sweep, not only this job.
            raise KeyboardInterrupt from error
        code = _tell(error, prefix=f"job {folder.name}: ")
        # Of our own kind, since the launcher may have to send it to another process.
        told = SweepError(str(error), code)
        _outcome.errors.append(told)
        raise told from None


def _load(cfg: DictConfig, cwd: Path, folder: Path, sweeping: bool) -> Config:
    """Loads the config; one that is wrong takes its still empty run folder with it."""
    try:
        return load(cfg, cwd)
    except (ConfigError, *COMPOSE_ERRORS) as error:
        if not sweeping:
            _remove_unused(folder)
        if isinstance(error, ConfigError):
            raise
        raise explain(error) from error


def _check_together(config: Config, folder: Path, sweeping: bool) -> None:
    """Raises where processes were started together for what one does; see ``pipeline.together``."""
    from .config import as_dict
    from .pipeline.together import refusal

    if error := refusal(
        config, _outcome.me, task=as_dict(config)["task"]["name"], sweeping=sweeping
    ):
        _remove_unused(folder)
        raise error


def _remove_unused(folder: Path) -> None:
    """Takes back the run folder Hydra made, when nothing but its own record is in it."""
    record = folder / ".hydra"
    names = ("config.yaml", "hydra.yaml", "overrides.yaml")
    if not record.is_dir() or [item.name for item in folder.iterdir()] != [".hydra"]:
        return
    if sorted(item.name for item in record.iterdir()) != sorted(names):
        return
    for name in names:
        (record / name).unlink()
    record.rmdir()
    folder.rmdir()


def main() -> int:
    """Runs the command line and returns the exit code."""
    argv = sys.argv[1:]
    if argv == ["--version"]:
        print(f"mondrian_ft {__version__}")
        return 0
    if "--help" in argv or "-h" in argv:
        print(help_page.text(argv), end="")
        return 0
    if error := flag(argv):
        return _tell(error)
    # Nothing here computes with torch, whose import takes transformers seconds where it is there.
    os.environ.setdefault("USE_TORCH", "0")
    me = launched()
    if me.first:
        return _run(argv, me)
    # The first process writes; what the code below has to write goes with this process.
    with scratch.folder() as folder:
        own = [word for word in argv if not word.startswith("hydra.run.dir=")]
        sys.argv[1:] = [*own, f"hydra.run.dir={folder}/run"]
        return _run(own, me)


def _run(argv: list[str], me: Launched) -> int:
    """Composes the config and runs its jobs; the exit code."""
    global _outcome
    before = os.environ.get("HYDRA_FULL_ERROR")
    _outcome = _Outcome(me, tracebacks=before not in (None, "", "0"))
    # Set, Hydra hands its errors to us; unset, it prints them itself and exits 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        job()
    except KeyboardInterrupt as error:
        return _tell(error.__cause__ or error)
    except BrokenPipeError:
        # Whoever read our output has gone (a pager, head); nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if any(error is told for told in _outcome.errors):
            return _sweep_failed()
        composing = isinstance(error, COMPOSE_ERRORS) or _outcome.started == 0
        if composing and not isinstance(error, MondrianError):
            told = explain(error, argv)
            told.__cause__ = error
            return _tell(told)
        return _tell(error)
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
    if _outcome.errors:
        return _tell(_outcome.errors[0])
    return 0


def _sweep_failed() -> int:
    """The closing line of a sweep by Hydra's own sweeper; its failed jobs told their sentences."""
    failed = len(_outcome.errors)
    print(f"{failed} of {_outcome.started} jobs failed; the others are done.", file=sys.stderr)
    return max(getattr(error, "exit_code", 1) for error in _outcome.errors)


def _tell(error: BaseException, prefix: str = "") -> int:
    """Prints the sentence of ``error`` on standard error and returns its exit code.

    Of processes that train together the first one speaks; another one only of what is its own.
    """
    if not _outcome.me.first:
        if isinstance(error, MondrianError) and error.common:
            # Said by the first, whose work mlx.launch would cut short if this were a failure.
            return 0
        if isinstance(error, KeyboardInterrupt) or (
            isinstance(error, PeerLost) and not error.aloud
        ):
            return 1
        prefix = f"process {_outcome.me.rank}: {prefix}"
    if _outcome.tracebacks:
        traceback.print_exception(error)
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    if isinstance(error, MondrianError):
        sentence = str(error)
    elif isinstance(error, KeyboardInterrupt):
        sentence = "interrupted."
    else:
        what = str(error) or "no message"
        sentence = (
            f"unexpected {type(error).__name__}: {what}; this is a fault of the program, not of "
            "your input: run it again with HYDRA_FULL_ERROR=1 to see where it happened."
        )
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
    label = "error:" if plain else "\033[1;31merror:\033[0m"
    print(f"{label} {prefix}{sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
