"""Writing a GGUF file, version 3: typed metadata, a record a tensor, and the tensors one after the other.

Source: the GGUF specification of the ggml project.
"""

import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from llama_jax.data.atomic import atomic_write
from llama_jax.errors import InputError
from llama_jax.weights.gguf_blocks import BLOCK_TYPES
from llama_jax.weights.source import Shape, shown

_VERSION = 3
_ALIGNMENT = 32

# Metadata types by the type in Python: number and `struct` letter. Ids and counts are unsigned; a list may have any sign.
_SINGLE = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
_LISTED = _SINGLE | {int: (5, "i")}
_TEXT, _LIST = 8, 9

_TYPE_NUMBERS = {block.name: number for number, block in BLOCK_TYPES.items()}


class NewTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: as in the file.
      shape: in numpy order, the fastest axis last; rows are whole blocks of the type.
      type: name of the element type, such as `F16` or `Q8_0`.
      content: gives its bytes, uint8 and contiguous, piece by piece; called once, when its turn has come.
    """

    name: str
    shape: Shape
    type: str
    content: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        block = BLOCK_TYPES[_TYPE_NUMBERS[self.type]]
        return math.prod(self.shape) // block.length * block.nbytes


def write_gguf_file(path: pathlib.Path, metadata: Mapping[str, object], tensors: Sequence[NewTensor]) -> None:
    """Writes a file that is whole or absent, whatever happens; an older one at its place stays until then.

    Args:
      path: the file; its directory exists.
      metadata: text, `bool`, `int` (stored as UINT32), `float` (FLOAT32), and lists of these, each of one type (`int` as
        INT32); an empty list is one of texts. `general.alignment` is added.
      tensors: in the order of the file.

    Raises:
      InputError: naming the key, for metadata of another type or out of range; and what reading the content raises.
      OSError: where the file cannot be written.
    """
    header = _header({**metadata, "general.alignment": _ALIGNMENT}, tensors)
    with atomic_write(path) as file:
        file.write(header + _padding(len(header)))
        for tensor in tensors:
            _write_content(file, tensor)


def _header(metadata: Mapping[str, object], tensors: Sequence[NewTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    parts += [_entry(key, value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        parts.append(_record(tensor, offset))
        offset += tensor.nbytes + len(_padding(tensor.nbytes))
    return b"".join(parts)


def _write_content(file: BinaryIO, tensor: NewTensor) -> None:
    written = sum(file.write(piece.data) for piece in tensor.content())
    if written != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name}: {written} bytes given, {tensor.nbytes} expected")
    file.write(_padding(written))


def _record(tensor: NewTensor, offset: int) -> bytes:
    shape = tensor.shape[::-1]  # the file has the fastest axis first
    layout = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TYPE_NUMBERS[tensor.type], offset)
    return _text(tensor.name) + layout


def _entry(key: str, value: object) -> bytes:
    try:
        return _text(key) + _value(value)
    except (KeyError, struct.error, OverflowError, UnicodeEncodeError):
        raise InputError(f"metadata {key}: {shown(value)} cannot be stored; a text, true or false, a number of 32 bits "
                         "or a list of one of these expected") from None  # fmt: skip


def _value(value: object) -> bytes:
    if isinstance(value, list):
        return struct.pack("<I", _LIST) + _list(value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    kind, letter = _SINGLE[type(value)]
    return struct.pack(f"<I{letter}", kind, value)


def _list(values: list) -> bytes:
    types = {type(value) for value in values} or {str}
    if types == {str}:
        return struct.pack("<IQ", _TEXT, len(values)) + b"".join(map(_text, values))
    kind, letter = _LISTED[types.pop() if len(types) == 1 else object]
    return struct.pack(f"<IQ{len(values)}{letter}", kind, len(values), *values)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(length: int) -> bytes:
    return bytes(-length % _ALIGNMENT)
