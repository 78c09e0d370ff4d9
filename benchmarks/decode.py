"""Our batched decoding beside ``mlx_vlm.generate`` one photograph at a time.

:func:`sample` uses the sample model, its photographs and its prompt; both sides run in this
process, so both have the BLAS that ours loads. :func:`random_4b` uses random weights in the shapes
of Qwen3-VL-4B and needs a GPU; it imports no config and no tracking library.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import measure

PHOTOGRAPHS, TOKENS = 16, 300


def sample(repeats: int) -> dict[str, Any]:
    """Sixteen photographs of the sample, answered free and under the schema, and by mlx-vlm."""
    from mondrian_ft.data.batches import encode
    from mondrian_ft.data.critique import DIMENSIONS, strict_format_error
    from mondrian_ft.data.pixels import PixelSettings
    from mondrian_ft.data.rows import Row
    from mondrian_ft.evaluation.constrain import Constraint
    from mondrian_ft.evaluation.generate import Request, generate, generate_each
    from mondrian_ft.model.base import load_base
    from mondrian_ft.model.features import FeatureStore
    from mondrian_ft.sample import model_dir, sample_data
    from mondrian_ft.sample.prompts import ADVISORS, CLOSING, SYSTEM_PROMPT

    base = load_base(model_dir())
    size = json.loads((model_dir() / "preprocessor_config.json").read_text())["size"]
    bounds = PixelSettings(size["shortest_edge"], size["longest_edge"])
    prompt = f"{SYSTEM_PROMPT}\n\n{ADVISORS[0].prompt}\n\n{CLOSING}"
    with tempfile.TemporaryDirectory() as folder:
        source = sample_data(0, Path(folder)).source_dir
        paths = sorted(path for path in source.rglob("*.jp*g") if path.is_file())[:PHOTOGRAPHS]
        constraint = Constraint.critique(base, DIMENSIONS)

        def requests() -> list[Any]:
            """From files to requests, tower included: mlx-vlm does that in its time as well."""
            store = FeatureStore(base.backbone)
            found = []
            for path in paths:
                row = Row("bench", "ansel", path, prompt, "{}", str(path))
                one = encode(row, base, base.image_processor, bounds, base.backbone.image_token)
                (features,) = store.get([(str(path), one.pixels)])
                tokens = base.prompt_tokens(prompt, one.pixels.tokens)
                found.append(Request(tokens, features, one.pixels.grid))
            return found

        def ours(**options: Any) -> Any:
            return generate(base, requests(), max_tokens=TOKENS, batch_size=PHOTOGRAPHS, **options)

        stock = _stock_sample(model_dir(), prompt, paths)
        ours()  # not counted
        stock(1)
        times: dict[str, list[float]] = {"one by one": [], "batched": [], "under the schema": []}
        texts: dict[str, list[str]] = {}
        for _ in range(repeats):
            for name, work in (
                ("one by one", stock),
                ("batched", lambda: [one.text for one in ours()]),
                ("under the schema", lambda: [one.text for one in ours(constraint=constraint)]),
            ):
                started = time.perf_counter()
                texts[name] = work()
                times[name].append(time.perf_counter() - started)
        free, kept = generate_each(
            base,
            requests(),
            [None, constraint],
            max_tokens=600,
            batch_size=PHOTOGRAPHS,
        )
    valid = [n for n, one in enumerate(free) if strict_format_error(one.text, DIMENSIONS) is None]
    figures = {name: measure.spread(values) for name, values in times.items()}
    entry = {
        "what": f"{PHOTOGRAPHS} photographs, {TOKENS} tokens at most, from files to texts",
        "seconds": figures,
        "ratio": round(figures["one by one"]["min"] / figures["batched"]["min"], 2),
        "schema_cost": round(figures["under the schema"]["min"] / figures["batched"]["min"], 2),
        "same_texts_as_mlx_vlm": sum(
            a.strip() == b.strip()
            for a, b in zip(texts["one by one"], texts["batched"], strict=True)
        ),
        "strict_of_16": {
            "free": len(valid),
            "under the schema": sum(
                strict_format_error(one.text, DIMENSIONS) is None for one in kept
            ),
            "valid ones unchanged": sum(free[n].text == kept[n].text for n in valid),
        },
    }
    print(json.dumps(entry, indent=2))
    return entry


def _stock_sample(folder: Path, prompt: str, paths: list[Path]) -> Callable[..., list[str]]:
    """mlx-vlm as its users call it."""
    from mlx_vlm.generate import generate
    from mlx_vlm.utils import load

    model: Any
    processor: Any
    model, processor = load(str(folder))
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
        tokenize=False,
    )

    def answer(count: int = len(paths)) -> list[str]:
        options: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0}
        return [
            generate(model, processor, text, image=str(path), **options).text
            for path in paths[:count]
        ]

    return answer


@dataclass(frozen=True)
class Shapes:
    """Sizes of :func:`random_4b`; the defaults are Qwen3-VL-4B's, smaller ones try the code.

    Attributes:
        layers, hidden: of the decoder.
        side: patches of a picture's side; side² / 4 image tokens.
        prompt: tokens of a prompt, image tokens among them.
        tokens: tokens of an answer in the whole evaluation.
        steps: steps that are timed.
        photographs: of the whole evaluation, all in one batch.
        stock: photographs that mlx-vlm answers, whose time is scaled to all of them.
    """

    layers: int = 36
    hidden: int = 2560
    side: int = 64
    prompt: int = 1744
    tokens: int = 800
    steps: int = 100
    photographs: int = 16
    stock: int = 2


def random_4b(shapes: Shapes, out: Path | None) -> dict[str, Any]:
    """Steps at batch 1 and full batch, and a whole evaluation, with random weights.

    Every section is written to ``out`` as soon as it is measured; one that fails leaves its
    traceback there and the next goes on.
    """
    from mondrian_ft.model.backend import describe, mx

    found: dict[str, Any] = {
        "shapes": asdict(shapes),
        "backend": describe(),
        "versions": measure.versions(),
    }
    world = _World(shapes)

    def section(name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        try:
            mx.reset_peak_memory()
            found[name] = work()
            found[name]["peak_gb"] = round(mx.get_peak_memory() / 1e9, 2)
        except Exception:  # a section that fails must not lose the others
            found[name] = {"error": traceback.format_exc()[-3000:]}
        found[name]["section_seconds"] = round(time.perf_counter() - started, 1)
        print(name, json.dumps(found[name]), flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=2) + "\n")

    full = shapes.photographs
    section("model", world.load)
    if "error" in found["model"]:
        return found
    section("base_batch_1", lambda: world.steps(1))
    section(f"base_batch_{full}", lambda: world.steps(full))
    section("base_batch_1_masked", lambda: world.steps(1, masked=True))
    section(f"base_batch_{full}_masked", lambda: world.steps(full, masked=True))
    section("base_numbers", world.numbers)
    section("mlx_vlm_batch_1", world.stock_steps)
    section("adapter", world.attach)
    section("tuned_numbers", world.numbers)
    section("tuned_batch_1", lambda: world.steps(1))
    section(f"tuned_batch_{full}", lambda: world.steps(full))
    section("evaluation_ours", world.evaluation)
    section("evaluation_mlx_vlm", world.stock_evaluation)
    try:
        found["evaluation_ratio"] = round(
            found["evaluation_mlx_vlm"]["seconds_scaled"] / found["evaluation_ours"]["seconds"], 2
        )
    except KeyError:
        found["evaluation_ratio"] = None
    print(json.dumps(found, indent=2))
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")
    return found


class _AnyToken:
    """A constraint that allows every token: what masks cost, without what finding them costs."""

    def __init__(self, size: int) -> None:
        self.words = -(-size // 32)

    def start(self, rows: int) -> _AnyToken:
        return self

    def allowed(self, rows: list[int]) -> np.ndarray:
        return np.full((len(rows), self.words), -1, np.int32)

    def consume(self, row: int, token: int) -> None: ...


class _World:
    """A model of random weights, and pictures of noise."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.grid = (1, shapes.side, shapes.side)
        noise = np.random.default_rng(0)
        size = (shapes.photographs, shapes.side**2, 1536)
        self.patches = noise.standard_normal(size, np.float32)
        images = shapes.side**2 // 4
        text = noise.integers(1000, 100_000, shapes.prompt - images - 1).tolist()
        # As in the chat template: an opening token stands before the picture.
        self.tokens = [151_652, *[151_655] * images, *text]

    def load(self) -> dict[str, Any]:
        """Make the model, in bfloat16 on a GPU."""
        from mlx.utils import tree_flatten
        from mlx_vlm.models.qwen3_vl.config import ModelConfig
        from mlx_vlm.models.qwen3_vl.qwen3_vl import Model

        from mondrian_ft.model.backend import default_dtype, mx
        from mondrian_ft.model.qwen3_vl import Qwen3VL

        mx.random.seed(0)
        model: Any = Model(ModelConfig.from_dict(_config(self.shapes)))
        model.set_dtype(default_dtype())
        model.freeze()
        model.eval()
        mx.eval(model.parameters())
        self.backbone = Qwen3VL(model)
        # What `generate` asks of a base, and no tokenizer: texts are not looked at here.
        self.base: Any = SimpleNamespace(
            backbone=self.backbone,
            model=model,
            end_tokens=frozenset(),
            pad_token=0,
            text=lambda tokens: "",
            identity=SimpleNamespace(name="random weights"),
            plain=False,
        )
        weights: dict[str, Any] = dict(tree_flatten(model.parameters()))  # pyright: ignore
        return {
            "parameters": sum(one.size for one in weights.values()),
            "gb": round(sum(one.nbytes for one in weights.values()) / 1e9, 2),
            "dtype": str(default_dtype()),
        }

    def attach(self) -> dict[str, Any]:
        """Rank-16 LoRA on the seven projections, with some effect."""
        from mondrian_ft.model import lora
        from mondrian_ft.model.backend import mx

        from .training_step import TARGETS

        names = lora.attach(self.base.model, lora.LoraSpec(16, 32.0, 0.0, TARGETS, "lora"), seed=0)
        for layer in lora.lora_layers(self.base.model).values():
            layer["lora_b"] = 0.01 * mx.random.normal(layer["lora_b"].shape)
        mx.eval(self.base.model.parameters())
        self.base.model.eval()
        return {"matrices": len(names)}

    def requests(self, count: int) -> list[Any]:
        """Prompts with pictures that go through the tower now."""
        from mondrian_ft.evaluation.generate import Request
        from mondrian_ft.model.backend import mx

        found = []
        for number in range(count):
            (features,) = self.backbone.encode(self.patches[number], self.grid)
            mx.eval(features.features, features.deepstack)
            found.append(Request(self.tokens, features, self.grid))
        return found

    def steps(self, rows: int, *, masked: bool = False) -> dict[str, Any]:
        """Milliseconds of a step, after the first ones, which compile."""
        from mondrian_ft.evaluation.generate import read_prompts
        from mondrian_ft.model.backend import mx
        from mondrian_ft.model.decode import Decoding, Steps

        requests = self.requests(rows)
        started = time.perf_counter()
        prompts = read_prompts(self.base, requests)
        first_read = time.perf_counter() - started
        started = time.perf_counter()
        prompts = read_prompts(self.base, requests)
        reading = time.perf_counter() - started
        decoding = Decoding(
            Steps(self.backbone), prompts, capacity=self.shapes.prompt + self.shapes.tokens
        )
        del prompts
        size = int(self.backbone.text.embed_tokens.weight.shape[0])
        constraint = _AnyToken(size) if masked else None
        every = list(range(rows))
        decoding.choose(constraint.allowed(every) if constraint else None)

        def step(*, waiting: bool = False) -> None:
            token = decoding.token
            if waiting:
                mx.eval(token)
            decoding.advance(choosing=constraint is None)
            np.array(token)
            if constraint is not None:
                decoding.choose(constraint.allowed(every))

        started = time.perf_counter()
        step()
        np.array(decoding.token)
        compiling = time.perf_counter() - started
        for _ in range(4):
            step()

        def timed(count: int, **options: bool) -> float:
            np.array(decoding.token)
            started = time.perf_counter()
            for _ in range(count):
                step(**options)
            np.array(decoding.token)
            return (time.perf_counter() - started) / count * 1000

        part = max(1, self.shapes.steps // 4)
        ahead = [timed(part) for _ in range(4)]
        waiting = [timed(part, waiting=True) for _ in range(2)]
        median = statistics.median(ahead)
        return {
            "rows": rows,
            "prefill_seconds": {"first": round(first_read, 3), "again": round(reading, 3)},
            "first_step_seconds": round(compiling, 2),
            "ms_per_step": measure.spread(ahead),
            "ms_per_step_when_waiting": measure.spread(waiting),
            "tokens_per_second": round(rows / median * 1000, 1),
        }

    def numbers(self) -> dict[str, Any]:
        """How far the logits of a step are from those of the same step in float32, with our kernels
        and with MLX's operations; two rows of unequal length, three steps, root mean squares."""
        from mondrian_ft.evaluation.generate import Request, read_prompts
        from mondrian_ft.model import lora
        from mondrian_ft.model.backend import mx
        from mondrian_ft.model.decode import Decoding, Prefilled, Steps

        long, other = self.requests(2)
        short = Request(other.tokens[: -self.shapes.prompt // 16], other.features, other.grid)
        prompts = read_prompts(self.base, [long, short])

        def logits(prompts: Prefilled, *, own_kernels: bool) -> np.ndarray:
            steps = Steps(self.backbone, own_kernels=own_kernels)
            decoding = Decoding(steps, prompts, capacity=self.shapes.prompt + 3)
            found = []
            for number in range(3):
                decoding.token = mx.array([1000 + number, 2000 - number], mx.int32)
                decoding.advance(choosing=False)
                found.append(np.array(decoding.logits.astype(mx.float32)))  # pyright: ignore
            return np.stack(found)

        ours = logits(prompts, own_kernels=True)
        mlxs = logits(prompts, own_kernels=False)
        model, dtype = self.base.model, self.backbone.text.norm.weight.dtype
        adapter = lora.tensors(model)  # float32 in any case, and to stay so
        model.set_dtype(mx.float32)
        wide = Prefilled(
            prompts.logits,
            [one.astype(mx.float32) for one in prompts.keys],
            [one.astype(mx.float32) for one in prompts.values],
            prompts.lengths,
            prompts.positions,
        )
        exact = logits(wide, own_kernels=False)
        model.set_dtype(dtype)
        if adapter:
            lora.set_tensors(model, adapter)

        def size(values: np.ndarray) -> float:
            return round(float(np.sqrt((values.astype(np.float64) ** 2).mean())), 5)

        return {
            "logits": size(exact),
            "our_kernels_less_float32": size(ours - exact),
            "mlx_operations_less_float32": size(mlxs - exact),
        }

    def stock_steps(self) -> dict[str, Any]:
        """mlx-vlm's own loop at batch 1: what `mlx_vlm.generate` runs, less its texts."""
        self._stock(0, 4)
        short = min(self._stock(0, 2) for _ in range(2))
        count = max(4, self.shapes.steps)
        whole = min(self._stock(0, count) for _ in range(2))
        return {
            "prefill_and_2_tokens_seconds": round(short, 3),
            "ms_per_step": round((whole - short) / (count - 2) * 1000, 3),
        }

    def evaluation(self) -> dict[str, Any]:
        """Every photograph with base and tuned model: tower, prefill, answers. Twice: the first
        time compiles."""
        from mondrian_ft.evaluation.generate import generate
        from mondrian_ft.model import lora

        times = []
        for _ in range(2):
            started = time.perf_counter()
            requests = self.requests(self.shapes.photographs)
            options: dict[str, Any] = {
                "max_tokens": self.shapes.tokens,
                "batch_size": self.shapes.photographs,
            }
            tuned = generate(self.base, requests, **options)
            with lora.without_adapter(self.base.model):
                base = generate(self.base, requests, **options)
            times.append(time.perf_counter() - started)
        return {
            "photographs": self.shapes.photographs,
            "arms": 2,
            "tokens": sum(one.tokens for one in [*tuned, *base]),
            "first_seconds": round(times[0], 2),
            "seconds": round(times[1], 2),
            "prefill_seconds_per_row": round(tuned[0].prefill_seconds or 0.0, 4),
        }

    def stock_evaluation(self) -> dict[str, Any]:
        """mlx-vlm on a few of the photographs in both arms, scaled to all of them."""
        from mondrian_ft.model import lora

        count = min(self.shapes.stock, self.shapes.photographs)
        started = time.perf_counter()
        for number in range(count):
            self._stock(number, self.shapes.tokens)
        with lora.without_adapter(self.base.model):
            for number in range(count):
                self._stock(number, self.shapes.tokens)
        seconds = time.perf_counter() - started
        scale = self.shapes.photographs / count
        return {
            "measured_photographs": count,
            "seconds_measured": round(seconds, 2),
            "scaled_by": scale,
            "seconds_scaled": round(seconds * scale, 2),
        }

    def _stock(self, number: int, tokens: int) -> float:
        """Seconds of one answer by mlx-vlm, its tower included."""
        from mlx_vlm.generate.ar import generate_step

        from mondrian_ft.model.backend import mx

        started = time.perf_counter()
        ids = mx.array([self.tokens])
        made = 0
        for token, _ in generate_step(
            ids,
            self.base.model,
            mx.array(self.patches[number]),
            mx.ones_like(ids),
            max_tokens=tokens,
            temperature=0.0,
            image_grid_thw=mx.array([self.grid]),
        ):
            int(token)  # pyright: ignore[reportArgumentType]
            made += 1
        if made != tokens:
            raise RuntimeError(f"mlx-vlm gave {made} of {tokens} tokens")
        return time.perf_counter() - started


def _config(shapes: Shapes) -> dict[str, Any]:
    """config.json of Qwen3-VL-4B, or of a smaller one with the same head size."""
    heads = max(1, shapes.hidden * 32 // 2560)
    groups = max(one for one in range(1, heads // 4 + 2) if heads % one == 0)
    depth = 24 if shapes.layers >= 18 else max(1, min(24, shapes.layers))
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151_936,
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.hidden * 9728 // 2560,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "qwen3_vl",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "depth": depth,
        "num_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": shapes.hidden,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17] if depth >= 18 else [0],
    }
    return {
        "model_type": "qwen3_vl",
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
    }
