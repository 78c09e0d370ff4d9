"""A person's review of the labels: the page, until Ctrl-C, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..report import screen, wording
from . import auditing, rows
from .words import command

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run


def review(task: tasks.Review, config: Config, run: Run) -> None:
    """Serve the page that corrects labels, and tell what was decided when it is stopped.

    Links first unless ``data.manifest`` is given or the folder holds a manifest.

    Raises:
        ConfigError: neither ``data.output_dir`` nor ``data.manifest`` is set.
        ServerError: the port is taken.
    """
    from ..serving import local
    from ..serving.review import Desk, cases_of, make_app

    if config.data.output_dir is None and config.data.manifest is None:
        raise ConfigError(
            "task=review writes corrections beside the data, where later runs find them, and "
            "data.output_dir is null; set it, as in data.output_dir=./training_data."
        )
    listening = local.listen(task.host, task.port)
    with listening:
        path = rows.manifest_path(config, run)
        if config.data.manifest is None and not path.is_file():
            rows.link(config, run)
        entries, _ = auditing.entries_of(config, path)
        auditing.check_some(config, entries)
        found = rows.corrections(config, run)
        if found.notice:
            run.warn(found.notice)
        if not local.is_loopback(task.host):
            run.warn(
                f"task.host={task.host} lets everyone who reaches this machine look at the "
                "photographs and decide about the labels"
            )
        desk = Desk(cases_of(entries, auditing.look(config, run, entries).findings), found)
        counts = desk.counts()
        said = run.console.print
        said(f"\nReview {wording.count(counts['all'], 'row')}, {counts['left']} of them undecided:")
        said(f"  {local.url_of(task.host, listening)}", style="bold", soft_wrap=True, markup=False)
        said("Ctrl-C stops it; what is decided is on the disk at once.", markup=False)
        local.serve(make_app(desk, host=task.host), listening)
    counts = desk.counts()
    run.record(review=counts, corrections_file=str(desk.path))
    said(
        f"\nReviewed: {counts['accept']} accepted, {counts['correct']} corrected, "
        f"{counts['reject']} rejected, {counts['left']} left.",
        markup=False,
    )
    if counts["left"] == counts["all"] and not desk.path.exists():
        return
    said(f"Decisions: {screen.near(desk.path)}", soft_wrap=True, markup=False)
    said("\nNext", style="bold")
    said(
        f"  # prepare with what was decided\n  {command('task=prepare')}",
        soft_wrap=True,
        markup=False,
    )
