"""Spells texts alike before errors are counted: what is written otherwise but spoken the same is no error."""

from __future__ import annotations

import re
from functools import lru_cache

from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

MOST_DIGITS = 6  # of a number read as one; longer ones, of telephones, are read digit by digit. A guess
_NUMBER = re.compile(r"\d+")


def spelled(text: str, language: str) -> str:
    """Gives a text as it is compared, reference and transcript alike.

    English as Whisper's authors do: numbers in digits, contractions in full. In other languages their rule leaves
    numbers alone; here they become words, in the cardinal's first form ("uno", not "una"), and accents are dropped,
    which the prompts' texts often lack.

    Args:
        text: of any case and punctuation.
        language: as in "fr".

    Raises:
        ImportError: a number is to be spelled, and num2words is not installed.
    """
    if language == "en":
        return str(_english()(text))
    return str(_basic()(_NUMBER.sub(lambda digits: f" {number_words(digits[0], language)} ", text)))


@lru_cache(maxsize=4096)
def number_words(digits: str, language: str) -> str:
    """Gives a whole number in words; digit by digit where it is long or starts with 0."""
    try:
        from num2words import num2words
    except ImportError as error:
        raise ImportError("numbers in other languages than English need num2words: pip install num2words") from error
    if len(digits) > MOST_DIGITS or (digits[0] == "0" and len(digits) > 1):
        return " ".join(number_words(digit, language) for digit in digits)
    return str(num2words(int(digits), lang=language))


@lru_cache(maxsize=1)
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer({})


@lru_cache(maxsize=1)
def _basic() -> BasicTextNormalizer:
    return BasicTextNormalizer(remove_diacritics=True)
