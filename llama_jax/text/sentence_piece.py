"""SentencePiece models: the tokenizer of LLaMA 1 and 2, and of models trained here."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping

from sentencepiece import SentencePieceProcessor

from llama_jax.errors import InputError
from llama_jax.text.model_proto import longest_replacement
from llama_jax.text.surface import Surface, require_characters

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
      promoted: control symbols that their file calls ordinary, see `llama_jax.text.turns`.
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
    def surface(self) -> Surface:
        """The bytes of every token."""
        pieces = tuple(map(self._piece_bytes, range(self.vocab_size)))
        spaced = (token for token in range(self.vocab_size) if self.processor.id_to_piece(token).startswith(_SPACE))
        return Surface(pieces, {token: self.processor.decode([token]).encode() for token in spaced})

    def _piece_bytes(self, token: int) -> bytes:
        """Bytes inside a text; the library decodes bytes only in runs, so byte pieces are read from their names."""
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
        """Ids of text behind a special token: it begins a word there as well (so Meta's code encodes turns)."""
        return self.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.surface.decode(tokens)


def processor_from_bytes(model: bytes, origin: str) -> SentencePieceProcessor:
    """The library's object for a serialized model.

    Args:
      model: content of a `tokenizer.model`.
      origin: where the bytes come from, for the message.

    Raises:
      InputError: for bytes that are no SentencePiece model, and for one that makes a text grow without measure.
    """
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        pieces = processor.id_to_piece(list(range(processor.vocab_size())))  # pieces that are not UTF-8 show up here
        replacement = longest_replacement(processor.serialized_model_proto())
    except (RuntimeError, UnicodeDecodeError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{origin}: not a SentencePiece model ({reason}); give an intact tokenizer.model") from None
    longest = max(map(len, pieces), default=0)
    if longest > _LONGEST_PIECE or replacement > _LONGEST_REPLACEMENT:
        raise InputError(f"{origin}: a piece of {longest} characters, a replacement of {replacement} bytes given, "
                         f"at most {_LONGEST_PIECE} and {_LONGEST_REPLACEMENT} expected")  # fmt: skip
    return processor


def load_sentence_piece(path: pathlib.Path) -> SentencePieceTokenizer:
    """Reads a `tokenizer.model`; begin and end tokens are those of the file, and a prompt begins with the former.

    Raises:
      InputError: for files above 64 MiB and for anything that is no SentencePiece model.
    """
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise InputError(f"{path}: {size} bytes given, at most {_LARGEST_FILE} expected of a SentencePiece model")
    processor = processor_from_bytes(path.read_bytes(), str(path))
    begin, end = processor.bos_id(), processor.eos_id()
    return SentencePieceTokenizer(processor, begin if begin >= 0 else None, end if end >= 0 else None, begin >= 0)
