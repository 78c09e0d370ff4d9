"""Adapter directories and reports, made by hand and whole, without MLX or numpy."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from mondrian_ft.identity import identity_hash

NAME = "sample-ansel"
LOCK = "0" * 64
BASE = {"name": "sample", "weights": "5353577da641216b", "quantization": "none", "dtype": "float32"}
SCALE = 2.0


def weights(seed: int = 0) -> bytes:
    """A whole safetensors file with two tensors."""
    tensors = {"a": [2, 3], "b": [3, 2]}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for at, (name, shape) in enumerate(tensors.items()):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [24 * at, 24 * at + 24]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<12f", *range(seed, seed + 12))


def digest(seed: int) -> str:
    """The hash of the adapter with this seed."""
    return identity_hash(weights(seed), SCALE)


def adapter(folder: Path, seed: int = 0, *, evaluated: bool = True, **report: Any) -> Path:
    """An adapter directory; ``report`` are keywords of `comparison`."""
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(weights(seed))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 32.0}))
    manifest = {
        "hash": digest(seed),
        "base": BASE,
        "data_lock": LOCK,
        "created": "2026-01-02T03:04:05+00:00",
        "lora": {"scale": SCALE},
        "advisor": "ansel",
        "training": {"rows": 87},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "checkpoints" / "step_000002" / "state.safetensors").write_bytes(b"x")
    if evaluated:
        place = folder / "evaluation" / "comparison_report.json"
        place.parent.mkdir()
        place.write_text(json.dumps(comparison(seed, **report)))
    return folder


def change(mean: float, state: str, margin: float = 0.25) -> dict[str, Any]:
    """A paired change over 18 photographs."""
    interval = [mean - 0.3, mean + 0.3]
    return {"n": 18, "mean": mean, "interval": interval, "state": state, "margin": margin}


def verdict(gain: float = 1.6, state: str = "better", ratio: float | None = 1.0) -> dict[str, Any]:
    """What tuned shows against another: a score gain and its state, and seconds per token."""
    latency = None
    if ratio is not None:
        latency = {"n": 10, "ratio": ratio, "interval": [ratio * 0.98, ratio * 1.02]}
    return {
        "verdict": state,
        "change": {"score": change(gain, state), "format": change(0.0, "no_worse", 0.02)},
        "latency": latency,
    }


def comparison(
    seed: int,
    *,
    against: int | None = None,
    lock: str | None = LOCK,
    base: dict[str, str] | None = BASE,
    fired: str | None = None,
    rows: int = 18,
    date: str = "2026-01-02T03:04:05+00:00",
    **about: Any,
) -> dict[str, Any]:
    """A report on the adapter with this seed, as far as the registry reads one.

    ``against`` is the seed of the adapter in production, ``about`` are keywords of `verdict`.
    """
    arms: dict[str, Any] = {
        "base": {"n": 18, "format_strict": 1.0, "score_mae": 2.9},
        "tuned": {"n": 18, "format_strict": 1.0, "score_mae": 0.7},
    }
    found = verdict(**about)
    evidence = {
        **found,
        "arms": arms,
        "against": {},
        "adapter_hash": digest(seed),
        "data_lock": lock,
        "base": base,
        "judged_part": {"part": "test", "rows": rows, "of": 18},
        "detections": [
            {"name": name, "fired": name == fired, "disqualifies": True, "sentence": "It is."}
            for name in ("recites", "one_critique")
        ],
    }
    if against is not None:
        arms["production"] = {"n": 18, "adapter_hash": digest(against)}
        evidence["against"] = {"production": found}
    return {
        "evaluation_date": date,
        "validation_data": "/data/training_data_ansel_test.json",
        "evidence": evidence,
    }
