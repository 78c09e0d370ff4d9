"""Looking at the batches of a run before it: the trainer's own, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.pixels import to_photograph
from ..errors import TrainingError
from ..files import atomic_write_bytes, atomic_write_json
from ..report import inspect_page, inspect_screen, screen
from ..training.preflight import Check, batch_faults
from . import rows, training
from .words import command

if TYPE_CHECKING:
    from PIL.Image import Image

    from .. import tasks
    from ..config import Config
    from ..run import Run

PAGE = "inspect.html"
NUMBERS = "inspect.json"


def inspect(task: tasks.Inspect, config: Config, run: Run) -> None:
    """Write the page of the first epoch's batches, and say whether their masks are right.

    The page is written before anything is refused, so that it shows what is wrong. It lies in the
    run folder and, where ``data.output_dir`` is set, beside the data as well.

    Raises:
        DataError: there are no rows, or a photograph cannot be read.
        TrainingError: a row does not pass a check.
    """
    parts = rows.load(config, run)
    # No weight is read: tokenizer and picture processor are all that makes a batch.
    base, _ = training.load_base_of(config, run, lazy=True)
    stream = training.training_stream(config, run, base, parts.train)
    seen: list[inspect_page.Row] = []
    faults: list[tuple[int, str, str]] = []
    for number in range(1, stream.per_epoch + 1):
        batch = stream.next()
        faults += [(len(seen) + f.row, str(f.check), f.sentence) for f in batch_faults(base, batch)]
        seen += inspect_page.rows_of(batch, number, base.backbone.image_token)

    def decode(tokens: Sequence[int]) -> str:
        return base.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    def photograph(row: inspect_page.Row) -> Image:
        return to_photograph(row.batch.examples[row.place].pixels, base.image_processor)

    found = inspect_page.summary(seen)
    numbers = {
        "summary": found,
        "checks": {
            str(check): {
                "passed": len(seen) - len({row for row, name, _ in faults if name == check})
            }
            for check in Check
        },
        "faults": [sentence for _, _, sentence in faults],
        "rows": [{"part": "train", **inspect_page.facts(row, decode)} for row in seen],
    }
    page = inspect_page.write(
        run.folder / PAGE,
        seen,
        checks=[str(check) for check in Check],
        faults=faults,
        batches=task.batches,
        decode=decode,
        control=frozenset({*base.end_tokens, *base.tokenizer.all_special_ids}),
        photograph=photograph,
        title=config.experiment_name,
        settings={
            "This page": {
                "base model": base.identity.name,
                "data lock": parts.lock,
                "config hash": run.config_hash,
                "batch_size": config.trainer.batch_size,
                "seed": config.trainer.seed,
            },
            "Data": run.resolved["data"],
        },
    )
    atomic_write_json(page.with_name(NUMBERS), numbers)
    if config.data.output_dir is not None:
        beside = Path(config.data.output_dir)
        for path in (page, page.with_name(NUMBERS)):
            atomic_write_bytes(beside / path.name, path.read_bytes())
    run.record(inspect=found | {"faults": len(faults)})
    inspect_screen.show(run.console, found, page=page)
    if faults:
        broken = len({row for row, _, _ in faults})
        raise TrainingError(
            f"{faults[0][2]} ({broken} of {len(seen)} rows did not pass; {screen.near(page)} shows "
            f"{'it' if broken == 1 else 'them'})"
        )
    run.console.print("\nEvery row passed every check.", style="bold", markup=False)
    data = screen.near(rows.data_dir(config, run))
    run.console.print("\nNext", style="bold")
    following = command("task=train", f"data.output_dir={data}")
    run.console.print(f"  # train on these batches\n  {following}", soft_wrap=True, markup=False)
