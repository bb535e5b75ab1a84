"""SentencePiece models: the tokenizer of LLaMA 1 and 2, and of models trained here."""

import dataclasses
import functools
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from llama_jax.errors import InputError
from llama_jax.text.byte_level import TokenBytes, require_characters

# --- model proto ---
#
# Writes a SentencePiece model from its pieces, and reads fields that the library does not expose.
#
# The message is small and its field numbers are fixed, so its protocol-buffer form is written here
# directly: the generated classes that ship with sentencepiece demand one exact protobuf version.
#
# Source: sentencepiece_model.proto of the SentencePiece project (field numbers below).


_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types

# Fields that are read, by message, with their types.
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
    trainer = (
        _integer(3, _BPE) + _integer(35, True) + _message(45, unknown.encode())
    )  # model_type byte_fallback unk_piece
    normalizer = (
        _message(1, b"identity")
        + _integer(3, space_prefix)
        + _integer(4, False)
        + _integer(5, True)
    )
    return b"".join(map(_piece, pieces)) + _message(2, trainer) + _message(3, normalizer)


class Model(NamedTuple):
    """What a serialized model says about encoding.

    Attributes:
      pieces: the vocabulary in the order of ids.
      byte_pair: whether pieces are merged by score (else: unigram, words or characters).
      byte_fallback: whether characters that no piece holds are written in bytes.
      charsmap: compiled table by which characters are replaced before encoding; empty where text is
        left as it is.
      space_prefix: whether a text is encoded as if a space came before it.
      plain_spaces: whether every space becomes one `▁`: none is removed, escaped otherwise or put
        after its word.
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
      InputError: for bytes that end inside a field or hold a kind of field that the format does not
        use.
    """
    parts = list(_fields(model, _MODEL_FIELDS))
    trainer = dict(_fields(b"".join(part for field, part in parts if field == 2), _TRAINER_FIELDS))
    normalizer = dict(
        _fields(b"".join(part for field, part in parts if field == 3), _NORMALIZER_FIELDS)
    )
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
    """The most bytes by which a serialized model replaces one stretch of text before encoding.

    Raises:
      InputError: as `read_model`.
    """
    parts = _fields(model, _MODEL_FIELDS)
    normalizers = (
        dict(_fields(part, _NORMALIZER_FIELDS)) for field, part in parts if field in (3, 5)
    )
    charsmaps = (normalizer.get(2, b"") for normalizer in normalizers)
    # Four bytes tell the size of an index, which comes next; then the replacements, each with a
    # zero byte behind it.
    texts = (charsmap[4 + int.from_bytes(charsmap[:4], "little") :] for charsmap in charsmaps)
    return max((len(entry) for text in texts for entry in text.split(b"\0")), default=0)


def _read_piece(content: bytes) -> Piece:
    fields = dict(_fields(content, _PIECE_FIELDS))
    return Piece(fields.get(1, b"").decode(), fields.get(2, 0.0), fields.get(3, 1))


def _fields(content: bytes, known: Mapping[int, type]) -> Iterator[tuple[int, Any]]:
    """Numbers and values of the known fields of a message; others, or with another kind of value,
    are none of ours.
    """
    for number, value in _all_fields(content):
        if type(value) is known.get(number):
            yield number, value


def _all_fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message: an integer for a varint, a float for four bytes, bytes for
    the rest.
    """
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
        yield (
            key >> 3,
            value if kind == _VARINT else struct.unpack("<f", held)[0] if kind == _FLOAT else held,
        )
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


# --- sentence piece ---


_LARGEST_FILE = 64 << 20
_LONGEST_PIECE = 1024  # characters
_LONGEST_REPLACEMENT = 256  # bytes; Unicode's longest compatibility form has 33
_SPACE = "\u2581"  # how SentencePiece spells a space


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A `llama_jax.text.tokenizer.Tokenizer` around a SentencePiece model.

    Attributes:
      processor: the library's object.
      begin_id: id of the token that begins a text (`<s>`), or `None`.
      end_id: id of the token that ends a text (`</s>`), or `None`.
      adds_begin: whether a plain prompt begins with `begin_id`.
      promoted: control symbols that their file calls ordinary, see `llama_jax.text.files`.
    """

    processor: SentencePieceProcessor
    begin_id: int | None
    end_id: int | None
    adds_begin: bool
    promoted: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.processor.vocab_size()

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Control symbols and their ids."""
        control = filter(self.processor.is_control, range(self.vocab_size))
        return {self.processor.id_to_piece(token): token for token in control}

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token."""
        pieces = tuple(map(self._piece_bytes, range(self.vocab_size)))
        spaced = (
            token
            for token in range(self.vocab_size)
            if self.processor.id_to_piece(token).startswith(_SPACE)
        )
        return TokenBytes(
            pieces, {token: self.processor.decode([token]).encode() for token in spaced}
        )

    def _piece_bytes(self, token: int) -> bytes:
        """Bytes inside a text; the library decodes bytes only in runs, so byte pieces are read from
        their names.
        """
        piece = self.processor.id_to_piece(token)
        if self.processor.is_byte(token):
            return bytes.fromhex(piece[3:5])
        if self.processor.is_control(token) or self.processor.is_unknown(token):
            return self.processor.decode([token]).encode()
        return piece.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control symbols written in it stay text, nothing is added.

        Raises:
          InputError: for text that is not valid Unicode.
        """
        return self.processor.encode(require_characters(text))

    def encode_after_special(self, text: str) -> list[int]:
        """Ids of text after a special token: it begins a word there as well (so Meta's code
        encodes turns).
        """
        return self.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.token_bytes.decode(tokens)


def processor_from_bytes(model: bytes, origin: str) -> SentencePieceProcessor:
    """The library's object for a serialized model.

    Args:
      model: content of a `tokenizer.model`.
      origin: where the bytes come from, for the message.

    Raises:
      InputError: for bytes that are no SentencePiece model, and for one that makes a text grow
        without measure.
    """
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        pieces = processor.id_to_piece(
            list(range(processor.vocab_size()))
        )  # pieces that are not UTF-8 show up here
        replacement = longest_replacement(processor.serialized_model_proto())
    except (RuntimeError, UnicodeDecodeError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{origin}: not a SentencePiece model ({reason}); give an intact tokenizer.model"
        ) from None
    longest = max(map(len, pieces), default=0)
    if longest > _LONGEST_PIECE or replacement > _LONGEST_REPLACEMENT:
        raise InputError(
            f"{origin}: a piece of {longest} characters, a replacement of {replacement} "
            "bytes given, "
            f"at most {_LONGEST_PIECE} and {_LONGEST_REPLACEMENT} expected"
        )
    return processor


def load_sentence_piece(path: pathlib.Path) -> SentencePieceTokenizer:
    """Reads a `tokenizer.model`; begin and end tokens are those of the file, and a prompt begins
    with the former.

    Raises:
      InputError: for files above 64 MiB and for anything that is no SentencePiece model.
    """
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise InputError(
            f"{path}: {size} bytes given, at most {_LARGEST_FILE} expected of a SentencePiece model"
        )
    processor = processor_from_bytes(path.read_bytes(), str(path))
    begin, end = processor.bos_id(), processor.eos_id()
    return SentencePieceTokenizer(
        processor, begin if begin >= 0 else None, end if end >= 0 else None, begin >= 0
    )
