"""Commands to type next, with this run's own choices in them."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..launched import launched
from ..report import screen

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


def command(*overrides: str) -> str:
    """A command with this run's own choices of model, data and experiment, and the given ones."""
    kept = [
        word
        for word in sys.argv[1:]
        if word.lstrip("+").startswith(("experiment=", "model", "data", "registry"))
        and not word.startswith(tuple(f"{over.split('=')[0]}=" for over in overrides))
    ]
    return " ".join([_program(), *map(shlex.quote, kept), *overrides])


def without(*names: str) -> str:
    """This very command less the keys of these names."""
    dropped = tuple(f"{name}=" for name in names)
    kept = [word for word in sys.argv[1:] if not word.lstrip("+").startswith(dropped)]
    return " ".join([_program(), *map(shlex.quote, kept)])


def resume_command(config: Config, run: Run, folder: Path) -> str:
    """This very command, going on from the adapter folder's newest checkpoint."""
    from .rows import data_dir  # what reads data is not needed to type a command

    dropped = ("trainer.resume=", "task.output_dir=", "data.output_dir=")
    kept = [word for word in sys.argv[1:] if not word.startswith(dropped)]
    data = screen.near(data_dir(config, run))
    added = [
        f"task.output_dir={screen.near(folder)}",
        f"data.output_dir={data}",
        "trainer.resume=auto",
    ]
    size = launched().size
    together = ["mlx.launch", "-n", str(size), "--"] if size > 1 else []
    return " ".join([*together, _program(), *map(shlex.quote, kept), *added])


def _program() -> str:
    """How this process was started: ``make run``, for one, uses a Python that is on no PATH."""
    typed = sys.orig_argv
    if Path(sys.argv[0]).name == "mondrian-ft":
        # Found on the PATH, the script's name is enough; else it was typed with its folder.
        on_path = shutil.which("mondrian-ft") == str(Path(sys.argv[0]).absolute())
        return "mondrian-ft" if on_path else screen.near(sys.argv[0])
    python = typed[0] if "-m" in typed else "python"
    return f"{screen.near(python)} -m mondrian_ft"
