"""Numbered adapters: where a run's adapter goes, what a name stands for, and who may be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import RegistryError
from ..report import screen
from .words import command

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

PRODUCTION = "production"
LOCK_NAME = "split.lock.json"


def register(config: Config, run: Run, folder: Path) -> str:
    """Copy an adapter directory into the registry; returns its version.

    One that is there already keeps its number, and gets the evaluation in the directory.
    """
    root, name = where(config)
    version = registry.register(root, name, folder, facts=facts(run), mirror=mirror(config))
    if version.fresh:
        told = f"Registered as {name} {version.version}."
    else:
        told = f"{name} {version.version} is this adapter already, byte for byte."
    run.console.print(told, markup=False)
    run.record(registered={"name": name, "version": version.version})
    happened(run, "register", version=version.version, hash=version.hash, fresh=version.fresh)
    publish(config, run, version.version, fresh=version.fresh)
    report = folder / registry.REPORT
    if not version.fresh and report.is_file():
        file_report(config, run, version.hash, report)
    elif version.metrics is None and report.is_file():
        run.warn(f"{screen.near(report)} is about other weights, so it is no evidence for these")
    return version.version


def file_report(config: Config, run: Run, digest: str, report: Path) -> str | None:
    """Keep an evaluation if its adapter is a version here; returns that version."""
    root, name = where(config)
    label = registry.label_of(root, name, digest)
    if label is None:
        return None
    new = registry.file_report(root, name, label, report, facts=facts(run), mirror=mirror(config))
    if new:
        run.console.print(f"Filed as evidence for {name} {label}.", markup=False)
        happened(run, "evaluate", version=label, hash=digest)
    return label


def promote(task: tasks.Promote, config: Config, run: Run) -> None:
    """Let a channel mean a version, if the gate lets it.

    Raises:
        RegistryError: the gate refuses; the reasons are printed and in the history.
    """
    root, name = where(config)
    done = registry.promote(
        root,
        name,
        task.version,
        task.channel,
        rules(config),
        lock=data_lock(config),
        force=task.force,
        reason=task.reason,
        facts=facts(run),
        mirror=mirror(config),
    )
    if done.decision is None:
        run.console.print(f"{task.channel} is {done.version} already.", markup=False)
        return
    tell(run, done, task.channel)
    happened(
        run,
        "promote" if done.moved else "refuse",
        version=done.version,
        channel=task.channel,
        before=done.before.version if done.before else None,
        forced=done.forced,
    )
    if not done.moved:
        against = done.decision.against[0].rstrip(".")
        raise RegistryError(
            f"{done.version} is not promoted to {task.channel}: {against}{remedy(config, done)}"
        )
    publish(config, run, done.version)
    was = f"it was {done.before.version}" if done.before else "it was empty"
    how = ", by force" if done.forced else ""
    run.console.print(f"{task.channel} is {done.version} now ({was}){how}.", markup=False)
    if done.before:
        back = command("task=rollback", *_unless("task.channel", task.channel, PRODUCTION))
        run.console.print(f"\nBack again\n  {back}", soft_wrap=True, markup=False)


def rollback(task: tasks.Rollback, config: Config, run: Run) -> None:
    """Let a channel mean again what it meant before."""
    root, name = where(config)
    now, then = registry.rollback(root, name, task.channel, facts=facts(run), mirror=mirror(config))
    run.console.print(
        f"{task.channel} is {then.version} again (it was {now.version}).", markup=False
    )
    happened(run, "rollback", version=then.version, channel=task.channel, before=now.version)
    publish(config, run, then.version)


def prune(task: tasks.Prune, config: Config, run: Run) -> None:
    """Remove old versions that nobody needs.

    Raises:
        RegistryError: it was not said how many to keep.
    """
    if task.keep is None:
        raise RegistryError("task.keep is not set; say how many of the newest versions to keep.")
    root, name = where(config)
    gone, kept = registry.prune(
        root, name, task.keep, force=task.force, facts=facts(run), mirror=mirror(config)
    )
    run.console.print(
        f"Removed {', '.join(gone)}." if gone else "There is nothing to remove.", markup=False
    )
    for label, why in kept.items():
        run.console.print(f"{label} stays: {why}.", markup=False)
    if gone:
        happened(run, "prune", versions=gone)


def versions(task: tasks.Versions, config: Config, run: Run) -> None:
    """The registry's versions, oldest first."""
    root, name = where(config)
    registry.repair(root, name, mirror=mirror(config))
    found = registry.versions(root, name)
    if task.format == "json":
        print(json.dumps([version.as_dict() for version in found], indent=2))
        return
    if not found:
        run.console.print(
            f"The registry has no version of {name} yet; the main job registers one.", markup=False
        )
        return
    run.console.print(screen.versions_table([version.as_dict() for version in found]))


def next_step(config: Config, label: str) -> tuple[list[tuple[str, str]], list[str]]:
    """What to type to promote a new version, as (what it does, command), and what is against it."""
    root, name = where(config)
    seen = registry.preview(root, name, label, PRODUCTION, rules(config), lock=data_lock(config))
    if seen.decision is None:
        return [], [f"{PRODUCTION} is {label} already."]
    if not seen.decision.passed:
        told = [f"{label} cannot be promoted: {sentence}" for sentence in seen.decision.against]
        return [], told
    rival = seen.before.version if seen.before else "its base"
    typed = command("task=promote", f"task.version={label}")
    return [(f"promote {label}: the evidence against {rival} allows it", typed)], []


def tell(run: Run, done: registry.Outcome, channel: str) -> None:
    """Print what each rule found."""
    assert done.decision is not None
    run.console.print(f"{done.version} to {channel}", style="bold", markup=False)
    for reason in done.decision.reasons:
        word = "passed " if reason.passed else "refused"
        run.console.print(
            f"  {word}  {screen.plain(reason.sentence)}", soft_wrap=True, markup=False
        )


def remedy(config: Config, done: registry.Outcome) -> str:
    """What to type so that the gate has what it lacks, or to overrule it; the end of a sentence."""
    assert done.decision is not None
    force = "task.force=true with a task.reason overrules it"
    if done.decision.fits or done.meanwhile:
        return f"; {force}."
    words = ["task=evaluate", f"task.adapter={done.version}"]
    data = config.data.output_dir or (str(Path(done.data).parent) if done.data else None)
    if data is not None and not (config.data.val_data or config.data.train_data):
        words.append(f"data.output_dir={screen.near(data)}")
    compared = occupant(config, config.eval.against) if config.eval.against else None
    if done.before is not None and compared != done.before[:2]:
        words.append(f"eval.against={done.before.version}")
    return f"; this makes the evidence: {command(*words)} (or {force})."


def rules(config: Config) -> registry.Rules:
    """The gate's rules of this config."""
    gate = config.registry.gate
    return registry.Rules(str(gate.inconclusive), str(gate.no_worse), gate.latency)


def data_lock(config: Config) -> registry.Lock | None:
    """The lock of the rows in ``data.output_dir``; None where the config names none of its own.

    Rows given by file or by fold have no entry in the lock file.
    """
    data = config.data
    if data.output_dir is None or data.train_data or data.val_data or data.fold is not None:
        return None
    path = Path(data.output_dir) / LOCK_NAME
    if not path.is_file():
        return None
    from ..data.store import advisor_id

    try:
        locks = json.loads(path.read_bytes())["advisors"]
        found = locks[advisor_id(data.advisor) or "all"]["data_lock"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"{path} has no data lock of {data.advisor or 'all'} ({error!r}); run task=prepare."
        ) from error
    return registry.Lock(str(found), f"of {screen.near(path)}")


def happened(run: Run, event: str, **about: Any) -> None:
    """Keep in run.json what became of the registry."""
    run.record(registry={"event": event, **about})


def publish(config: Config, run: Run, label: str, *, fresh: bool = False) -> None:
    """Tell the trackers of a version that was registered, or that a channel means now."""
    root, name = where(config)
    found = next(one for one in registry.versions(root, name) if one.version == label)
    run.tracker.publish(name, found._replace(fresh=fresh))


def occupant(config: Config, ref: str) -> tuple[str, str] | None:
    """Version and hash that a channel or version means; None if there is none."""
    root, name = where(config)
    place = registry.serves(root, name, ref)
    if place is not None:
        return place.version, place.hash
    for version in registry.history(root, name):
        if version["event"] == "register" and version["version"] == ref:
            return ref, version["hash"]
    return None


def where(config: Config) -> tuple[Path, str]:
    """The registry's folder, and what this config's versions are counted under."""
    return Path(config.registry.root), registry_name(config)


def mirror(config: Config) -> Path | None:
    """The folder that is kept in the workbook's layout."""
    return Path(config.registry.mirror) if config.registry.mirror else None


def facts(run: Run) -> dict[str, Any]:
    """Where an event of the history came from."""
    return {"run": str(run.folder), "config_hash": run.config_hash}


def registry_name(config: Config) -> str:
    """What this config's versions are counted under."""
    if config.registry.name is not None:
        return config.registry.name
    model = "sample" if config.model.path is None else Path(config.model.path).name
    return f"{model}-{config.data.advisor or 'all'}".lower()


def find_adapter(name: str, config: Config, *, checked: bool = True) -> Path:
    """An adapter directory, or a version or channel of the registry; see `registry.resolve`.

    A link, such as the mirror's ``<name>-active``, is followed once and here: if it is swapped
    while the adapter is read, all files are still one version's.
    """
    path = Path(name)
    if path.exists() or "/" in name:
        return path.resolve() if path.is_symlink() else path
    return registry.resolve(*where(config), name, checked=checked)


def _unless(key: str, value: str, default: str) -> list[str]:
    return [] if value == default else [f"{key}={value}"]
