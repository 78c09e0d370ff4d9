"""``python -m benchmarks [ENTRY …] [--repeats N]``.

``python -m benchmarks decode --shapes 4b --out FILE`` measures decoding with random weights in the
shapes of Qwen3-VL-4B, on a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from datetime import date
from pathlib import Path

# Imports what each entry needs when it runs; the training step measures processes of their own.
from . import (
    curves,
    decode,
    epoch_cost,
    large_database,
    main_job,
    measure,
    memory_fit,
    pieces,
    service,
    similar,
    sweeps,
    tracking,
    training_step,
)

ENTRIES = {
    "training_step": training_step.run,
    "first_update": training_step.first_update,
    "epoch_cost": epoch_cost.run,
    "main_job": main_job.run,
    "sweep_overhead": sweeps.overhead,
    "composing": sweeps.composing,
    "search_curves": curves.run,
    "search": sweeps.search,
    **pieces.ENTRIES,
    "tracking": tracking.run,
    "memory_fit": memory_fit.run,
    "decode": decode.sample,
    "service": service.run,
    "similar": similar.run,
    "large_database": large_database.run,
}
ON_REQUEST = ("large_database", "search_curves")
"""Measured only where they are named: half an hour and 6 GB of disk."""


def main() -> None:
    """Measure the entries asked for, print them, and record them for this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=f"of {', '.join(ENTRIES)}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--dry", action="store_true", help="print only, record nothing")
    shapes = parser.add_argument_group("decode, random weights")
    shapes.add_argument("--shapes", choices=["sample", "4b"], default="sample")
    shapes.add_argument("--out", type=Path, help="JSON file of its figures")
    for item in fields(decode.Shapes):
        shapes.add_argument(f"--{item.name}", type=int, default=item.default)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.entries if name not in ENTRIES]
    if unknown:
        parser.error(f"no entry is named {unknown[0]}; there are {', '.join(ENTRIES)}")
    if arguments.repeats < 1:
        parser.error("--repeats is 1 or more")
    if arguments.shapes == "4b":
        if arguments.entries != ["decode"]:
            parser.error("--shapes 4b belongs to the entry decode alone")
        sizes = {item.name: getattr(arguments, item.name) for item in fields(decode.Shapes)}
        decode.random_4b(decode.Shapes(**sizes), arguments.out)
        return
    for name in arguments.entries or [n for n in ENTRIES if n not in ON_REQUEST]:
        entry = ENTRIES[name](arguments.repeats)
        if arguments.dry:
            print(json.dumps(entry, indent=2))
        else:
            command = f"python -m benchmarks {name} --repeats {arguments.repeats}"
            entry = {"measured": date.today().isoformat(), "command": command, **entry}
            print(f"recorded in {measure.record(name, entry).relative_to(training_step.ROOT)}\n")


if __name__ == "__main__":
    main()
