"""A training step with random weights in the shapes of Qwen3-VL-4B, ours beside others', on a GPU.

``python -m benchmarks.training_4b --out FILE [PARTY …]`` runs each party in a process of its own,
one after the other; nothing is downloaded, and every figure is in ``FILE`` as soon as it is there.
LoRA of rank 16 on the seven projections, rows of 1,024 image and 1,520 text tokens, 800 of them
trained. ``--layers 2 --hidden 256 --side 8 --text 60 --trained 30`` tries the code on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import decode, measure

ROOT = Path(__file__).resolve().parents[1]
MARK = "measured: "


@dataclass(frozen=True)
class Shapes:
    """Sizes of the model and of a row; ``side`` patches of a picture's side, side² / 4 tokens."""

    layers: int = 36
    hidden: int = 2560
    side: int = 64
    text: int = 1520
    trained: int = 800

    @property
    def image(self) -> int:
        """Image tokens of a row."""
        return self.side**2 // 4

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.image + self.text


@dataclass(frozen=True)
class Party:
    """One way to take the step.

    Attributes:
        work: name of the function that measures it.
        rows: batch sizes.
        options: for it.
        environment: variables of its process.
        seconds: after which its process is ended.
    """

    work: str
    rows: tuple[int, ...] = (1, 4)
    options: tuple[tuple[str, Any], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    seconds: int = 200


def _party(work: str, *rows: int, env: dict[str, str] | None = None, **options: Any) -> Party:
    return Party(work, rows or (1, 4), tuple(options.items()), tuple((env or {}).items()))


def _graphs(operations: int, megabytes: int) -> dict[str, str]:
    """What ends a graph of kernels; until it has run, all its temporary arrays are held."""
    return {
        "MLX_MAX_OPS_PER_BUFFER": str(operations),
        "MLX_MAX_MB_PER_BUFFER": str(megabytes),
    }


OTHERS = ((1, 32, 700, 400), (2, 48, 3500, 900), (8, 24, 500, 250))
"""Rows, patches of a side, text and trained tokens of other batches, for what memory they take."""

PARTIES: dict[str, Party] = {
    "ours": _party("ours"),
    "checkpointed": _party("ours", checkpoint=True),
    "4bit_checkpointed": _party("ours", 1, 4, checkpoint=True, bits=4),
    "mlx_vlm": _party("stock"),
    "torch_liger_compiled": _party("torch", liger=True, compiled=True),
    "torch_liger_checkpointed": _party("torch", liger=True, checkpoint=True),
    "torch_liger": _party("torch", liger=True),
    "torch": _party("torch"),
    "torch_checkpointed": _party("torch", checkpoint=True),
    "memory": _party("ours", 2, others=OTHERS),
    "memory_checkpointed": _party("ours", 2, checkpoint=True, others=OTHERS),
    "memory_4bit": _party("ours", 2, checkpoint=True, bits=4, others=OTHERS),
    "4bit": _party("ours", 1, bits=4),
    "without_kernels": _party("ours", without=("kernels",)),
    "without_joined": _party("ours", without=("joined",)),
    "without_attention": _party("ours", without=("attention",)),
    "larger_graphs": _party("ours", env=_graphs(200, 4000)),
    "checkpointed_larger_graphs": _party("ours", checkpoint=True, env=_graphs(100, 150)),
    "checkpointed_limit": _party("ours", checkpoint=True, limit_gb=2.0),
    "eager": _party("ours", 1, compiled=False),
    "pieces": _party("pieces", 1, 4),
}
"""Graphs of kernels are as large as the product makes them, where nothing else is said."""


def main() -> None:
    """Measure the parties named, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_4b", description=__doc__)
    parser.add_argument("parties", nargs="*", metavar="PARTY", help=f"of {', '.join(PARTIES)}")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed (default 6)")
    parser.add_argument("--seconds", type=int, default=560, help="for all of it (default 560)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for item in fields(Shapes):
        parser.add_argument(f"--{item.name}", type=int, default=item.default)
    arguments = parser.parse_args()
    shapes = Shapes(**{item.name: getattr(arguments, item.name) for item in fields(Shapes)})
    unknown = [name for name in arguments.parties if name not in PARTIES]
    if unknown:
        parser.error(f"no party is named {unknown[0]}; there are {', '.join(PARTIES)}")
    if arguments.child:
        party = PARTIES[arguments.child]
        for name, figures in WORK[party.work](party, shapes, arguments.steps):
            print(MARK + json.dumps({name: figures}), flush=True)
        return
    started = time.monotonic()
    found: dict[str, Any] = {
        "shapes": asdict(shapes),
        "versions": measure.versions(),
        "command": " ".join(["python -m benchmarks.training_4b", *sys.argv[1:]]),
        "parties": {},
    }
    sizes = [f"--{name}={value}" for name, value in asdict(shapes).items()]
    for name in arguments.parties or PARTIES:
        left = arguments.seconds - (time.monotonic() - started)
        if left < 30:
            found["parties"][name] = {"not measured": "the time was up"}
            continue
        argv = [sys.executable, "-m", "benchmarks.training_4b", f"--child={name}"]
        argv += [f"--steps={arguments.steps}", *sizes]
        found["parties"][name] = _child(argv, PARTIES[name], left)
        print(name, json.dumps(found["parties"][name]), flush=True)
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    _show(found["parties"])


def _child(argv: list[str], party: Party, left: float) -> dict[str, Any]:
    """What a party's process printed; what it failed of as ``error``."""
    started = time.monotonic()
    environment = {**os.environ, **dict(party.environment), "PYTHONUNBUFFERED": "1"}
    limit = min(party.seconds, left)
    error = None
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            output, _ = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            error = f"ended after {limit:.0f} s"
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith(MARK):
            found |= json.loads(line.removeprefix(MARK))
    if error is None and child.returncode != 0:
        error = f"exit status {child.returncode}"
    if error is not None:
        found["error"] = f"{error}: {output[-1500:]}"
    found["process_seconds"] = round(time.monotonic() - started, 1)
    return found


def _show(parties: dict[str, Any]) -> None:
    print(f"\n{'':28}{'rows':>5}{'s/step':>9}{'queued':>9}{'peak GB':>9}{'first s':>9}")
    for name, found in parties.items():
        for key, one in found.items():
            if isinstance(one, dict) and "seconds" in one:
                queued = one.get("seconds_queued", {}).get("median", float("nan"))
                print(
                    f"{name:28}{key.removeprefix('rows_'):>5}{one['seconds']['median']:>9.4f}"
                    f"{queued:>9.4f}{one['peak_gb']:>9.2f}{one['first_step_seconds']:>9.1f}"
                )
        if "error" in found:
            print(f"{name:28} {found['error'].splitlines()[-1][:100]}")


# --- ours and mlx-vlm's ---------------------------------------------------------------------------


def _rows(shapes: Shapes, rows: int) -> np.ndarray:
    """Random tokens (rows, L): an opening token, the picture, text."""
    text = np.random.default_rng(0).integers(1000, 100_000, (rows, shapes.text)).astype(np.int32)
    opening = np.full((rows, 1), 151_652, np.int32)
    image = np.full((rows, shapes.image), 151_655, np.int32)
    return np.concatenate([opening, image, text[:, 1:]], axis=1)


def _model(shapes: Shapes) -> Any:
    """Random weights in the shapes of Qwen3-VL-4B, bfloat16 on a GPU, frozen."""
    from mlx_vlm.models.qwen3_vl.config import ModelConfig
    from mlx_vlm.models.qwen3_vl.qwen3_vl import Model

    from mondrian_ft.model.backend import default_dtype, mx

    config = decode._config(decode.Shapes(layers=shapes.layers, hidden=shapes.hidden))
    mx.random.seed(0)
    model: Any = Model(ModelConfig.from_dict(config))
    model.set_dtype(default_dtype())
    model.freeze()
    mx.eval(model.parameters())
    mx.clear_cache()
    return model


def _ours(party: Party, shapes: Shapes, steps: int) -> Iterator[tuple[str, Any]]:
    from mondrian_ft.model import lora
    from mondrian_ft.model.backend import MEGABYTES, OPERATIONS, mx, nn, number, size_graphs
    from mondrian_ft.model.base import quantizable
    from mondrian_ft.model.qwen3_vl import Qwen3VL, VisionFeatures, assemble
    from mondrian_ft.training import optim
    from mondrian_ft.training.step import UpdateStep

    options = dict(party.options)
    size_graphs(small=bool(options.get("checkpoint")))
    model = _model(shapes)
    if bits := options.pop("bits", None):
        nn.quantize(
            model.language_model, 64, bits, class_predicate=lambda _, module: quantizable(module)
        )
        mx.eval(model.parameters())
    # Photographs have gone through the tower before the first update, and it has been given back.
    model.vision_tower = nn.Module()
    for name in options.pop("without", ()):
        _leave_out(name)
    backbone = Qwen3VL(model)
    lora.attach(model, lora.LoraSpec(16, 32.0, 0.0, decode_targets(), "lora"), seed=0)
    mx.clear_cache()
    weights = round(mx.get_active_memory() / 1e9, 2)
    more = options.pop("limit_gb", None)
    dtype = backbone.text.norm.weight.dtype
    cases = [(f"rows_{rows}", rows, shapes) for rows in party.rows]
    for rows, side, text, trained in options.pop("others", ()):
        other = replace(shapes, side=side, text=text, trained=trained)
        cases.append((f"rows_{rows}_image_{other.image}_text_{text}", rows, other))
    for name, rows, shapes in cases:
        # 128 is what the fused backward pass of attention asks for on CUDA.
        width = -(-shapes.length // 128) * 128
        optimizer = optim.adamw(
            optim.learning_rate(1e-4, warmup=2, total=1000, schedule="cosine"), weight_decay=0.01
        )
        optimizer.init(model.trainable_parameters())
        tokens = np.zeros((rows, width), np.int32)
        tokens[:, : shapes.length] = _rows(shapes, rows)
        deepstack = len(model.config.vision_config.deepstack_visual_indexes)
        arrays = [
            mx.random.normal((shapes.image, shapes.hidden)).astype(dtype)
            for _ in range(1 + deepstack)
        ]
        grid = (1, shapes.side, shapes.side)
        inputs, _ = assemble(
            tokens,
            [shapes.length] * rows,
            [VisionFeatures(arrays[0], tuple(arrays[1:]))] * rows,
            [grid] * rows,
            image_token=151_655,
            merge=2,
        )
        first = shapes.length - shapes.trained - 1
        where = np.concatenate(
            [np.arange(first, shapes.length - 1) + row * width for row in range(rows)]
        ).astype(np.int32)
        wanted = tokens.reshape(-1)[where + 1]
        batch = (inputs, mx.array(where), mx.array(wanted))
        mx.eval(inputs.tokens, inputs.features, inputs.deepstack, inputs.positions, batch[1:])
        step = UpdateStep(backbone, optimizer, **options)
        if more is not None:
            # Above it MLX waits for what is running before it queues more; a third of it a row.
            mx.set_memory_limit(int((weights + more * (1 + (rows - 1) / 3)) * 1e9))

        def queue(
            step: Any = step, batch: Any = batch, optimizer: Any = optimizer, n: int = len(where)
        ) -> Any:
            done = step([[batch]], n)
            mx.async_eval(step.arrays(), done.loss, done.applied)
            return done

        def wait(done: Any) -> float:
            return number(done.loss)

        yield (
            name,
            {
                **_time(queue, wait, steps),
                "weights_gb": weights,
                "graphs": [os.environ.get(name) for name in (OPERATIONS, MEGABYTES)],
                "tokens": shapes.length,
                "image_tokens": shapes.image,
                "trained": shapes.trained,
            },
        )
        del step, batch, inputs, optimizer, queue
        mx.clear_cache()


def _leave_out(name: str) -> None:
    """Take something out of the step that was found to pay, to see by how much."""
    from mondrian_ft.model import cuda_attention, cuda_train, joined

    if name == "kernels":
        cuda_train.fits = lambda *_: False
    elif name == "attention":
        cuda_attention.fits = lambda *_: False
    else:
        assert name == "joined", name
        joined.join = lambda layers: None


def decode_targets() -> tuple[str, ...]:
    """The seven projections."""
    from .training_step import TARGETS

    return TARGETS


def _time(
    queue: Callable[[], Any], wait: Callable[[Any], float], steps: int, *, ahead: bool = True
) -> dict[str, Any]:
    """Seconds of a step that is waited for, and with ``ahead`` of one whose figures are read a step
    later."""
    from mondrian_ft.model.backend import mx

    mx.reset_peak_memory()
    started = time.perf_counter()
    losses = [wait(queue())]
    first = time.perf_counter() - started
    # Buffers find their sizes in the first steps.
    losses += [wait(queue()) for _ in range(2)]
    mx.reset_peak_memory()
    taken, host = [], []
    for _ in range(steps):
        started = time.perf_counter()
        done = queue()
        host.append(time.perf_counter() - started)
        losses.append(wait(done))
        taken.append(time.perf_counter() - started)
    found = {
        "seconds": measure.spread(taken, 4),
        "seconds_until_queued": measure.spread(host, 4),
        "first_step_seconds": round(first, 1),
        "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
    }
    if not ahead:
        return found | {"losses": [round(one, 3) for one in losses[:4]]}
    queued = []
    mx.reset_peak_memory()
    before = queue()
    started = time.perf_counter()
    for _ in range(steps):
        now = queue()
        losses.append(wait(before))
        queued.append(time.perf_counter() - started)
        before, started = now, time.perf_counter()
    losses.append(wait(before))
    return found | {
        "seconds_queued": measure.spread(queued, 4),
        "peak_gb_queued": round(mx.get_peak_memory() / 1e9, 2),
        "cache_gb": round(mx.get_cache_memory() / 1e9, 2),
        "losses": [round(one, 3) for one in losses[:4]],
    }


def _stock(party: Party, shapes: Shapes, steps: int) -> Iterator[tuple[str, Any]]:
    """mlx-vlm's own loss, gradient and update, as its trainer runs them: answers only, the tower
    in every step."""
    from mlx.optimizers import AdamW
    from mlx_vlm.trainer.common.utils import apply_gradient_step
    from mlx_vlm.trainer.peft.lora_layers import LoRALinear
    from mlx_vlm.trainer.vlm.sft.runtime import vlm_sft_loss

    from mondrian_ft.model.backend import mx, nn, number

    model = _model(shapes)
    for layer in model.language_model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in decode_targets():
                if name in part:
                    part[name] = LoRALinear.from_base(part[name], r=16, scale=2.0)
    mx.eval(model.parameters())
    model.train()
    patches = np.random.default_rng(0).standard_normal((shapes.side**2, 1536), np.float32)
    for rows in party.rows:
        optimizer = AdamW(learning_rate=1e-4)
        optimizer.init(model.trainable_parameters())
        # Their trainer takes the last token off and pads to a multiple of 32 plus one.
        tokens = mx.array(_rows(shapes, rows))
        completion = np.zeros(tokens.shape, np.int32)
        completion[:, -shapes.trained :] = 1
        batch = {
            "input_ids": tokens,
            "attention_mask": mx.ones(tokens.shape, mx.int32),
            "completion_mask": mx.array(completion),
            "pixel_values": mx.array(np.concatenate([patches] * rows)),
            "image_grid_thw": mx.array([[1, shapes.side, shapes.side]] * rows),
        }
        gradient = nn.value_and_grad(
            model, lambda model, batch: vlm_sft_loss(model, batch, train_on_completions=True)
        )

        def queue(batch: Any = batch, gradient: Any = gradient, optimizer: Any = optimizer) -> Any:
            loss, metrics, _ = apply_gradient_step(
                model, optimizer, gradient, batch, None, update=True, accumulation_steps=1
            )
            mx.eval(model.state, optimizer.state, loss, list(metrics.values()))
            return loss

        yield f"rows_{rows}", _time(queue, lambda loss: number(loss), steps, ahead=False)
        del batch, gradient, optimizer, queue
        mx.clear_cache()


# --- where a step goes ----------------------------------------------------------------------------


def _pieces(party: Party, shapes: Shapes, steps: int) -> Iterator[tuple[str, Any]]:
    """Milliseconds of single operations, in bfloat16, each as many times as fill a queue."""
    from mondrian_ft.model import decoder
    from mondrian_ft.model.backend import default_dtype, mx

    dtype, count = default_dtype(), 16
    hidden, inner = shapes.hidden, shapes.hidden * 9728 // 2560
    heads = max(1, hidden * 32 // 2560)

    def random(*shape: int) -> mx.array:
        return (0.1 * mx.random.normal(shape)).astype(dtype)

    def ms(work: Callable[..., Any], *sets: Any) -> float:
        """Of one call; each set of arguments in turn, so that no cache holds a matrix."""
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            mx.eval([work(*sets[n % len(sets)]) for n in range(count)])
            taken.append((time.perf_counter() - started) / count * 1000)
        return round(statistics.median(taken[1:]), 4)

    for rows in party.rows:
        length = -(-shapes.length // 128) * 128
        t = rows * length
        found: dict[str, Any] = {}
        for fan_in, fan_out in (
            (hidden, heads * 128),
            (hidden, 1024),
            (heads * 128, hidden),
            (hidden, inner),
            (inner, hidden),
            (hidden, 2 * inner),
        ):
            sets = [(random(t, fan_in), random(fan_out, fan_in)) for _ in range(2)]
            mx.eval(sets)
            flops = 2 * t * fan_in * fan_out / 1e9
            forward = ms(lambda x, w: x @ w.T, *sets)
            backs = [(random(t, fan_out), w) for _, w in sets]
            mx.eval(backs)
            backward = ms(lambda y, w: y @ w, *backs)
            found[f"{fan_in}->{fan_out}"] = {
                "ms": [forward, backward],
                "tflops": [round(flops / forward), round(flops / backward)],
            }
            del sets, backs
            mx.clear_cache()
        found |= _small_pieces(shapes, rows, ms, random, decoder)
        yield f"pieces_rows_{rows}", found


def _small_pieces(
    shapes: Shapes, rows: int, ms: Callable[..., float], random: Callable[..., Any], decoder: Any
) -> dict[str, Any]:
    """LoRA's products, attention, the gate and the rotation, forward and backward."""
    from mondrian_ft.model.backend import mx

    hidden, inner = shapes.hidden, shapes.hidden * 9728 // 2560
    heads = max(1, hidden * 32 // 2560)
    length = -(-shapes.length // 128) * 128
    t = rows * length
    x, wide, gate = random(t, hidden), random(t, inner), random(t, inner)
    a, a3, b = random(hidden, 16), random(hidden, 48), random(16, inner)
    z, weight = random(t, 16), random(hidden)
    mx.eval(x, wide, gate, a, a3, b, z, weight)
    rms = mx.compile(lambda x: mx.fast.rms_norm(x, weight, 1e-6))
    swiglu = mx.compile(decoder._swiglu)
    swiglu_back = mx.compile(lambda g, u, y: mx.vjp(decoder._swiglu, [g, u], [y])[1])
    found = {
        "x A, rank 16": ms(lambda x: x @ a, (x,)),
        "x A, rank 48": ms(lambda x: x @ a3, (x,)),
        "x' g, rank 16": ms(lambda x: x.T @ z, (x,)),
        "x' g, wide, rank 16": ms(lambda x: x.T @ z, (wide,)),
        "z B alone": ms(lambda z: z @ b, (z,)),
        "y + z B": ms(lambda y: mx.addmm(y, z, b), (wide,)),
        "y B', wide": ms(lambda y: y @ b.T, (wide,)),
        "rms norm": ms(rms, (x,)),
        "rms norm back": ms(lambda x: mx.vjp(rms, [x], [x])[1], (x,)),
        "swiglu": ms(swiglu, (wide, gate)),
        "swiglu back": ms(swiglu_back, (wide, gate, gate)),
        "x + x": ms(lambda x: x + x, (x,)),
    }
    del wide, gate
    q, k = random(rows, length, heads, 128), random(rows, length, max(1, heads // 4), 128)
    cos, sin = random(rows, length, 1, 128), random(rows, length, 1, 128)
    mx.eval(q, k, cos, sin)
    turned = mx.compile(decoder._turned)
    turned_back = mx.compile(lambda q, y: mx.vjp(decoder._turned, [q, cos, sin], [y])[1][0])
    found["rotation of q"] = ms(turned, (q, cos, sin))
    found["rotation of q back"] = ms(turned_back, (q, q))

    def attention(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (one.transpose(0, 2, 1, 3) for one in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=128**-0.5, mask="causal")
        return out.transpose(0, 2, 1, 3)

    found["attention"] = ms(attention, (q, k, k))
    found["attention and back"] = ms(lambda q, k: mx.vjp(attention, [q, k, k], [q])[1], (q, k))
    return found


def _torch(party: Party, shapes: Shapes, steps: int) -> Iterator[tuple[str, Any]]:
    from .training_4b_torch import run

    for rows in party.rows:
        try:
            yield (
                f"rows_{rows}",
                run(_rows(shapes, rows), asdict(shapes), steps, **dict(party.options)),
            )
        except Exception:
            yield f"rows_{rows}", {"error": traceback.format_exc()[-1500:]}


WORK: dict[str, Callable[[Party, Shapes, int], Iterator[tuple[str, Any]]]] = {
    "ours": _ours,
    "stock": _stock,
    "pieces": _pieces,
    "torch": _torch,
}


if __name__ == "__main__":
    main()
