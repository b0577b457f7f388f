"""Numbers in text, as GSM8K (Cobbe et al. 2021) marks its answers: ``#### 72``."""

from __future__ import annotations

import re
from decimal import Decimal

# 1,234.50 / -3 / .5, also with a currency sign before or behind the minus. ASCII digits only, and no two ways to read a
# text, so that reading it takes time proportional to its length.
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
# A minus behind a word, a number or a bracket takes off: 48-24.
_NUMBER = rf"(?:(?<![\w.)])-)?[$€£]?(?:(?<=[$€£])-)?{_DIGITS}"
NUMBER = re.compile(_NUMBER)
MARKED = re.compile(rf"####\s*({_NUMBER})")
LONGEST = 1000  # characters of a number that is taken for one


def marked_number(text: str) -> Decimal | None:
    """The number behind the last ``####`` that has one; None where none has."""
    found = MARKED.findall(text)
    return _value(found[-1]) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None where there is none."""
    found = NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(written: str) -> Decimal | None:
    plain = re.sub(r"[$€£,]", "", written)
    if len(plain) > LONGEST:
        return None
    number = Decimal(plain.replace("-", ""))
    return number.copy_negate() if plain.count("-") == 1 else number  # -$-5 is 5
