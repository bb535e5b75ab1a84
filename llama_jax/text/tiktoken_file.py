"""Reads the tiktoken text form of a byte-pair vocabulary: a line a token, in base64, then a space and its rank.

The loader of the tiktoken library is not used: it keeps what it once read in a folder that everybody can write to and
answers from there. Source of the form: Meta's `tokenizer.model` of Llama 3, 128,000 such lines.
"""

import base64
import binascii
import pathlib
import re

from llama_jax.errors import InputError

_LARGEST_FILE = 32 << 20  # Llama 3's has 2.1 MiB
_LONGEST_TOKEN = 1024  # bytes; Llama 3's has 128
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (0|[1-9]\d{0,8})\s*")


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that begins so is of this form."""
    return _LINE.fullmatch(head.partition(b"\n")[0]) is not None


def read_ranks(path: pathlib.Path) -> tuple[bytes, ...]:
    """The tokens of a file in the order of their ranks, the lowest of which merges first.

    Raises:
      InputError: for a file above 32 MiB, a line that is not of the form, a rank that is not the number of its line
        (counted from 0), a token that is empty, too long or stands there twice, and a byte that no token spells.
    """
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise InputError(f"{path}: {size} bytes given, at most {_LARGEST_FILE} expected of tiktoken ranks")
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                _add(ranks, line, f"{path}: line {number}")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise InputError(f"{path}: byte 0x{missing:02X} has no rank, all 256 expected; the file is damaged or cut off")
    return tuple(ranks)


def _add(ranks: dict[bytes, int], line: bytes, origin: str) -> None:
    """Adds the token of a line, whose rank is the next one."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise InputError(f"{origin}: {line[:40]!r} given, a token in base64, a space and its rank expected")
    token = _decoded(match[1], origin)
    if int(match[2]) != len(ranks):
        raise InputError(f"{origin}: rank {int(match[2])} given, {len(ranks)} expected; ranks go up from 0 without a gap")
    if ranks.setdefault(token, len(ranks)) != int(match[2]):
        raise InputError(f"{origin}: token {token[:40]!r} stands there twice, with ranks {ranks[token]} and {int(match[2])}")


def _decoded(token: bytes, origin: str) -> bytes:
    """The bytes of a token."""
    try:
        decoded = base64.b64decode(token, validate=True)
    except binascii.Error as error:
        raise InputError(f"{origin}: {token[:40]!r} is not base64 ({error})") from None
    if not 0 < len(decoded) <= _LONGEST_TOKEN:
        raise InputError(f"{origin}: a token of {len(decoded)} bytes given, 1 to {_LONGEST_TOKEN} expected")
    return decoded
