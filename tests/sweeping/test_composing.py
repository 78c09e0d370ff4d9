"""Composing the jobs of a sweep, quicker than Hydra does and to the same end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode

from mondrian_ft.config import as_dict, conf_dir, load, register_schemas
from mondrian_ft.errors import ConfigError
from mondrian_ft.sweeping.composing import Composer, quoted


@pytest.fixture
def composer() -> Iterator[Composer]:
    register_schemas()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config(
            config_name="config", overrides=["hydra.sweep.dir=x"], run_mode=RunMode.MULTIRUN
        )
        from hydra._internal.callbacks import Callbacks

        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        yield Composer(config, context, lambda cfg: None)


WORDS = (
    ["lora.rank=8", "optimizer.learning_rate=1e-3"],
    ["model=qwen3_vl_4b", "lora=dora", "lora.rank=4", "+data.dimension_map={a: b}"],
    ["+experiment=ansel_v1", "model=sample", "data=sample", "trainer.epochs=1"],
    ["lora.target_modules=[q_proj]", "trainer.patience=null", "experiment_name='a b'"],
    ["task=train", "task.output_dir=m", "data.limit=${trainer.epochs}", "++lora.rank=3"],
)


@pytest.mark.parametrize("words", WORDS)
def test_the_quick_way_is_hydras(composer: Composer, words: list[str]) -> None:
    """Promise: a job is what Hydra's own composing makes of its words, value by value."""
    slow = composer.context.config_loader.load_sweep_config(composer.config, list(words))
    for _ in range(2):  # the second time from what the first one kept
        job = composer.compose(words)
        wanted = _loaded(slow, composer.cwd)
        if isinstance(wanted, ConfigError):
            assert str(job.error) == str(wanted)
        else:
            assert job.config is not None
            assert as_dict(job.config) == wanted


def _loaded(composed: Any, cwd: Path) -> Any:
    from omegaconf import open_dict, read_write

    with read_write(composed), open_dict(composed):
        composed.pop("hydra", None)
    try:
        return as_dict(load(composed, cwd))
    except ConfigError as error:
        return error


def test_a_wrong_key_is_hydras_error(composer: Composer) -> None:
    """Promise: a key that does not exist is found before any job is run."""
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException, match=r"lora\.rnk"):
        composer.compose(["lora.rnk=4"])


def test_composing_and_validating_a_job_is_quick(composer: Composer) -> None:
    """Promise: 0.3 s for a job at the most, by the processor's clock of this thread: 48 jobs are
    checked before the first one starts."""
    composer.compose(["lora.rank=4"])
    taken = []
    for rank in range(5, 9):
        start = time.thread_time()
        composer.compose([f"lora.rank={rank}"])
        taken.append(time.thread_time() - start)
    assert min(taken) < 0.3


def test_any_path_is_quoted(composer: Composer) -> None:
    """Promise: a folder's name survives Hydra's grammar, whatever is in it."""
    for name in ("a b", "it's", "a,b", "x=1", "[1]", "(a)", "ü{}"):
        job = composer.compose([f"experiment_name={quoted(name)}"])
        shown = job.error if job.config is None else job.config.experiment_name
        assert name in str(shown)
