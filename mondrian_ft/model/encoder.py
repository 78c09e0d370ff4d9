"""Texts to token ids and back, by a model's own tokenizer and chat template; no weights needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ModelError

# transformers announces on import that torch is missing; it is missing on purpose.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclass
class Encoder:
    """What turns texts into token ids, for training, evaluation and counting alike.

    Attributes:
        tokenizer: the model's own, from its folder.
        image_token: id of the token that stands for a piece of the picture.
        folder: the model's.
        name: what to call the model in errors.
    """

    tokenizer: Any
    image_token: int
    folder: Path
    name: str

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer."""
        ends = {self.tokenizer.eos_token_id}
        for file in ("config.json", "generation_config.json"):
            if (self.folder / file).is_file():
                settings = json.loads((self.folder / file).read_text())
                found = settings.get("eos_token_id")
                ends |= set(found) if isinstance(found, list) else {found}
        return frozenset(int(token) for token in ends if token is not None)

    @cached_property
    def pad_token(self) -> int:
        """Token id that fills rows on the right; it is never attended to by a real token."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else next(iter(self.end_tokens)))

    def prompt_tokens(self, prompt: str, image_tokens: int) -> list[int]:
        """Token ids of one user turn: the picture, then the prompt, then the assistant's opening.

        Args:
            prompt: the text as ``data.prompt`` built it.
            image_tokens: how many tokens the picture takes.

        Raises:
            ModelError: the chat template does not make exactly one place for the picture.
        """
        ids = self._ids(self.prompt_text(prompt))
        places = [at for at, token in enumerate(ids) if token == self.image_token]
        if len(places) != 1:
            raise ModelError(
                f"the chat template of {self.name} makes {len(places)} image places of "
                "one picture; mondrian_ft needs a template for pictures, so use an -Instruct model"
            )
        at = places[0]
        return [*ids[:at], *[self.image_token] * image_tokens, *ids[at + 1 :]]

    def text_prompt_tokens(self, prompt: str) -> list[int]:
        """Token ids of one user turn without a picture, then the assistant's opening."""
        return self._ids(self.text_prompt_text(prompt))

    def prompt_text(self, prompt: str) -> str:
        """The turn of :meth:`prompt_tokens` as the chat template writes it."""
        return self._turn([{"type": "image"}, {"type": "text", "text": prompt}])

    def text_prompt_text(self, prompt: str) -> str:
        """The turn of :meth:`text_prompt_tokens` as the chat template writes it."""
        return self._turn([{"type": "text", "text": prompt}])

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every file beside the weights that texts depend on.

        Tokenizer, chat template and the tokens that end an answer, none of which is in
        ``base.weights_fingerprint``. It covers all of the folder's small text files: one too many
        costs an answer that is given anew, one too few an answer that is wrong.
        """
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".json", ".jinja", ".txt") and path.is_file():
                digest.update(f"{path.name}:{path.stat().st_size};".encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def _turn(self, content: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def answer_tokens(self, answer: str) -> list[int]:
        """Token ids of an answer and the token that ends it."""
        return [
            *self.tokenizer.encode(answer, add_special_tokens=False),
            int(self.tokenizer.eos_token_id),
        ]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens."""
        return self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
