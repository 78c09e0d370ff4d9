"""What a run works on, told to the trackers: the manifest and the split lock of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.link import REPORT_NAME
from . import rows, versioning
from .rows import Parts

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


def tell(config: Config, run: Run, parts: Parts) -> None:
    """Tell of both; rows that were given as files of their own have neither."""
    if config.data.train_data is not None or config.data.val_data is not None:
        return
    name = versioning.registry_name(config)
    manifest = rows.manifest_path(config, run)
    facts = {
        "data_lock": parts.lock,
        "advisor": config.data.advisor,
        "rows": {part: len(getattr(parts, part)) for part in rows.PARTS},
    }
    known = {
        # With the report of every row that was left out.
        "manifest": (manifest, manifest.with_name(REPORT_NAME)),
        "split": (rows.data_dir(config, run) / versioning.LOCK_NAME,),
    }
    for kind, paths in known.items():
        if files := [path for path in paths if path.is_file()]:
            run.tracker.takes(f"{name}-{kind}", kind, files, facts, f"lock-{parts.lock[:12]}")
