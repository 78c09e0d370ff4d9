"""Repeated measurements, the machine's neutral name, and the file of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Finished:
    """A process that ended well: wall time in seconds, peak resident memory in GB, its output, and
    the seconds of all cores together."""

    seconds: float
    memory: float
    output: str
    cpu: float = 0.0


def process(argv: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> Finished:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message ends with the last it printed.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        list(argv), cwd=cwd, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    with child.stdout as pipe:
        output = pipe.read().decode(errors="replace")
    # wait4 and not wait: it tells the memory of this one child.
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {child.returncode}:\n{output[-3000:]}")
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return Finished(seconds, usage.ru_maxrss * unit / 1e9, output, cpu)


def seconds_of(work: Callable[[], object], *, repeats: int = 5) -> float:
    """Median wall time of a call, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def machine() -> str:
    """What the figures depend on, and no more: system, processor family, cores, GPU backend."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = "" if _installed("mlx-cuda-13") is None else "-cuda"
    return f"{platform.system()}-{platform.machine()}-{cores}-cores{gpu}".lower()


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("mlx", "mlx-cpu", "mlx-cuda-13", "mlx-vlm", "mlx-lm", "transformers", "numpy")
    found = {name: _installed(name) for name in names}
    return {"python": platform.python_version()} | {k: v for k, v in found.items() if v}


def record(name: str, entry: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Put one entry into this machine's file of results; other entries stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine()}.json"
    results: dict[str, Any] = {"machine": machine(), "entries": {}}
    if path.is_file():
        results = json.loads(path.read_text())
    results["entries"][name] = {"versions": versions(), **entry}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(path)
    return path


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
