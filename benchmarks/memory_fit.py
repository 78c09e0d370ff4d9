"""Peak memory of updates as MLX counts it, beside what ``training.memory`` predicts.

Every configuration is measured in a process of its own, with random weights: memory depends on
shapes alone. ``python -m benchmarks memory_fit`` measures and records; ``python -m
benchmarks.memory_fit --docs`` then writes the table of ``docs/memory.md``, and ``--against FILE``
compares the peaks that ``benchmarks/training_4b.py`` wrote.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import measure

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
WIDE = replace(SMALL, hidden=512, ffn=2048, heads=8, kv_heads=2, layers=6)
CASES = {
    "small": SMALL,
    "batch 4": replace(SMALL, batch=4),
    "long": replace(SMALL, text=1472, trained=800),
    "large picture": replace(SMALL, side=32),
    "very large picture": replace(SMALL, side=64, text=128, trained=64, layers=2),
    "batch 2, checkpointed": replace(SMALL, batch=2, checkpoint=True),
    "batch 4, checkpointed": replace(SMALL, batch=4, checkpoint=True),
    "long, checkpointed": replace(SMALL, text=1472, trained=800, checkpoint=True),
    "deep, checkpointed": replace(SMALL, layers=24, batch=2, checkpoint=True),
    "rank 64": replace(SMALL, rank=64, batch=2),
    "DoRA": replace(SMALL, method="dora", batch=2),
    "wide vocabulary": replace(SMALL, vocab=65_536, trained=384),
    "wide": replace(WIDE, batch=2),
    "wide, 4 bits": replace(WIDE, bits=4),
    "wide, bfloat16": replace(WIDE, dtype="bfloat16"),
}


def run(repeats: int) -> dict[str, Any]:
    """Every case, measured and predicted. ``repeats`` is not used: bytes do not vary."""
    figures = {}
    for name, case in CASES.items():
        figures[name] = measured(case)
        found = figures[name]
        print(
            f"{name:<24} measured {found['measured'] / 1e6:8.1f} MB, predicted "
            f"{found['predicted'] / 1e6:8.1f} MB, {found['off']:+.1%}",
            flush=True,
        )
    return {
        "what": "peak memory of two updates, measured by MLX and predicted, in bytes",
        "backend": next(iter(figures.values()))["backend"],
        "largest_error": max(abs(found["off"]) for found in figures.values()),
        "cases": figures,
    }


def measured(case: Case) -> dict[str, Any]:
    """A case's peak in a process of its own, and the prediction."""
    done = measure.process(
        [sys.executable, "-m", "benchmarks.memory_fit", json.dumps(asdict(case))],
        cwd=ROOT,
        env=dict(os.environ),
    )
    found = json.loads(done.output.strip().splitlines()[-1])
    predicted = predicted_peak(case, found["backend"])
    off = round(predicted / found["peak"] - 1, 4)
    return {
        "backend": found["backend"],
        "measured": found["peak"],
        "predicted": predicted,
        "off": off,
        "case": asdict(case),
    }


def predicted_peak(case: Case, backend: str) -> int:
    """What ``training.memory`` says of a case, in bytes."""
    from mondrian_ft.training import memory

    image_tokens = case.side**2 // 4
    setting = memory.Setting(
        batch=case.batch,
        checkpoint=case.checkpoint,
        itemsize=4 if case.dtype == "float32" else 2,
        bits=case.bits,
        rank=case.rank,
        magnitudes=case.method == "dora",
        images=case.batch,
    )
    row = memory.Row(image_tokens + case.text, image_tokens, case.trained)
    shape = memory.Shape.of(config_of(case))
    return memory.predict(shape, setting, [row] * case.batch, memory.COSTS[backend]).total


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
    from mondrian_ft.model.machine import memory_kind
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
    optimizer = optim.adamw(
        optim.learning_rate(1e-4, warmup=1, total=2, schedule="constant"), weight_decay=0.0
    )
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
    return {"peak": mx.get_peak_memory(), "backend": memory_kind()}


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


def against_4b(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Peaks of ``benchmarks/training_4b.py``'s runs of ours beside the prediction, in bytes.

    Those with graphs of kernels of another size than the product's are left out.

    Args:
        results: what it wrote: ``shapes`` and, in ``parties``, the peak of each number of rows.
    """
    from mondrian_ft.model import backend
    from mondrian_ft.training import memory

    shapes = results["shapes"]
    shape = memory.Shape(
        hidden=shapes["hidden"],
        ffn=9728,
        layers=shapes["layers"],
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=151_936,
        tied=True,
        vision_hidden=1024,
        vision_ffn=4096,
        vision_depth=24,
        vision_heads=16,
        deepstack=3,
        patch=1536,
        places=2304,
        merge=2,
    )
    found = {}
    for party, (checkpoint, bits) in PARTIES.items():
        for case, figures in results["parties"].get(party, {}).items():
            if not case.startswith("rows_") or "peak_gb" not in figures:
                continue
            usual = [str(one) for one in backend.graphs(small=checkpoint)]
            if figures.get("graphs", usual) != usual:
                continue
            count = int(case.split("_")[1])
            tokens, trained = figures["tokens"], figures["trained"]
            setting = memory.Setting(count, checkpoint=checkpoint, itemsize=2, bits=bits)
            row = memory.Row(tokens, figures["image_tokens"], trained)
            predicted = memory.predict(shape, setting, [row] * count, memory.COSTS["CUDA"]).total
            peak = max(figures["peak_gb"], figures["peak_gb_queued"]) * 1e9
            found[f"4B, {PARTY_NAMES[party]}{count} × {tokens:,} tokens"] = {
                "backend": "CUDA",
                "measured": int(peak),
                "predicted": predicted,
                "off": round(predicted / peak - 1, 4),
            }
    return found


PARTIES = {
    "ours": (False, None),
    "memory": (False, None),
    "checkpointed": (True, None),
    "memory_checkpointed": (True, None),
    "4bit_checkpointed": (True, 4),
    "memory_4bit": (True, 4),
}
"""Of ``training_4b``: whether they checkpoint, and the base's bits."""
PARTY_NAMES = {
    name: ("4 bits, " if bits else "") + ("checkpointed, " if checkpoint else "")
    for name, (checkpoint, bits) in PARTIES.items()
}
DOCS = ROOT / "docs" / "memory.md"
_START, _END = "<!-- measured -->", "<!-- end -->"


def table(folder: Path = measure.RESULTS) -> str:
    """The recorded cases of every machine as a Markdown table."""
    lines = [
        "| backend | configuration | measured, MB | predicted, MB | off |",
        "|---|---|--:|--:|--:|",
    ]
    for path in sorted(folder.glob("*.json")):
        entries = json.loads(path.read_text())["entries"]
        cases = dict(entries.get("memory_fit", {}).get("cases", {}))
        if "training_4b" in entries:
            cases |= against_4b(entries["training_4b"])
        lines += [
            f"| {one['backend']} | {name} | {one['measured'] / 1e6:,.0f} | "
            f"{one['predicted'] / 1e6:,.0f} | {100 * one['off']:+.1f} % |"
            for name, one in cases.items()
        ]
    return "\n".join(lines)


def write_docs() -> None:
    """Put the table of the recorded cases into the documentation."""
    text = DOCS.read_text(encoding="utf-8")
    start, rest = text.split(_START)
    DOCS.write_text(f"{start}{_START}\n{table()}\n{_END}{rest.split(_END)[1]}", encoding="utf-8")


def _main(argv: list[str]) -> None:
    if argv == ["--docs"]:
        write_docs()
    elif argv[:1] == ["--against"] and len(argv) == 2:
        print(json.dumps(against_4b(json.loads(Path(argv[1]).read_text())), indent=2))
    else:
        print(json.dumps(measure_one(Case(**json.loads(argv[0])))))


if __name__ == "__main__":
    _main(sys.argv[1:])
