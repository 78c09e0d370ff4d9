"""The tasks' bodies: what each verb does, in the order it does it.

Config objects stop here. The rooms below take values, and could be used from a notebook in the
same way as these functions use them. What a verb needs is imported when it runs: linking must not
wait for MLX.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterError, ConfigError, Interrupted
from ..files import atomic_write_text
from ..report import screen
from .words import command, resume_command, without

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run


def experiment(task: tasks.Experiment, config: Config, run: Run) -> float | None:
    """The whole main job. Returns the validation loss of the adapter that was kept."""
    from . import (
        auditing,
        evaluation,
        judging,
        overfitting,
        repeats,
        rows,
        together,
        training,
        versioning,
    )

    judging.check(config)
    folder = _adapter_dir(task.output_dir, run)
    world = together.join(config, run)
    parts = together.after_the_first(world, lambda: rows.linked_and_prepared(config, run))
    labels = auditing.brief(config, run, parts) if world.first else ""
    base, features = training.load_base_of(config, run, to_train=True)
    if config.trainer.overfit is not None:
        return overfitting.overfit(config, run, base, features, parts)
    if repeats.wanted(config):
        done, loss = repeats.evaluate(config, run, base, features, parts, labels=labels)
        screen.show_closing(
            run.console,
            done.report,
            page=run.folder / "report.html",
            labels=labels,
            commands=[
                (
                    f"this judged the recipe over {repeats.told(config)}; train the adapter itself",
                    without("eval.folds", "eval.seeds", "data.folds"),
                )
            ],
        )
        done.check()
        return loss
    adapter, loss = training.train(config, run, base, features, parts, folder, world)
    if adapter is None:
        return loss  # the first process goes on by itself
    if parts.judged:
        try:
            done = evaluation.evaluate(config, run, base, features, parts, adapter, labels=labels)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped while comparing; the adapter is whole in {adapter.folder}; go on with: "
                f"{resume_command(config, run, folder)}"
            ) from None
        page = run.folder / "report.html"
        if "tuned" in done.report["evidence"]["arms_failed"]:
            done.check()  # an adapter that cannot answer is no candidate
        version = versioning.register(config, run, adapter.folder)
        steps, against = versioning.next_step(config, version)
        screen.show_closing(
            run.console,
            done.report,
            adapter=adapter.folder,
            page=page,
            labels=labels,
            commands=[
                *steps,
                ("list every adapter so far", command("task=versions")),
                (
                    f"give {version} to mlx-vlm",
                    command(
                        "task=export",
                        "task.format=mlx",
                        f"task.adapter={screen.near(adapter.folder)}",
                    ),
                ),
            ],
        )
        for sentence in against:
            run.console.print(screen.plain(sentence), soft_wrap=True, markup=False)
        done.check()
    else:
        run.warn("there is neither a test nor a validation part, so the adapter was not evaluated")
        versioning.register(config, run, adapter.folder)
    return loss


def link(task: tasks.Link, config: Config, run: Run) -> None:
    """Job database, photographs and analyses to a manifest."""
    from . import rows

    rows.link(config, run)


def audit(task: tasks.Audit, config: Config, run: Run) -> None:
    """What the linked rows are worth, as text, JSON and HTML."""
    from . import auditing

    auditing.audit(config, run)


def prepare(task: tasks.Prepare, config: Config, run: Run) -> None:
    """Manifest to rows. Without ``data.manifest`` and a linked folder, links first."""
    from ..data.link import MANIFEST_NAME
    from . import rows

    folder = rows.data_dir(config, run)
    if config.data.manifest is None and not (folder / MANIFEST_NAME).is_file():
        rows.link(config, run)
    rows.prepare(config, run)


def review(task: tasks.Review, config: Config, run: Run) -> None:
    """A page to accept, correct or reject labels, until Ctrl-C."""
    from . import reviewing

    reviewing.review(task, config, run)


def inspect(task: tasks.Inspect, config: Config, run: Run) -> None:
    """The batches that ``train`` would get, as a page and as JSON."""
    from . import inspecting

    inspecting.inspect(task, config, run)


def memory(task: tasks.Memory, config: Config, run: Run) -> None:
    """The predicted peak of training, before anything is loaded."""
    from . import planning

    planning.memory(task, config, run)


def train(task: tasks.Train, config: Config, run: Run) -> float | None:
    """Prepared rows to an adapter directory. Returns the validation loss, if there is one."""
    from . import auditing, overfitting, rows, together, training

    folder = _adapter_dir(task.output_dir, run)
    world = together.join(config, run)
    parts = together.after_the_first(world, lambda: rows.load(config, run))
    if config.data.require_informative:
        auditing.brief(config, run, parts)
    base, features = training.load_base_of(config, run, to_train=True)
    if config.trainer.overfit is not None:
        return overfitting.overfit(config, run, base, features, parts)
    adapter, loss = training.train(config, run, base, features, parts, folder, world)
    if adapter is None:
        return loss
    run.console.print(f"adapter  {screen.near(adapter.folder)}", soft_wrap=True, markup=False)
    run.console.print("\nNext", style="bold")
    data = screen.near(rows.data_dir(config, run))
    judge = command(
        "task=evaluate", f"task.adapter={screen.near(adapter.folder)}", f"data.output_dir={data}"
    )
    run.console.print(f"  # compare it with its base\n  {judge}", soft_wrap=True, markup=False)
    return loss


def evaluate(task: tasks.Evaluate, config: Config, run: Run) -> float | None:
    """Base against tuned. Returns the tuned score error, or None without an adapter.

    Raises:
        ConfigError: ``eval.folds`` or ``eval.seeds``, which need trainings of their own.
    """
    from ..evaluation import probing
    from ..model import adapter as adapters
    from . import evaluation, judging, repeats, rows, training, versioning

    if repeats.wanted(config):
        raise ConfigError(
            "eval.folds and eval.seeds train adapters of their own; use them without task=evaluate"
        )
    judging.check(config)
    folder = versioning.find_adapter(task.adapter, config) if task.adapter else None
    if folder is not None and not folder.is_dir():
        adapters.read(folder)  # a wrong path is told before the data are linked
    parts = rows.load(config, run)
    base, features = training.load_base_of(config, run)
    adapter, failed = None, {}
    if folder is not None:
        probe = probing.probe_inputs(base, training.pixel_settings(config))
        try:
            adapter = adapters.load(folder, base, probe=probe)
        except AdapterError as error:
            # The other arms are worth having, whatever is wrong with this one.
            failed["tuned"] = str(error)
            run.warn(f"tuned could not be loaded: {error}")
    elif [arm for arm in config.eval.arms if arm.startswith("tuned")]:
        run.warn("task.adapter is not set, so there is no tuned arm")
    done = evaluation.evaluate(config, run, base, features, parts, adapter, failed=failed)
    screen.show_closing(
        run.console,
        done.report,
        adapter=adapter.folder if adapter else None,
        page=run.folder / "report.html",
    )
    if adapter is not None and "tuned" in done.report["evidence"]["arms"]:
        own = run.folder / "evaluation" / "comparison_report.json"
        version = versioning.file_report(config, run, adapter.hash, own)
        if version is not None:
            versioning.publish(config, run, version)
    done.check()
    return done.report["evidence"]["arms"].get("tuned", {}).get("score_mae")


def assess(task: tasks.Assess, config: Config, run: Run) -> None:
    """A page for a person's blind comparison of base and tuned, until Ctrl-C."""
    from . import assessing

    assessing.assess(task, config, run)


def export(task: tasks.Export, config: Config, run: Run) -> None:
    """An adapter for other programs, or one model with it merged in."""
    from . import exporting

    exporting.export(task, config, run)


def import_adapter(task: tasks.ImportAdapter, config: Config, run: Run) -> None:
    """An adapter of another program to an adapter directory."""
    from . import exchange

    exchange.import_adapter(task, config, run)


def diff(task: tasks.Diff, config: Config, run: Run) -> None:
    """Two adapters compared."""
    from . import exchange

    exchange.diff(task, config, run)


def average(task: tasks.Average, config: Config, run: Run) -> None:
    """Adapters of one base to their average."""
    from . import exchange

    exchange.average(task, config, run)


def serve(task: tasks.Serve, config: Config, run: Run) -> None:
    """The advisor service, until Ctrl-C."""
    from . import serving

    serving.serve(task, config, run)


def migrate(task: tasks.Migrate, config: Config, run: Run) -> None:
    """The service's columns, added to a job database after a backup."""
    from . import migrating

    migrating.migrate(task, config, run)


def verify(task: tasks.Verify, config: Config, run: Run) -> None:
    """Everything that an adapter has to prove, as a table."""
    from . import verifying

    verifying.verify(task, config, run)


def register(task: tasks.Register, config: Config, run: Run) -> None:
    """An adapter directory to the registry's next version."""
    from . import versioning

    if task.adapter is None:
        raise AdapterError("task.adapter is not set; give the adapter directory to register")
    versioning.register(config, run, versioning.find_adapter(task.adapter, config))


def versions(task: tasks.Versions, config: Config, run: Run) -> None:
    """The registry's versions, oldest first."""
    from . import versioning

    versioning.versions(task, config, run)


def promote(task: tasks.Promote, config: Config, run: Run) -> None:
    """A channel of the registry to another version, if the evidence allows it."""
    from . import versioning

    versioning.promote(task, config, run)


def rollback(task: tasks.Rollback, config: Config, run: Run) -> None:
    """A channel of the registry to what it meant before."""
    from . import versioning

    versioning.rollback(task, config, run)


def prune(task: tasks.Prune, config: Config, run: Run) -> None:
    """The registry without old versions that nobody needs."""
    from . import versioning

    versioning.prune(task, config, run)


def report(task: tasks.Report, config: Config, run: Run) -> None:
    """Runs compared on a page."""
    from . import reporting

    reporting.report(task, config, run)


def workspace(task: tasks.Workspace, config: Config, run: Run) -> None:
    """The dashboards in Weights & Biases."""
    from . import dashboards

    dashboards.workspace(task, config, run)


def sample_model(task: tasks.SampleModel, config: Config, run: Run) -> float | None:
    """Trains the sample's base model again. Returns its final training loss."""
    from ..sample import pretrain

    folder = Path(task.output_dir) if task.output_dir else run.folder / "model"
    recipe = pretrain.Recipe(
        pictures=task.pictures, steps=task.steps, batch=task.batch_size, seed=task.seed
    )
    facts = pretrain.train(folder, recipe, lambda line: run.console.print(f"  {line}"))
    facts |= pretrain.judge(folder, task.judged)
    atomic_write_text(folder / "README.md", pretrain.card(recipe, facts))
    run.record(sample_model=facts)
    for name, value in facts.items():
        run.console.print(f"{name:<24} {value}", markup=False)
    run.console.print(f"model    {screen.near(folder)}", soft_wrap=True, markup=False)
    return float(facts["final_loss"])


def _adapter_dir(output_dir: str | None, run: Run) -> Path:
    return Path(output_dir) if output_dir and run.first else run.folder / "adapter"
