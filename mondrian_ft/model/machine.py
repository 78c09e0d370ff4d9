"""How much memory and how many cores there are to compute with."""

from __future__ import annotations

import os
from pathlib import Path

from .backend import mx

_CGROUPS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where Linux says what a container may use, in its two versions."""

AT_ONCE = 4
"""Rows that a CPU computes side by side at most: each holds what its backward pass needs."""
SUMMED_BYTES = 256 << 20
"""Memory that the sums of base and adapter may take on a CPU, see ``lora_layers.summed``."""
RESTS_FROM = 100_000_000
"""Bytes of a vision tower that are worth giving back while it is not needed."""


def cores() -> int:
    """Cores that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found or 1


def memory_kind() -> str:
    """``Metal``, ``CUDA`` or ``CPU``: what spends memory in its own way."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def memory_limit() -> tuple[int, str] | None:
    """Bytes that training can use, and what that is; None where the device does not say.

    Metal's recommended working set, a GPU's memory, or the RAM that this process may have.
    """
    kind = memory_kind()
    if kind == "CPU":
        return _ram()
    facts = mx.device_info()
    for key, words in (
        ("max_recommended_working_set_size", "the working set that Metal recommends"),
        ("total_memory", "the GPU's memory"),
        ("memory_size", "the device's memory"),
    ):
        if key in facts:
            return int(facts[key]), words
    return None


def _ram(files: tuple[Path, ...] = _CGROUPS) -> tuple[int, str]:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in files:
        try:
            allowed = int(file.read_text())
        except (OSError, ValueError):  # no such version, or "max"
            continue
        if allowed < ram:
            return allowed, "what this container may use"
    return ram, "this machine's RAM"
