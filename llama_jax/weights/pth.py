"""Reading a `.pth` of PyTorch without PyTorch and without trust: a ZIP archive of one pickle and
raw storages.

Nothing of the file is executed (`pth_pickle`), every extent is checked against the bytes there are
(`stored_zip`), and the weights stay in the file, memory-mapped.

Source: PyTorch's `torch/serialization.py` and `caffe2/serialize/inline_container.h`, the format
  since PyTorch 1.6.
"""

import dataclasses
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.pth_pickle import PthTensor, tensors_in_pickle
from llama_jax.weights.source import blamed_on, mapped, shown

# --- stored zip ---
#
# The directory of a ZIP archive whose entries are stored as they are, so that they can be used
# where they lie.
#
# A reader of its own because the archive may be hostile: every count and extent is checked against
# the bytes there are, no entry lies over another, and nothing of the archive is unpacked. Only the
# end of the file, the directory and the header in front of each entry are read.
#
# Source: PKWARE's APPNOTE.TXT 6.3 (records 4.3.7, 4.3.12, 4.3.14 to 4.3.16, extra field 0x0001).


_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_EXTRA = struct.Struct("<2H")

_IN_64 = 0xFFFFFFFF  # a number that stands in the 64-bit field instead
_IN_64_SHORT = 0xFFFF
_LARGEST_COUNT = 1 << 16  # a model of 1000 layers has 10,000 entries
_LARGEST_DIRECTORY = 16 << 20
_ENCRYPTED = 0x2041  # flag bits: encrypted, strongly encrypted, masked headers


class Entry(NamedTuple):
    """Where the bytes of an entry lie.

    Attributes:
      start: first byte, from the beginning of the file.
      nbytes: how many.
      checksum: their CRC-32, as the directory states it.
    """

    start: int
    nbytes: int
    checksum: int


class _Record(NamedTuple):
    """An entry as the directory states it."""

    name: str
    header: int
    nbytes: int
    checksum: int


def stored_entries(data: np.ndarray) -> dict[str, Entry]:
    """The entries of an archive by name.

    Args:
      data: all bytes of the archive.

    Raises:
      InputError: for a damaged or compressed archive, names that lead elsewhere, and entries over
        one another.
    """
    start, nbytes, count = _directory(data)
    entries: dict[str, Entry] = {}
    free = 0
    for record in sorted(
        _central_directory(data[start : start + nbytes].tobytes(), count),
        key=lambda record: record.header,
    ):
        entry = _placed(data, record)
        if record.name in entries:
            raise InputError(f"two entries are called {shown(record.name)}; the archive is damaged")
        if record.header < free or entry.start + entry.nbytes > start:
            raise InputError(
                f"entry {shown(record.name)} lies over another part of the archive; it is damaged"
            )
        free = entry.start + entry.nbytes
        entries[record.name] = entry
    return entries


def require_intact(data: np.ndarray, name: str, entry: Entry) -> None:
    """Compares the bytes of an entry with its checksum.

    Raises:
      InputError: where they differ, naming the entry.
    """
    if zlib.crc32(data[entry.start : entry.start + entry.nbytes].data) != entry.checksum:
        raise InputError(
            f"entry {shown(name)} does not match its checksum; fetch the file again (or "
            "save it with checksums)"
        )


def _directory(data: np.ndarray) -> tuple[int, int, int]:
    """First byte, length and number of entries of the directory, which ends where the closing
    records begin.
    """
    end = len(data) - _END.size  # a comment may not follow: then nothing has to be searched for
    if end < 0:
        raise InputError("the archive ends too early; fetch the file again")
    magic, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(data[end:].tobytes())
    if magic != b"PK\5\6" or comment:
        raise InputError(
            "the archive does not end as a ZIP archive does; it is cut short or damaged"
        )
    short = (disk, first_disk, here, count, nbytes, start)
    disk, first_disk, here, count, nbytes, start, closing = _directory64(data, end, short) or (
        *short,
        end,
    )
    if (disk, first_disk, here) != (0, 0, count) or start + nbytes != closing:
        raise InputError(
            "the directory of the archive is not where it should be; the file is cut "
            "short or damaged"
        )
    if nbytes > _LARGEST_DIRECTORY or count > min(_LARGEST_COUNT, nbytes // _CENTRAL.size):
        raise InputError(
            f"the archive declares {count} entries in {nbytes} bytes, which cannot be; "
            "it is damaged"
        )
    return start, nbytes, count


def _directory64(data: np.ndarray, end: int, short: tuple[int, ...]) -> tuple[int, ...] | None:
    """What `_directory` reads, from the 64-bit records if there are any, and where those begin."""
    at = end - _LOCATOR.size
    if at < 0 or data[at : at + 4].tobytes() != b"PK\6\7":
        return None
    _, disk, closing, disks = _LOCATOR.unpack(data[at:end].tobytes())
    if (disk, disks) != (0, 1) or closing + _END64.size != at:
        raise InputError(
            "the 64-bit end record of the archive is not where it should be; the file is damaged"
        )
    magic, _, _, _, *long = _END64.unpack(data[closing:at].tobytes())
    agree = all(narrow in (wide, _IN_64, _IN_64_SHORT) for narrow, wide in zip(short, long))
    if magic != b"PK\6\6" or not agree:
        raise InputError("the two end records of the archive disagree; it is damaged")
    return (*long, closing)


def _central_directory(directory: bytes, count: int) -> Iterator[_Record]:
    position = 0
    for _ in range(count):
        fixed = directory[position : position + _CENTRAL.size]
        if len(fixed) < _CENTRAL.size or fixed[:4] != b"PK\1\2":
            raise InputError("the directory of the archive is damaged")
        (
            _,
            _,
            _,
            flags,
            method,
            _,
            _,
            checksum,
            packed,
            size,
            name,
            extra,
            comment,
            disk,
            *_,
            header,
        ) = _CENTRAL.unpack(fixed)
        names = position + _CENTRAL.size
        extras, position = names + name, names + name + extra + comment
        text = _name(directory[names:extras])
        if method or flags & _ENCRYPTED or disk:
            raise InputError(
                f"entry {shown(text)} is compressed, encrypted or split; save the file "
                "again with torch.save"
            )
        size, packed, header = _wide(directory[extras : extras + extra], (size, packed, header))
        if size != packed or position > len(directory):
            raise InputError(f"entry {shown(text)} has two sizes or no end; the archive is damaged")
        yield _Record(text, header, size, checksum)


def _wide(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, ...]:
    """Size, packed size and place of an entry, those of them that need 64 bits from the extra
    field.
    """
    wanted = numbers.count(_IN_64)
    if not wanted:
        return numbers
    wide = iter(_wide_field(extra, wanted))
    return tuple(next(wide) if number == _IN_64 else number for number in numbers)


def _wide_field(extra: bytes, wanted: int) -> tuple[int, ...]:
    position = 0
    while position + _EXTRA.size <= len(extra):
        kind, nbytes = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if kind == 1 and 8 * wanted <= nbytes <= len(extra) - position:
            return struct.unpack_from(f"<{wanted}Q", extra, position)
        position += nbytes
    raise InputError("an entry of the archive lacks its 64-bit size; the archive is damaged")


def _name(raw: bytes) -> str:
    """The name of an entry: parts with a slash between them, none of which leads upwards."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("the name of an entry is not UTF-8; the archive is damaged") from None
    if (
        not name.isprintable()
        or "\\" in name
        or any(part in ("", ".", "..") for part in name.split("/"))
    ):
        raise InputError(
            f"entry {shown(name)} has a name that torch.save does not write; the archive is refused"
        )
    return name


def _placed(data: np.ndarray, record: _Record) -> Entry:
    """An entry behind its own header, which has to tell the same as the directory."""
    fixed = data[record.header : record.header + _LOCAL.size].tobytes()
    if len(fixed) < _LOCAL.size or fixed[:4] != b"PK\3\4":
        raise InputError(
            f"entry {shown(record.name)} is not where the archive says; it is cut short or damaged"
        )
    _, _, flags, method, *_, name, extra = _LOCAL.unpack(fixed)
    names = record.header + _LOCAL.size
    if method or flags & _ENCRYPTED or data[names : names + name].tobytes() != record.name.encode():
        raise InputError(
            f"entry {shown(record.name)} is described in two different ways; the archive is damaged"
        )
    return Entry(names + name + extra, record.nbytes, record.checksum)


# --- pth ---


__all__ = ["PthFile", "PthTensor"]

_LARGEST_RECORD = 16 << 20  # a pickle takes about 200 bytes a tensor


@dataclasses.dataclass(frozen=True, eq=False)
class PthFile:
    """An open `.pth` file that holds a state dict.

    Attributes:
      path: the file.
      tensors: the tensors by name; nothing of them is read.
      data: the bytes of the whole file, memory-mapped.
      entries: the records of the archive by name, without the folder they are in.
      intact: names of the records whose checksums have been compared.
    """

    path: pathlib.Path
    tensors: dict[str, PthTensor]
    data: np.ndarray
    entries: dict[str, Entry]
    intact: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "PthFile":
        """Parses the directory of the archive and its pickle; no tensor is read.

        Raises:
          InputError: for a file that is missing, damaged, of another format, or that holds anything
            but tensors.
        """
        with blamed_on(path):
            data = mapped(path)
            _require_archive(data)
            entries = _records(stored_entries(data))
            _require_little_endian(data, entries)
            tensors = tensors_in_pickle(_record(data, entries, "data.pkl"))
            for name, tensor in tensors.items():
                with blamed_on(f"tensor {shown(name)}"):
                    _require_inside(tensor, entries)
            return cls(pathlib.Path(path), tensors, data, entries)

    def read(self, name: str) -> np.ndarray:
        """One tensor as stored, a view of the file; its checksum is compared when its storage is
        first read.

        Raises:
          InputError: for a tensor that is not there or is damaged, naming it.
        """
        with blamed_on(self.path):
            if name not in self.tensors:
                raise InputError(f"tensor {shown(name)} is missing")
            record = f"data/{self.tensors[name].storage.key}"
            if record not in self.intact:
                require_intact(self.data, record, self.entries[record])
                self.intact.add(record)
            return self.view(name)

    def view(self, name: str) -> np.ndarray:
        """As `read`, of a tensor that is there, without looking at its checksum (and so at all of
        its bytes).
        """
        tensor = self.tensors[name]
        dtype, entry = tensor.storage.dtype, self.entries[f"data/{tensor.storage.key}"]
        numbers = self.data[entry.start : entry.start + entry.nbytes].view(dtype)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, strides, writeable=False
        )


def _require_archive(data: np.ndarray) -> None:
    """Refuses the formats that PyTorch had before 1.6, and everything else."""
    magic = data[:4].tobytes()
    if magic[:1] == b"\x80" or data[257:262].tobytes() == b"ustar":
        raise InputError(
            "written in the format of PyTorch before 1.6; load it with torch and "
            "torch.save it again"
        )
    if magic != b"PK\3\4":
        raise InputError(f"not a .pth file: it begins with {magic!r}, b'PK\\x03\\x04' expected")


def _records(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries by their names in the one folder that they have to be in."""
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1:
        raise InputError(
            f"the archive has {len(folders)} folders at the top; torch.save writes one"
        )
    records = {name.partition("/")[2]: entry for name, entry in entries.items()}
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise InputError(
            "this is a TorchScript archive, which is a program; save the state dict with torch.save"
        )
    return records


def _require_little_endian(data: np.ndarray, records: dict[str, Entry]) -> None:
    order = (
        _record(data, records, "byteorder") if "byteorder" in records else b"little"
    )  # PyTorch before 2.1 names none
    if order != b"little":
        raise InputError(
            f"byte order {shown(order)} given; load the file with torch and save it on a "
            "little-endian machine"
        )


def _record(data: np.ndarray, records: dict[str, Entry], name: str) -> bytes:
    """The bytes of a small record."""
    if name not in records:
        raise InputError(f"the archive has no {name}; a file written by torch.save has")
    entry = records[name]
    if entry.nbytes > _LARGEST_RECORD:
        raise InputError(
            f"{name} has {entry.nbytes} bytes; that of a state dict of tensors has at "
            f"most {_LARGEST_RECORD}"
        )
    require_intact(data, name, entry)
    return data[entry.start : entry.start + entry.nbytes].tobytes()


def _require_inside(tensor: PthTensor, records: dict[str, Entry]) -> None:
    """Refuses a storage of another size than its record, and a tensor that reaches out of its
    storage.
    """
    storage = tensor.storage
    record = records.get(f"data/{storage.key}")
    if record is None or record.nbytes != storage.count * storage.dtype.itemsize:
        there = "missing" if record is None else f"{record.nbytes} bytes long"
        raise InputError(
            f"storage {storage.key} of {storage.count} {storage.dtype} is {there}; the "
            "file is damaged"
        )
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides)
    )
    size = math.prod(tensor.shape)
    if size > storage.count or (size and last >= storage.count) or tensor.offset > storage.count:
        raise InputError(
            f"shape {shown(tensor.shape)} reaches out of its storage of {storage.count}; "
            "the file is damaged"
        )
