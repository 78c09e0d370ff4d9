"""The part of a model that needs no weights: config, tokenizer, picture processor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .encoder import Encoder


@dataclass(frozen=True)
class Front:
    """What tells how many tokens a row has.

    Attributes:
        encoder: texts to tokens.
        image_processor: pictures to patches.
        config: the model's ``config.json``.
    """

    encoder: Encoder
    image_processor: Any
    config: dict[str, Any]


def load_front(path: str | Path, *, name: str | None = None) -> Front:
    """Load it from a folder or a Hugging Face id; no weights are read or downloaded.

    Raises:
        ModelError: the folder does not exist or lacks a file, or the hub cannot be reached.
    """
    from .base import front_folder, image_token_of
    from .processor import image_processor

    folder, name = front_folder(path), name or str(path)
    from transformers import AutoTokenizer

    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_token = image_token_of(config)
        if image_token is None:
            raise KeyError("image_token_id")
        encoder = Encoder(tokenizer, image_token, folder, name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"{name} cannot be read from {folder}: {first}") from error
    return Front(encoder, image_processor(folder), config)
