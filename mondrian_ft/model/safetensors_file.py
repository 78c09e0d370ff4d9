"""Adapter files of other programs, read without trusting them: bytes in, float32 arrays out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import AdapterError

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def read_tensors(path: Path, content: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as float32.

    Nothing is ever unpickled: a pickle may run any program, whatever the file is called.

    Args:
        path: what errors call the file.
        content: its bytes.

    Raises:
        AdapterError: it is a pickle or a PyTorch file, is cut off or damaged, or holds a tensor
            that is no float or not finite.
    """
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(content)
    except SafetensorError as error:
        _refuse_pickles(path, content)
        raise AdapterError(
            f"{path} is no whole safetensors file ({error}); it was cut off or damaged, so copy or "
            "download it again"
        ) from None
    return {name: _array(path, name, entry) for name, entry in entries}


def _refuse_pickles(path: Path, content: bytes) -> None:
    # Asked after the reader has refused: a whole safetensors file may begin with any byte.
    kind = None
    if content.startswith(b"PK\x03\x04"):
        kind = "a zip archive, as torch.save and numpy write them,"
    elif content.startswith((*_PICKLES, b"(")):
        kind = "a pickle"
    if kind:
        raise AdapterError(
            f"{path} is {kind} and not a safetensors file; it is not opened, because a pickle can "
            "run any program, so save the adapter again as safetensors where it was made"
        )


def _array(path: Path, name: str, entry: dict) -> np.ndarray:
    kind, data, shape = entry["dtype"], bytes(entry["data"]), tuple(entry["shape"])
    if kind == "BF16":
        # The upper half of a float32.
        array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif kind in _FLOATS:
        array = np.frombuffer(data, _FLOATS[kind]).astype(np.float32)
    else:
        raise AdapterError(
            f"{path}: {name} is of type {kind}; an adapter's tensors are floating-point numbers of "
            "16 bits or more"
        )
    if not np.isfinite(array).all():
        raise AdapterError(
            f"{path}: {name} holds numbers that are not finite; the file is damaged or its "
            "training diverged, so copy or train it again"
        )
    return array.reshape(shape)
