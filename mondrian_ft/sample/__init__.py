"""The embedded default: rendered photographs, a sample job database, a tiny trained base model."""

from __future__ import annotations

from pathlib import Path

from .database import SampleData, sample_data

__all__ = ["MODEL_NAME", "SampleData", "model_dir", "sample_data"]

MODEL_NAME = "mondrian_ft sample model"
"""What records call the sample base model."""


def model_dir() -> Path:
    """The sample base model's folder (a Qwen3-VL in miniature, float32), inside the package."""
    return Path(__file__).resolve().parent / "weights"
