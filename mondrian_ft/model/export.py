"""Adapters for other programs, and reading back what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import atomic_write_bytes, atomic_write_json
from . import foreign, imports, layouts, lora
from .adapter import CONFIG, WEIGHTS, Adapter
from .agreement import probe_logits
from .backend import mx
from .base import Base, load_base


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


def logits_of_mlx(folder: Path, base: Base) -> dict[str, np.ndarray]:
    """Probe logits of a base with an adapter that mlx-vlm's own loader puts in from a folder."""
    from mlx_vlm.trainer.peft.utils import apply_lora_layers

    try:
        apply_lora_layers(base.model, folder)
        mx.eval(base.model.parameters())  # read now: a moment later the folder has another name
        return probe_logits(base)
    finally:
        lora.detach(base.model)


def logits_of_peft(folder: Path, base: Base) -> dict[str, np.ndarray]:
    """Probe logits of a base with an adapter that is read from a PEFT folder as a foreign one."""
    foreign.attach(base, imports.read_foreign(folder))
    try:
        return probe_logits(base)
    finally:
        lora.detach(base.model)


def logits_of_model(folder: Path, dtype: str) -> dict[str, np.ndarray]:
    """Probe logits of the model in a folder, loaded afresh with weights of this type."""
    return probe_logits(load_base(folder, name=folder.name, dtype=dtype))
