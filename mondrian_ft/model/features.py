"""Each photograph through the frozen vision tower once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .backend import mx
from .qwen3_vl import Grid, Qwen3VL, VisionFeatures

_TOGETHER = 8


class Patched(Protocol):
    """A photograph as patches; ``data.pixels.Pixels`` is one."""

    @property
    def patches(self) -> np.ndarray: ...
    @property
    def grid(self) -> Grid: ...


class FeatureStore:
    """Features of photographs, computed at first need and kept within a memory bound.

    Valid as long as the tower's weights are: adapters of this project leave it frozen.

    Args:
        backbone: whose tower to use.
        max_bytes: bound on what is kept; the least recently used go first and are computed again
            when needed.
    """

    def __init__(self, backbone: Qwen3VL, *, max_bytes: int = 2 << 30) -> None:
        self.backbone = backbone
        self.max_bytes = max_bytes
        # The grid belongs to the key: other pixel bounds give the same photograph another view.
        self._kept: OrderedDict[tuple[str, Grid], VisionFeatures] = OrderedDict()
        self._bytes = 0

    def get(self, photographs: Sequence[tuple[str, Patched]]) -> list[VisionFeatures]:
        """Features of photographs, each given as a key (its content's hash) and its pixels."""
        found: dict[tuple[str, Grid], VisionFeatures] = {}
        wanted: dict[Grid, dict[str, Patched]] = {}
        for name, pixels in photographs:
            key = (name, pixels.grid)
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            else:
                wanted.setdefault(pixels.grid, {})[name] = pixels
        for grid, group in wanted.items():
            keys = list(group)
            for first in range(0, len(keys), _TOGETHER):
                some = keys[first : first + _TOGETHER]
                patches = np.stack([group[key].patches for key in some])
                encoded = self.backbone.encode(patches, grid)
                mx.eval([[one.features, *one.deepstack] for one in encoded])
                for name, features in zip(some, encoded, strict=True):
                    found[name, grid] = features
                    self._keep((name, grid), features)
        return [found[name, pixels.grid] for name, pixels in photographs]

    def _keep(self, key: tuple[str, Grid], features: VisionFeatures) -> None:
        self._kept[key] = features
        self._bytes += _size(features)
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(features: VisionFeatures) -> int:
    return features.features.nbytes + sum(level.nbytes for level in features.deepstack)
