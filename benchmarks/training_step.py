"""Our training step beside ``python -m mlx_vlm.train``: same model, rows, batch size and LoRA.

Each side runs as its users run it, in a process of its own, one after the other and in turn. Both
train only on the answers, in float32 on CPU with the same OpenBLAS (mlx-vlm's process gets it
through ``LD_PRELOAD``; left alone it would use the slow BLAS of MLX's Linux wheel). One epoch
without validation, and no checkpoint before the last.

What differs, because it is theirs: mlx-vlm groups rows of like length, pads to a multiple of 32,
and prepares a row anew whenever it has left its cache of 32. Its time per step is therefore given
with and without that preparation; ours prepares rows before the first update, which the figure of
the whole process holds.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import measure

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH, RANK, ALPHA, RATE = 2, 16, 32, 1e-3
_FIELD = re.compile(
    r"\b(step_time|data_time_per_step|train_loss|total_processed_tokens)=([\d.e,-]+)"
)


def run(repeats: int) -> dict[str, Any]:
    """Measure both sides ``repeats`` times; print and return the entry."""
    from mondrian_ft.sample import model_dir

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        steps = _prepare(folder)
        ours = _our_command(folder, steps)
        theirs = _their_command(folder, model_dir(), steps)
        ours_env = {**environment(), "PYTHONPATH": str(ROOT)}
        theirs_env = {**environment(), **preload()}
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "mlx_vlm": []}
        for number in range(repeats):
            print(f"training step, round {number + 1} of {repeats}", flush=True)
            done = measure.process(ours, cwd=folder, env=ours_env)
            runs["ours"].append(_read_ours(done, folder))
            done = measure.process(theirs, cwd=folder, env=theirs_env)
            runs["mlx_vlm"].append(_read_theirs(done.output, done, steps))
    figures = {
        side: {name: measure.spread([one[name] for one in all_runs]) for name in all_runs[0]}
        for side, all_runs in runs.items()
    }
    ratios = {
        name: round(figures["mlx_vlm"][name]["median"] / figures["ours"][name]["median"], 2)
        for name in ("process_seconds", "step_seconds", "step_with_data_seconds", "memory_gb")
    }
    _show(figures, ratios, steps, repeats)
    return {
        "commands": {"ours": _shown(ours, folder), "mlx_vlm": _shown(theirs, folder)},
        "settings": {"steps": steps, "batch_size": BATCH, "rank": RANK, "repeats": repeats},
        "figures": figures,
        "mlx_vlm_over_ours": ratios,
    }


def _prepare(folder: Path) -> int:
    """Write the sample's training rows for both sides; returns the updates of one epoch."""
    argv = [*_ours(), "task=prepare", f"data.output_dir={folder / 'data'}"]
    measure.process(argv, cwd=folder, env={**environment(), "PYTHONPATH": str(ROOT)})
    rows = json.loads((folder / "data" / "training_data_ansel_train.json").read_text())
    # mlx-vlm drops the incomplete batch at the end of an epoch, so neither side gets one.
    rows = rows[: len(rows) // BATCH * BATCH]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "jsonl").mkdir()
    with (folder / "jsonl" / "train.jsonl").open("w") as file:
        for row in rows:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
            file.write(json.dumps({"messages": messages, "image": row["image_path"]}) + "\n")
    return len(rows) // BATCH


def _ours() -> list[str]:
    return [sys.executable, "-m", "mondrian_ft", "tracking=none"]


def _our_command(folder: Path, steps: int) -> list[str]:
    return [
        *_ours(),
        "task=train",
        f"data.train_data={folder / 'rows.json'}",
        f"trainer.max_steps={steps}",
        f"trainer.batch_size={BATCH}",
        f"trainer.save_every={steps}",
        f"lora.rank={RANK}",
        f"lora.alpha={ALPHA}",
        f"optimizer.learning_rate={RATE}",
        "hydra.run.dir=ours",
    ]


def _their_command(folder: Path, model: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlx_vlm.train"),
        *("--model", str(model)),
        *("--data", str(folder / "jsonl")),
        *("--output-path", str(folder / "theirs")),
        *("--iters", str(steps)),
        *("--batch-size", str(BATCH)),
        *("--lora-rank", str(RANK)),
        *("--lora-alpha", str(ALPHA)),
        *("--target-modules", *TARGETS),
        *("--learning-rate", str(RATE)),
        "--train-on-completions",
        *("--steps-per-report", "1"),
        *("--steps-per-save", str(steps)),
    ]


def _read_ours(done: measure.Finished, folder: Path) -> dict[str, float]:
    lines = (folder / "ours" / "training_log.jsonl").read_text().splitlines()
    updates = [one for one in map(json.loads, lines) if one["kind"] == "step"]
    seconds = [one["seconds"] for one in updates]
    (folder / "ours" / "training_log.jsonl").unlink()
    return {
        "process_seconds": done.seconds,
        "step_seconds": statistics.median(seconds),
        "step_with_data_seconds": statistics.mean(seconds),
        "tokens": sum(one["tokens_per_second"] * one["seconds"] for one in updates),
        "first_loss": updates[0]["loss"],
        "last_loss": statistics.mean(one["loss"] for one in updates[-5:]),
        "memory_gb": done.memory,
    }


def _read_theirs(output: str, done: measure.Finished, steps: int) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name, value in _FIELD.findall(output):
        found.setdefault(name, []).append(float(value.replace(",", "")))
    if len(found.get("step_time", [])) != steps:
        raise RuntimeError(f"mlx-vlm reported {len(found.get('step_time', []))} of {steps} steps")
    data = found["data_time_per_step"]
    return {
        "process_seconds": done.seconds,
        "step_seconds": statistics.median(found["step_time"]),
        "step_with_data_seconds": statistics.mean(found["step_time"]) + statistics.mean(data),
        "tokens": found["total_processed_tokens"][-1],
        "first_loss": found["train_loss"][0],
        "last_loss": statistics.mean(found["train_loss"][-5:]),
        "memory_gb": done.memory,
    }


def environment() -> dict[str, str]:
    """This process's environment without what would change a measured one."""
    foreign = ("WANDB_", "HYDRA_", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def preload() -> dict[str, str]:
    """Gives mlx-vlm's process the OpenBLAS that ours loads by itself."""
    from mondrian_ft.model import blas

    library = blas.load_openblas()
    if library is None:
        return {}
    # The Fortran runtimes an OpenBLAS of a wheel needs lie beside it, and have to come first.
    return {"LD_PRELOAD": ":".join([*blas._beside(library), library])}


def _shown(argv: Sequence[str], folder: Path) -> str:
    """A command without the places of one machine."""
    from mondrian_ft.sample import model_dir

    text = " ".join(argv).replace(str(folder), "…").replace(str(model_dir()), "<sample model>")
    return text.replace(sys.executable, "python")


def _show(figures: dict[str, Any], ratios: dict[str, float], steps: int, repeats: int) -> None:
    rows = {
        "whole process, s": "process_seconds",
        "step, s (median)": "step_seconds",
        "step with data, s (mean)": "step_with_data_seconds",
        "peak memory, GB": "memory_gb",
    }
    print(f"\n{steps} steps of {BATCH} rows, LoRA rank {RANK}; medians of {repeats} rounds")
    print(f"{'':26}{'mlx-vlm':>10}{'ours':>10}{'ratio':>8}")
    for label, name in rows.items():
        theirs, ours = figures["mlx_vlm"][name]["median"], figures["ours"][name]["median"]
        print(f"{label:26}{theirs:>10.3f}{ours:>10.3f}{ratios[name]:>7.2f}x")
    print("ratio above 1: ours is ahead. Ours prepares all rows before the first step, which only")
    print("the whole process shows; it also checks, probes and writes a model card.")
