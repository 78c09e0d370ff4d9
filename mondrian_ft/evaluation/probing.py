"""The probe's inputs, made on the same way as every photograph and prompt: what an adapter is saved
with and loaded against (`model.probe`)."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.pixels import Pixels, PixelSettings, fingerprint, open_photograph, to_pixels
from ..data.prompt import build_prompt
from ..errors import AdapterError
from ..model.adapter import Adapter
from ..model.base import Base
from ..model.probe import ProbeInput, ProbeInputs

QUESTION = "What makes a photograph hold together?"
"""The input of text alone."""
UPRIGHT = (203, 149)
"""Width and height of the drawn photograph: odd, and no multiple of a patch."""
_ORIENTATION, _QUARTER_TURN = 0x0112, 6


@dataclass(frozen=True)
class _Prompts:
    """Fixed texts in the place of a job database's: what is probed is how they are put together."""

    def system_prompt(self) -> str:
        return "You are a photography advisor. Answer with one JSON object."

    def advisor_prompt(self, advisor: str) -> str:
        return f"Judge as {advisor} would."


def probe_inputs(base: Base, settings: PixelSettings) -> ProbeInputs:
    """The probe for a base, its processor and tokenizer, and pixel bounds."""
    pixels = _photograph(base, settings)
    prompt, _ = build_prompt(_Prompts(), "ansel")
    encoder = base.encoder
    shown, asked = encoder.prompt_text(prompt), encoder.text_prompt_text(QUESTION)
    # One image token stands for the picture here: how many it takes is the picture's affair.
    ids = [base.prompt_tokens(prompt, 1), base.text_prompt_tokens(QUESTION)]
    patches = np.round(pixels.patches, 3).astype("<f4") + np.float32(0)  # no negative zeros
    return ProbeInputs(
        inputs=(
            ProbeInput("text", np.array(ids[1], np.int32)),
            ProbeInput(
                "picture",
                np.array(base.prompt_tokens(prompt, pixels.tokens), np.int32),
                pixels.patches,
                pixels.grid,
            ),
        ),
        pixels=fingerprint(base.image_processor, settings),
        digests={
            "picture": _digest(str(pixels.grid).encode() + patches.tobytes()),
            "prompt": _digest(prompt.encode()),
            "template": _digest("\0".join((shown, asked)).encode()),
            "tokens": _digest(str(ids).encode()),
        },
    )


def pixels_of(adapter: Adapter) -> PixelSettings:
    """The pixel bounds an adapter was trained with, for who has no pictures to show it.

    Raises:
        AdapterError: its manifest does not give them.
    """
    pixels = adapter.manifest.get("pixels", {})
    try:
        return PixelSettings(int(pixels["min_pixels"]), int(pixels["max_pixels"]))
    except (KeyError, TypeError, ValueError):
        raise AdapterError(
            f"{adapter.folder} does not say how the pixels it was trained on were prepared; "
            "restore it or train again"
        ) from None


def _photograph(base: Base, settings: PixelSettings) -> Pixels:
    """The drawn photograph, through a file that lies on its side as those of telephones do."""
    from PIL import Image

    width, height = UPRIGHT
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    bands = [(x * 255) // width, (y * 255) // height, ((x // 7 + y // 5) % 2) * 200 + 20]
    upright = Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[_ORIENTATION] = _QUARTER_TURN
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.png")
        upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        return to_pixels(open_photograph(path), base.image_processor, settings)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
