"""Reading a GGUF file that nobody vouches for: every count and extent is checked against the bytes
that are there.

A file is a header (metadata, then one record a tensor) and, from an aligned offset on, the tensors'
bytes. The header is parsed at once and the bytes stay in the file, memory-mapped.

Source: the GGUF specification of the ggml project, versions 2 and 3.
"""

import dataclasses
import math
import os
import pathlib
import re
import struct
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.gguf_blocks import BLOCK_TYPES, DECODERS
from llama_jax.weights.source import blamed_on, shown, whole

# The largest vocabularies (256,000 tokens with merges) make headers of 15 MiB.
_LARGEST_HEADER = 64 << 20
_MOST_ITEMS = (
    1 << 22
)  # of all arrays together: as lists, they take many times the bytes of the file
_MOST_ROWS = 1 << 16  # of a table; the largest model has 1,200 tensors
_SMALLEST_ENTRY = 8 + 4 + 1  # an empty key, its type, one byte
_SMALLEST_TENSOR = (
    8 + 4 + 8 + 4 + 8
)  # an empty name, a number of dimensions, one dimension, type, offset

# Number of a metadata type to its letter, which `struct` and numpy share.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRUCTS = {kind: struct.Struct("<" + letter) for kind, letter in _NUMBERS.items()}
_STRING, _ARRAY = 8, 9
_UINT32, _UINT64 = _STRUCTS[4], _STRUCTS[10]


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
      shape: in numpy order, the fastest axis last.
      type: name of the element type, such as `F16` or `Q4_1`.
      offset: first byte, from the beginning of the file.
      nbytes: bytes in the file.
      part: which file of a model in several, from 0.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    part: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """An open GGUF file, or the several files of one model (see `gguf_split`).

    Attributes:
      path: the file, or the first of several.
      metadata: keys and values of the header; arrays are lists.
      tensors: the tensors by name.
      data: the bytes of each whole file, memory-mapped.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: tuple[np.ndarray, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GgufFile":
        """Parses and checks the header of one file; no tensor is read.

        Raises:
          InputError: for a file that is missing, damaged, of another version or byte order.
        """
        with blamed_on(path):
            data = _mapped(path)
            header = _Header(data[:_LARGEST_HEADER].data)
            tensor_count, entry_count = header.counts()
            metadata = header.table(entry_count, _SMALLEST_ENTRY, header.value)
            records = header.table(tensor_count, _SMALLEST_TENSOR, header.record)
            tensors = _placed(records, header.position, _alignment(metadata), len(data))
            return cls(pathlib.Path(path), metadata, tensors, (data,))

    def read(self, name: str) -> np.ndarray:
        """The weights of one tensor: float types as stored (a view of the file), quantised ones as
        float32.

        Raises:
          InputError: for a tensor that is not there or an element type that is not supported,
            naming it.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path}: tensor {shown(name)} is missing")
        tensor = self.tensors[name]
        if tensor.type not in DECODERS:
            supported = ", ".join(DECODERS)
            raise InputError(
                f"{self.path}: tensor {shown(name)} has type {tensor.type}; supported "
                f"are {supported}"
            )
        data = self.data[tensor.part][tensor.offset : tensor.offset + tensor.nbytes]
        return DECODERS[tensor.type](data).reshape(tensor.shape)


def _mapped(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a file, mapped read-only."""
    try:
        size = os.path.getsize(path)
        # An empty file cannot be mapped; the parser refuses it.
        return np.asarray(np.memmap(path, np.uint8, "r")) if size else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None


class _Header:
    """A position in the header, and readers that move it."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0
        self.room = _MOST_ITEMS

    def refuse(self, what: str) -> NoReturn:
        """Raises an `InputError` that says where."""
        raise InputError(f"damaged GGUF header: {what} at byte {self.position}")

    def require(self, nbytes: int) -> None:
        """Refuses a header with fewer bytes left."""
        left = len(self.data) - self.position
        if nbytes > left:
            self.refuse(
                f"{nbytes} more bytes declared than the {left} there are"
                if nbytes > 8
                else "the file ends"
            )

    def number(self, layout: struct.Struct) -> Any:
        """One number."""
        self.require(layout.size)
        (number,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return number

    def string(self) -> str:
        """One text, with its length in front."""
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Texts, in one loop without calls of ours: a vocabulary with its merges has a few hundred
        thousand.
        """
        self.require(count * _UINT64.size)
        texts, end = [], self.position
        try:
            for _ in range(count):
                (length,) = _UINT64.unpack_from(self.data, end)
                start, end = end + _UINT64.size, end + _UINT64.size + length
                if end > len(self.data):
                    self.refuse(f"a text of {length} bytes, more bytes than there are,")
                texts.append(str(self.data[start:end], "utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            self.refuse(
                "the file ends" if isinstance(error, struct.error) else "a text that is not UTF-8"
            )
        self.position = end
        return texts

    def counts(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata entries, after magic and version."""
        magic = bytes(self.data[:4])
        if magic != b"GGUF":
            raise InputError(f"not a GGUF file: it begins with {magic!r}, b'GGUF' expected")
        self.position = 4
        version = self.number(_UINT32)
        if version in (2 << 24, 3 << 24):
            raise InputError(
                "GGUF in big-endian byte order is not supported; convert it to little-endian"
            )
        if version not in (2, 3):
            raise InputError(f"GGUF version {version} is not supported; 2 and 3 are")
        return self.number(_UINT64), self.number(_UINT64)

    def table(self, count: int, smallest: int, item: Callable[[], Any]) -> dict[str, Any]:
        """`count` pairs of a name and an item of at least `smallest` bytes together."""
        self.require(count * smallest)
        if count > _MOST_ROWS:
            self.refuse(f"a table of {count} rows, more than the {_MOST_ROWS} of any model,")
        table: dict[str, Any] = {}
        for _ in range(count):
            name = self.string()
            if name in table:
                self.refuse(f"a second {shown(name)}")
            table[name] = item()
        return table

    def value(self) -> Any:
        """The type and value of a metadata entry."""
        kind = self.number(_UINT32)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _STRUCTS:
            self.refuse(f"unknown metadata type {kind}")
        return self.number(_STRUCTS[kind])

    def array(self) -> list:
        """An array of numbers or of texts."""
        kind, count = self.number(_UINT32), self.number(_UINT64)
        self.require(count)
        self.room -= count
        if self.room < 0:
            self.refuse(
                f"arrays of more than {_MOST_ITEMS} items together, more than any model has,"
            )
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            self.refuse("an array of arrays, which is not supported,")
        if kind not in _NUMBERS:
            self.refuse(f"unknown metadata type {kind}")
        size = count * _STRUCTS[kind].size
        self.require(size)
        start, self.position = self.position, self.position + size
        return np.frombuffer(self.data[start : self.position], "<" + _NUMBERS[kind]).tolist()

    def record(self) -> GgufTensor:
        """The record of a tensor, its offset still counted from the first tensor."""
        rank = self.number(_UINT32)
        if not 1 <= rank <= 4:
            self.refuse(f"a tensor of {rank} dimensions (1 to 4 expected)")
        shape = tuple(self.number(_UINT64) for _ in range(rank))[::-1]
        kind, offset = self.number(_UINT32), self.number(_UINT64)
        if kind not in BLOCK_TYPES:
            supported = ", ".join(DECODERS)
            raise InputError(
                f"a tensor has element type {kind}, which is not supported; supported "
                f"are {supported}"
            )
        block = BLOCK_TYPES[kind]
        if min(shape) < 1 or shape[-1] % block.length:
            self.refuse(
                f"a tensor of shape {shape} and type {block.name} (rows are whole blocks "
                f"of {block.length})"
            )
        return GgufTensor(
            shape, block.name, offset, math.prod(shape) // block.length * block.nbytes
        )


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or alignment < 1
        or alignment & (alignment - 1)
    ):
        raise InputError(f"general.alignment is {shown(alignment)}; a power of two expected")
    return alignment


def _placed(
    records: dict[str, GgufTensor], header_end: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    """The tensors with offsets from the beginning of the file, each inside it and none over
    another.
    """
    start = -(-header_end // alignment) * alignment
    tensors = {
        name: dataclasses.replace(record, offset=start + record.offset)
        for name, record in records.items()
    }
    free = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        end = tensor.offset + tensor.nbytes
        if (tensor.offset - start) % alignment:
            raise InputError(
                f"tensor {shown(name)} is not aligned to {alignment} bytes; the file is damaged"
            )
        if tensor.offset < free:
            raise InputError(f"tensor {shown(name)} lies over another one; the file is damaged")
        if end > size:
            raise InputError(
                f"tensor {shown(name)} ends at byte {end} of {size}; the file is cut "
                "short or damaged"
            )
        free = end
    return tensors


# --- gguf split ---
#
# A model in several GGUF files, `NAME-00001-of-0000N.gguf` and so on, opened as one.
#
# Every part is a GGUF file with a share of the tensors; the first also has the metadata. Each says
# which part it is (`split.no`, from 0), of how many (`split.count`), and how many tensors they hold
# together (`split.tensors.count`).
#
# Source: `gguf-split` and `llama_split_path` of the llama.cpp project.


_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_OF_ALL = ("split.count", "split.tensors.count")
_OF_ONE = ("split.no", "general.alignment")


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a file, and its neighbours in the same directory if it is one part of a model; no
    tensor is read.

    Args:
      path: a whole file or any of the parts.

    Raises:
      InputError: for a file that is missing, damaged, of another version or byte order; naming the
        parts that are not there, or the one that is not of the same model.
    """
    file = GgufFile.open(path)
    with blamed_on(path):
        count = whole(file.metadata, "split.count", 1)
        if count in (0, 1):
            return file
        paths = _all_parts(file.path, whole(file.metadata, "split.no"), count)
    return _merged([file if part == file.path else GgufFile.open(part) for part in paths])


def part_paths(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that belong together by their names: a part's neighbours and itself, or the file
    alone; nothing is opened.
    """
    name = _NAME.fullmatch(path.name)
    if name is None:
        return [path]
    paths = [
        path.with_name(f"{name[1]}-{part:05}-of-{name[3]}.gguf")
        for part in range(1, int(name[3]) + 1)
    ]
    return [part for part in paths if part.is_file()]


def _all_parts(path: pathlib.Path, number: int, count: int) -> list[pathlib.Path]:
    """The files of a model, in order, by the name of one of them."""
    name = _NAME.fullmatch(path.name)
    if name is None or (int(name[2]) - 1, int(name[3])) != (number, count):
        raise InputError(
            f"part {number + 1} of {count} by its metadata (split.no, split.count), "
            "which its name contradicts; "
            f"NAME-{number + 1:05}-of-{count:05}.gguf expected"
        )
    paths = [
        path.with_name(f"{name[1]}-{part:05}-of-{name[3]}.gguf") for part in range(1, count + 1)
    ]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"one of {count} parts, of which {', '.join(missing[:3])}{rest} cannot be "
            "found beside it"
        )
    return paths


def _merged(files: list[GgufFile]) -> GgufFile:
    """All parts as one file: the metadata of the first, the tensors of all."""
    first = files[0]
    tensors: dict[str, GgufTensor] = {}
    for part, file in enumerate(files):
        with blamed_on(file.path):
            _require_alike(file, part, first)
            twice = next((name for name in file.tensors if name in tensors), None)
            if twice is not None:
                raise InputError(
                    f"tensor {shown(twice)} is in an earlier part already; fetch all parts again"
                )
        tensors |= {
            name: dataclasses.replace(tensor, part=part) for name, tensor in file.tensors.items()
        }
    with blamed_on(first.path):
        declared = whole(first.metadata, "split.tensors.count")
        if declared != len(tensors):
            raise InputError(
                f"split.tensors.count is {declared} but the parts hold {len(tensors)}; "
                "fetch all parts again"
            )
    return GgufFile(first.path, first.metadata, tensors, tuple(file.data[0] for file in files))


def _require_alike(file: GgufFile, part: int, first: GgufFile) -> None:
    """Refuses a part of another model, or one with metadata of its own that nobody would read."""
    number = whole(file.metadata, "split.no")
    if number != part:
        raise InputError(f"split.no is {number}, {part} expected by its name; fetch the file again")
    for key in sorted({*file.metadata, *_OF_ALL} - {*_OF_ONE}):
        here, there = file.metadata.get(key), first.metadata.get(key)
        if here != there:
            raise InputError(
                f"{shown(key)} is {shown(here)} but {shown(there)} in {first.path.name}; "
                "fetch all parts again"
            )
