"""The torch side of ``training_4b``: transformers + PEFT, Liger and ``torch.compile`` as asked.

Imports no MLX: both would reserve the GPU's memory.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np


def run(
    tokens: np.ndarray,
    shapes: dict[str, int],
    steps: int,
    *,
    liger: bool = False,
    compiled: bool = False,
    checkpoint: bool = False,
) -> dict[str, Any]:
    """Seconds of a step and peak memory in bfloat16, LoRA of rank 16 on the seven projections."""
    import torch  # pyright: ignore[reportMissingImports]

    from .training_step import TARGETS

    model = _model(shapes, liger=liger)
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    pattern = r".*language_model\.layers\.\d+\..*\.(" + "|".join(TARGETS) + ")"
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=pattern)
    )
    if checkpoint:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        for layer in model.base_model.model.model.language_model.layers:
            layer.compile()
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    ids = torch.tensor(tokens.astype(np.int64), device="cuda")
    labels = torch.full_like(ids, -100)
    labels[:, -shapes["trained"] :] = ids[:, -shapes["trained"] :]
    rows = len(tokens)
    patches = np.random.default_rng(0).standard_normal((shapes["side"] ** 2, 1536), np.float32)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.tensor(np.concatenate([patches] * rows), device="cuda").bfloat16(),
        "image_grid_thw": torch.tensor([[1, shapes["side"], shapes["side"]]] * rows).cuda(),
        "mm_token_type_ids": (ids == 151_655).int(),
    }

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    started = time.perf_counter()
    losses = [step()]
    first = time.perf_counter() - started
    losses += [step() for _ in range(3)]
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return {
        "seconds": {
            "median": round(statistics.median(taken), 4),
            "min": round(min(taken), 4),
            "max": round(max(taken), 4),
        },
        "first_step_seconds": round(first, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "losses": [round(one, 3) for one in losses[:4]],
    }


def _model(shapes: dict[str, int], *, liger: bool) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from . import decode

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_vl  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_qwen3_vl()
    raw = decode._config(decode.Shapes(layers=shapes["layers"], hidden=shapes["hidden"]))
    text = raw["text_config"]
    text["rope_parameters"] = {
        **text.pop("rope_scaling"),
        "rope_theta": text.pop("rope_theta"),
    }
    torch.manual_seed(0)
    config = Qwen3VLConfig(**raw)
    config._attn_implementation = "sdpa"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    # The sample's answer is trained, the base is not.
    model.config.use_cache = False
    return model
