"""The directory of a ZIP archive whose entries are stored as they are, so that they can be used where they lie.

A reader of its own because the archive may be hostile: every count and extent is checked against the bytes there are, no
entry lies over another, and nothing of the archive is unpacked. Only the end of the file, the directory and the header in
front of each entry are read.

Source: PKWARE's APPNOTE.TXT 6.3 (records 4.3.7, 4.3.12, 4.3.14 to 4.3.16, extra field 0x0001).
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.source import shown

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
      InputError: for a damaged or compressed archive, names that lead elsewhere, and entries over one another.
    """
    start, nbytes, count = _directory(data)
    entries: dict[str, Entry] = {}
    free = 0
    for record in sorted(_records(data[start : start + nbytes].tobytes(), count), key=lambda record: record.header):
        entry = _placed(data, record)
        if record.name in entries:
            raise InputError(f"two entries are called {shown(record.name)}; the archive is damaged")
        if record.header < free or entry.start + entry.nbytes > start:
            raise InputError(f"entry {shown(record.name)} lies over another part of the archive; it is damaged")
        free = entry.start + entry.nbytes
        entries[record.name] = entry
    return entries


def require_intact(data: np.ndarray, name: str, entry: Entry) -> None:
    """Compares the bytes of an entry with its checksum.

    Raises:
      InputError: where they differ, naming the entry.
    """
    if zlib.crc32(data[entry.start : entry.start + entry.nbytes].data) != entry.checksum:
        raise InputError(f"entry {shown(name)} does not match its checksum; fetch the file again (or save it with checksums)")


def _directory(data: np.ndarray) -> tuple[int, int, int]:
    """First byte, length and number of entries of the directory, which ends where the closing records begin."""
    end = len(data) - _END.size  # a comment may not follow: then nothing has to be searched for
    if end < 0:
        raise InputError("the archive ends too early; fetch the file again")
    magic, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(data[end:].tobytes())
    if magic != b"PK\5\6" or comment:
        raise InputError("the archive does not end as a ZIP archive does; it is cut short or damaged")
    short = (disk, first_disk, here, count, nbytes, start)
    disk, first_disk, here, count, nbytes, start, closing = _directory64(data, end, short) or (*short, end)
    if (disk, first_disk, here) != (0, 0, count) or start + nbytes != closing:
        raise InputError("the directory of the archive is not where it should be; the file is cut short or damaged")
    if nbytes > _LARGEST_DIRECTORY or count > min(_LARGEST_COUNT, nbytes // _CENTRAL.size):
        raise InputError(f"the archive declares {count} entries in {nbytes} bytes, which cannot be; it is damaged")
    return start, nbytes, count


def _directory64(data: np.ndarray, end: int, short: tuple[int, ...]) -> tuple[int, ...] | None:
    """What `_directory` reads, from the 64-bit records if there are any, and where those begin."""
    at = end - _LOCATOR.size
    if at < 0 or data[at : at + 4].tobytes() != b"PK\6\7":
        return None
    _, disk, closing, disks = _LOCATOR.unpack(data[at:end].tobytes())
    if (disk, disks) != (0, 1) or closing + _END64.size != at:
        raise InputError("the 64-bit end record of the archive is not where it should be; the file is damaged")
    magic, _, _, _, *long = _END64.unpack(data[closing:at].tobytes())
    agree = all(narrow in (wide, _IN_64, _IN_64_SHORT) for narrow, wide in zip(short, long))
    if magic != b"PK\6\6" or not agree:
        raise InputError("the two end records of the archive disagree; it is damaged")
    return (*long, closing)


def _records(directory: bytes, count: int) -> Iterator[_Record]:
    position = 0
    for _ in range(count):
        fixed = directory[position : position + _CENTRAL.size]
        if len(fixed) < _CENTRAL.size or fixed[:4] != b"PK\1\2":
            raise InputError("the directory of the archive is damaged")
        _, _, _, flags, method, _, _, checksum, packed, size, name, extra, comment, disk, *_, header = _CENTRAL.unpack(fixed)
        names = position + _CENTRAL.size
        extras, position = names + name, names + name + extra + comment
        text = _name(directory[names:extras])
        if method or flags & _ENCRYPTED or disk:
            raise InputError(f"entry {shown(text)} is compressed, encrypted or split; save the file again with torch.save")
        size, packed, header = _wide(directory[extras : extras + extra], (size, packed, header))
        if size != packed or position > len(directory):
            raise InputError(f"entry {shown(text)} has two sizes or no end; the archive is damaged")
        yield _Record(text, header, size, checksum)


def _wide(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, ...]:
    """Size, packed size and place of an entry, those of them that need 64 bits from the extra field."""
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
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(f"entry {shown(name)} has a name that torch.save does not write; the archive is refused")
    return name


def _placed(data: np.ndarray, record: _Record) -> Entry:
    """An entry behind its own header, which has to tell the same as the directory."""
    fixed = data[record.header : record.header + _LOCAL.size].tobytes()
    if len(fixed) < _LOCAL.size or fixed[:4] != b"PK\3\4":
        raise InputError(f"entry {shown(record.name)} is not where the archive says; it is cut short or damaged")
    _, _, flags, method, *_, name, extra = _LOCAL.unpack(fixed)
    names = record.header + _LOCAL.size
    if method or flags & _ENCRYPTED or data[names : names + name].tobytes() != record.name.encode():
        raise InputError(f"entry {shown(record.name)} is described in two different ways; the archive is damaged")
    return Entry(names + name + extra, record.nbytes, record.checksum)
