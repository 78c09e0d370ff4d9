"""The embedded default: rendered photographs, a sample job database, a tiny trained base model."""

from __future__ import annotations

from pathlib import Path

from .database import SampleData, sample_data

__all__ = ["SampleData", "model_dir", "sample_data"]


def model_dir() -> Path:
    """The sample base model's folder (a Qwen3-VL in miniature, float32), inside the package."""
    return Path(__file__).resolve().parent / "weights"
