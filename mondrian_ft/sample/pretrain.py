"""Training of the sample base model, from nothing, on rendered photographs.

The base learns to follow the JSON instruction and to describe what it sees; its scores are those
of the generic reviewer, or of an invented critic where the prompt names one. It never meets the
taste of the sample's advisors, nor a photograph of the sample: those come from other seeds.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import base_model
from .critics import GENERIC, Critic, answer, invented
from .prompts import INVENTED_NAMES, training_prompt
from .scenes import Scene, render

# Far from every seed a sample database can have, which are small non-negative numbers.
_PICTURE_SEED = 2**40


@dataclass(frozen=True)
class Recipe:
    """What determines the trained weights, on one machine.

    Attributes:
        pictures: rendered photographs in all.
        critiques: critiques written for each.
        steps, batch: updates, and rows in each.
        learning_rate, warmup, weight_decay: AdamW with linear warm-up and cosine to a twentieth.
        generic: share of critiques by the generic reviewer.
        describe: weight in the loss of the description's tokens, where seeing is learnt; all
            others have 1.
    """

    pictures: int = 32_000
    critiques: int = 6
    steps: int = 3_000
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 150
    weight_decay: float = 0.05
    generic: float = 0.6
    describe: float = 4.0
    seed: int = 0


def critics(seed: int) -> dict[str, Critic]:
    """The invented critics of a recipe, by name."""
    rng = np.random.default_rng([_PICTURE_SEED, seed])
    return {name: invented(name, rng) for name in INVENTED_NAMES}


def written(scene: Scene, recipe: Recipe, rng: np.random.Generator) -> tuple[str, str]:
    """One prompt and the answer to it, about a scene."""
    if rng.random() < recipe.generic:
        return training_prompt(rng, None), answer(GENERIC.critique(scene, rng))
    name = str(rng.choice(INVENTED_NAMES))
    return training_prompt(rng, name), answer(critics(recipe.seed)[name].critique(scene, rng))


def train_tokenizer(folder: Path, recipe: Recipe, pairs: int = 4_000) -> dict[str, int]:
    """Train the tokenizer on prompts and answers of the recipe's family. Returns special ids."""
    rng = np.random.default_rng([_PICTURE_SEED, recipe.seed, 1])

    def texts() -> Iterator[str]:
        for _ in range(pairs):
            yield from written(Scene.draw(rng), recipe, rng)

    return base_model.write_tokenizer(folder, texts())


def _make(task: tuple[str, Recipe, int, int]) -> list[tuple[Any, np.ndarray, list[np.ndarray]]]:
    """One worker's share: patches (uint8) and tokenised rows of some pictures."""
    from PIL import Image
    from tokenizers import Tokenizer

    from ..data.pixels import PixelSettings, to_pixels
    from ..model.processor import image_processor

    folder, recipe, first, count = task
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    processor = image_processor(Path(folder))
    settings = PixelSettings(base_model.MIN_PIXELS, base_model.MAX_PIXELS)
    head, tail = base_model.TURN
    made = []
    for number in range(first, first + count):
        rng = np.random.default_rng([_PICTURE_SEED, recipe.seed, 2, number])
        scene = Scene.draw(rng)
        # Through JPEG, as every photograph of the sample: its marks are part of what is seen.
        buffer = io.BytesIO()
        render(scene).save(buffer, "JPEG", quality=int(rng.integers(84, 95)))
        pixels = to_pixels(Image.open(buffer), processor, settings)
        patches = pixels.patches.reshape(-1, 3, 2, 256)[:, :, 0].reshape(-1, 768)
        patches = np.round((patches * 0.5 + 0.5) * 255).astype(np.uint8)
        rows = []
        for _ in range(recipe.critiques):
            prompt, text = written(scene, recipe, rng)
            before = tokenizer.encode(head + prompt + tail, add_special_tokens=False).ids
            image = int(tokenizer.token_to_id("<|image_pad|>") or 0)
            at = before.index(image)
            before = before[:at] + [image] * pixels.tokens + before[at + 1 :]
            after = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False).ids
            described = text[: text.index('","dimensions"')]
            seen = len(tokenizer.encode(described, add_special_tokens=False).ids)
            rows.append(np.array([len(before), seen, *before, *after], np.uint16))
        made.append((pixels.grid, patches, rows))
    return made


def corpus(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> dict[Any, Any]:
    """Everything to train on, by grid: patches (n, P, 768) uint8 and a list of rows per picture."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    share = 250
    tasks = [
        (str(folder), recipe, first, min(share, recipe.pictures - first))
        for first in range(0, recipe.pictures, share)
    ]
    by_grid: dict[Any, tuple[list[np.ndarray], list[list[np.ndarray]]]] = {}
    started = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for done, made in enumerate(pool.map(_make, tasks), 1):
            for grid, patches, rows in made:
                pictures, texts = by_grid.setdefault(grid, ([], []))
                pictures.append(patches)
                texts.append(rows)
            if done % 16 == 0 or done == len(tasks):
                rendered = min(done * share, recipe.pictures)
                say(f"{rendered} pictures, {time.monotonic() - started:.0f} s")
    return {grid: (np.stack(pictures), texts) for grid, (pictures, texts) in by_grid.items()}


def train(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the base model and write its folder.

    Args:
        folder: receives the model folder (config, tokenizer, processor settings, weights).
        recipe: what to do.
        say: receives progress, one line at a time.

    Returns:
        Facts for the model card: parameters, seconds, final loss, backend.
    """
    # The backend before anything of MLX's own: it is what loads OpenBLAS.
    from ..model.backend import describe, mx, nn
    from ..model.processor import build_model
    from ..model.qwen3_vl import Inputs, Qwen3VL, positions_of

    from mlx import optimizers  # isort: skip
    from mlx.utils import tree_flatten  # isort: skip

    started = time.monotonic()
    tokens = train_tokenizer(folder, recipe)
    base_model.write_settings(folder, tokens)
    data = corpus(folder, recipe, say)

    mx.random.seed(recipe.seed)
    model = build_model(folder)
    _initialise(model)
    mx.eval(model.parameters())
    backbone = Qwen3VL(model)
    longest = max(len(row) for _, texts in data.values() for rows in texts for row in rows)
    length = -(-longest // 32) * 32
    schedule = optimizers.join_schedules(
        [
            optimizers.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
            optimizers.cosine_decay(
                recipe.learning_rate,
                max(1, recipe.steps - recipe.warmup),
                recipe.learning_rate * 0.05,
            ),
        ],
        [recipe.warmup],
    )
    optimizer = optimizers.AdamW(
        schedule, betas=[0.9, 0.98], weight_decay=recipe.weight_decay, bias_correction=True
    )

    def loss(
        grid: Any,
        patches: mx.array,
        ids: mx.array,
        positions: mx.array,
        index: mx.array,
        targets: mx.array,
        weights: mx.array,
    ) -> mx.array:
        rows, count, _ = patches.shape
        pixels = (patches.astype(mx.float32) / 255 - 0.5) / 0.5
        pixels = mx.repeat(pixels.reshape(rows, count, 3, 1, 256), 2, axis=3)
        features, deepstack = backbone.tower_forward(pixels.reshape(rows, count, -1), grid)
        flat = tuple(level.reshape(-1, level.shape[-1]) for level in deepstack)
        inputs = Inputs(ids, positions, index, features.reshape(-1, features.shape[-1]), flat)
        logits = backbone.head(backbone.hidden(inputs))
        losses = nn.losses.cross_entropy(logits, targets)
        return (losses * weights).sum() / weights.sum()

    optimizer.init(model.trainable_parameters())
    steps: dict[Any, Any] = {}
    state = [model.state, optimizer.state]

    def step_for(grid: Any) -> Any:
        if grid not in steps:
            gradient = nn.value_and_grad(model, lambda *batch: loss(grid, *batch))

            def step(*batch: mx.array) -> mx.array:
                value, grads = gradient(*batch)
                grads, _ = optimizers.clip_grad_norm(grads, 1.0)
                optimizer.update(model, grads)
                return value

            steps[grid] = mx.compile(step, inputs=state, outputs=state)
        return steps[grid]

    grids = sorted(data)
    weights = np.array([len(data[grid][1]) for grid in grids], float)
    rng = np.random.default_rng([_PICTURE_SEED, recipe.seed, 3])
    seen, recent, reported = time.monotonic(), [], 0
    for number in range(1, recipe.steps + 1):
        grid = grids[rng.choice(len(grids), p=weights / weights.sum())]
        pictures, texts = data[grid]
        chosen = rng.choice(len(texts), recipe.batch, replace=len(texts) < recipe.batch)
        ids = np.full((recipe.batch, length), tokens["<|endoftext|>"], np.int32)
        targets = np.zeros((recipe.batch, length), np.int32)
        weight = np.zeros((recipe.batch, length), np.float32)
        tokens_in_image = grid[1] * grid[2] // 4
        index = np.zeros((recipe.batch, length), np.int32)
        positions = np.zeros((3, recipe.batch, length), np.int32)
        for row, picture in enumerate(chosen):
            options = texts[picture]
            text = options[rng.integers(len(options))].astype(np.int32)
            before, described, text = int(text[0]), int(text[1]), text[2:]
            ids[row, : len(text)] = text
            targets[row, before - 1 : len(text) - 1] = text[before:]
            weight[row, before - 1 : len(text) - 1] = 1.0
            weight[row, before - 1 : before - 1 + described] = recipe.describe
            at = int(np.argmax(text == tokens["<|image_pad|>"]))
            index[row, at : at + tokens_in_image] = (
                np.arange(tokens_in_image) + row * tokens_in_image + 1
            )
            positions[:, row] = positions_of(length, at, grid)
        batch = (pictures[chosen], ids, positions, index, targets, weight)
        value = step_for(grid)(*(mx.array(part) for part in batch))
        mx.eval(value, state)
        recent.append(float(value))
        if number % 100 == 0 or number == recipe.steps:
            say(
                f"step {number}/{recipe.steps}  loss {np.mean(recent[-100:]):.4f}  "
                f"{(time.monotonic() - seen) / (number - reported) * 1000:.0f} ms/step"
            )
            seen, reported = time.monotonic(), number

    parameters = dict(tree_flatten(model.parameters()))
    weights_file = {
        name: mx.contiguous(value)
        for name, value in base_model.to_published_names(parameters).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights_file, metadata={"format": "pt"})
    return {
        "parameters": sum(value.size for value in parameters.values()),
        "tokens_per_row": longest - 2,
        "final_loss": round(float(np.mean(recent[-100:])), 4),
        "seconds": round(time.monotonic() - started),
        "backend": describe(),
    }


def _initialise(model: Any) -> None:
    """Normal: 0.02 for tables, by fan-in for the rest, narrower where a residual is written."""
    from ..model.backend import mx

    from mlx.utils import tree_map_with_path  # isort: skip

    layers = len(model.language_model.model.layers)

    def fresh(path: str, value: Any) -> Any:
        if value.ndim < 2:
            return value
        *_, module, _ = path.split(".")
        if module in ("embed_tokens", "pos_embed"):
            return mx.random.normal(value.shape) * 0.02
        scale = 0.7 * (value.size // value.shape[0]) ** -0.5
        if module in ("o_proj", "down_proj") or (
            "blocks" in path and module in ("proj", "linear_fc2")
        ):
            scale /= (2 * layers) ** 0.5
        return mx.random.normal(value.shape) * scale

    model.update(tree_map_with_path(fresh, model.parameters()))


def judge(folder: Path, count: int) -> dict[str, Any]:
    """How a trained base does on unseen photographs, asked as the sample's service asks.

    Args:
        folder: the model's folder.
        count: photographs, of a seed that neither training nor any sample uses.

    Returns:
        ``format_strict``: share of answers in the exact format. ``words_right``: share of the
        description's words that are the true ones. ``score_mae``: error of the scores against the
        sample's first advisor, in points, over readable answers; ``mean_score_mae``: the error of
        always giving that advisor's mean scores.
    """
    import json

    from ..data.critique import strict_format_error
    from ..data.pixels import PixelSettings, to_pixels
    from ..evaluation.generate import Request, generate
    from ..model.base import load_base
    from .critics import ANSEL, DIMENSIONS, describe
    from .prompts import ADVISORS, CLOSING, SYSTEM_PROMPT

    base = load_base(folder)
    rng = np.random.default_rng([_PICTURE_SEED, 4])
    scenes = [Scene.draw(rng) for _ in range(count)]
    wanted = np.array([[ANSEL.score(name, scene, rng) for name in DIMENSIONS] for scene in scenes])
    prompt = f"{SYSTEM_PROMPT}\n\n{ADVISORS[0].prompt}\n\n{CLOSING}"
    settings = PixelSettings(base_model.MIN_PIXELS, base_model.MAX_PIXELS)
    requests = []
    for scene in scenes:
        pixels = to_pixels(render(scene), base.image_processor, settings)
        tokens = base.prompt_tokens(prompt, pixels.tokens)
        features = base.backbone.encode(pixels.patches, pixels.grid)[0]
        requests.append(Request(tokens, features, pixels.grid))
    outputs = generate(base, requests, max_tokens=500, batch_size=16)
    right, errors, strict = [], [], 0
    for scene, scores, output in zip(scenes, wanted, outputs, strict=True):
        if strict_format_error(output.text, DIMENSIONS) is not None:
            continue
        strict += 1
        critique = json.loads(output.text)
        said, true = critique["image_description"].split(), describe(scene).split()
        right.append(np.mean([a == b for a, b in zip(said, true, strict=False)]))
        given = {one["name"]: one["score"] for one in critique["dimensions"]}
        errors.append(np.abs(np.array([given[name] for name in DIMENSIONS]) - scores).mean())
    return {
        "judged": count,
        "format_strict": round(strict / count, 3),
        "words_right": round(float(np.mean(right)), 3) if right else None,
        "score_mae": round(float(np.mean(errors)), 2) if errors else None,
        "mean_score_mae": round(float(np.abs(wanted - wanted.mean(axis=0)).mean()), 2),
    }


_MEANINGS = {
    "judged": "photographs, of a seed that neither training nor any sample uses",
    "format_strict": "share of answers in the exact format",
    "words_right": "share of the description's words that are the true ones, where readable",
    "score_mae": "distance of its scores from the sample's first advisor's, in points of 10",
    "mean_score_mae": "the same, of always giving that advisor's mean scores",
}


def card(recipe: Recipe, facts: dict[str, Any]) -> str:
    """The model's README, from what was done and measured.

    Args:
        recipe: what it was trained by.
        facts: what :func:`train` and :func:`judge` returned, in one; others may be added.
    """

    def table(rows: Iterable[tuple[object, ...]]) -> str:
        return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)

    described = [
        (name, "no readable answer" if facts[name] is None else facts[name], meaning)
        for name, meaning in _MEANINGS.items()
    ]
    return f"""# The sample base model

A Qwen3-VL in miniature, trained from nothing on rendered landscapes. It stands in for
Qwen3-VL-4B-Instruct where that cannot be downloaded: it follows the JSON instruction and says what
a picture shows, and its scores are generic. It knows nothing of real photographs, and is of no use
on them.

## Recipe

`python -m mondrian_ft task=sample_model` makes it again. The same recipe on another machine gives
another model, near this one in what it can do: floating-point sums differ.

| | |
|---|---|
{table(vars(recipe).items())}

Data: rendered photographs of seeds that no sample database uses, each with critiques by a generic
reviewer or, where the prompt names one, by an invented critic. The sample's advisors are unknown
to it: their names appear in prompts, always with the generic answer.

## Training run

| | |
|---|---|
{table((name, value) for name, value in facts.items() if name not in _MEANINGS)}

`tokens_per_row` is the longest row's; `final_loss` is the mean of the last 100 updates, in nats per
token, with the description's tokens weighted {recipe.describe:g} times.

## Held out

Asked with the prompt of the sample's service.

| | | |
|---|---|---|
{table(described)}

The scores are meant to be off: they are a generic reviewer's, which is what fine-tuning on an
advisor's critiques is there to change.

Weights: Apache-2.0, like the rest of the package.
"""
