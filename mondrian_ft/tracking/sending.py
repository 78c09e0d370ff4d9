"""What a W&B run is sent besides numbers: an evaluation, the files it works on, an adapter.

Everything here is called on W&B's own thread, with a run that is open; it may raise what it likes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MondrianError
from ..files import is_read_only

if TYPE_CHECKING:
    from ..registry import Version
    from ..report.tables import Table


def evaluation(run: Any, tables: Mapping[str, Table], page: Path) -> None:
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


def inputs(
    run: Any, name: str, kind: str, files: Sequence[Path], facts: dict[str, Any], alias: str
) -> None:
    import wandb

    made = wandb.Artifact(_plain_name(name), type=kind, metadata=facts)
    for path in files:
        made.add_file(str(path), name=path.name)
    _use(run, made, [alias])


def adapter(run: Any, name: str, version: Version) -> None:
    """A version to W&B, where one with its contents is not stored twice."""
    import wandb

    name = _plain_name(name)
    alias = f"registry-{version.version}"
    aliases = [alias, *version.channels]
    offline = _is_offline(run)
    if not version.fresh and not offline:
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
    for path in sorted(version.path.rglob("*")):
        if path.is_file():
            # What the registry never changes need not be copied to wait for being sent.
            policy = "immutable" if is_read_only(path) else "mutable"
            where = path.relative_to(version.path).as_posix()
            made.add_file(str(path), name=where, policy=policy)
    if version.fresh or not offline:
        run.log_artifact(made, aliases=aliases)
    else:
        _use(run, made, aliases)


def _use(run: Any, made: Any, aliases: list[str]) -> None:
    """An artifact as input of the run, which W&B stores unless it has one with its contents."""
    if _is_offline(run):
        # use_artifact refuses offline, but the file that is kept knows inputs as well.
        run._log_artifact(made, aliases=aliases, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(made, aliases=aliases)


def _is_offline(run: Any) -> bool:
    return bool(getattr(run, "offline", False))


def _plain_name(name: str) -> str:
    """A name that W&B takes: letters, digits, ``-``, ``_`` and ``.``, 128 of them at most."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:128]
