"""Adapters for other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import atomic_write_bytes, atomic_write_json
from . import layouts
from .adapter import CONFIG, WEIGHTS, Adapter


def export_mlx(adapter: Adapter, folder: Path) -> Path:
    """Write an adapter in mlx-vlm's layout, for ``mlx_vlm.generate --adapter-path``."""
    atomic_write_json(
        folder / "adapter_config.json", layouts.mlx_config(adapter.spec, adapter.tensors)
    )
    from safetensors.numpy import save as to_bytes

    # Contiguous: the writer takes the memory as it lies, whatever the strides say.
    arrays = {name: np.ascontiguousarray(value) for name, value in adapter.tensors.items()}
    atomic_write_bytes(folder / "adapters.safetensors", to_bytes(arrays, {"format": "mlx"}))
    return folder


def export_peft(adapter: Adapter, folder: Path) -> Path:
    """Copy what PEFT needs: ``PeftModel.from_pretrained`` loads the folder as it is."""
    for name in (CONFIG, WEIGHTS):
        atomic_write_bytes(folder / name, (adapter.folder / name).read_bytes())
    return folder
