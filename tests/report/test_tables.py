"""The tables that trackers get hold what the report holds."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from mondrian_ft.report import tables


def test_a_row_an_arm_with_intervals_and_reasons(many) -> None:
    """Models, guesses and failed arms; what an arm has no number for is None."""
    columns, rows = tables.arms(many.report)
    found = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    evidence = many.report["evidence"]
    assert list(found) == [*evidence["arms"], "production_constrained"]
    low, high = evidence["arms"]["tuned"]["score_mae_interval"]
    assert (found["tuned"]["score_mae_low"], found["tuned"]["score_mae_high"]) == (low, high)
    assert found["tuned"]["peak_memory_gb"] == 9.42
    assert found["prompt_example"]["score_mae"] == 1.93
    assert found["prompt_example"]["format_strict"] is None
    assert found["production_constrained"]["failed"] == "its adapter is of <another> base."
    assert found["production_constrained"]["score_mae"] is None


def test_a_row_a_photograph_with_every_voice(many) -> None:
    """Picture, reference, and each arm's output, scores and error; a lost picture is None."""
    samples = many.report["sample_results"]
    Path(samples[1]["image_path"]).unlink()
    columns, rows = tables.photographs(many.report)
    assert len(rows) == len(samples)
    for row, sample in zip(rows, samples, strict=True):
        told = dict(zip(columns, row, strict=True))
        assert told["reference"] == sample["reference"]["full_output"]
        assert told["base"] == sample["base_model"]["full_output"]
        assert told["production_error"] == sample["production"]["score_error"]
    first, second = (dict(zip(columns, row, strict=True)) for row in rows[:2])
    assert first["base_scores"] is None
    assert first["tuned_scores"].endswith("overall 3.4")
    assert second["picture"] is None
    with Image.open(io.BytesIO(first["picture"])) as picture:
        assert picture.format == "JPEG"
        assert max(picture.size) <= tables.SIDE
