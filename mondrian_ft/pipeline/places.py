"""Where verbs keep what outlives a run, below the folder that a command is typed in."""

from __future__ import annotations

from pathlib import Path

VISION_FEATURES = Path("outputs/cache/features")
"""What the vision tower says of photographs, for whoever has the same tower and pixels."""
