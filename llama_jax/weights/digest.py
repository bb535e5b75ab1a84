"""A digest of the contents of a model's files, to compare two models without reading
all of them.
"""

import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.checkpoint import list_steps
from llama_jax.weights.gguf_read import GgufFile, part_paths
from llama_jax.weights.open import base_of, fetch, names_model
from llama_jax.weights.run import RUN_CHECKPOINTS
from llama_jax.weights.safetensors import map_safetensors
from llama_jax.weights.source import mapped

_WHOLE = 64 << 20  # bytes of a file without tensors that is read whole
_SAMPLES = 3  # places of a tensor that are looked at: its beginning, middle and end
_SAMPLE = 16 << 10  # bytes at each
_WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin")
_MANIFEST = "metadata"  # of a run's checkpoint


def files_digest(path: pathlib.Path) -> str:
    """SHA-256 over names, sizes and contents of a model's files; of every large tensor, of three
    samples.

    A tensor whose values are others, whichever it is, gives another digest, except where only a few
    of its values are. A run is known by its newest checkpoint's manifest, which holds a checksum of
    every array; adapters by their own files and their model's.

    Args:
      path: of a model, as `open_model` takes it.

    Raises:
      InputError: for a path that leads nowhere, and for adapters whose model is not there.
    """
    return _digest(path, lambda file: True)


def weights_digest(path: pathlib.Path) -> str:
    """`files_digest` over the files of weights alone: a README beside them, or another tokenizer,
    changes nothing.

    Raises:
      InputError: see `files_digest`.
    """
    return _digest(path, lambda file: file.suffix in _WEIGHTS or file.name == _MANIFEST)


def _digest(path: pathlib.Path, counts: Callable[[pathlib.Path], bool]) -> str:
    """Over the files that count."""
    path = (fetch(path) if names_model(path) else path).absolute()
    if not path.exists():
        raise InputError(f"{path}: nothing there; the path of a model expected")
    digest = hashlib.sha256()
    for file in filter(counts, _files(path)):
        digest.update(f"{file.name} {file.stat().st_size} ".encode("utf-8", "surrogatepass"))
        for part in _parts(file):
            for start in _places(part.size):
                digest.update(part[start : start + _SAMPLE].tobytes())
    base = base_of(path)
    if base is not None:
        digest.update(_digest(base, counts).encode())
    return digest.hexdigest()


def _places(size: int) -> list[int]:
    """Where samples begin: everywhere in a part that they cover whole."""
    if size <= _SAMPLES * _SAMPLE:
        return list(range(0, size, _SAMPLE))
    return [(size - _SAMPLE) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]


def _parts(file: pathlib.Path) -> Iterator[np.ndarray]:
    """The bytes of a file, `[size]` each: a part a tensor, and what is not of a tensor in parts
    that are read whole.
    """
    data = mapped(file)
    ends = sorted({*(end for end in _borders(file, data) if 0 < end < data.size), data.size})
    for start, end in zip([0, *ends], ends):
        header = start == 0 or len(ends) == 1
        step = _SAMPLE if header and end - start <= _WHOLE else max(end - start, 1)
        yield from (data[at : min(at + step, end)] for at in range(start, end, step))


def _borders(file: pathlib.Path, data: np.ndarray) -> list[int]:
    """Where tensors begin and end in a file of weights; nowhere in another, and in one that is
    damaged.
    """
    try:
        if file.suffix == ".gguf":
            tensors = GgufFile.open(file).tensors.values()
            return [
                border
                for tensor in tensors
                for border in (tensor.offset, tensor.offset + tensor.nbytes)
            ]
        if file.suffix == ".safetensors":
            return _safetensors_borders(file, data)
        if file.suffix in (".pth", ".pt", ".bin"):
            with zipfile.ZipFile(file) as archive:
                return [member.header_offset for member in archive.infolist()] + [archive.start_dir]
    except (InputError, zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return []  # the reader names the damage
    return []


def _safetensors_borders(file: pathlib.Path, data: np.ndarray) -> list[int]:
    """By the header, once the reader has found nothing wrong with it."""
    map_safetensors(file)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    return [
        start,
        *(
            start + end
            for name, at in header.items()
            if name != "__metadata__"
            for end in at["data_offsets"]
        ),
    ]


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that determine a model's outputs, sorted by name."""
    if path.is_file():
        return part_paths(path)
    checkpoints = path / RUN_CHECKPOINTS
    steps = list_steps(checkpoints)
    manifest = [checkpoints / str(steps[-1]) / "meta" / _MANIFEST] if steps else []
    with os.scandir(path) as entries:
        names = sorted(
            entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")
        )
    changing = ("metrics.jsonl", "config.yaml") if steps else ()
    return [file for file in manifest if file.is_file()] + [
        path / name for name in names if name not in changing
    ]
