"""The fixture that turns lists of answers into a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mondrian_ft.evaluation import comparison

from .critiques import make_output, make_row


@pytest.fixture
def compare() -> Callable[..., dict]:
    """``build`` with the arguments that most tests do not care about."""

    def build(
        references: Sequence[str],
        train: Sequence[str] = (),
        shas=None,
        score_margin: float = 0.25,
        format_margin: float = 0.02,
        forgetting: Any = None,
        **arms: Sequence[str],
    ) -> dict:
        shas = shas or [None] * len(references)
        rows = [make_row(str(i), r, shas[i]) for i, r in enumerate(references)]
        return comparison.build(
            rows=rows,
            arms={n: [make_output(text) for text in texts] for n, texts in arms.items()},
            train_rows=[make_row(f"t{i}", text) for i, text in enumerate(train)],
            base_model="sample",
            lora_path="adapter",
            validation_data="training_data_ansel_test.json",
            settings={"max_tokens": 300},
            adapter_hash="0" * 64,
            date="2026-11-24T12:00:00+00:00",
            score_margin=score_margin,
            format_margin=format_margin,
            forgetting=forgetting,
        )

    return build
