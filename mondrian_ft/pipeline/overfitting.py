"""Can it learn at all? A few batches, again and again, until the model knows them by heart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.batches import BatchStream
from ..errors import TrainingError
from ..model import lora
from ..model.base import Base
from ..model.features import FeatureStore
from ..training import optim
from ..training.trainer import Trainer
from . import checking, training
from .rows import Parts

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run

LEARNT = 0.02
"""Mean loss (nats a token) at which rows count as known by heart: 98 % for each token."""
UPDATES = 300
"""Most updates where trainer.max_steps does not say."""


def overfit(config: Config, run: Run, base: Base, features: FeatureStore, parts: Parts) -> float:
    """Train on the first ``trainer.overfit`` batches alone until they are known by heart.

    No checkpoint and no adapter is written: what comes of it is of no use.

    Returns:
        The last loss, :data:`LEARNT` or less.

    Raises:
        TrainingError: it is still higher after the last update, or a check before is not passed.
    """
    batches = config.trainer.overfit or 1
    wanted = batches * config.trainer.batch_size
    examples = training.training_stream(config, run, base, parts.train[:wanted]).examples
    checking.base(config, run, base, examples, features)
    lora.attach(base.model, training.lora_spec(config), seed=config.trainer.seed)
    checking.adapter(config, run, base, examples, features, run.folder)
    stream = BatchStream(
        examples,
        batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        pad_token=base.pad_token,
    )
    limit = config.trainer.max_steps or UPDATES
    rate = optim.learning_rate(
        config.optimizer.learning_rate, warmup=1, total=limit, schedule="constant"
    )
    optimizer = optim.adamw(rate, weight_decay=0.0)
    optimizer.init(base.model.trainable_parameters())
    trainer = Trainer(
        base.backbone,
        optimizer,
        stream,
        features,
        [],
        None,  # pyright: ignore[reportArgumentType]  (nothing is saved)
        max_steps=limit,
        max_grad_norm=config.optimizer.max_grad_norm,
        save_every=limit,
        eval_every=limit,
        grad_checkpoint=config.trainer.grad_checkpoint,
    )
    rows = f"{len(examples)} {'row' if len(examples) == 1 else 'rows'}"
    run.console.print(f"Learning {rows} by heart, in {limit} updates at most.", markup=False)
    losses: list[float] = []
    for step in range(1, limit + 1):
        update = trainer.update(stream.update(1))
        losses.append(float(update.loss))
        run.tracker.log({"loss": losses[-1]}, step)
        if step % 25 == 0:
            run.console.print(f"  update {step:>4}  loss {losses[-1]:.4f}", markup=False)
        # Every batch has to be known, not the last alone.
        if len(losses) >= batches and max(losses[-batches:]) <= LEARNT:
            break
    worst = max(losses[-batches:])
    run.record(
        overfit={"rows": len(examples), "updates": len(losses), "first": losses[0], "last": worst}
    )
    told = f"the loss of {rows} went from {losses[0]:.3f} to {worst:.3f} in {len(losses)} updates"
    if worst > LEARNT:
        raise TrainingError(
            f"{told}, and {LEARNT:g} or less was wanted: the model cannot even learn these by "
            "heart, so more rows would not help; raise optimizer.learning_rate, lora.rank or "
            "trainer.max_steps, and look at the rows with task=inspect"
        )
    run.console.print(
        f"Learnt by heart: {told}. The model, the masks and the optimizer can learn.",
        soft_wrap=True,
        markup=False,
    )
    return worst
