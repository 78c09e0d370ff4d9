"""Text and picture processors of a model folder, and an untrained model from its config."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

# transformers announces on import that torch is missing; it is missing on purpose.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@cache
def image_processor(folder: Path) -> Any:
    """The folder's Qwen3-VL image processor (numpy and Pillow, no torch)."""
    from mlx_vlm.models.qwen3_vl.processing_qwen3_vl import (
        Qwen3VLImageProcessor,
        _qwen_vl_image_kwargs,
    )

    return Qwen3VLImageProcessor(**_qwen_vl_image_kwargs(folder))


def build_model(folder: Path) -> Any:
    """An mlx-vlm Qwen3-VL with the folder's config and fresh weights, for training from nothing."""
    from .backend import mx  # noqa: F401  (sets the backend up before mlx-vlm imports MLX)

    from mlx_vlm.models import qwen3_vl

    settings = json.loads((folder / "config.json").read_text())
    config = qwen3_vl.ModelConfig.from_dict(settings)
    return qwen3_vl.Model(config)
