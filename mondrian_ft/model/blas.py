"""A fast BLAS for MLX's Linux CPU backend.

The Linux CPU wheel of MLX links the reference BLAS. An OpenBLAS that is loaded with global symbol
visibility before ``mlx.core`` is imported takes its place, because the dynamic linker resolves
``sgemm_`` to the first library that offers it. Measured on 2 cores: a 1024³ float32 product went
from 2.5 to 203 GFLOP/s.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def load_openblas() -> str | None:
    """Load an OpenBLAS with global symbols, once, before MLX.

    Looks in the opencv-python wheel (mlx-vlm depends on it), then among the system's libraries.

    Returns:
        The library's path or name, or None where there is nothing to do (macOS, where MLX uses
        Accelerate) or none was found. A caller that cares says so: see :func:`backend.describe`.
    """
    if sys.platform != "linux":
        return None
    for library in _candidates():
        try:
            for needed in _beside(library):
                ctypes.CDLL(needed, mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue  # an unusable candidate: the next one, or none, which is reported
        return library
    return None


def _candidates() -> list[str]:
    found: list[str] = []
    spec = importlib.util.find_spec("cv2")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent.parent / "opencv_python.libs"
        found += sorted(str(path) for path in bundled.glob("libopenblas*.so*"))
    system = ctypes.util.find_library("openblas")
    return found + ([system] if system else [])


def _beside(library: str) -> list[str]:
    """Fortran runtimes that a bundled OpenBLAS needs and that lie beside it, in loading order."""
    folder = Path(library).parent
    if not folder.is_absolute():
        return []
    patterns = ("libquadmath*.so*", "libgfortran*.so*")
    return [str(path) for pattern in patterns for path in sorted(folder.glob(pattern))]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """OpenBLAS uses so many threads within the block; nothing happens where it is not loaded."""
    from .backend import OPENBLAS

    if OPENBLAS is None:
        yield
        return
    found = ctypes.CDLL(OPENBLAS)
    before = found.openblas_get_num_threads()
    found.openblas_set_num_threads(min(count, before))
    try:
        yield
    finally:
        found.openblas_set_num_threads(before)
