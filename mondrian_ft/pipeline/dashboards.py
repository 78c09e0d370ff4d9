"""The dashboards of our runs in Weights & Biases, as a workspace of its own for a project."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import MondrianError
from ..files import atomic_write_json
from ..login import wandb_mode
from ..report import screen

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

AXIS = "train/step"
FILE = "workspace.json"


class Lines(NamedTuple):
    """A panel of curves over updates."""

    title: str
    metrics: tuple[str, ...]
    smooth: bool = False


class Bars(NamedTuple):
    """A panel with a bar a run."""

    title: str
    metrics: tuple[str, ...]


LINES: dict[str, tuple[Lines, ...]] = {
    "Loss": (
        Lines("Training loss", ("train/loss",), smooth=True),
        Lines("Held-out loss", ("eval/val_loss",)),
        Lines("Token accuracy", ("train/token_accuracy",), smooth=True),
        Lines("Gradient norm, before clipping", ("train/grad_norm",)),
        Lines("Learning rate", ("train/learning_rate",)),
        Lines("Updates not applied", ("train/bad_steps",)),
    ),
    "Speed and memory": (
        Lines("Tokens a second", ("train/tokens_per_second",)),
        Lines("Trained tokens a second", ("train/trained_tokens_per_second",)),
        Lines("Peak memory, GB", ("train/peak_memory_gb",)),
        Lines("Seconds an update", ("train/seconds",)),
        Lines("Seconds waiting for data", ("train/data_wait_seconds",)),
        Lines("Share of padding", ("train/padding_share",)),
    ),
}
BARS = (
    Bars("Score error by arm, points of 10", ("base/score_mae", "tuned/score_mae")),
    Bars("Exact format by arm", ("base/format_strict", "tuned/format_strict")),
    Bars("Held-out loss of the adapter that was kept", ("val_loss",)),
)
TABLES = ("evaluation/arms", "evaluation/photographs")
PAGE = "evaluation/report"
RESULT = "tuned/score_mae"
SETTINGS = (
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.method",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "trainer.epochs",
    "trainer.batch_size",
)
"""Keys of the config whose values stand side by side with `RESULT`."""


def build(title: str, project: str, entity: str) -> Any:
    """The workspace, not yet sent. Nothing is asked of W&B.

    Raises:
        MondrianError: the package that describes workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise MondrianError(
            "task=workspace needs wandb-workspaces, which is not installed: "
            "pip install 'mondrian_ft[workspace]'"
        ) from error

    def lines(panel: Lines) -> Any:
        smoothing: dict[str, Any] = {}
        if panel.smooth:
            smoothing = {
                "smoothing_type": "exponentialTimeWeighted",
                "smoothing_factor": 0.6,
                "smoothing_show_original": True,
            }
        return wr.LinePlot(
            title=panel.title, x=AXIS, y=[*panel.metrics], title_x="updates", **smoothing
        )

    evaluation = [
        *(
            wr.BarPlot(title=bars.title, metrics=[wr.SummaryMetric(one) for one in bars.metrics])
            for bars in BARS
        ),
        *(wr.WeavePanelSummaryTable(table_name=table) for table in TABLES),
        wr.MediaBrowser(title="Report", media_keys=[PAGE]),
    ]
    column = wr.ParallelCoordinatesPlotColumn  # pyright: ignore[reportPrivateImportUsage]
    columns = [column(metric=wr.Config(key)) for key in SETTINGS]
    columns.append(column(metric=wr.SummaryMetric(RESULT)))
    sweep = [
        wr.ParallelCoordinatesPlot(title="Settings and score error", columns=columns),
        wr.ParameterImportancePlot(with_respect_to=RESULT),
        wr.RunComparer(diff_only=True),
    ]
    return ws.Workspace(
        name=title,
        entity=entity,
        project=project,
        sections=[
            *(
                ws.Section(
                    name=section,
                    panels=[lines(one) for one in panels],
                    is_open=True,
                    panel_settings=ws.SectionPanelSettings(x_axis=AXIS),
                )
                for section, panels in LINES.items()
            ),
            ws.Section(name="Evaluation", panels=evaluation, is_open=True),
            ws.Section(name="Sweep", panels=sweep, is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis=AXIS, sort_panels_alphabetically=False),
        auto_generate_panels=False,
    )


def spec(made: Any) -> dict[str, Any]:
    """The workspace as W&B would be sent it."""
    return json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def workspace(task: tasks.Workspace, config: Config, run: Run) -> None:
    """Build the workspace, keep what it says in the run folder, and send it where W&B is online.

    Raises:
        MondrianError: it cannot be built, or W&B does not take it.
    """
    tracking = config.tracking
    mode, warning = wandb_mode(str(tracking.mode), os.environ)
    if warning:
        run.warn(warning)
    made = build(task.title, tracking.project, tracking.entity or "")
    path = run.folder / FILE
    atomic_write_json(path, spec(made))
    panels = sum(len(section.panels) for section in made.sections)
    run.console.print(
        f"Built {task.title}: {panels} panels in {len(made.sections)} sections.", markup=False
    )
    run.console.print(f"panels   {screen.near(path)}", soft_wrap=True, markup=False)
    if mode != "online":
        run.console.print(
            "It is not sent, since W&B is not online here; log in with 'wandb login' and type this "
            "again.",
            markup=False,
        )
        return
    url = _send(made, tracking.entity)
    run.record(workspace=url)
    run.console.print(f"W&B:      {url}", soft_wrap=True, markup=False)


def _send(made: Any, entity: str | None) -> str:
    """Save the workspace as a view of its project; returns its address."""
    import wandb

    try:
        made.entity = entity or wandb.Api(timeout=20).default_entity
        made.save()
        return str(made.url)
    # W&B raises its own errors, its transport's and plain ones.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise MondrianError(
            f"W&B does not take the workspace ({said}); look at the key, at tracking.entity and at "
            "tracking.project."
        ) from error
