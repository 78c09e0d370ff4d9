"""One small dataclass per verb: what ``task=NAME`` runs, and the keys it takes.

A task's fields are its keys (``task.output_dir=…``), typed and checked like every other group.
Its body lives in ``pipeline``, which is imported when the task runs and not before: composing a
config or printing help must not pay for MLX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import Config
    from .run import Run


class ExportFormat(StrEnum):
    """What can be written for other programs.

    ``peft`` and ``mlx``: the adapter alone. ``fused``: base and adapter as one model in the
    published layout. ``fused_4bit``: the same quantised, for mlx-vlm. ``hf_base``: the base alone,
    in the published layout.
    """

    peft = "peft"
    mlx = "mlx"
    fused = "fused"
    fused_4bit = "fused_4bit"
    hf_base = "hf_base"


class ScaleRule(StrEnum):
    """What ``alpha`` meant where an adapter's files do not say: the scale, or rank times it."""

    alpha = "alpha"
    alpha_over_rank = "alpha_over_rank"


class TableFormat(StrEnum):
    """How a list is printed: for a person, or as JSON and nothing else."""

    table = "table"
    json = "json"


class ModelMode(StrEnum):
    """Which model answers a request of the service that does not say."""

    base = "base"
    fine_tuned = "fine_tuned"
    ab_test = "ab_test"


def _path(*, or_name: bool = False) -> Any:
    """An optional path; ``or_name`` lets a bare word that is no file here stand for a name."""
    return field(default=None, metadata={"path": "or_name" if or_name else "always"})


@dataclass
class Task:
    """What a config runs; each child is one verb."""

    def run(self, config: Config, run: Run) -> float | None:
        """Runs the task; the number returned, if any, is what a sweep minimises."""
        raise ConfigError("the config chooses no task; choose one with task=NAME.")


@dataclass
class Experiment(Task):
    """The whole main job: link, prepare, train, evaluate, register, report."""

    output_dir: str | None = _path()
    """Folder of the adapter; null puts it into the run folder as ``adapter/``."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.experiment(self, config, run)


@dataclass
class Link(Task):
    """Job database, photographs and analyses -> manifest and link report."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.link(self, config, run)


@dataclass
class Audit(Task):
    """What the labels are worth: findings and a verdict, as text, JSON and HTML."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.audit(self, config, run)


@dataclass
class Prepare(Task):
    """Manifest -> training, validation and test rows, and the split lock."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.prepare(self, config, run)


@dataclass
class Review(Task):
    """A local page to accept, correct or reject labels -> corrections.jsonl."""

    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is reached from this machine only."""
    port: int = 5110
    """Port to listen on, 0 to 65535; 0 is any free one."""

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise ConfigError("task.host is empty, but it must be an address such as 127.0.0.1.")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"task.port is {self.port}, but it must be 0 to 65535.")

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.review(self, config, run)


@dataclass
class Inspect(Task):
    """The batches that training would get, as a page: pictures, tokens, what is trained."""

    batches: int | None = 4
    """Batches of the first epoch to show, 0 or more; null shows them all. The longest and the
    shortest row are shown besides, and every row is checked."""

    def __post_init__(self) -> None:
        if self.batches is not None and self.batches < 0:
            raise ConfigError(
                f"task.batches is {self.batches}, but it must be 0 or more, or null for all."
            )

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.inspect(self, config, run)


@dataclass
class Memory(Task):
    """Predicted peak memory of training, with nothing loaded, and what would lower it."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.memory(self, config, run)


@dataclass
class Train(Task):
    """Prepared rows -> adapter directory."""

    output_dir: str | None = _path()
    """Folder of the adapter; null puts it into the run folder as ``adapter/``."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.train(self, config, run)


@dataclass
class Evaluate(Task):
    """Base against tuned on held-out photographs -> comparison_report.json, report.html."""

    adapter: str | None = _path(or_name=True)
    """Adapter directory to judge; null judges the base alone."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.evaluate(self, config, run)


@dataclass
class Assess(Task):
    """A local page for a blind comparison by a person -> assessments.jsonl."""

    report: str | None = _path(or_name=True)
    """What to judge: a comparison_report.json, a run folder, an adapter directory, or a version or
    channel of the registry; null takes ``eval.report``, else this experiment's newest run."""
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is reached from this machine only."""
    port: int = 5111
    """Port to listen on, 0 to 65535; 0 is any free one."""
    seed: int = 0
    """Seed of the order and of who stands on the left."""
    reviewer: str | None = None
    """Name written beside each judgement; with several people each one gives their own."""

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise ConfigError("task.host is empty, but it must be an address such as 127.0.0.1.")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"task.port is {self.port}, but it must be 0 to 65535.")
        if self.reviewer is not None and not self.reviewer.strip():
            raise ConfigError("task.reviewer is blank; give a name, or null for none.")

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.assess(self, config, run)


@dataclass
class Export(Task):
    """Adapter directory -> another layout, or one model with the adapter merged in."""

    adapter: str | None = _path(or_name=True)
    """Adapter directory to export; null with ``hf_base`` only."""
    format: ExportFormat = ExportFormat.mlx
    """``peft`` (PeftModel) and ``mlx`` (mlx-vlm): the adapter; ``fused`` (transformers and mlx-vlm)
    and ``fused_4bit`` (mlx-vlm): one model; ``hf_base``: the base alone."""
    output_dir: str | None = _path()
    """Where to write; null puts it into the run folder as ``export/``."""
    max_error: float = 0.5
    """Largest distance of a fused model from base + adapter, over 0: root mean square of the
    logits, in units of what the adapter changes; at 1 rounding takes as much as was learnt."""
    force: bool = False
    """Write a fused model that is above ``max_error`` all the same."""
    push_to_hub: str | None = None
    """``organisation/name`` to upload to on the Hugging Face hub, once verified; null uploads
    nothing."""
    private: bool = True
    """Whether a repository that is made for ``push_to_hub`` is private."""

    def __post_init__(self) -> None:
        if not 0 < self.max_error < float("inf"):
            raise ConfigError(f"task.max_error is {self.max_error}, but it must be over 0.")
        repository = self.push_to_hub
        if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise ConfigError(
                f"task.push_to_hub is {repository}, but it must be organisation/name, such as "
                "me/ansel-advisor."
            )

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.export(self, config, run)


@dataclass
class ImportAdapter(Task):
    """An adapter of PEFT, mlx-vlm or mlx-lm -> adapter directory."""

    source: str | None = _path()
    """Its folder, or its weights file with adapter_config.json beside it; needed."""
    scale_rule: ScaleRule | None = None
    """For a config of ``rank`` and ``alpha`` alone: ``alpha`` multiplies by alpha (mlx-vlm before
    April 2026), ``alpha_over_rank`` by alpha / rank; null asks."""
    output_dir: str | None = _path()
    """Folder of the adapter; null puts it into the run folder as ``adapter/``."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.import_adapter(self, config, run)


@dataclass
class Diff(Task):
    """Two adapters compared: settings, data, metrics, what each adds to the weights."""

    adapter: str | None = _path(or_name=True)
    """Adapter directory, or a version or channel of the registry; needed."""
    other: str | None = _path(or_name=True)
    """The one to compare it with; needed."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.diff(self, config, run)


@dataclass
class Average(Task):
    """Adapters of one base -> one adapter that adds the average of what they add."""

    adapters: list[str] = field(default_factory=list, metadata={"path": "or_name"})
    """Two or more adapter directories, or versions or channels of the registry."""
    weights: list[float] | None = None
    """Share of each, together 1; null gives all the same."""
    rank: int | None = None
    """Rank of the result; null adds the ranks up, which is exact. A smaller one is cut off, and
    the error told."""
    output_dir: str | None = _path()
    """Folder of the adapter; null puts it into the run folder as ``adapter/``."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"task.rank is {self.rank}, but it must be 1 or more, or null.")
        if self.weights is None:
            return
        if len(self.weights) != len(self.adapters):
            raise ConfigError(
                f"task.weights has {len(self.weights)} numbers for {len(self.adapters)} adapters; "
                "give one each, or null."
            )
        if not abs(sum(self.weights) - 1) < 1e-6:
            raise ConfigError(
                f"task.weights add up to {sum(self.weights):g}, but an average's add up to 1."
            )

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.average(self, config, run)


@dataclass
class Serve(Task):
    """The advisor service over HTTP: base, tuned, or an A/B test of both."""

    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is reached from this machine only."""
    port: int = 5100
    """Port to listen on, 0 to 65535; 0 is any free one."""
    model_mode: ModelMode = ModelMode.base
    """``base``, ``fine_tuned``, or ``ab_test``; a request may ask for another."""
    ab_test_split: float = 0.5
    """Share of an A/B test that goes to the tuned model, 0 to 1."""
    adapter: str | None = _path(or_name=True)
    """The tuned model: an adapter directory, or a version or channel of the registry."""
    db_path: str | None = _path()
    """Job database to write; null writes none, and prompts are those of ``data.db_path``."""

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise ConfigError("task.host is empty, but it must be an address such as 127.0.0.1.")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"task.port is {self.port}, but it must be 0 to 65535.")
        if not 0 <= self.ab_test_split <= 1:
            raise ConfigError(
                f"task.ab_test_split is {self.ab_test_split}, but it must be a share, 0 to 1."
            )

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.serve(self, config, run)


@dataclass
class Migrate(Task):
    """Adds the columns that the service writes to a job database, after a backup."""

    db_path: str | None = _path()
    """The job database."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.migrate(self, config, run)


@dataclass
class Versions(Task):
    """Lists the registry's versions, oldest first."""

    format: TableFormat = TableFormat.table
    """``table`` for a person, ``json`` for a program."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.versions(self, config, run)


@dataclass
class Register(Task):
    """Adapter directory -> the registry's next version."""

    adapter: str | None = _path(or_name=True)
    """Adapter directory to register."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.register(self, config, run)


@dataclass
class Verify(Task):
    """Proves an adapter: its files, its base, and that it is applied as when saved."""

    adapter: str | None = _path(or_name=True)
    """Adapter directory, or a version or channel of the registry, to verify."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.verify(self, config, run)


@dataclass
class Promote(Task):
    """Lets a channel mean a version, if the evidence says so; exit 1 if not."""

    version: str = "candidate"
    """The version, or a channel that means it."""
    channel: str = "production"
    """The channel to move."""
    force: bool = False
    """Move it whatever the evidence says; needs ``task.reason``."""
    reason: str | None = None
    """A sentence for the history."""

    def __post_init__(self) -> None:
        if self.force and not (self.reason or "").strip():
            raise ConfigError("task.force=true needs task.reason, a sentence for the history.")

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.promote(self, config, run)


@dataclass
class Rollback(Task):
    """Lets a channel mean again what it meant before."""

    channel: str = "production"
    """The channel to take back."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.rollback(self, config, run)


@dataclass
class Prune(Task):
    """Removes old versions; never one that a channel means."""

    keep: int | None = None
    """How many of the newest to keep, 1 or more; needed."""
    force: bool = False
    """Remove those as well that a rollback could come to."""

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"task.keep is {self.keep}, but it must be 1 or more.")

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.prune(self, config, run)


@dataclass
class Report(Task):
    """Runs compared -> experiments/<name>/: a page, and a table to decide under."""

    runs: list[str] = field(default_factory=list, metadata={"path": "always"})
    """Run folders, folders of them such as a sweep's, or patterns ('outputs/sweeps/*'); none is
    every evaluated run of this experiment."""
    output_dir: str | None = _path()
    """Where to write; null is ``experiments/<experiment_name>``."""

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.report(self, config, run)


@dataclass
class Workspace(Task):
    """W&B dashboards of our runs: built, and sent where W&B is online."""

    title: str = "mondrian_ft"
    """What the workspace is called in its project."""

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ConfigError("task.title is empty, but the workspace needs a name.")

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.workspace(self, config, run)


@dataclass
class SampleModel(Task):
    """Trains the sample's base model again, on rendered photographs."""

    output_dir: str | None = _path()
    """Where the model's folder is written; null puts it into the run folder as ``model/``."""
    pictures: int = 32_000
    """Rendered photographs to train on, 1 or more."""
    steps: int = 3_000
    """Updates, 1 or more."""
    batch_size: int = 128
    """Rows of an update, 1 or more."""
    seed: int = 0
    """Seed of the photographs, the critiques and the weights, 0 or more."""
    judged: int = 64
    """Unseen photographs the trained model is judged on, 1 or more."""

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "batch_size", "judged"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"task.{name} is {getattr(self, name)}, but it must be 1 or more."
                )
        if self.seed < 0:
            raise ConfigError(f"task.seed is {self.seed}, but it must be 0 or more.")

    def run(self, config: Config, run: Run) -> float | None:
        from . import pipeline

        return pipeline.sample_model(self, config, run)


TASKS: dict[str, type[Task]] = {
    "experiment": Experiment,
    "link": Link,
    "audit": Audit,
    "prepare": Prepare,
    "review": Review,
    "inspect": Inspect,
    "memory": Memory,
    "train": Train,
    "evaluate": Evaluate,
    "assess": Assess,
    "export": Export,
    "import_adapter": ImportAdapter,
    "diff": Diff,
    "average": Average,
    "serve": Serve,
    "migrate": Migrate,
    "versions": Versions,
    "register": Register,
    "verify": Verify,
    "promote": Promote,
    "rollback": Rollback,
    "prune": Prune,
    "report": Report,
    "workspace": Workspace,
    "sample_model": SampleModel,
}
"""Every task by the name it is chosen with, in the order a person meets them."""
