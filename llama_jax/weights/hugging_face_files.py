"""Which files of a directory of Hugging Face's hold its tensors: safetensors, or what `torch.save` wrote before."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.files import json_object
from llama_jax.weights.hugging_face_quantized import require_unquantized
from llama_jax.weights.pth import PthFile
from llama_jax.weights.safetensors_file import map_safetensors
from llama_jax.weights.source import blamed_on, shown

# The one file, or the index of several, in the order in which transformers looks for them.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WHOLE)
_SHARD_NAME = re.compile(r"[\w.-]+(\.safetensors|\.bin)")
_TYPES = ("float64", "float32", "float16", "bfloat16")
_TYPES_OF_8_BITS = ("float8_e4m3fn", "float8_e5m2")
_BUFFER = "rotary_emb.inv_freq"  # that old versions stored


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the directory; a link may lead only into it, or into the blobs of the same download cache.

    Raises:
      InputError: for a link that leads elsewhere.
    """
    path = directory / name
    home = directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    target = path.resolve()
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise InputError(f"{name} links to {target}, outside of the directory; copy the file instead")
    return path


def description(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in a small JSON file of the directory.

    Raises:
      InputError: naming the file, where it is missing or holds anything else.
    """
    path = inside(directory, name)
    with blamed_on(name):
        return json_object(path)


def stored_tensors(directory: pathlib.Path, fp8: bool) -> tuple[dict[str, np.ndarray], dict[str, PthFile]]:
    """Every tensor by name, without the buffers that old versions stored; nothing is read but headers.

    Args:
      directory: where the files are.
      fp8: whether 8-bit floats are taken.

    Returns:
      Views of the files; and the file of each tensor that is one of PyTorch's, whose checksums its `read` compares.

    Raises:
      InputError: for missing or damaged files, and an index that names others or places tensors elsewhere.
    """
    index, weight_map = _weight_map(directory)
    tensors: dict[str, np.ndarray] = {}
    pickles: dict[str, PthFile] = {}
    held: dict[str, str] = {}
    for shard in [index] if weight_map is None else sorted(set(weight_map.values())):
        path = inside(directory, shard)
        file = None if shard.endswith(".safetensors") else _pickle(path)
        found = map_safetensors(path, narrow=True) if file is None else {name: file.view(name) for name in file.tensors}
        for name, tensor in found.items():
            if name in tensors:
                raise InputError(f"tensor {shown(name)} is in two files, one of them {shard}")
            tensors[name], held[name] = tensor, shard
            if file is not None:
                pickles[name] = file
    if weight_map is not None:
        _require_placed(index, weight_map, held)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFER)}
    _require_floats(tensors, fp8)
    return tensors, pickles


def _require_floats(tensors: Mapping[str, np.ndarray], fp8: bool) -> None:
    """Refuses types that weights do not have, and what only quantized files hold."""
    if not fp8:
        require_unquantized(tensors)
    known = (*_TYPES, *(_TYPES_OF_8_BITS if fp8 else ()))
    for name, tensor in tensors.items():
        if tensor.dtype.name not in known:
            raise InputError(f"tensor {shown(name)} has type {tensor.dtype.name}; supported are {', '.join(known)}")


def _pickle(path: pathlib.Path) -> PthFile:
    """A file of PyTorch's, blamed by its name alone."""
    try:
        return PthFile.open(path)
    except InputError as error:
        raise InputError(str(error).replace(f"{path}: ", f"{path.name}: ", 1)) from None


def _weight_map(directory: pathlib.Path) -> tuple[str, dict[str, str] | None]:
    """The file that holds all tensors and `None`, or the index of several and which of them holds each tensor."""
    for whole, index in zip(_WHOLE, _INDICES):
        if (directory / whole).is_file():
            return whole, None
        if (directory / index).is_file():
            return index, _names(description(directory, index), pathlib.Path(whole).suffix)
    wanted = " nor ".join(name for pair in zip(_WHOLE, _INDICES) for name in pair)
    raise InputError(f"neither {wanted}; fetch the files of the weights as well")


def _names(index: Mapping[str, Any], suffix: str) -> dict[str, str]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError("the index has no weight_map")
    for name in names.values():
        match = _SHARD_NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[1] != suffix:
            raise InputError(f"the index names the file {shown(name)}; a plain name ending in {suffix} expected")
    return names


def _require_placed(index: str, weight_map: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Refuses an index that places tensors otherwise than the files: others read by it."""
    for name in sorted({*weight_map, *held}):
        there, here = weight_map.get(name), held.get(name)
        if there != here and not name.endswith(_BUFFER):
            found = "no file has it" if here is None else f"it is in {here}"
            placed = f"in {there}" if there else "nowhere"
            raise InputError(f"{index} places tensor {shown(name)} {placed}, but {found}; fetch the index and the files again")
