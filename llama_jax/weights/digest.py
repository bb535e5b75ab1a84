"""A short name for what a model's files hold, for telling whether two are the same without reading all of them."""

import hashlib
import os
import pathlib

from llama_jax.errors import InputError
from llama_jax.weights.checkpoint_files import list_steps
from llama_jax.weights.gguf_split import part_paths
from llama_jax.weights.hub import fetch, names_model
from llama_jax.weights.run import RUN_CHECKPOINTS

_SAMPLES = 16  # places of a large file that are looked at
_SAMPLE = 64 << 10  # bytes at each


def files_digest(path: pathlib.Path) -> str:
    """SHA-256 over names, sizes and contents of a model's files; of large ones, of samples spread over them.

    Other weights of the same shapes differ in every sample. A run is known by its newest checkpoint's manifest, which
    holds a checksum of every array.

    Args:
      path: of a model, as `open_model` takes it.

    Raises:
      InputError: for a path that leads nowhere.
    """
    path = (fetch(path) if names_model(path) else path).absolute()
    if not path.exists():
        raise InputError(f"{path}: nothing there; the path of a model expected")
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode("utf-8", "surrogatepass"))
        with file.open("rb") as stream:
            for start in _places(size):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def _places(size: int) -> list[int]:
    """Where samples begin: everywhere in a file that they cover whole."""
    if size <= _SAMPLES * _SAMPLE:
        return list(range(0, size, _SAMPLE))
    return [(size - _SAMPLE) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that decide what a model says, sorted by name."""
    if path.is_file():
        return part_paths(path)
    checkpoints = path / RUN_CHECKPOINTS
    steps = list_steps(checkpoints)
    manifest = [checkpoints / str(steps[-1]) / "meta" / "metadata"] if steps else []
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
    changing = ("metrics.jsonl", "config.yaml") if steps else ()
    return [file for file in manifest if file.is_file()] + [path / name for name in names if name not in changing]
