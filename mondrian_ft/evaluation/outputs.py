"""What a model answered, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """One answer to one photograph.

    Attributes:
        text: the whole answer without special tokens.
        prompt_tokens: text and image tokens of the prompt.
        tokens: tokens generated.
        seconds: wall time of the batch the answer was generated in, prefill included, divided by
            the rows of that batch: what the answer cost, not how long anyone waited for it. Where
            one prefill served several decodings, it counts in each.
        finished: true when the model itself ended the answer, false when the token limit cut it.
        prefill_seconds: the prefill's part of ``seconds``.
        first_token_seconds: wall time from the start of the batch until its first tokens were
            there; a latency, so it is not divided.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    finished: bool
    prefill_seconds: float | None = None
    first_token_seconds: float | None = None
