"""What a model answered, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """One answer to one photograph.

    ``text`` is the whole answer without special tokens; ``prompt_tokens`` counts text and image
    tokens of the prompt and ``tokens`` those generated; ``seconds`` is the wall time of the batch
    the answer was generated in, divided by the rows of that batch; ``finished`` is true when the
    model itself ended the answer, false when the token limit cut it. ``prefill_seconds`` (reading
    the prompt) and ``first_token_seconds`` (from the start to the first token) are wall times, None
    where they were not taken.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    finished: bool
    prefill_seconds: float | None = None
    first_token_seconds: float | None = None
