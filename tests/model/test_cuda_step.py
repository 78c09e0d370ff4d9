"""The step in kernels of our own: what leads to them everywhere, and they themselves on CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mondrian_ft.model import cuda_step
from mondrian_ft.model.backend import ON_CPU, mx, nn
from mondrian_ft.model.cuda_step import Matrices
from mondrian_ft.model.cuda_step import cuda_step as step_of

on_cuda = pytest.mark.skipif(ON_CPU or not mx.cuda.is_available(), reason="needs a CUDA device")


def plain_product(x: Any, matrices: Any, *, before: Any = None, paired: bool = False) -> Any:
    """What `cuda_step.product` says it does."""
    parts = [x @ one.T for one in matrices.weights]
    if matrices.a is not None:
        room = matrices.a.shape[0] // 2
        rank = matrices.b.shape[0]
        first = matrices.a[:room].astype(mx.float32) + matrices.a[room:].astype(mx.float32)
        start = 0
        for number, weight in enumerate(matrices.weights):
            z = x.astype(mx.float32) @ first[number * rank : (number + 1) * rank].T
            added = z @ matrices.b[:, start : start + weight.shape[0]]
            parts[number] = parts[number] + added.astype(x.dtype)
            start += weight.shape[0]
    if paired:
        return nn.silu(parts[0]) * parts[1]
    out = mx.concatenate(parts, axis=-1)
    return out if before is None else before + out


def plain_attention(qkv: Any, norms: Any, rotary: Any, old: Any, new: Any, places: Any) -> Any:
    """What `cuda_step.attention` says it does, row by row."""
    rows, heads, _, size = new[0].shape
    lengths, width, start, column = (np.array(one) for one in places)
    parts = qkv.reshape(rows, -1, size)
    groups = parts.shape[1] // heads - 2
    cos, sin = rotary[0][:, None], rotary[1][:, None]

    def turned(x: Any) -> Any:
        half = size // 2
        return x * cos + mx.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin

    q = turned(norms[0](parts[:, : heads * groups])).reshape(rows, heads, groups, size)
    k = turned(norms[1](parts[:, heads * groups : -heads]))
    v = parts[:, -heads:]
    now = int(column[0] - start[0])
    keys, values = mx.array(new[0]), mx.array(new[1])
    keys[:, :, now], values[:, :, now] = k, v
    found = []
    for row in range(rows):
        chosen = [*range(int(lengths[row])), *range(int(width[0]), int(start[0]))]
        index = mx.array(np.array(chosen, np.int32))
        ks = mx.concatenate([old[0][row][:, index], keys[row][:, : now + 1]], axis=1)
        vs = mx.concatenate([old[1][row][:, index], values[row][:, : now + 1]], axis=1)
        weights = mx.softmax(q[row] @ ks.swapaxes(-1, -2) * size**-0.5, axis=-1, precise=True)
        found.append((weights @ vs).reshape(-1))
    return mx.stack(found), keys, values


def test_there_is_none_without_cuda(base) -> None:
    """Elsewhere MLX's operations take the steps."""
    if not mx.cuda.is_available():
        assert step_of(base.backbone) is None


@pytest.mark.skipif(not ON_CPU, reason="its plain operations look at arrays, which tracing forbids")
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj", "up_proj", "down_proj"), None])
def test_the_step_is_the_models(lab, base, monkeypatch, targets) -> None:
    """With plain operations in the kernels' place, every token is that of the modules."""
    from mondrian_ft.evaluation import generate as module
    from mondrian_ft.evaluation.generate import Request
    from mondrian_ft.model import decode
    from mondrian_ft.model.features import FeatureStore

    if targets is None:
        lab.attach(base)
    elif targets:
        lab.attach(base, targets=targets, rank=5)
    examples = lab.examples(4, base=base)
    pictures = FeatureStore(base.backbone).get([(e.row.image_sha256, e.pixels) for e in examples])
    some = [
        Request(base.prompt_tokens("?" * n, e.pixels.tokens), picture, e.pixels.grid)
        for n, (e, picture) in enumerate(zip(examples, pictures, strict=True))
    ]
    prompts = module.read_prompts(base, some)

    def tokens(block: int) -> list[list[int]]:
        steps = decode.Steps(base.backbone)
        decoding = decode.Decoding(steps, prompts, capacity=25, block=block)
        return module._decode(base, decoding, 25, None)[0]

    expected = tokens(0)
    monkeypatch.setattr(cuda_step, "product", plain_product)
    monkeypatch.setattr(cuda_step, "attention", plain_attention)
    monkeypatch.setattr(decode, "cuda_step", cuda_step.CudaStep)
    taken: list[int] = []
    plain = cuda_step.CudaStep.logits
    monkeypatch.setattr(cuda_step.CudaStep, "logits", lambda *a: taken.append(1) or plain(*a))
    assert tokens(6) == expected
    assert len(taken) == 24


def test_an_adapter_keeps_its_bits(lab, base) -> None:
    """Two bfloat16 numbers hold 16 bits of a float32; the scale is in the second matrix."""
    from mondrian_ft.model.lora import lora_layers

    lab.attach(base, rank=5)
    found = lora_layers(base.model)
    prefix = "language_model.model.layers.0.self_attn."
    layers = [found[f"{prefix}{name}_proj"] for name in "qkv"]
    matrices = cuda_step._matrices(*layers)
    assert matrices.a is not None
    assert matrices.b is not None
    room = matrices.a.shape[0] // 2
    assert room == 16
    a = np.array(matrices.a.astype(mx.float32))
    for number, layer in enumerate(layers):
        own = np.array(layer.lora_a).T
        rows = slice(number * 5, number * 5 + 5)
        assert np.abs(a[:room][rows] + a[room:][rows] - own).max() < np.abs(own).max() * 2**-16
    wanted = np.concatenate([np.array(one.scale * one.lora_b) for one in layers], axis=1)
    assert np.array_equal(np.array(matrices.b), wanted)
    assert not a[15:16].any()


def _model(**changes: Any) -> Any:
    """A backbone as far as `_fits` looks, in bfloat16."""

    def linear(rows: int, inner: int) -> Any:
        one = nn.Linear(inner, rows, bias=False)
        one.set_dtype(mx.bfloat16)
        return one

    norm = SimpleNamespace(eps=1e-6, weight=mx.ones((128,), mx.bfloat16))
    attn = SimpleNamespace(n_heads=2, n_kv_heads=1, head_dim=128, q_norm=norm, k_norm=norm)
    for name, sizes in {"q": (256, 64), "k": (128, 64), "v": (128, 64), "o": (64, 256)}.items():
        setattr(attn, f"{name}_proj", linear(*sizes))
    mlp = SimpleNamespace(
        gate_proj=linear(96, 64), up_proj=linear(96, 64), down_proj=linear(64, 96)
    )
    for name, value in changes.items():
        setattr(attn, name, value)
    layer = SimpleNamespace(
        self_attn=attn, mlp=mlp, input_layernorm=norm, post_attention_layernorm=norm
    )
    args = SimpleNamespace(tie_word_embeddings=False)
    return SimpleNamespace(
        text=SimpleNamespace(layers=[layer], embed_tokens=linear(320, 64), norm=norm),
        model=SimpleNamespace(language_model=SimpleNamespace(args=args, lm_head=linear(320, 64))),
    )


def test_only_models_that_the_kernels_take() -> None:
    """Everything else goes through MLX's operations, not into a wrong answer."""
    from mlx_vlm.trainer.peft.dora_layers import DoRALinear
    from mlx_vlm.trainer.peft.lora_layers import LoRALinear

    from mondrian_ft.model.lora import _dora_layer
    from mondrian_ft.model.lora_layers import LoRALayer

    assert cuda_step._fits(_model())
    attn = _model().text.layers[0].self_attn
    assert cuda_step._fits(_model(q_proj=LoRALayer.from_base(attn.q_proj, r=4)))
    assert cuda_step._fits(_model(q_proj=LoRALinear.from_base(attn.q_proj, r=4)))
    wide = nn.Linear(64, 256, bias=False)
    biased = nn.Linear(64, 256)
    biased.set_dtype(mx.bfloat16)
    odd = nn.Linear(64, 264, bias=False)
    odd.set_dtype(mx.bfloat16)
    for changed in (
        {"q_proj": wide},
        {"q_proj": biased},
        {"q_proj": odd},
        {"q_proj": nn.QuantizedLinear.from_linear(wide)},
        {"q_proj": DoRALinear.from_base(attn.q_proj, r=4)},
        {"q_proj": _dora_layer().from_base(attn.q_proj, r=4, dropout=0.0, scale=2.0)},
        {"head_dim": 64},
        {"n_heads": 9},
        {"k_norm": SimpleNamespace(eps=1e-5, weight=mx.ones((128,), mx.bfloat16))},
        {"k_norm": SimpleNamespace(eps=1e-6, weight=mx.ones((128,)))},
    ):
        assert not cuda_step._fits(_model(**changed)), changed


def _close(found: Any, wanted: Any, bound: float = 0.01) -> None:
    found, wanted = (np.array(one.astype(mx.float32)) for one in (found, wanted))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


def _normal(*shape: int) -> Any:
    return mx.random.normal(shape).astype(mx.bfloat16)


@on_cuda
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16, 20])
@pytest.mark.parametrize("rank", [0, 5, 16])
def test_products_on_cuda(rows, rank) -> None:
    """Any number of rows, with what follows a product, with an adapter and without."""
    mx.random.seed(0)
    inner = 416
    x = _normal(rows, inner)
    sizes = (96, 32, 64)
    weights = tuple(0.1 * _normal(size, inner) for size in sizes)
    a = b = None
    if rank:
        a = mx.pad(0.1 * _normal(3 * rank, inner), [(0, -3 * rank % 16), (0, 0)])
        a = mx.concatenate([a, a * 0.002])
        b = mx.random.normal((rank, sum(sizes)))
    matrices = Matrices(weights, a, b)
    before = _normal(rows, sum(sizes))
    _close(cuda_step.product(x, matrices), plain_product(x, matrices))
    _close(cuda_step.product(x, matrices, before=before), plain_product(x, matrices, before=before))
    pair = (weights[0], 0.1 * _normal(96, inner))
    if rank:
        a = mx.pad(0.1 * _normal(2 * rank, inner), [(0, -2 * rank % 16), (0, 0)])
        a, b = mx.concatenate([a, a * 0.002]), mx.random.normal((rank, 192))
    matrices = Matrices(pair, a, b)
    _close(cuda_step.product(x, matrices, paired=True), plain_product(x, matrices, paired=True))


@on_cuda
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize(("start", "column"), [(40, 40), (40, 47), (56, 58), (56, 63)])
def test_attention_on_cuda(groups, start, column) -> None:
    """Unequal prompts, with old columns after them and without, at both ends of a block."""
    mx.random.seed(0)
    heads, size, rows, block = 2, 128, 3, 8
    norms = (nn.RMSNorm(size, eps=1e-6), nn.RMSNorm(size, eps=1e-6))
    for norm in norms:
        norm.weight = 1 + 0.1 * _normal(size)
    angle = mx.random.normal((rows, size // 2))
    angle = mx.concatenate([angle, angle], axis=-1)
    rotary = (mx.cos(angle).astype(mx.bfloat16), mx.sin(angle).astype(mx.bfloat16))
    lengths = mx.array([40, 1, 23], mx.int32)
    places = (lengths, *(mx.array([one], mx.int32) for one in (40, start, column)))
    old = (_normal(rows, heads, 72, size), _normal(rows, heads, 72, size))
    new = (_normal(rows, heads, block, size), _normal(rows, heads, block, size))
    qkv = _normal(rows, (groups + 2) * heads * size)
    found = cuda_step.attention(qkv, norms, rotary, old, new, places)
    wanted = plain_attention(qkv, norms, rotary, old, new, places)
    _close(found[0], wanted[0], 0.02)
    done = column - start + 1
    for one, other in zip(found[1:], wanted[1:], strict=True):
        _close(one[:, :, :done], other[:, :, :done])
