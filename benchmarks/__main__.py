"""``python -m benchmarks [ENTRY …] [--repeats N]``."""

from __future__ import annotations

import argparse
from datetime import date

# Imports what each entry needs when it runs; the training step measures processes of their own.
from . import large_database, measure, pieces, similar, training_step

ENTRIES = {
    "training_step": training_step.run,
    **pieces.ENTRIES,
    "similar": similar.run,
    "large_database": large_database.run,
}
ON_REQUEST = ("large_database",)
"""Measured only where they are named: half an hour and 6 GB of disk."""


def main() -> None:
    """Measure the entries asked for, print them, and record them for this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=f"of {', '.join(ENTRIES)}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--dry", action="store_true", help="print only, record nothing")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.entries if name not in ENTRIES]
    if unknown:
        parser.error(f"no entry is named {unknown[0]}; there are {', '.join(ENTRIES)}")
    if arguments.repeats < 1:
        parser.error("--repeats is 1 or more")
    for name in arguments.entries or [n for n in ENTRIES if n not in ON_REQUEST]:
        entry = ENTRIES[name](arguments.repeats)
        if not arguments.dry:
            entry = {"measured": date.today().isoformat(), **entry}
            print(f"recorded in {measure.record(name, entry).relative_to(training_step.ROOT)}\n")


if __name__ == "__main__":
    main()
