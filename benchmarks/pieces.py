"""What single choices of the fast path are worth, each measured against its plain alternative.

All on the sample model and random pictures or rows of the sample's size, in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import measure

GRID = (1, 8, 12)
"""Patches of the picture all entries use: 24 image tokens, the most the sample allows."""
ROWS, LENGTH, SUPERVISED = 2, 480, 230


def batched_decode(repeats: int) -> dict[str, Any]:
    """Sixteen answers of 100 tokens, decoded one by one and all together."""
    from mondrian_ft.evaluation.generate import Request, generate

    base = _base()
    prompt = base.prompt_tokens("Judge the photograph. " * 8, GRID[1] * GRID[2] // 4)
    features = base.backbone.encode(_patches(16), GRID)
    requests = [Request(prompt, one, GRID) for one in features]

    def decode(batch: int) -> Callable[[], object]:
        return lambda: generate(base, requests, max_tokens=100, batch_size=batch)

    return _compare("16 answers", ("one by one", decode(1)), ("batch of 16", decode(16)), repeats)


def features_once(repeats: int) -> dict[str, Any]:
    """A LoRA step with the pictures' features at hand, and with the tower run in every step."""
    backbone, inputs, loss_of = _lora_step()
    patches = _array(_patches(ROWS))

    def again() -> object:
        return loss_of(_with(inputs, *backbone.tower_forward(patches, GRID)))

    return _compare(
        "LoRA step, 2 rows",
        ("tower in every step", again),
        ("features at hand", lambda: loss_of(inputs)),
        repeats * 3,
    )


def supervised_head(repeats: int) -> dict[str, Any]:
    """A LoRA step with logits for every position, and for the trained ones only."""
    _, inputs, loss_of = _lora_step()
    return _compare(
        "LoRA step, 2 rows",
        ("logits everywhere", lambda: loss_of(inputs, everywhere=True)),
        ("where they are needed", lambda: loss_of(inputs)),
        repeats * 3,
    )


def patch_embedding(repeats: int) -> dict[str, Any]:
    """The patch embedding's forward and backward pass as a convolution, and as a product."""
    from mondrian_ft.model.backend import mx, nn

    tower = _base().model.vision_tower
    tower.unfreeze()
    patches = _array(_patches(8)).reshape(-1, 1536)
    embed = tower.patch_embed

    def convolution(module: Any) -> mx.array:
        return (module(patches) ** 2).sum()

    def product(module: Any) -> mx.array:
        weight = module.proj.weight
        kernel = weight.transpose(0, 4, 1, 2, 3).reshape(weight.shape[0], -1)
        return ((patches @ kernel.T + module.proj.bias) ** 2).sum()

    def gradient(function: Callable[[Any], mx.array]) -> Callable[[], object]:
        both = nn.value_and_grad(embed, function)
        return lambda: mx.eval(both(embed))

    assert mx.allclose(convolution(embed), product(embed), rtol=1e-4).item()
    return _compare(
        "patch embedding, 8 pictures",
        ("convolution", gradient(convolution)),
        ("product", gradient(product)),
        repeats,
    )


def openblas(repeats: int) -> dict[str, Any]:
    """A float32 product of 1024³ on MLX's own BLAS and on OpenBLAS, each in its own process."""
    import sys

    from .training_step import ROOT, environment

    work = (
        "{before}import mlx.core as mx, time\n"
        "a = mx.random.normal((1024, 1024)); mx.eval(a, a @ a)\n"
        "t = time.perf_counter()\n"
        "for _ in range({times}): mx.eval(a @ a)\n"
        "print((time.perf_counter() - t) / {times})"
    )

    def seconds(before: str, times: int) -> float:
        code = work.format(before=before, times=times)
        env = {**environment(), "PYTHONPATH": str(ROOT)}
        done = measure.process([sys.executable, "-c", code], cwd=ROOT, env=env)
        return float(done.output.split()[-1])

    ours = "import mondrian_ft.model.backend\n"
    plain = measure.spread([seconds("", 2) for _ in range(repeats)], 4)
    fast = measure.spread([seconds(ours, 20) for _ in range(repeats)], 4)
    return _entry("1024³ product", {"MLX's own BLAS": plain, "OpenBLAS": fast})


ENTRIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "openblas": openblas,
    "batched_decode": batched_decode,
    "features_once": features_once,
    "supervised_head": supervised_head,
    "patch_embedding": patch_embedding,
}


def _base() -> Any:
    from mondrian_ft.model.base import load_base
    from mondrian_ft.sample import model_dir

    return load_base(model_dir())


def _patches(pictures: int) -> np.ndarray:
    noise = np.random.default_rng(0)
    return noise.standard_normal((pictures, GRID[1] * GRID[2], 1536)).astype(np.float32)


def _array(values: np.ndarray) -> Any:
    from mondrian_ft.model.backend import mx

    return mx.array(values)


def _with(inputs: Any, features: Any, deepstack: Any) -> Any:
    from dataclasses import replace

    flat = tuple(level.reshape(-1, level.shape[-1]) for level in deepstack)
    return replace(inputs, features=features.reshape(-1, features.shape[-1]), deepstack=flat)


def _lora_step() -> tuple[Any, Any, Callable[..., object]]:
    """The sample model with rank-16 LoRA: its backbone, one batch, and loss with gradient."""
    from mondrian_ft.model import lora
    from mondrian_ft.model.backend import mx, nn
    from mondrian_ft.model.qwen3_vl import assemble

    from .training_step import TARGETS

    base = _base()
    backbone = base.backbone
    lora.attach(base.model, lora.LoraSpec(16, 32.0, 0.0, TARGETS, "lora"), seed=0)
    base.model.train()
    noise = np.random.default_rng(0)
    tokens = noise.integers(300, 1000, (ROWS, LENGTH)).astype(np.int32)
    tokens[:, 4 : 4 + GRID[1] * GRID[2] // 4] = backbone.image_token
    features = backbone.encode(_patches(ROWS), GRID)
    mx.eval([[one.features, *one.deepstack] for one in features])
    inputs, _ = assemble(
        tokens,
        [LENGTH] * ROWS,
        features,
        [GRID] * ROWS,
        image_token=backbone.image_token,
        merge=backbone.merge,
    )
    trained = np.zeros((ROWS, LENGTH), bool)
    trained[:, -SUPERVISED - 1 : -1] = True
    where = mx.array(np.flatnonzero(trained).astype(np.int32))
    wanted = mx.array(np.roll(tokens, -1, axis=1).reshape(-1))

    def loss_of(inputs: Any, *, everywhere: bool = False) -> None:
        def loss(_: Any) -> mx.array:
            h = backbone.hidden(inputs).reshape(ROWS * LENGTH, -1)
            if everywhere:
                losses = nn.losses.cross_entropy(backbone.head(h), wanted)
                return losses[where].sum()
            return nn.losses.cross_entropy(backbone.head(h[where]), wanted[where]).sum()

        mx.eval(nn.value_and_grad(base.model, loss)(base.model))

    return backbone, inputs, loss_of


def _compare(
    what: str,
    plain: tuple[str, Callable[[], object]],
    chosen: tuple[str, Callable[[], object]],
    repeats: int,
) -> dict[str, Any]:
    """Medians of a plain way and the chosen way of doing the same."""
    figures = {}
    for label, work in (plain, chosen):
        figures[label] = {"median": round(measure.seconds_of(work, repeats=repeats), 4)}
    return _entry(what, figures)


def _entry(what: str, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    (slow_label, slow), (fast_label, fast) = figures.items()
    ratio = round(slow["median"] / fast["median"], 2)
    print(
        f"{what}: {slow_label} {slow['median']:.3f} s, {fast_label} {fast['median']:.3f} s, "
        f"ratio {ratio}x"
    )
    return {"what": what, "seconds": figures, "ratio": ratio}
