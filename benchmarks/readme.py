"""The README's figures, and the plot and the words of an epoch's cost in ``docs/training.md``.

``python -m benchmarks.readme`` makes them from the files of results; what those do not hold is left
out. They lie in ``benchmarks/results``, one for each kind of machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mondrian_ft.report.plots import Frame, number, ticks

from . import measure

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TRAINING = ROOT / "docs" / "training.md"
PLOT = ROOT / "docs" / "images" / "epoch_cost.svg"
CPU, GPU = "linux-x86_64-2-cores", "nvidia-h200"
BEGIN = "<!-- figures: python -m benchmarks.readme -->"
END = "<!-- end of figures -->"

PARTIES = {
    "ours": "**ours**",
    "checkpointed": "**ours, layers recomputed**",
    "4bit_checkpointed": "**ours, 4-bit base, layers recomputed**",
    "mlx_vlm": "mlx-vlm",
    "torch_liger": "transformers, PEFT, Liger",
    "torch_liger_compiled": "transformers, PEFT, Liger, `torch.compile`",
    "torch_liger_checkpointed": "transformers, PEFT, Liger, checkpointed",
}
"""What to call those who were measured; a name that is not here is told as it is."""

Entries = Mapping[str, Any]


def main() -> None:
    """Write what is made from the results."""
    for path, text in made().items():
        path.write_text(text, encoding="utf-8")


def made() -> dict[Path, str]:
    """What the files that show figures have to hold, by the results there are."""
    found = entries(CPU)
    texts = {
        README: with_figures(
            README.read_text(encoding="utf-8"), [*_cpu(found), *_gpu(entries(GPU))]
        ),
        TRAINING: with_figures(TRAINING.read_text(encoding="utf-8"), _epoch_cost(found)),
    }
    drawn = plot(found)
    return texts | ({} if drawn is None else {PLOT: drawn})


def entries(machine: str) -> Entries:
    """What was measured on a kind of machine; empty without its file."""
    path = measure.RESULTS / f"{machine}.json"
    return json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else {}


def with_figures(text: str, parts: Sequence[str]) -> str:
    """A text with ``parts``, a paragraph each, in place of what stands between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the text lacks the lines {BEGIN!r} and {END!r}")
    inside = "".join(f"\n{part}\n" for part in parts)
    return f"{before}{BEGIN}\n{inside}{inside and chr(10)}{END}{after}"


# --- two cores -------------------------------------------------------------------------------


def _cpu(found: Entries) -> list[str]:
    rows: list[Sequence[str]] = []
    if step := found.get("training_step"):
        rows += _training(step)
    if first := found.get("first_update"):
        rows += [
            (
                f"{name}: start to first update, a second run, s",
                "",
                _two(one["again"]["median"]),
                "",
            )
            for name, one in first["seconds"].items()
        ]
    if decode := found.get("decode"):
        one, many = (decode["seconds"][name]["median"] for name in ("one by one", "batched"))
        rows.append((f"{decode['what']}, s", _two(one), _two(many), _times(one / many)))
    if server := found.get("service", {}).get("mlx_vlm_server", {}).get("one_adapter"):
        theirs, ours = (server[who]["requests_a_second"]["median"] for who in ("theirs", "ours"))
        what = "service with one adapter, 16 clients, requests/s"
        rows.append((what, _two(theirs), _two(ours), _times(server["ours_to_theirs"]["median"])))
    if not rows:
        return []
    used = {found[name]["versions"]["mlx-vlm"] for name in ("training_step",) if name in found}
    theirs = " ".join(["mlx-vlm", *sorted(used)])
    return [
        "**Two CPU cores, sample model, float32, both on OpenBLAS**",
        _table(("", theirs, "ours", "times"), rows),
    ]


def _training(step: Entries) -> Iterable[Sequence[str]]:
    figures, settings = step["figures"], step["settings"]
    epochs = settings.get("epochs", 1)
    what = f"LoRA, {epochs} epoch{'s' if epochs > 1 else ''}, {settings['steps']} updates of "
    what += f"{settings['batch_size']} rows"
    shown = (
        ("process_seconds", f"{what}: the whole process, s"),
        ("step_seconds", "an update, s"),
        ("memory_gb", "most memory, GB"),
    )
    for name, label in shown:
        theirs, ours = (figures[who][name]["median"] for who in ("mlx_vlm", "ours"))
        yield label, _two(theirs), _two(ours), _times(theirs / ours)
    if "validation_loss" in figures["ours"]:
        losses = (figures[who]["validation_loss"]["median"] for who in ("mlx_vlm", "ours"))
        yield "loss on held-out rows afterwards", *(f"{loss:.3f}" for loss in losses), ""


# --- a GPU -----------------------------------------------------------------------------------


def _gpu(found: Entries) -> list[str]:
    parts = []
    if training := found.get("training_4b"):
        parts += _training_4b(training)
    if decoding := found.get("decode_4b"):
        parts.append(_decoding_4b(decoding))
    return parts


def _training_4b(training: Entries) -> list[str]:
    parties = {
        name: one for name, one in training["parties"].items() if "rows_1" in one or "rows_4" in one
    }
    rows = []
    for name in [*(one for one in PARTIES if one in parties), *sorted(parties.keys() - PARTIES)]:
        cells = [PARTIES.get(name, name.replace("_", " "))]
        for size in ("rows_1", "rows_4"):
            one, theirs = (parties.get(who, {}).get(size, {}) for who in (name, "mlx_vlm"))
            cells += [_beside(one, theirs, key) for key in ("seconds", "seconds_queued")]
            cells.append(f"{one['peak_gb']:.1f}" if "peak_gb" in one else "")
        rows.append(cells)
    shapes = training["shapes"]
    images = (shapes["side"] // 2) ** 2
    versions = training["versions"]
    return [
        "**One NVIDIA H200, random weights in the shapes of Qwen3-VL-4B, bfloat16, LoRA of rank 16 "
        f"on seven projections**, rows of {images:,} image and {shapes['text']:,} text tokens, "
        f"{shapes['trained']:,} of them trained; mlx {versions['mlx']}, "
        f"mlx-vlm {versions['mlx-vlm']}",
        _table(("an update", *("1 row, s", "queued", "GB"), *("4 rows, s", "queued", "GB")), rows),
        "In brackets: times as fast as mlx-vlm. Queued: the loss is read when the next step is "
        "queued, as the trainer does; others wait for each step."
        + _larger(parties.get("ours", {}))
        + (f" {training['caveat']}" if "caveat" in training else ""),
    ]


def _larger(ours: Entries) -> str:
    """What to say where ours was measured with larger graphs of kernels than the product has."""
    from mondrian_ft.model import backend

    usual = str(backend.graphs(small=False)[1])
    cases = (one for one in ours.values() if isinstance(one, dict))
    found = {one["graphs"][1] for one in cases if "graphs" in one} - {usual}
    if not found:
        return ""
    return (
        f" Ours without checkpointing had graphs of kernels of {int(found.pop()) / 1000:g} GB; now "
        f"they are of {int(usual) / 1000:g} GB, which takes less memory ([table](docs/memory.md))."
    )


def _beside(ours: Entries, theirs: Entries, key: str) -> str:
    """Seconds, and how many times as fast as mlx-vlm's, which waits for each step where queued ones
    of it were not measured; empty where ours were not."""
    if not ours.get(key):
        return ""
    seconds, beside = ours[key]["median"], theirs.get(key) or theirs.get("seconds")
    if not beside or theirs is ours:
        return f"{seconds:.3f}"
    return f"{seconds:.3f} ({_times(beside['median'] / seconds)})"


def _decoding_4b(decoding: Entries) -> str:
    ours, theirs = decoding["evaluation_ours"], decoding["evaluation_mlx_vlm"]
    return (
        f"Answers there: {ours['photographs']} photographs × "
        f"{ours['tokens'] // ours['photographs'] // ours['arms']} tokens × {ours['arms']} arms in "
        f"{ours['seconds']:.1f} s; one by one by `mlx_vlm.generate` {theirs['seconds_scaled']:.0f} "
        f"s, scaled from {theirs['measured_photographs']} photographs: "
        f"{decoding['evaluation_ratio']:.0f} times."
    )


# --- an epoch ----------------------------------------------------------------------------------


def _epoch_cost(found: Entries) -> list[str]:
    cost = found.get("epoch_cost")
    if cost is None:
        return []
    line, sizes = cost["line"], cost["sizes"]
    least, most = (choose(one["peak_mb"] for one in sizes) for choose in (min, max))
    told = (
        "On two CPU cores, with the sample model, an epoch took "
        f"{line['seconds_a_row'] * 1000:.0f} ms a row from {sizes[0]['rows']:,} to "
        f"{sizes[-1]['rows']:,} rows (R² {line['r_squared']:.4f}, no size more than "
        f"{line['largest_difference']:.0%} off the line), and the process {least} to {most} MB."
    )
    if cost["subsampled"]:
        told += " Of the larger sizes a part of the updates was measured, and taken for all."
    return [told, f"![Seconds of an epoch over its rows](images/{PLOT.name})"]


# --- the plot --------------------------------------------------------------------------------


def plot(found: Entries, *, width: int = 640, height: int = 300) -> str | None:
    """Seconds of an epoch over rows, with the straight line through them, as SVG; None without."""
    cost = found.get("epoch_cost")
    if cost is None:
        return None
    points = [(float(one["rows"]), float(one["epoch_seconds"])) for one in cost["sizes"]]
    line, most = cost["line"], max(rows for rows, _ in points)
    top = 1.1 * max(seconds for _, seconds in points)
    frame = Frame(56, 16, width - 56 - 24, height - 16 - 46, (0, most * 1.05), (0, top))
    right, bottom = frame.left + frame.width, frame.top + frame.height
    memory = [one["peak_mb"] for one in cost["sizes"]]
    told = (
        f"An epoch over its rows: {line['seconds_a_row'] * 1000:.0f} ms a row, "
        f"R² {line['r_squared']:.4f}; memory {min(memory):.0f} to {max(memory):.0f} MB"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{told}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for value in (one for one in ticks(0, top, about=4) if one <= top):
        _, y = frame.at((0, value))
        parts.append(
            f'<line x1="{frame.left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in (one for one in ticks(0, most, about=6) if one <= frame.x[1]):
        x, _ = frame.at((value, 0))
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{number(value)}</text>'
        )
    (x0, y0), (x1, y1) = (
        frame.at((rows, line["seconds_at_0"] + line["seconds_a_row"] * rows)) for rows in (0, most)
    )
    parts.append(
        f'<line x1="{x0:.1f}" x2="{x1:.1f}" y1="{y0:.1f}" y2="{y1:.1f}" stroke="#888" '
        'stroke-dasharray="5 4"/>'
    )
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in map(frame.at, points)]
    parts.append(
        f'<text x="{frame.left + 12}" y="{frame.top + 16}">{told.partition(": ")[2]}</text>'
        f'<text x="{frame.left + frame.width / 2:.1f}" y="{height - 6}" text-anchor="middle">'
        f'rows</text><text x="8" y="{frame.top + 4}">s</text></svg>\n'
    )
    return "\n".join(parts)


# --- words -----------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in lines)


def _two(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×"


if __name__ == "__main__":
    main()
