"""Counts as people write them: `15T` tokens, `1.3M` hours, `405B` parameters; the letters are powers of ten."""

import argparse
import decimal
import re

_POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12, "P": 15}
_WRITTEN = re.compile(r"(\d{1,3}(?:[,_]\d{3})+|\d+)(\.\d+)?(?:[eE]\+?(\d{1,2}))?\s?([kKmMbBgGtTpP]?)", re.ASCII)
_LARGEST = 10**24
_EXPECTED = "a whole number such as 4096, 4M, 1.3M or 15T (powers of ten: K, M, B or G, T, P) expected"


def count(text: str) -> int:
    """The whole number, at least 1, that a text such as `15T`, `1.3M`, `4,096` or `2e12` stands for; a type for argparse.

    Raises:
      ArgumentTypeError: for anything else, half tokens and numbers beyond 1e24 included.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r:.60} given; {_EXPECTED}")
    digits, fraction, exponent, letter = found.groups()
    power = int(exponent or 0) + _POWERS[letter.upper()]
    value = decimal.Decimal(re.sub("[,_]", "", digits)[:40] + (fraction or "")[:40]).scaleb(power)
    if value != value.to_integral_value() or not 1 <= value <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r:.60} given; {_EXPECTED}, at least 1 and at most 1e24")
    return int(value)


def positive(text: str) -> float:
    """A number above 0, for argparse.

    Raises:
      ArgumentTypeError: for anything else, infinity included.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r:.60} given; a number above 0 expected")
    return value
