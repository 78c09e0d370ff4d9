"""What an adapter is named by, and whether a weights file is one, without any library.

The registry numbers adapters without loading them, so this needs neither MLX nor numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from typing import Any

_PICKLES = (b"\x80", b"PK\x03\x04", b"\x93NUMPY")
"""How a pickle, a zip (which torch.save writes) and an array of numpy begin."""
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element, of the types that an adapter can be in."""


def identity_hash(weights: bytes, scale: float) -> str:
    """64 hexadecimal digits that name an adapter: the weights file and the effective scale."""
    return hashlib.sha256(weights + f"scale={scale!r}".encode()).hexdigest()


def safetensors_fault(data: bytes) -> str | None:
    """What keeps ``data`` from being a whole safetensors file, as the end of a sentence, or None.

    The format: eight bytes with the length of a JSON header, which gives each tensor's type, shape
    and place; then the tensors, one after another without a gap, and nothing after the last.
    """
    if data.startswith(_PICKLES):
        return "is a pickle or an archive with another name, which can run code when it is loaded"
    if len(data) < 8:
        return f"has {len(data)} bytes, too few for a safetensors file"
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        return f"is cut off in its header, or no safetensors file ({len(data)} bytes)"
    try:
        header = json.loads(data[8 : 8 + length])
        spans = sorted(
            (*_span(name, about), name) for name, about in header.items() if name != "__metadata__"
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"has a damaged header ({error})"
    if not spans:
        return "holds no tensor"
    place = 0
    for start, end, name in spans:
        if start != place:
            return f"has a damaged header (the tensor {name} does not follow the one before it)"
        place = end
    there = len(data) - 8 - length
    if there != place:
        what = "is cut off" if there < place else "goes on after its last tensor"
        return f"{what}: {there} bytes of tensors are there, its header speaks of {place}"
    return None


def _span(name: str, about: dict[str, Any]) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, after checking that its shape fills them."""
    start, end = (int(place) for place in about["data_offsets"])
    size = _SIZES.get(str(about["dtype"]))
    wanted = size * math.prod(int(side) for side in about["shape"]) if size else end - start
    if not 0 <= start <= end or end - start != wanted:
        raise ValueError(f"the tensor {name} has {end - start} bytes, its shape wants {wanted}")
    return start, end
