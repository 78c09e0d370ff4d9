"""What a model answered, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """One answer to one photograph.

    ``text`` is the whole answer without special tokens; ``prompt_tokens`` counts text and image
    tokens of the prompt and ``tokens`` those generated; ``seconds`` is the wall time of the batch
    the answer was generated in, divided by the rows of that batch; ``finished`` is true when the
    model itself ended the answer, false when the token limit cut it.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    finished: bool
