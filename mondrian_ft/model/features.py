"""Each photograph through the frozen vision tower once, in this run and in later ones.

While an adapter is in the tower nothing is kept and nothing that was kept is used: what the tower
says then is that adapter's, and it changes with every update. Nor is anything kept for a backbone
without a tower of its own (`model.plain`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import MondrianError
from ..files import atomic_write_bytes
from .backend import describe, mx
from .qwen3_vl import Grid, Qwen3VL, Unseen, VisionFeatures

_FORM = 1
"""Bump when the tower's forward gives other numbers for the same weights and patches."""
_DTYPES = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
"""By the names that safetensors has for them."""


class Patched(Protocol):
    """A photograph as patches; ``data.pixels.Pixels`` is one."""

    @property
    def patches(self) -> np.ndarray: ...
    @property
    def grid(self) -> Grid: ...


class FeatureStore:
    """Features of photographs, computed at first need and kept within a memory bound.

    What is kept is the base tower's. As long as an adapter is in the tower, photographs go through
    it each time they are asked for. Photographs
    go through the tower one at a time: in a batch the last bit of a feature depends on its
    neighbours, and a run would depend on what earlier ones left in the cache.

    Args:
        backbone: whose tower to use.
        max_bytes: bound on what is kept; the least recently used go first and are computed again
            when needed.
        disk: what lies below the memory; None for nothing.
    """

    def __init__(
        self, backbone: Qwen3VL, *, max_bytes: int = 2 << 30, disk: FeatureCache | None = None
    ) -> None:
        self.backbone = backbone
        self.max_bytes = max_bytes
        self.disk = disk
        # The grid belongs to the key: other pixel bounds give the same photograph another view.
        self._kept: OrderedDict[tuple[str, Grid], VisionFeatures] = OrderedDict()
        self._bytes = 0

    def get(self, photographs: Sequence[tuple[str, Patched]]) -> list[VisionFeatures]:
        """Features of photographs, each given as a key (its content's hash) and its pixels."""
        if not self.backbone.keeps_features:
            return self._anew(photographs)
        found: dict[tuple[str, Grid], VisionFeatures] = {}
        for name, pixels in photographs:
            key = (name, pixels.grid)
            if key in found:
                continue
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
                continue
            features = self.disk.read(*key) if self.disk is not None else None
            if features is None:
                (features,) = self.backbone.encode(pixels.patches[None], pixels.grid)
                mx.eval(features.features, features.deepstack)
                if self.disk is not None:
                    self.disk.write(*key, features)
            found[key] = features
            self._keep(key, features)
        return [found[name, pixels.grid] for name, pixels in photographs]

    def prepare(self, photographs: Sequence[tuple[str, Patched]]) -> None:
        """Compute what is missing, so that the tower need not be asked again."""
        for name, pixels in photographs:
            if not self.has(name, pixels.grid):
                self.get([(name, pixels)])

    def pictures(
        self, photographs: Sequence[tuple[str, Patched]]
    ) -> list[VisionFeatures] | list[Unseen]:
        """What a forward that may learn is given: features, or the pictures themselves where it
        learns in the tower."""
        if self.backbone.keeps_features:
            return self.get(photographs)
        return [Unseen(mx.array(pixels.patches), pixels.grid) for _, pixels in photographs]

    def _anew(self, photographs: Sequence[tuple[str, Patched]]) -> list[VisionFeatures]:
        """Through the tower as it is now; each photograph once a call."""
        found: dict[tuple[str, Grid], VisionFeatures] = {}
        for name, pixels in photographs:
            if (name, pixels.grid) not in found:
                (features,) = self.backbone.encode(pixels.patches[None], pixels.grid)
                if isinstance(features, VisionFeatures):
                    mx.eval(features.features, features.deepstack)
                found[name, pixels.grid] = features
        return [found[name, pixels.grid] for name, pixels in photographs]

    def has(self, name: str, grid: Grid) -> bool:
        """Whether a photograph's features are here or on disk (where they may be damaged)."""
        if (name, grid) in self._kept:
            return True
        return self.disk is not None and self.disk.path(name, grid).is_file()

    def _keep(self, key: tuple[str, Grid], features: VisionFeatures) -> None:
        self._kept[key] = features
        self._bytes += _size(features)
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


class FeatureCache:
    """Features on disk, one safetensors file a photograph; safe to delete at any time.

    A file is found only by what its numbers depend on: the photograph's content and grid, the pixel
    pipeline, the tower's weights and their type, the backend. Files are written whole or not at
    all, and a checksum in each tells a damaged one, which is computed again.

    Args:
        folder: where the files lie; made when the first is written.
        backbone: whose tower it is.
        pixels: ``data.pixels.fingerprint`` of the pipeline that made the patches.
        max_bytes: bound on the files together, other models' included; the ones used longest ago
            go first.
        notice: called with a sentence when a file is damaged or the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Qwen3VL,
        *,
        pixels: str,
        max_bytes: int = 8 << 30,
        notice: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.notice = notice
        self._about = {
            "form": _FORM,
            "tower": tower_hash(backbone),
            "pixels": pixels,
            "backend": describe(),
            "mlx": version("mlx"),
        }
        self._writes = True
        self._sizes: dict[Path, int] | None = None

    def path(self, name: str, grid: Grid) -> Path:
        """The file of a photograph, given its content's hash; it need not be there."""
        key = json.dumps({**self._about, "photograph": name, "grid": grid}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def read(self, name: str, grid: Grid) -> VisionFeatures | None:
        """Features of a photograph; None if they are not there or damaged."""
        path = self.path(name, grid)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            features = _unpack(data)
        except ValueError as error:
            self.notice(f"the cached features in {path} are damaged ({error}); computed again")
            return None
        # The time of last use decides what goes first; access times are often not kept.
        with suppress(OSError):
            os.utime(path)
        return features

    def write(self, name: str, grid: Grid, features: VisionFeatures) -> None:
        """Keep a photograph's features. A cache that cannot be written to is left alone."""
        if not self._writes:
            return
        path = self.path(name, grid)
        data = _pack(features)
        try:
            self._make_room(len(data), path)
            atomic_write_bytes(path, data)
        except (OSError, MondrianError) as error:
            self._writes = False
            self.notice(f"vision features are not kept for later runs: {error}")
            return
        assert self._sizes is not None
        self._sizes[path] = len(data)

    def _make_room(self, size: int, path: Path) -> None:
        """Remove the files used longest ago until ``size`` more bytes fit."""
        if self._sizes is None:
            self._sizes = {one: at.st_size for one, at in self._files()}
        self._sizes.pop(path, None)
        if sum(self._sizes.values()) + size <= self.max_bytes:
            return
        # Looked up anew: other processes read and write here as well.
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        total = sum(at.st_size for _, at in files)
        # A tenth more than needed, so that not every photograph of a full cache reads the folder.
        aim = self.max_bytes * 0.9
        for old, at in files:
            if total + size <= aim:
                break
            with suppress(OSError):
                old.unlink()
            total -= at.st_size
        self._sizes = {one: at.st_size for one, at in self._files()}

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                found.append((path, path.stat()))
        return found


def tower_hash(backbone: Qwen3VL) -> str:
    """32 hexadecimal digits over the vision tower's weights: names, types, shapes and bytes."""
    from mlx.utils import tree_flatten

    digest = hashlib.sha256()
    weights: dict[str, Any] = dict(tree_flatten(backbone.tower.parameters()))  # pyright: ignore
    for name in sorted(weights):
        value: mx.array = weights[name]
        digest.update(f"{name} {value.dtype} {value.shape};".encode())
        digest.update(_bytes(value))
    # Where they are added counts as well, and is no weight.
    digest.update(json.dumps(list(backbone.tower.deepstack_visual_indexes)).encode())
    return digest.hexdigest()[:32]


def _bytes(value: mx.array) -> bytes:
    """An array's bytes; numpy knows no bfloat16."""
    return np.array(mx.contiguous(value).reshape(-1).view(mx.uint8)).tobytes()


def _pack(features: VisionFeatures) -> bytes:
    """A safetensors file with a checksum over all its tensors in its metadata."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    arrays = [features.features, *features.deepstack]
    data = [_bytes(array) for array in arrays]
    header: dict[str, Any] = {
        "__metadata__": {"sha256": hashlib.sha256(b"".join(data)).hexdigest()}
    }
    start = 0
    for number, (array, values) in enumerate(zip(arrays, data, strict=True)):
        header[f"{number:03d}"] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + len(values)],
        }
        start += len(values)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _unpack(data: bytes) -> VisionFeatures:
    """What :func:`_pack` packed.

    Raises:
        ValueError: the file is not whole, or not what was written.
    """
    from safetensors import SafetensorError, deserialize

    try:
        tensors = dict(deserialize(data))
        length = int.from_bytes(data[:8], "little")
        wanted = json.loads(data[8 : 8 + length])["__metadata__"]["sha256"]
        ordered = [tensors[name] for name in sorted(tensors)]
        digest = hashlib.sha256()
        for one in ordered:
            digest.update(one["data"])
        if digest.hexdigest() != wanted:
            raise ValueError("its checksum differs")
        arrays = [
            mx.array(np.frombuffer(one["data"], np.uint8))
            .view(_DTYPES[one["dtype"]])
            .reshape(one["shape"])
            for one in ordered
        ]
        mx.eval(arrays)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error).strip("'\"") or type(error).__name__) from error
    return VisionFeatures(arrays[0], tuple(arrays[1:]))


def _size(features: VisionFeatures) -> int:
    return features.features.nbytes + sum(level.nbytes for level in features.deepstack)
