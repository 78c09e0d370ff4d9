"""Adding the service's columns to a job database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..report import screen

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run


def migrate(task: tasks.Migrate, config: Config, run: Run) -> None:
    """Add what is missing, and say what that was and where the backup is.

    Raises:
        ConfigError: no database is named.
        DataError: it is no job database.
        ServerError: it cannot be written; it is as it was.
    """
    from ..serving import migration

    if task.db_path is None:
        raise ConfigError(
            "task=migrate changes a database and takes none by default; set task.db_path to the "
            "service's mondrian.db."
        )
    path = Path(task.db_path)
    done = migration.migrate(path)
    backup = str(done.backup) if done.backup else None
    run.record(migrated={"database": str(path), "added": list(done.added), "backup": backup})
    said = run.console.print
    if done.backup is None:
        said(f"{screen.near(path)} has every column already; nothing was changed.", markup=False)
        return
    said(f"Backup: {screen.near(done.backup)}", soft_wrap=True, markup=False)
    said(f"Added to jobs: {', '.join(done.added)}.", soft_wrap=True, markup=False)
