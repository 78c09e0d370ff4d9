"""What is in production is compared with by itself, or it is said why not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft import registry
from mondrian_ft.errors import RegistryError
from mondrian_ft.evaluation.probing import probe_inputs
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import lora
from mondrian_ft.pipeline import arms as arms_of
from mondrian_ft.pipeline.versioning import find_adapter
from mondrian_ft.schema import Arm, Config

NAME = "tiny"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A config whose registry is empty."""
    found = Config()
    found.registry.root, found.registry.name = str(tmp_path / "registry"), NAME
    return found


def saved(lab: Any, base: Any, folder: Path, seed: int, **facts: Any) -> adapters.Adapter:
    """An adapter of the tiny base, as training leaves it."""
    spec = lab.attach(base, seed=seed)
    facts = {"trained_on": []} | facts
    probe = probe_inputs(base, lab.settings)
    pixels = {**asdict(lab.settings), "fingerprint": probe.pixels}
    try:
        return adapters.save(
            folder,
            base,
            spec,
            pixels=pixels,
            prompts=[],
            data_lock="0" * 64,
            facts=facts,
            probe=probe,
        )
    finally:
        lora.detach(base.model)


def in_production(config: Config, made: adapters.Adapter) -> None:
    registry.register(Path(config.registry.root), NAME, made.folder, facts={}, channel="production")


def find(lab: Any, base: Any, config: Config, tuned: adapters.Adapter, **how: Any) -> arms_of.Arms:
    rows, probe = lab.rows(2), probe_inputs(base, lab.settings)
    return arms_of.find(
        config, base, adapter=tuned, rows=rows, train=rows, probe=probe, failed={}, **how
    )


def test_another_adapter_in_production_is_asked(lab, base, config, tmp_path) -> None:
    """Nobody has to name it; it can be named, turned off, and left out of folds."""
    in_production(config, saved(lab, base, tmp_path / "a", 1))
    tuned = saved(lab, base, tmp_path / "b", 2)
    found = find(lab, base, config, tuned)
    assert found.names == ["base", "tuned", "production"]
    assert found.voices["production"].adapter != tuned.hash
    assert (found.notes, found.failed) == ([], {})
    assert find(lab, base, config, tuned, alone=True).names == ["base", "tuned"]
    config.eval.against = None
    assert find(lab, base, config, tuned).names == ["base", "tuned"]
    config.eval.against = "v1"
    assert find(lab, base, config, tuned).names == ["base", "tuned", "production"]


def test_nothing_to_compare_with(lab, base, config, tmp_path) -> None:
    """An empty channel and the very adapter in it are no arm, unless the arm is asked for."""
    tuned = saved(lab, base, tmp_path / "a", 1)
    assert find(lab, base, config, tuned).names == ["base", "tuned"]
    in_production(config, tuned)
    assert find(lab, base, config, tuned).names == ["base", "tuned"]
    config.eval.arms = [Arm.base, Arm.tuned, Arm.production]
    assert find(lab, base, config, tuned).names == ["base", "tuned", "production"]


def test_one_that_cannot_be_asked_is_told(lab, base, config, tmp_path) -> None:
    """Trained on these photographs, or of other pixels: a note; where it was named, a failure."""
    in_production(config, saved(lab, base, tmp_path / "a", 1, trained_on=["row0"]))
    tuned = saved(lab, base, tmp_path / "b", 2)
    found = find(lab, base, config, tuned)
    assert found.names == ["base", "tuned"]
    assert found.failed == {}
    (note,) = found.notes
    assert note.startswith("production (v1) is not compared with: 1 of 2 photographs")
    config.eval.arms = [Arm.base, Arm.tuned, Arm.production]
    found = find(lab, base, config, tuned)
    assert "were trained on by v1" in found.failed["production"]


def test_another_base_in_production_is_told(lab, base, config, tmp_path) -> None:
    """It is found out before anything is asked."""
    other = lab.load(lab.write_model(tmp_path / "other", seed=9))
    in_production(config, saved(lab, other, tmp_path / "a", 1))
    found = find(lab, base, config, saved(lab, base, tmp_path / "b", 2))
    assert found.names == ["base", "tuned"]
    assert "set model.path to the base it was trained on" in found.notes[0]


def test_a_link_is_followed_once(lab, base, config, tmp_path) -> None:
    """<name>-active may be swapped while an adapter is read: its files are of one version."""
    made = saved(lab, base, tmp_path / "a", 1)
    (tmp_path / "active").symlink_to("a", target_is_directory=True)
    assert find_adapter(str(tmp_path / "active"), config) == made.folder.resolve()
    with pytest.raises(RegistryError, match="nothing yet"):
        find_adapter("active", config)
