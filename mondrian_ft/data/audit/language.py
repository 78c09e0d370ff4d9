"""Whether a critique is in English, told from letters and from the small words.

Two rules, no model: a text with more than a fifth of its letters outside the Latin script is not
English; nor is one in which the small words of another language outnumber the English ones. A
text with fewer than eight small words of any language is given the benefit of the doubt, so this
errs towards English; a photographer's names and terms do not count either way.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_SMALL_WORDS = {
    "en": "the a an and of to in is it that with for on as are by this be from at which but not "
    "more its has have could would your you",
    "de": "der die das und ist ein eine einen einem den dem des mit zu auf für nicht von im sich "
    "auch es wird werden durch aber oder bei sehr",
    "fr": "le la les un une des et est de du dans en que qui pour pas sur avec par au aux ce cette "
    "son sa ses plus mais ou",
    "es": "el la los las un una y es de del en que por para con no se su sus al como más pero o "
    "este esta lo",
    "it": "il lo la i gli le un una e è di del della in che per con non si su dei nel alla più ma "
    "come questo questa",
    "pt": "o a os as um uma e é de do da em que por para com não se no na dos das ao mais mas como "
    "este esta",
    "nl": "de het een en is van in op te dat met voor niet zijn door aan ook maar bij wordt naar "
    "deze dit er als om",
    "sv": "och är en ett det som att på av för med den inte till i har de kan men om från",
    "pl": "i w na z się do nie jest to że o jak po co tak za od ale przez dla są",
}


def is_english(text: str) -> bool:
    """Whether a text is English, or too short to tell; see the module for the two rules."""
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return True
    foreign = sum(1 for letter in letters if not _latin(letter))
    if foreign > 0.2 * len(letters):
        return False
    words = re.findall(r"[^\W\d_]+", text.casefold())
    counts = {language: sum(word in small for word in words) for language, small in _sets().items()}
    best = max(counts.values())
    return best < 8 or counts["en"] >= best


@cache
def _sets() -> dict[str, frozenset[str]]:
    return {language: frozenset(words.split()) for language, words in _SMALL_WORDS.items()}


@cache
def _latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")
