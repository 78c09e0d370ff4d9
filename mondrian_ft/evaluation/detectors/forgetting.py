"""Detector of abilities that the base had and the tuned model has lost."""

from __future__ import annotations

import math

from .detection import Detection, result

RISE = 1.0
"""Nats a token: the base's own words are, on average, a third as likely as before."""


def forgetting(base_loss: float | None, tuned_loss: float | None) -> Detection:
    """The base's answers to general questions, grown unlikely.

    ``value`` is by how many nats a token the tuned model's loss on those answers is above the
    base's; it fires above ``threshold``, 1. Unknown where either could not be measured. It takes no
    ``better`` away: an adapter is there to judge photographs, and may pay for that elsewhere.
    """
    name = "forgetting"
    if base_loss is None or tuned_loss is None:
        sentence = "What the adapter costs on general questions could not be measured."
        return result(name, False, None, RISE, (), sentence)
    rise = tuned_loss - base_loss
    fired = rise > RISE
    left = f"{100 * math.exp(-rise):.0f} % as likely as for the base itself."
    return result(
        name,
        fired,
        rise,
        RISE,
        (),
        "It has forgotten much of what the base could do: on general questions the words of the "
        f"base’s answers are on average {left}"
        if fired
        else f"On general questions the words of the base’s answers are on average still {left}",
    )
