"""What each token id adds to decoded text, in bytes: a character may be cut between two tokens, a byte never is."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from llama_jax.errors import InputError


class Surface(NamedTuple):
    """The bytes of every token.

    Attributes:
      pieces: UTF-8 bytes by token id; empty for special tokens, which are no part of the text.
      opening: bytes of those tokens that read differently where a text begins: SentencePiece writes a space before
        the first word and takes it away again.
    """

    pieces: tuple[bytes, ...]
    opening: Mapping[int, bytes]

    def piece(self, token: int, begins: bool) -> bytes:
        """The bytes of one token; `begins` says that no text came before it.

        Raises:
          InputError: for an id outside the vocabulary.
        """
        if not 0 <= token < len(self.pieces):
            raise InputError(f"token id {token}: the tokenizer has {len(self.pieces)} tokens, numbered from 0")
        return self.opening.get(token, self.pieces[token]) if begins else self.pieces[token]

    def walk(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The bytes of each token in turn."""
        begins = True
        for token in tokens:
            yield self.piece(token, begins)
            begins = begins and not self.pieces[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that form no character become U+FFFD, as Unicode recommends."""
        return b"".join(self.walk(tokens)).decode("utf-8", errors="replace")


def require_characters(text: str) -> str:
    """The text itself.

    Raises:
      InputError: if it holds half of a surrogate pair, which no UTF-8 file can contain (undecodable input does).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise InputError(f"text holds {found}, half of a surrogate pair; give text that is valid UTF-8") from None
    return text
