"""Model weights on the disk: read and written one tensor at a time.

A model need not fit twice into memory to be merged: a tensor is read when it is its turn, and gone
when it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from .backend import mx

LARGEST = 5_000_000_000
"""Bytes of tensors in one file, as the hub's tools cut models."""
INDEX = "model.safetensors.index.json"
_TYPES: dict[str, tuple[mx.Dtype, int]] = {
    "F32": (mx.float32, 4),
    "F16": (mx.float16, 2),
    "BF16": (mx.bfloat16, 2),
    "U32": (mx.uint32, 4),
    "U8": (mx.uint8, 1),
    "I32": (mx.int32, 4),
}
_NAMES = {str(dtype): name for name, (dtype, _) in _TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that can be had.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: as safetensors calls it, such as ``BF16``.
        load: makes it, of that shape and type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], mx.array]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * _TYPES[self.dtype][1]


def type_name(dtype: mx.Dtype) -> str:
    """What safetensors calls a type."""
    return _NAMES[str(dtype)]


def entry_of(name: str, array: mx.array) -> Entry:
    """A tensor that is in memory."""
    return Entry(name, tuple(array.shape), type_name(array.dtype), lambda: array)


def read_entries(folder: Path) -> list[Entry]:
    """Every tensor of a model folder, in the order of its files; nothing is read but headers.

    Raises:
        ModelError: a file is damaged, or a tensor of a type that is not known.
    """
    entries = []
    for file in weight_files(folder):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                start = 8 + length
                entries += [_on_disk(file, name, about, start) for name, about in header.items()]
            except (ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
                raise ModelError(f"{file} is damaged ({error}); download it again") from None
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: those its index names, else all of them."""
    index = folder / INDEX
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(named))]
    return sorted(folder.glob("*.safetensors"))


def _on_disk(file: Path, name: str, about: dict[str, Any], start: int) -> Entry:
    kind, shape = str(about["dtype"]), tuple(map(int, about["shape"]))
    if kind not in _TYPES:
        raise ModelError(f"{file}: {name} is of type {kind}, which cannot be merged or copied here")
    first, last = map(int, about["data_offsets"])

    def load() -> mx.array:
        with file.open("rb") as stream:
            stream.seek(start + first)
            data = stream.read(last - first)
        return _from_bytes(data, kind, shape)

    return Entry(name, shape, kind, load)


def write_model(
    folder: Path, entries: Sequence[Entry], *, form: str, largest: int = LARGEST
) -> list[Path]:
    """Write weights as ``model.safetensors``, or in several files with an index.

    Args:
        folder: where to; it exists.
        entries: the tensors, in order.
        form: the ``format`` in the files' metadata: ``pt`` for the published layout, ``mlx``.
        largest: bytes of one file; a larger tensor gets a file of its own.

    Returns:
        The weight files.

    Raises:
        OSError: the disk is full.
    """
    groups = list(_groups(entries, largest))
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        count = len(groups)
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for name, group in zip(names, groups, strict=True):
        _write(folder / name, group, form)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(entry.size for entry in entries)},
            "weight_map": {
                entry.name: name
                for name, group in zip(names, groups, strict=True)
                for entry in group
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _groups(entries: Iterable[Entry], largest: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        if group and sum(other.size for other in group) + entry.size > largest:
            yield group
            group = []
        group.append(entry)
    yield group


def _write(file: Path, entries: Sequence[Entry], form: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": form}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as the format wants
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for entry in entries:
            array = entry.load()
            if tuple(array.shape) != entry.shape or type_name(array.dtype) != entry.dtype:
                raise ValueError(f"{entry.name} is not what its entry says")
            stream.write(_to_bytes(array))
            del array
            mx.clear_cache()


def _to_bytes(array: mx.array) -> bytes:
    plain = mx.contiguous(array)
    if plain.dtype == mx.bfloat16:  # NumPy has no such type
        plain = plain.view(mx.uint16)
    return np.array(plain).tobytes()


def _from_bytes(data: bytes, kind: str, shape: tuple[int, ...]) -> mx.array:
    if kind == "BF16":
        return mx.array(np.frombuffer(data, np.uint16)).view(mx.bfloat16).reshape(shape)
    as_numpy = {"F32": "<f4", "F16": "<f2", "U32": "<u4", "U8": "u1", "I32": "<i4"}[kind]
    return mx.array(np.frombuffer(data, as_numpy)).reshape(shape)
