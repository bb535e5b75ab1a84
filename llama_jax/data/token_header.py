"""The header of a token file: what it says about itself, and where in the file what lies.

magic, version, length and CRC-32 of the header   20 bytes
header                                            JSON, up to byte 4096
tokens                                            uint16 or uint32, little endian
padding to a multiple of 8 bytes
starts: position of each document's first token   uint64, little endian
mask: which tokens are learned from, if not all   one bit a token, the first in the highest bit of a byte
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from llama_jax.errors import CorruptError

VERSION = 2
TOKENS_AT = 4096  # bytes
START_DTYPE: np.dtype = np.dtype("<u8")

Kind = Literal["text", "chat", "pairs"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MAGIC = b"LJTOKENS"
_PREAMBLE = struct.Struct("<8sIII")
_TOKEN_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class TokenHeader(NamedTuple):
    """What a token file says about itself.

    Attributes:
      kind: `text`, learned from as a whole; `chat`, conversations with a mask of what the assistant says; `pairs`, the same
        with two neighbouring documents for one prompt, the chosen answer before the rejected one.
      dtype: `uint16` where the vocabulary allows, else `uint32`.
      tokens: number of tokens, begin and end tokens included.
      documents: number of documents; each has at least one token.
      bytes_of_text: UTF-8 bytes of what is learned from, all text or what the assistant says: the denominator of bits per byte.
      vocab_size: every token is below it.
      tokenizer_sha256: of the tokenizer's file.
      sources_sha256: of the documents' names and texts.
      tokens_crc32: checksum of the tokens' bytes.
      starts_crc32: checksum of the starts' bytes.
      mask_crc32: checksum of the mask's bytes; 0 for `text`, which has none.
    """

    kind: str
    dtype: str
    tokens: int
    documents: int
    bytes_of_text: int
    vocab_size: int
    tokenizer_sha256: str
    sources_sha256: str
    tokens_crc32: int
    starts_crc32: int
    mask_crc32: int

    @property
    def token_dtype(self) -> np.dtype:
        """The type of the tokens in the file."""
        return _TOKEN_DTYPES[self.dtype]

    @property
    def starts_at(self) -> int:
        """Byte at which the starts begin."""
        tokens_end = TOKENS_AT + self.tokens * self.token_dtype.itemsize
        return -(-tokens_end // START_DTYPE.itemsize) * START_DTYPE.itemsize

    @property
    def mask_at(self) -> int:
        """Byte at which the mask begins."""
        return self.starts_at + self.documents * START_DTYPE.itemsize

    @property
    def mask_bytes(self) -> int:
        """Length of the mask; 0 where every token is learned from."""
        return 0 if self.kind == "text" else -(-self.tokens // 8)

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.mask_at + self.mask_bytes


def choose_dtype(vocab_size: int) -> str:
    """The smallest type of token that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def pack_header(header: TokenHeader) -> bytes:
    """The first bytes of the file."""
    body = json.dumps(header._asdict()).encode()
    return _PREAMBLE.pack(_MAGIC, VERSION, len(body), zlib.crc32(body)) + body


def parse_header(path: Path, block: bytes) -> TokenHeader:
    """Checks the header of a file.

    Args:
      path: of the file, for messages.
      block: its first `TOKENS_AT` bytes.

    Raises:
      CorruptError: it is not a token file of this version, or its header is damaged.
    """
    if len(block) < TOKENS_AT or not block.startswith(_MAGIC):
        raise CorruptError(f"{path}: not a token file, or cut off in its header; prepare the data again")
    _, version, length, crc = _PREAMBLE.unpack_from(block)
    if version != VERSION:
        raise CorruptError(f"{path}: token file of version {version}, {VERSION} expected; prepare the data again")
    body = block[_PREAMBLE.size : _PREAMBLE.size + length]
    if zlib.crc32(body) != crc:
        raise CorruptError(f"{path}: the checksum of its header is wrong; prepare the data again")
    return _parse(path, body)


def _parse(path: Path, body: bytes) -> TokenHeader:
    """The header as typed values: a checksum proves that it is whole, not that this program wrote it."""
    try:
        header = TokenHeader(**json.loads(body))
    except (ValueError, TypeError, RecursionError):
        raise CorruptError(f"{path}: its header is not one of a token file; prepare the data again") from None
    types_fit = all(type(value) is TokenHeader.__annotations__[name] for name, value in header._asdict().items())
    known = types_fit and header.dtype in _TOKEN_DTYPES and header.kind in KINDS
    if not known or min(header.tokens, header.documents) < 1:
        raise CorruptError(f"{path}: its header has values of a wrong kind; prepare the data again")
    return header
