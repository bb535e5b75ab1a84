"""Writes a SentencePiece model from its pieces, and reads what the library does not tell of one.

The message is small and its field numbers are fixed, so its protocol-buffer form is written here directly: the
generated classes that ship with sentencepiece demand one exact protobuf version.

Source: sentencepiece_model.proto of the SentencePiece project (field numbers below).
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from llama_jax.errors import InputError

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types

# Fields that are read, by message, with what they hold.
_MODEL_FIELDS: Mapping[int, type] = {1: bytes, 2: bytes, 3: bytes, 5: bytes}
_PIECE_FIELDS: Mapping[int, type] = {1: bytes, 2: float, 3: int}
_TRAINER_FIELDS: Mapping[int, type] = {3: int, 24: int, 35: int}
_NORMALIZER_FIELDS: Mapping[int, type] = {2: bytes, 3: int, 4: int, 5: int}


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


class Model(NamedTuple):
    """What a serialized model says about encoding.

    Attributes:
      pieces: the vocabulary in the order of ids.
      byte_pair: whether pieces are merged by score (else: unigram, words or characters).
      byte_fallback: whether characters that no piece holds are written in bytes.
      charsmap: compiled table by which characters are replaced before encoding; empty where text is left as it is.
      space_prefix: whether a text is encoded as if a space came before it.
      plain_spaces: whether every space becomes one `▁`: none is removed, escaped otherwise or put behind its word.
    """

    pieces: tuple[Piece, ...]
    byte_pair: bool
    byte_fallback: bool
    charsmap: bytes
    space_prefix: bool
    plain_spaces: bool


def read_model(model: bytes) -> Model:
    """Reads a serialized model; absent fields have the defaults of sentencepiece_model.proto.

    Raises:
      InputError: for bytes that end inside a field or hold a kind of field that the format does not use.
    """
    parts = list(_fields(model, _MODEL_FIELDS))
    trainer = dict(_fields(b"".join(part for field, part in parts if field == 2), _TRAINER_FIELDS))
    normalizer = dict(_fields(b"".join(part for field, part in parts if field == 3), _NORMALIZER_FIELDS))
    spaces = (not normalizer.get(4, True), normalizer.get(5, True), not trainer.get(24, False))
    return Model(
        pieces=tuple(_read_piece(part) for field, part in parts if field == 1),
        byte_pair=trainer.get(3, _UNIGRAM) == _BPE,
        byte_fallback=bool(trainer.get(35, False)),
        charsmap=normalizer.get(2, b""),
        space_prefix=bool(normalizer.get(3, True)),
        plain_spaces=all(spaces),
    )


def longest_replacement(model: bytes) -> int:
    """The most bytes that a serialized model puts in place of one stretch of text before encoding.

    Raises:
      InputError: as `read_model`.
    """
    parts = _fields(model, _MODEL_FIELDS)
    normalizers = (dict(_fields(part, _NORMALIZER_FIELDS)) for field, part in parts if field in (3, 5))
    charsmaps = (normalizer.get(2, b"") for normalizer in normalizers)
    # Four bytes tell the size of an index, which comes next; then the replacements, each with a zero byte behind it.
    texts = (charsmap[4 + int.from_bytes(charsmap[:4], "little") :] for charsmap in charsmaps)
    return max((len(entry) for text in texts for entry in text.split(b"\0")), default=0)


def _read_piece(content: bytes) -> Piece:
    fields = dict(_fields(content, _PIECE_FIELDS))
    return Piece(fields.get(1, b"").decode(), fields.get(2, 0.0), fields.get(3, 1))


def _fields(content: bytes, known: Mapping[int, type]) -> Iterator[tuple[int, Any]]:
    """Numbers and values of the known fields of a message; others, or with another kind of value, are none of ours."""
    for number, value in _all_fields(content):
        if type(value) is known.get(number):
            yield number, value


def _all_fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message: an integer for a varint, a float for four bytes, bytes for the rest."""
    position = 0
    while position < len(content):
        key, position = _read_varint(content, position)
        kind, value = key & 7, 0
        if kind == _BYTES:
            value, position = _read_varint(content, position)
        size = {_VARINT: 0, _DOUBLE: 8, _BYTES: value, _FLOAT: 4}.get(kind)
        if size is None or position + size > len(content):
            raise InputError(f"SentencePiece model: field {key >> 3} at byte {position} is damaged")
        if kind == _VARINT:
            value, position = _read_varint(content, position)
        held = content[position : position + size]
        yield key >> 3, value if kind == _VARINT else struct.unpack("<f", held)[0] if kind == _FLOAT else held
        position += size


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            break
        value |= (content[position] & 0x7F) << shift
        position += 1
        if content[position - 1] < 0x80:
            return value, position
    raise InputError(f"SentencePiece model: the number at byte {position} does not end")
