"""Writes a SentencePiece model from its pieces.

The message is small and its field numbers are fixed, so its protocol-buffer form is written here directly: the
generated classes that ship with sentencepiece demand one exact protobuf version.

Source: sentencepiece_model.proto of the SentencePiece project (field numbers below).
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

_BPE = 2  # TrainerSpec.ModelType
_VARINT, _BYTES, _FLOAT = 0, 2, 5  # wire types


class Piece(NamedTuple):
    """One entry of the vocabulary.

    Attributes:
      text: the piece, with `▁` for a space.
      score: pairs that merge into a piece with a higher score merge first.
      kind: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    """

    text: str
    score: float
    kind: int


def _varint(value: int) -> bytes:
    head = bytearray()
    while value > 0x7F:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*head, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _piece(piece: Piece) -> bytes:
    score = _varint(2 << 3 | _FLOAT) + struct.pack("<f", piece.score)
    return _message(1, _message(1, piece.text.encode()) + score + _integer(3, piece.kind))


def model_proto(pieces: Iterable[Piece], unknown: str, space_prefix: bool) -> bytes:
    """A serialized byte-pair model that leaves text as it is, apart from spaces.

    Args:
      pieces: the vocabulary in the order of ids.
      unknown: text of the piece of kind 2.
      space_prefix: whether a text is encoded as if a space came before it.
    """
    trainer = _integer(3, _BPE) + _integer(35, True) + _message(45, unknown.encode())  # model_type byte_fallback unk_piece
    normalizer = _message(1, b"identity") + _integer(3, space_prefix) + _integer(4, False) + _integer(5, True)
    return b"".join(map(_piece, pieces)) + _message(2, trainer) + _message(3, normalizer)
