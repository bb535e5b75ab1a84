"""Reading a `.pth` of PyTorch without PyTorch and without trust: a ZIP archive of one pickle and raw storages.

Nothing of the file is executed (`pth_pickle`), every extent is checked against the bytes there are (`stored_zip`), and the
weights stay in the file, memory-mapped.

Source: PyTorch's `torch/serialization.py` and `caffe2/serialize/inline_container.h`, the format since PyTorch 1.6.
"""

import dataclasses
import math
import os
import pathlib

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.files import mapped
from llama_jax.weights.pth_pickle import PthTensor, tensors_in_pickle
from llama_jax.weights.source import blamed_on, shown
from llama_jax.weights.stored_zip import Entry, require_intact, stored_entries

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
          InputError: for a file that is missing, damaged, of another format, or that holds anything but tensors.
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
        """One tensor as stored, a view of the file; its checksum is compared when its storage is first read.

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
        """As `read`, of a tensor that is there, without looking at its checksum (and so at all of its bytes)."""
        tensor = self.tensors[name]
        dtype, entry = tensor.storage.dtype, self.entries[f"data/{tensor.storage.key}"]
        numbers = self.data[entry.start : entry.start + entry.nbytes].view(dtype)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)


def _require_archive(data: np.ndarray) -> None:
    """Refuses the formats that PyTorch had before 1.6, and everything else."""
    magic = data[:4].tobytes()
    if magic[:1] == b"\x80" or data[257:262].tobytes() == b"ustar":
        raise InputError("written in the format of PyTorch before 1.6; load it with torch and torch.save it again")
    if magic != b"PK\3\4":
        raise InputError(f"not a .pth file: it begins with {magic!r}, b'PK\\x03\\x04' expected")


def _records(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries by their names in the one folder that they have to be in."""
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1:
        raise InputError(f"the archive has {len(folders)} folders at the top; torch.save writes one")
    records = {name.partition("/")[2]: entry for name, entry in entries.items()}
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise InputError("this is a TorchScript archive, which is a program; save the state dict with torch.save")
    return records


def _require_little_endian(data: np.ndarray, records: dict[str, Entry]) -> None:
    order = _record(data, records, "byteorder") if "byteorder" in records else b"little"  # PyTorch before 2.1 names none
    if order != b"little":
        raise InputError(f"byte order {shown(order)} given; load the file with torch and save it on a little-endian machine")


def _record(data: np.ndarray, records: dict[str, Entry], name: str) -> bytes:
    """The bytes of a small record."""
    if name not in records:
        raise InputError(f"the archive has no {name}; a file written by torch.save has")
    entry = records[name]
    if entry.nbytes > _LARGEST_RECORD:
        raise InputError(f"{name} has {entry.nbytes} bytes; that of a state dict of tensors has at most {_LARGEST_RECORD}")
    require_intact(data, name, entry)
    return data[entry.start : entry.start + entry.nbytes].tobytes()


def _require_inside(tensor: PthTensor, records: dict[str, Entry]) -> None:
    """Refuses a storage of another size than its record, and a tensor that reaches out of its storage."""
    storage = tensor.storage
    record = records.get(f"data/{storage.key}")
    if record is None or record.nbytes != storage.count * storage.dtype.itemsize:
        there = "missing" if record is None else f"{record.nbytes} bytes long"
        raise InputError(f"storage {storage.key} of {storage.count} {storage.dtype} is {there}; the file is damaged")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    size = math.prod(tensor.shape)
    if size > storage.count or (size and last >= storage.count) or tensor.offset > storage.count:
        raise InputError(f"shape {shown(tensor.shape)} reaches out of its storage of {storage.count}; the file is damaged")
