"""Our training step beside ``python -m mlx_vlm.train``: same model, rows, batch size and LoRA.

Each side runs as its users run it, in a process of its own, one after the other and in turn. Both
train only on the answers, in float32 on CPU with the same OpenBLAS (mlx-vlm's process gets it
through ``LD_PRELOAD``; left alone it would use the slow BLAS of MLX's Linux wheel). Three epochs
without validation, and no checkpoint before the last. Afterwards both adapters are judged by one
evaluator, ours, on rows that neither was trained on.

What differs, because it is theirs: mlx-vlm groups rows of like length, pads to a multiple of 32,
and prepares a row anew whenever it has left its cache of 32. Its time per step is therefore given
with and without that preparation; ours prepares rows before the first update, which the figure of
the whole process holds. Its learning rate is constant, ours warms up and falls, as each does when
nobody says otherwise.

``first_update`` is how long a process takes from its start to the first update.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import measure

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EPOCHS, BATCH, RANK, ALPHA, RATE = 3, 2, 16, 32, 1e-3
_FIELD = re.compile(
    r"\b(step_time|data_time_per_step|train_loss|total_processed_tokens)=([\d.e,-]+)"
)


RATIOS = (
    "process_seconds",
    "cpu_seconds",
    "step_seconds",
    "step_with_data_seconds",
    "memory_gb",
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
            losses = _validation_losses(folder, model_dir())
            for side, loss in losses.items():
                runs[side][-1]["validation_loss"] = loss
    figures = {
        side: {name: measure.spread([one[name] for one in all_runs]) for name in all_runs[0]}
        for side, all_runs in runs.items()
    }
    ratios = {
        name: round(figures["mlx_vlm"][name]["median"] / figures["ours"][name]["median"], 2)
        for name in RATIOS
    }
    _show(figures, ratios, steps, repeats)
    return {
        "commands": {"ours": _shown(ours, folder), "mlx_vlm": _shown(theirs, folder)},
        "settings": {
            "epochs": EPOCHS,
            "steps": steps,
            "batch_size": BATCH,
            "rank": RANK,
            "repeats": repeats,
        },
        "figures": figures,
        "mlx_vlm_over_ours": ratios,
    }


def _prepare(folder: Path) -> int:
    """Write the sample's training rows for both sides; returns the updates of all epochs."""
    argv = [*_ours(), "task=prepare", f"data.output_dir={folder / 'data'}"]
    measure.process(argv, cwd=folder, env={**environment(), "PYTHONPATH": str(ROOT)})
    rows = json.loads((folder / "data" / "training_data_ansel_train.json").read_text())
    held_out = (folder / "data" / "training_data_ansel_val.json").read_text()
    (folder / "held_out.json").write_text(held_out)
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
    return len(rows) // BATCH * EPOCHS


def _ours() -> list[str]:
    return [sys.executable, "-m", "mondrian_ft", "tracking=none"]


def _our_command(folder: Path, steps: int) -> list[str]:
    return [
        *_ours(),
        "task=train",
        f"data.train_data={folder / 'rows.json'}",
        f"trainer.epochs={EPOCHS}",
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
        *("--epochs", str(EPOCHS)),
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
        "cpu_seconds": done.cpu,
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
        "cpu_seconds": done.cpu,
        "step_seconds": statistics.median(found["step_time"]),
        "step_with_data_seconds": statistics.mean(found["step_time"]) + statistics.mean(data),
        "tokens": found["total_processed_tokens"][-1],
        "first_loss": found["train_loss"][0],
        "last_loss": statistics.mean(found["train_loss"][-5:]),
        "memory_gb": done.memory,
    }


def _validation_losses(folder: Path, model: Path) -> dict[str, float]:
    """Mean cross-entropy of the held-out rows with either adapter, in nats."""
    from mondrian_ft.data.batches import encode, in_order
    from mondrian_ft.data.pixels import PixelSettings
    from mondrian_ft.data.rows import read_rows
    from mondrian_ft.model import adapter, foreign, imports, lora
    from mondrian_ft.model.base import load_base
    from mondrian_ft.model.features import FeatureStore
    from mondrian_ft.training.trainer import mean_loss

    base = load_base(model)
    trained = adapter.read(folder / "ours" / "adapter")
    settings = PixelSettings(
        trained.manifest["pixels"]["min_pixels"], trained.manifest["pixels"]["max_pixels"]
    )
    token = base.backbone.image_token
    rows = read_rows(folder / "held_out.json")
    examples = [encode(row, base, base.image_processor, settings, token) for row in rows]
    features = FeatureStore(base.backbone)

    def judged() -> float:
        base.model.eval()
        found = mean_loss(base.backbone, in_order(examples, BATCH, base.pad_token), features)
        lora.detach(base.model)
        return found

    lora.attach(base.model, trained.spec, seed=0)
    lora.set_tensors(base.model, trained.tensors)
    losses = {"ours": judged()}
    foreign.attach(base, imports.read_foreign(folder / "theirs" / "adapters.safetensors"))
    return losses | {"mlx_vlm": judged()}


def first_update(repeats: int) -> dict[str, Any]:
    """Seconds from the start of a process to its first update: no photograph's features known, then
    ``repeats`` times as a run of one epoch leaves them."""
    from mondrian_ft.pipeline.places import VISION_FEATURES

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _prepare(folder)
        commands = {
            "task=train": [
                *_ours(),
                "task=train",
                f"data.train_data={folder / 'rows.json'}",
                "trainer.max_steps=1",
                "hydra.run.dir=train",
            ],
            "the whole main job": [*_ours(), "trainer.max_steps=1", "hydra.run.dir=job"],
        }
        epoch = ["trainer.epochs=1", "eval.max_examples=1", "hydra.run.dir=epoch"]
        found: dict[str, Any] = {}
        for name, argv in commands.items():
            # The rows lie beside the sample's photographs, which have to stay.
            shutil.rmtree(folder / VISION_FEATURES, ignore_errors=True)
            first, _ = until_first_update(argv, folder)
            # What is measured ends at its first update, when few photographs have been looked at.
            env = {**environment(), "PYTHONPATH": str(ROOT)}
            measure.process([*argv[:-2], *epoch], cwd=folder, env=env)
            shutil.rmtree(folder / "epoch")
            taken, cpu = zip(
                *(until_first_update(argv, folder) for _ in range(repeats)), strict=True
            )
            again = measure.spread(taken, 2)
            found[name] = {
                "first": round(first, 2),
                "again": again,
                "again_cpu": measure.spread(cpu, 2),
            }
            print(
                f"{name}: first update after {first:.2f} s, again {again['median']:.2f} s "
                f"({again['min']:.2f} to {again['max']:.2f})",
                flush=True,
            )
    return {"what": "seconds from a process's start to its first update", "seconds": found}


def until_first_update(argv: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds from a process's start to its first update, which a line of its log tells of.

    The process is stopped then. Beside it the CPU time that it had taken, that update's included.

    Args:
        argv: with ``hydra.run.dir=`` as its last word; relative to ``folder``.

    Raises:
        RuntimeError: it ended without an update.
    """
    run = folder / argv[-1].removeprefix("hydra.run.dir=")
    shutil.rmtree(run, ignore_errors=True)
    log = run / "training_log.jsonl"
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    with (folder / "output.txt").open("w+") as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            list(argv), cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while not log.is_file() or not log.read_text().endswith("\n"):
                # Neither poll() nor kill(), which polls: they would take its CPU time with them.
                if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    output.seek(0)
                    raise RuntimeError(f"no update was made:\n{output.read()[-3000:]}")
                time.sleep(0.005)
            passed = time.perf_counter() - started
        finally:
            os.kill(child.pid, signal.SIGKILL)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
    first = json.loads(log.read_text().splitlines()[0])
    before = passed - first["seconds"] - first["data_wait_seconds"]
    return before, usage.ru_utime + usage.ru_stime


def environment() -> dict[str, str]:
    """This process's environment without what would change a measured one.

    An installed package has its bytecode; a checkout in an environment that forbids to write it
    would be compiled by every process, and those that it is compared with would not.
    """
    foreign = ("WANDB_", "HYDRA_", "LD_PRELOAD", "PYTHONDONTWRITEBYTECODE")
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
        "its CPU time, s": "cpu_seconds",
        "step, s (median)": "step_seconds",
        "step with data, s (mean)": "step_with_data_seconds",
        "peak memory, GB": "memory_gb",
    }
    print(f"\n{steps} steps of {BATCH} rows, LoRA rank {RANK}; medians of {repeats} rounds")
    print(f"{'':26}{'mlx-vlm':>10}{'ours':>10}{'ratio':>8}")
    for label, name in rows.items():
        theirs, ours = figures["mlx_vlm"][name]["median"], figures["ours"][name]["median"]
        print(f"{label:26}{theirs:>10.3f}{ours:>10.3f}{ratios[name]:>7.2f}x")
    losses = [figures[side]["validation_loss"]["median"] for side in ("mlx_vlm", "ours")]
    print(f"{'validation loss after it':26}{losses[0]:>10.3f}{losses[1]:>10.3f}")
    print("ratio above 1: ours is ahead. Ours prepares all rows before the first step, which only")
    print("the whole process shows; it also checks, probes and writes a model card.")
