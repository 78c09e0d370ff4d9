"""Peak memory of updates as MLX counts it, beside what ``training.memory`` predicts.

Every configuration is measured in a process of its own, with random weights: memory depends on
shapes alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        hidden, ffn, layers, heads, kv_heads, vocab: of the language model; heads have 64 numbers.
        side: patches of a picture's side; side² / 4 image tokens.
        text, trained: tokens of a row beside the picture's, and how many of them are trained.
        batch, checkpoint, dtype, bits, rank, method: as in the config.
    """

    hidden: int = 256
    ffn: int = 768
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 4096
    side: int = 16
    text: int = 448
    trained: int = 256
    batch: int = 1
    checkpoint: bool = False
    dtype: str = "float32"
    bits: int | None = None
    rank: int = 16
    method: str = "lora"


SMALL = Case()
CASES = {
    "small": SMALL,
    "batch 4": replace(SMALL, batch=4),
    "long": replace(SMALL, text=1472, trained=800),
    "large picture": replace(SMALL, side=32),
    "batch 4, checkpointed": replace(SMALL, batch=4, checkpoint=True),
    "long, checkpointed": replace(SMALL, text=1472, trained=800, checkpoint=True),
    "rank 64": replace(SMALL, rank=64, batch=2),
    "wide vocabulary": replace(SMALL, vocab=65_536, trained=384),
    "wide": replace(SMALL, hidden=512, ffn=2048, heads=8, kv_heads=2, layers=6, batch=2),
    "wide, 4 bits": replace(
        SMALL, hidden=512, ffn=2048, heads=8, kv_heads=2, layers=6, batch=2, bits=4
    ),
    "wide, bfloat16": replace(
        SMALL, hidden=512, ffn=2048, heads=8, kv_heads=2, layers=6, dtype="bfloat16"
    ),
    "deep, checkpointed": replace(SMALL, layers=24, batch=2, checkpoint=True),
    "DoRA": replace(SMALL, method="dora", batch=2),
}


def measure_one(case: Case) -> dict[str, Any]:
    """Build a model, train two updates on one batch, and tell the peak in bytes.

    Run it in a process of its own: the peak is that of the process.
    """
    import numpy as np

    from mondrian_ft.data.batches import BatchStream, Example
    from mondrian_ft.data.pixels import Pixels
    from mondrian_ft.data.rows import Row
    from mondrian_ft.model import lora
    from mondrian_ft.model.backend import mx, nn
    from mondrian_ft.model.base import quantizable
    from mondrian_ft.model.features import FeatureStore
    from mondrian_ft.model.processor import build_model
    from mondrian_ft.model.qwen3_vl import Qwen3VL
    from mondrian_ft.training import memory, optim
    from mondrian_ft.training.trainer import Trainer

    config = config_of(case)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = build_model(Path(folder))
    model.set_dtype(getattr(mx, case.dtype))
    if case.bits:
        nn.quantize(
            model.language_model, 64, case.bits, class_predicate=lambda _, one: quantizable(one)
        )
    model.freeze()
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    backbone = Qwen3VL(model)
    spec = lora.LoraSpec(case.rank, 2.0 * case.rank, 0.0, memory.MATRICES, case.method)
    lora.attach(model, spec, seed=0)
    optimizer = optim.adamw(1e-4, weight_decay=0.0)
    optimizer.init(model.trainable_parameters())

    noise = np.random.default_rng(0)
    image_tokens = case.side**2 // 4
    length = image_tokens + case.text
    examples = []
    for number in range(case.batch):
        tokens = noise.integers(300, 1000, length).astype(np.int32)
        tokens[4 : 4 + image_tokens] = backbone.image_token
        patches = noise.normal(size=(case.side**2, 1536)).astype(np.float32)
        row = Row(f"row{number}", "ansel", Path(f"{number}.png"), "", "", f"{number}")
        pixels = Pixels(patches, (1, case.side, case.side), 2)
        examples.append(Example(row, tokens, length - case.trained, 4, pixels))
    stream = BatchStream(examples, batch_size=case.batch, seed=0, pad_token=0)
    trainer = Trainer(
        backbone,
        optimizer,
        stream,
        FeatureStore(backbone),
        [],
        None,  # pyright: ignore[reportArgumentType]  (nothing is saved)
        max_steps=2,
        save_every=10,
        eval_every=10,
        grad_checkpoint=case.checkpoint,
    )
    for _ in range(2):
        trainer.update(stream.update(1))
    mx.eval(model.trainable_parameters())
    return {
        "peak": mx.get_peak_memory(),
        "weights": sum(value.nbytes for _, value in _flat(model.parameters())),
    }


def _flat(tree: Any) -> Any:
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


def config_of(case: Case) -> dict[str, Any]:
    """A ``config.json`` of the case's sizes; the tower is a small one."""
    from mondrian_ft.sample import model_dir

    config = json.loads((model_dir() / "config.json").read_text())
    config["text_config"] |= {
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": 64,
    }
    config["vision_config"]["out_hidden_size"] = case.hidden
    return config


if __name__ == "__main__":
    print(json.dumps(measure_one(Case(**json.loads(sys.argv[1])))))
