"""A model small enough to train in a test, photographs and rows for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = ((64, 96), (128, 64), (96, 96), (64, 64), (160, 64), (96, 64), (64, 128))
"""Width and height of the photographs in turn: several grids, so several prompt lengths."""


if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with as many BLAS threads each as there are cores wait for each other. Set
    # before anything loads OpenBLAS, and inherited by the processes that tests start.
    _each = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, _each)))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Under ``-n`` a file's tests share a process, and so do all that look at the one trained run.

    What they share is made once in a process. Not in ``pytest_collection_modifyitems``, in which
    pytest-xdist reads the groups.
    """
    shared = "sample_run" in getattr(item, "fixturenames", ())
    item.add_marker(pytest.mark.xdist_group("sample_run" if shared else str(item.path)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Versions of pytest and pytest-xdist that disagree group nothing, and say nothing of it: every
    shared run was once made in each process."""
    if getattr(session.config.option, "loadgroup", False):
        loose = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if loose:
            raise pytest.UsageError(f"pytest-xdist did not group the tests, {loose[0]} first")


class Lab:
    """A random Qwen3-VL (hidden 64, 2 layers, a tower of depth 2 with one deepstack level) in the
    published layout with the sample's tokenizer, and what it takes to train it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model_dir(self) -> Path:
        """The model's folder."""
        return self.write_model(self.folder / "tiny", seed=1)

    def write_model(self, folder: Path, *, seed: int, **text: Any) -> Path:
        """Write a model folder; ``text`` changes the language model's config."""
        from mondrian_ft.model.backend import mx
        from mondrian_ft.model.processor import build_model
        from mondrian_ft.sample import base_model, model_dir

        shutil.copytree(model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 32,
            "rope_scaling": {**config["text_config"]["rope_scaling"], "mrope_section": [6, 5, 5]},
            **text,
        }
        config["vision_config"] |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        }
        (folder / "config.json").write_text(json.dumps(config))
        mx.random.seed(seed)
        model = build_model(folder)
        self.roughen(model)
        from mlx.utils import tree_flatten

        parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))  # pyright: ignore
        published = base_model.to_published_names(parameters)
        mx.save_safetensors(
            str(folder / "model.safetensors"),
            {name: mx.contiguous(value) for name, value in published.items()},
            {"format": "pt"},
        )
        return folder

    @staticmethod
    def halve(folder: Path) -> Path:
        """Store a model folder's weights in bfloat16, as 4B models are published."""
        from mondrian_ft.model.backend import mx

        file = folder / "model.safetensors"
        weights: Any = mx.load(str(file))
        halved = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
        mx.save_safetensors(str(file), halved, {"format": "pt"})
        return folder

    @staticmethod
    def roughen(model: Any) -> None:
        """Give norms and biases values of their own: ones and zeros would hide a missing one."""
        from mlx.utils import tree_map

        from mondrian_ft.model.backend import mx

        model.update(
            tree_map(
                lambda value: (
                    value + 0.1 * mx.random.normal(value.shape) if value.ndim == 1 else value * 1.5
                ),
                model.parameters(),
            )
        )

    def load(self, folder: Path | None = None, **options: Any) -> Any:
        """A fresh base, for tests that damage it."""
        from mondrian_ft.model.base import load_base

        return load_base(folder or self.model_dir, name="tiny", **options)

    @cached_property
    def base(self) -> Any:
        """The base that tests share; see the fixture."""
        return self.load()

    def spec(self, **changes: Any) -> Any:
        """A LoRA specification."""
        from mondrian_ft.model.lora import LoraSpec

        values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ALL, **changes}
        return LoraSpec(**values)

    def attach(self, base: Any, *, seed: int = 3, live: bool = True, **changes: Any) -> Any:
        """Put LoRA layers in; ``live`` gives their B matrices values. Returns the spec."""
        from mondrian_ft.model import lora
        from mondrian_ft.model.backend import mx

        spec = self.spec(**changes)
        lora.attach(base.model, spec, seed=seed)
        if live:
            for layer in lora.lora_layers(base.model).values():
                layer["lora_b"] = 0.1 * mx.random.normal(layer["lora_b"].shape)
            mx.eval(base.model.parameters())
        return spec

    @cached_property
    def settings(self) -> Any:
        """Pixel bounds that leave the photographs' sizes as they are."""
        from mondrian_ft.data.pixels import PixelSettings

        return PixelSettings(1024, 16384)

    def rows(self, count: int, name: str = "row") -> list[Any]:
        """Rows with photographs of several sizes and answers of several lengths."""
        from mondrian_ft.data.rows import Row

        made = []
        for number in range(count):
            path = self.folder / f"{name}{number}.png"
            width, height = SIZES[number % len(SIZES)]
            noise = np.random.default_rng([number, len(name)])
            Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(path)
            words = " far ridge, low light" * (number * 2 % 5)
            response = json.dumps({"image_description": f"Photograph {number}{words}."})
            made.append(
                Row(f"{name}{number}", "ansel", path, "Judge it.", response, f"{name}{number}")
            )
        return made

    def examples(self, count: int, name: str = "row", base: Any = None) -> list[Any]:
        """Encoded rows."""
        from mondrian_ft.data.batches import encode

        base = base or self.base
        return [
            encode(row, base, base.image_processor, self.settings, base.backbone.image_token)
            for row in self.rows(count, name)
        ]

    def trainer(
        self,
        base: Any,
        examples: Sequence[Any],
        folder: Path,
        *,
        identity: dict[str, Any] | None = None,
        rate: float = 5e-3,
        batch_size: int = 2,
        seed: int = 0,
        optimizer: str = "adamw",
        plus: float = 1.0,
        vision: float = 1.0,
        **options: Any,
    ) -> Any:
        """A trainer over 6 updates, with a warm-up of 2 and cosine decay."""
        from mondrian_ft.data.batches import BatchStream
        from mondrian_ft.model.features import FeatureStore
        from mondrian_ft.training import optim
        from mondrian_ft.training.checkpoint import CheckpointDir
        from mondrian_ft.training.trainer import Trainer

        schedule = optim.learning_rate(rate, warmup=2, total=6, schedule="cosine")
        decay = 0.0 if optimizer == "adam" else 0.01
        moving = optim.build(optimizer, schedule, weight_decay=decay, plus=plus, vision=vision)
        moving.init(base.model.trainable_parameters())
        options = {
            "validation": (),
            "max_steps": 6,
            "save_every": 2,
            "eval_every": 3,
            **options,
        }
        return Trainer(
            base.backbone,
            moving,
            BatchStream(examples, batch_size=batch_size, seed=seed, pad_token=base.pad_token),
            FeatureStore(base.backbone),
            options.pop("validation"),
            CheckpointDir(folder / "checkpoints", identity or {"lora.rank": 4}),
            **options,
        )

    @staticmethod
    def weights(base: Any) -> dict[str, np.ndarray]:
        """Copies of the adapter's tensors."""
        from mondrian_ft.model import lora

        return {name: np.array(value) for name, value in lora.tensors(base.model).items()}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """See :class:`Lab`."""
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def base(lab: Lab) -> Iterator[Any]:
    """The tiny base, without an adapter before and after."""
    from mondrian_ft.model import lora

    yield lab.base
    lora.detach(lab.base.model)
    lab.base.model.freeze()
    lab.base.model.eval()
