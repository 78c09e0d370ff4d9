"""The same rows for both sides, and their logits compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 2e-4
"""Absolute, on logits of a scale of 5 to 20, in float32."""


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, with one picture or none: (tokens, patches, grid)."""

    rows: tuple[tuple[np.ndarray, np.ndarray | None, tuple[int, int, int] | None], ...]

    @classmethod
    def of(cls, lab: Any) -> Rows:
        """Pictures of three sizes and two texts."""
        made: list[Any] = [
            (example.tokens, example.pixels.patches, example.pixels.grid)
            for example in lab.examples(3, name="parity")
        ]
        for text in ("The low light falls on a far ridge.", "Depth."):
            tokens = lab.base.tokenizer.encode(text, add_special_tokens=False)
            made.append((np.array(tokens, np.int32), None, None))
        return cls(tuple(made))

    def batches(self) -> list[Rows]:
        """Each row by itself, and all of them right-padded."""
        return [*(Rows((row,)) for row in self.rows), self]

    @property
    def lengths(self) -> list[int]:
        return [len(row[0]) for row in self.rows]

    def padded(self, pad: int) -> np.ndarray:
        tokens = np.full((len(self.rows), max(self.lengths)), pad, np.int32)
        for number, (row, _, _) in enumerate(self.rows):
            tokens[number, : len(row)] = row
        return tokens


def ours(base: Any, rows: Rows) -> list[np.ndarray]:
    """Logits of every real token, row by row and then of the padded batch."""
    from mondrian_ft.model.qwen3_vl import assemble

    base.model.eval()
    found = []
    for batch in rows.batches():
        grids = [grid for _, _, grid in batch.rows]
        features = [
            None if patches is None else base.backbone.encode(patches, grid)[0]
            for _, patches, grid in batch.rows
        ]
        inputs, _ = assemble(
            batch.padded(base.pad_token),
            batch.lengths,
            features,
            grids,
            image_token=base.backbone.image_token,
            merge=base.backbone.merge,
        )
        logits = np.array(base.backbone.head(base.backbone.hidden(inputs)))
        found += [logits[n, :length] for n, length in enumerate(batch.lengths)]
    return found


def theirs(model: Any, rows: Rows, *, image_token: int, pad: int) -> list[np.ndarray]:
    """The same of a transformers or PEFT model."""
    import torch  # pyright: ignore[reportMissingImports]

    model.eval()
    found = []
    with torch.no_grad():
        for batch in rows.batches():
            logits = model(**torch_inputs(batch, image_token, pad)).logits.numpy()
            found += [logits[n, :length] for n, length in enumerate(batch.lengths)]
    return found


def torch_inputs(batch: Rows, image_token: int, pad: int) -> dict[str, Any]:
    """A batch as transformers' forward takes it.

    ``mm_token_type_ids`` says where pictures are; without it the positions would be wrong.
    """
    import torch  # pyright: ignore[reportMissingImports]

    tokens = batch.padded(pad)
    mask = np.arange(tokens.shape[1])[None] < np.array(batch.lengths)[:, None]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(tokens.astype(np.int64)),
        "attention_mask": torch.tensor(mask.astype(np.int64)),
    }
    pictures = [(patches, grid) for _, patches, grid in batch.rows if patches is not None]
    if pictures:
        inputs["pixel_values"] = torch.tensor(np.concatenate([p for p, _ in pictures]))
        inputs["image_grid_thw"] = torch.tensor([g for _, g in pictures])
        inputs["mm_token_type_ids"] = torch.tensor((tokens == image_token).astype(np.int64))
    return inputs


def assert_agree(mine: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Every logit within :data:`TOLERANCE`; returns the largest difference."""
    assert len(mine) == len(other)
    worst = max(float(np.abs(a - b).max()) for a, b in zip(mine, other, strict=True))
    assert worst < TOLERANCE, f"logits differ by up to {worst:.3g}"
    return worst


def assert_differ(mine: list[np.ndarray], other: list[np.ndarray]) -> None:
    """An adapter does something: each row's logits move by far more than the tolerance."""
    moved = min(float(np.abs(a - b).max()) for a, b in zip(mine, other, strict=True))
    assert moved > 100 * TOLERANCE, f"logits moved by {moved:.3g} only"


def load_reference(folder: Path) -> Any:
    """transformers' own Qwen3-VL from a folder, nothing missing and nothing left over."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen3VLForConditionalGeneration

    model, info = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model
