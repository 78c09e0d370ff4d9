"""The one door to MLX: OpenBLAS first, then ``mlx.core``, set up for the device that is there.

Every module of this package that computes imports ``mx`` and ``nn`` from here, so that no import
order can leave a process on the slow BLAS.
"""

from __future__ import annotations

import os
import sys

from .blas import load_openblas

# Symbols are resolved when MLX is loaded: a program that imported it before us keeps its own BLAS.
OPENBLAS = None if "mlx.core" in sys.modules else load_openblas()

import mlx.core as mx  # noqa: E402  (OpenBLAS has to come first)
import mlx.nn as nn  # noqa: E402

ON_CPU = mx.default_device().type == mx.DeviceType.cpu

if ON_CPU:
    # On CPU every compiled graph is built by a C++ compiler at run time: 7–18 s before the first
    # step, needs a toolchain, and gains nothing.
    mx.disable_compile()


OPERATIONS, MEGABYTES = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
"""MLX's variables for what ends a graph of kernels."""


def size_graphs(*, small: bool) -> None:
    """How many kernels CUDA runs as one graph; to be called before anything is computed.

    A large graph starts faster and holds all its temporary arrays until it has run; up to ten are
    under way. A training step of two rows of Qwen3-VL-4B takes 0.20 s and 39 GB with graphs of 1
    GB, no less with graphs of 4 GB and 65 GB; with checkpointing and graphs of 100 MB 0.30 s and
    11.8 GB (benchmarks/LOG.md). What the environment says goes first. Does nothing on other
    devices.
    """
    if ON_CPU or mx.metal.is_available():
        return
    operations, megabytes = graphs(small=small)
    os.environ.setdefault(OPERATIONS, str(operations))
    os.environ.setdefault(MEGABYTES, str(megabytes))


def graphs(*, small: bool) -> tuple[int, int]:
    """Operations and megabytes that end a graph of kernels, where the environment says nothing."""
    return (100, 100) if small else (200, 1000)


def describe() -> str:
    """The backend in a few words, for run records and the closing screen."""
    if mx.metal.is_available():
        return "Metal"
    if not ON_CPU:
        return "CUDA"
    if sys.platform == "darwin" or OPENBLAS:
        return "CPU with Accelerate" if sys.platform == "darwin" else "CPU with OpenBLAS"
    return "CPU with MLX's own BLAS (slow; install OpenBLAS, and import mondrian_ft before mlx)"


def default_dtype() -> mx.Dtype:
    """float32 on CPU, where half precision is some 20 times slower; bfloat16 on a GPU."""
    return mx.float32 if ON_CPU else mx.bfloat16


def number(value: mx.array) -> float:
    """A one-element array as a Python float; waits for the device."""
    return float(value.item())  # pyright: ignore[reportArgumentType]  (its type admits complex)


__all__ = [
    "ON_CPU",
    "OPENBLAS",
    "default_dtype",
    "describe",
    "mx",
    "nn",
    "number",
    "size_graphs",
]
