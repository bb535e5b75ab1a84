"""A model in several GGUF files, `NAME-00001-of-0000N.gguf` and so on, opened as one.

Every part is a GGUF file with a share of the tensors; the first also has the metadata. Each says which part it is
(`split.no`, from 0), of how many (`split.count`), and how many tensors they hold together (`split.tensors.count`).

Source: `gguf-split` and `llama_split_path` of the llama.cpp project.
"""

import dataclasses
import os
import pathlib
import re

from llama_jax.errors import InputError
from llama_jax.weights.gguf_file import GgufFile, GgufTensor
from llama_jax.weights.source import blamed_on, shown
from llama_jax.weights.values import whole

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_OF_ALL = ("split.count", "split.tensors.count")
_OF_ONE = ("split.no", "general.alignment")


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a file, and its neighbours in the same directory if it is one part of a model; no tensor is read.

    Args:
      path: a whole file or any of the parts.

    Raises:
      InputError: for a file that is missing, damaged, of another version or byte order; naming the parts that are not
        there, or the one that is not of the same model.
    """
    file = GgufFile.open(path)
    with blamed_on(path):
        count = whole(file.metadata, "split.count", 1)
        if count in (0, 1):
            return file
        paths = _all_parts(file.path, whole(file.metadata, "split.no"), count)
    return _merged([file if part == file.path else GgufFile.open(part) for part in paths])


def part_paths(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that belong together by their names: a part's neighbours and itself, or the file alone; nothing is opened."""
    name = _NAME.fullmatch(path.name)
    if name is None:
        return [path]
    paths = [path.with_name(f"{name[1]}-{part:05}-of-{name[3]}.gguf") for part in range(1, int(name[3]) + 1)]
    return [part for part in paths if part.is_file()]


def _all_parts(path: pathlib.Path, number: int, count: int) -> list[pathlib.Path]:
    """The files of a model, in order, by the name of one of them."""
    name = _NAME.fullmatch(path.name)
    if name is None or (int(name[2]) - 1, int(name[3])) != (number, count):
        raise InputError(f"part {number + 1} of {count} by its metadata (split.no, split.count), which its name contradicts; "
                         f"NAME-{number + 1:05}-of-{count:05}.gguf expected")  # fmt: skip
    paths = [path.with_name(f"{name[1]}-{part:05}-of-{name[3]}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"one of {count} parts, of which {', '.join(missing[:3])}{rest} cannot be found beside it")
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
                raise InputError(f"tensor {shown(twice)} is in an earlier part already; fetch all parts again")
        tensors |= {name: dataclasses.replace(tensor, part=part) for name, tensor in file.tensors.items()}
    with blamed_on(first.path):
        declared = whole(first.metadata, "split.tensors.count")
        if declared != len(tensors):
            raise InputError(f"split.tensors.count is {declared} but the parts hold {len(tensors)}; fetch all parts again")
    return GgufFile(first.path, first.metadata, tensors, tuple(file.data[0] for file in files))


def _require_alike(file: GgufFile, part: int, first: GgufFile) -> None:
    """Refuses a part of another model, or one with metadata of its own that nobody would read."""
    number = whole(file.metadata, "split.no")
    if number != part:
        raise InputError(f"split.no is {number}, {part} expected by its name; fetch the file again")
    for key in sorted({*file.metadata, *_OF_ALL} - {*_OF_ONE}):
        here, there = file.metadata.get(key), first.metadata.get(key)
        if here != there:
            raise InputError(f"{shown(key)} is {shown(here)} but {shown(there)} in {first.path.name}; fetch all parts again")
