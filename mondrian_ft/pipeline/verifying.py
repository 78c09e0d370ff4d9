"""Every check of an adapter, shown whether it holds or not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .. import registry
from ..errors import AdapterError
from ..evaluation.probing import probe_inputs
from ..files import sha256_file
from ..model import adapter as adapters
from ..model.proof import Check
from ..report import screen
from . import training, versioning

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run


def verify(task: tasks.Verify, config: Config, run: Run) -> None:
    """Check an adapter against its manifest, the registry, the base and its recorded proof.

    Raises:
        AdapterError: no adapter is named, or a check failed; the table was shown and recorded.
        RegistryError: the version or channel does not exist, or the history was changed.
    """
    if task.adapter is None:
        raise AdapterError(
            "task.adapter is not set; give an adapter directory, or a version or channel"
        )
    folder = versioning.find_adapter(task.adapter, config, checked=False)
    if not folder.is_dir():
        adapters.read(folder)  # a wrong path is told before the base is loaded
    checks = _registered(folder, config)
    base, _ = training.load_base_of(config, run)
    checks += adapters.examine(folder, base, probe_inputs(base, training.pixel_settings(config)))
    failed = [check for check in checks if not check.holds]
    run.record(
        verify={
            "adapter": str(folder),
            "holds": not failed,
            "checks": [{**asdict(check), "holds": check.holds} for check in checks],
        }
    )
    shown = [(check.name, check.expected, check.found, check.holds) for check in checks]
    run.console.print(screen.checks_table(shown))
    if failed:
        for check in failed[1:]:
            run.console.print(f"{check.name}: {check.refusal}", soft_wrap=True, markup=False)
        raise AdapterError(
            f"{len(failed)} of {len(checks)} checks of {screen.near(folder)} failed, "
            f"{failed[0].name} first: {failed[0].refusal}"
        )
    run.console.print(f"All {len(checks)} checks hold.", markup=False)


def _registered(folder: Path, config: Config) -> list[Check]:
    """Whether a registered version's files are those that were registered, byte for byte."""
    root, name = Path(config.registry.root).absolute(), versioning.registry_name(config)
    if folder.resolve().parent != (root / name).resolve():
        return []
    version = folder.resolve().name
    entries = [
        entry
        for entry in registry.history(root, name)
        if entry["event"] == "register" and entry["version"] == version
    ]
    if not entries:
        return [
            Check(
                "registered files",
                "a line in the history",
                "none",
                f"{version} was put into the registry by hand; register it with task=register",
            )
        ]
    then: dict[str, str] = entries[-1]["files"]
    now = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    wrong = [
        *(f"{name} is missing" for name in then.keys() - now.keys()),
        *(f"{name} is new" for name in now.keys() - then.keys()),
        *(f"{name} was changed" for name in then.keys() & now.keys() if then[name] != now[name]),
    ]
    told = ", ".join(sorted(wrong))
    return [
        Check(
            "registered files",
            f"{len(then)} as registered",
            told or f"{len(now)} as registered",
            f"{told} since {version} was registered; restore the version from a backup, or roll "
            "back to another"
            if wrong
            else "",
        )
    ]
