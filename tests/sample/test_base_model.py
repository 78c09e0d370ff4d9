"""The base model that ships: small, whole, able, generic; and the task that makes it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mondrian_ft.sample import model_dir
from mondrian_ft.sample.pretrain import Recipe, card, judge

ROOT = Path(__file__).resolve().parents[2]


def test_it_is_small_and_says_what_it_is():
    """Promise: at most 6 M parameters in float32 and 12 MB in all, with a card beside them."""
    from safetensors import safe_open

    with safe_open(model_dir() / "model.safetensors", "numpy") as weights:
        tensors = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
        assert {tensor.get_dtype() for tensor in tensors} == {"F32"}
        counts = []
        for tensor in tensors:
            count = 1
            for side in tensor.get_shape():
                count *= side
            counts.append(count)
    assert 2_000_000 <= sum(counts) <= 6_000_000
    assert sum(path.stat().st_size for path in model_dir().iterdir()) <= 12_000_000
    text = (model_dir() / "README.md").read_text(encoding="utf-8")
    assert f"{sum(counts):,}" in text
    for name, value in vars(Recipe()).items():
        assert f"| {name} | {value} |" in text, f"the card does not give the recipe's {name}"


@pytest.mark.slow
def test_it_follows_the_instruction_and_scores_generically():
    """Promise: 80 % exact format or more on unseen pictures; scores that are plausible (at most
    1.8 times the error of the mean), and not the advisor's (fine-tuning has a job to do)."""
    facts = judge(model_dir(), 16)
    assert facts["format_strict"] >= 0.8
    assert facts["words_right"] >= 0.9, "it does not say what it sees"
    assert facts["mean_score_mae"] < facts["score_mae"] <= 1.8 * facts["mean_score_mae"]


@pytest.mark.slow
def test_mlx_vlm_loads_it_as_it_is():
    """Promise: the folder is a model folder like any other, for mlx-vlm's own loader too; and its
    chat template gives the very tokens that training and service use."""
    import numpy as np

    from mondrian_ft.model.base import load_base

    base = load_base(model_dir())
    from mlx.utils import tree_flatten
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import load

    model, processor = load(str(model_dir()))
    ours = dict(tree_flatten(base.model.parameters()))  # pyright: ignore
    theirs = dict(tree_flatten(model.parameters()))  # pyright: ignore
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(np.array(value), np.array(theirs[name])), name
    text = apply_chat_template(processor, model.config, "Judge it.", num_images=1)
    tokens = processor.tokenizer.encode(text, add_special_tokens=False)
    assert tokens == base.prompt_tokens("Judge it.", 1)


@pytest.mark.slow
def test_anyone_can_train_it_again(tmp_path: Path):
    """Promise: ``task=sample_model`` renders, trains and writes a folder that loads, with its card;
    and it computes on the same fast BLAS as everything else (an import of MLX before the package's
    own would cost a factor of ten)."""
    from mondrian_ft.model import backend
    from mondrian_ft.model.base import load_base

    done = subprocess.run(
        [
            *(sys.executable, "-m", "mondrian_ft", "task=sample_model", "tracking=none"),
            *("task.pictures=6", "task.steps=2", "task.batch_size=2", "task.judged=1"),
            f"task.output_dir={tmp_path / 'model'}",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (tmp_path / "outputs").rglob("run.json")
    facts = json.loads(record.read_text())["sample_model"]
    assert facts["backend"] == backend.describe()
    assert 0 < facts["final_loss"] < 10
    made = load_base(tmp_path / "model")
    shipped = {path.name for path in model_dir().iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} == shipped
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == json.loads(
        (model_dir() / "config.json").read_text()
    )
    assert made.identity.weights != load_base(model_dir()).identity.weights
    assert "| steps | 2 |" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_the_card_says_when_no_answer_could_be_read():
    """Promise: a base that never answers in the format is not given a figure for its scores."""
    facts = {"judged": 4, "format_strict": 0.0, "words_right": None, "score_mae": None}
    text = card(Recipe(steps=1), {**facts, "mean_score_mae": 2.0, "seconds": 3})
    assert "| score_mae | no readable answer |" in text
    assert "| seconds | 3 |" in text
