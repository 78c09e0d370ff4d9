"""Text and picture processors of a model folder, and an untrained model from its config."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from .backend import mx  # noqa: F401  (mlx-vlm imports MLX, and OpenBLAS has to come before it)

# transformers announces on import that torch is missing; it is missing on purpose.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@cache
def image_processor(folder: Path) -> Any:
    """The folder's Qwen3-VL image processor (numpy and Pillow, no torch)."""
    from mlx_vlm.models.qwen3_vl.processing_qwen3_vl import (
        Qwen3VLImageProcessor,
        _qwen_vl_image_kwargs,
    )

    settings: dict[str, Any] = _qwen_vl_image_kwargs(folder)
    return Qwen3VLImageProcessor(**settings)


def build_model(folder: Path) -> Any:
    """An mlx-vlm Qwen3-VL with the folder's config and fresh weights, for training from nothing."""
    from mlx_vlm.models.qwen3_vl.config import ModelConfig
    from mlx_vlm.models.qwen3_vl.qwen3_vl import Model

    settings = json.loads((folder / "config.json").read_text())
    return Model(ModelConfig.from_dict(settings))
