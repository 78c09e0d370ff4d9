"""What the registry takes with as many versions, and as many names, as a large installation has.

    python -m benchmarks.many_versions [VERSIONS [NAMES]]

The adapters are the smallest that the registry takes (a few hundred bytes), so that its own work is
timed: a version's bytes are copied and hashed besides, at the disk's speed. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mondrian_ft import registry
from tests.registry import made


def run(count: int = 500, names: int = 100) -> dict[str, Any]:
    """Seconds of each command with ``count`` versions of one name, and with ``names`` names.

    Returns:
        The mean of the first and of the last 20 registrations, the least of three of what reads.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "registry"
        taken = []
        for seed in range(count):
            adapter = made.adapter(Path(folder) / f"adapter{seed}", seed)
            start = time.perf_counter()
            registry.register(root, made.NAME, adapter, facts={})
            taken.append(time.perf_counter() - start)
        for number in range(names):
            adapter = made.adapter(Path(folder) / f"other{number}", number)
            registry.register(root, f"sample-advisor{number}", adapter, facts={})
        last = f"v{count}"
        return {
            "versions": count,
            "names": names,
            "register_first": sum(taken[:20]) / 20,
            "register_last": sum(taken[-20:]) / 20,
            "list_versions": _least(lambda: registry.versions(root, made.NAME)),
            "resolve_last": _least(lambda: registry.resolve(root, made.NAME, last)),
            "resolve_one_of_the_names": _least(
                lambda: registry.resolve(root, f"sample-advisor{names - 1}", "v1")
            ),
        }


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    print(json.dumps(run(*map(int, sys.argv[1:])), indent=2))
