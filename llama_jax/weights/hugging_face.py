"""LLaMA weights from a directory as Hugging Face lays it out: `config.json` and safetensors files."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.hugging_face_config import config_from_hugging_face
from llama_jax.weights.source import blamed_on, file_shapes, oriented, require_tensors, shown

__all__ = ["NAMES", "HuggingFaceSource", "config_from_hugging_face"]

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/wq": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/wk": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/wv": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/wo": "model.layers.{}.self_attn.o_proj.weight",
    "layers/feed_forward_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/feed_forward/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/feed_forward/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/feed_forward/down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}

_DTYPES = ("F32", "F16", "BF16", "F64")
_LARGEST_JSON = 16 << 20
_INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
_COMPARED_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """A directory of Hugging Face's as a `Source`.

    Attributes:
      directory: where it is.
      config: the architecture that its `config.json` declares.
      files: by the name of a tensor, the open safetensors file that holds it.
    """

    directory: pathlib.Path
    config: LlamaConfig
    files: dict[str, Any]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "HuggingFaceSource":
        """Opens a directory and checks names, shapes and types of all tensors, reading none.

        Raises:
          InputError: for missing or damaged files, another architecture, tensors that do not fit, or an index that
            names a file elsewhere.
        """
        directory = pathlib.Path(directory)
        with blamed_on(directory):
            values = _json_object(directory, "config.json")
            with blamed_on("config.json"):
                config = config_from_hugging_face(values)
            files = _tensors(directory)
            _require_fitting(config, files)
        return cls(directory, config, files)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor in the canonical orientation; see `Source.read`."""
        stored = NAMES[name].format(layer)
        with blamed_on(self.directory), _damage_named(stored):
            return oriented(name, self.files[stored].get_tensor(stored))


def _inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the directory; a link may lead only into it, or into the blobs of the same download cache."""
    path = directory / name
    home = directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    target = path.resolve()
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise InputError(f"{name} links to {target}, outside of the directory; copy the file instead")
    return path


def _json_object(directory: pathlib.Path, name: str) -> dict[str, Any]:
    text = _small_file(directory, name)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not valid JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} does not hold a JSON object")
    return values


def _small_file(directory: pathlib.Path, name: str) -> bytes:
    path = _inside(directory, name)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{name} is larger than {_LARGEST_JSON} bytes; a description of a model is not")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None


def _shards(directory: pathlib.Path) -> list[str]:
    """Names of the safetensors files that make up the model."""
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"]
    if not (directory / _INDEX).exists():
        raise InputError(f"neither model.safetensors nor {_INDEX}; save the model as safetensors")
    names = _json_object(directory, _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError("the index has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise InputError(f"the index names the file {shown(name)}; a plain name ending in .safetensors expected")
    return sorted(set(names.values()))


def _tensors(directory: pathlib.Path) -> dict[str, Any]:
    """The open file of every tensor, without the buffers that old versions stored."""
    files: dict[str, Any] = {}
    for shard in _shards(directory):
        path = _inside(directory, shard)
        with _damage_named(shard):
            file = safe_open(path, framework="numpy")
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name in files:
                raise InputError(f"tensor {shown(name)} is in two files, one of them {shard}")
            files[name] = file
    return {name: file for name, file in files.items() if not name.endswith("rotary_emb.inv_freq")}


@contextlib.contextmanager
def _damage_named(what: str) -> Iterator[None]:
    """Turns the errors of safetensors into ours."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{what} cannot be read ({shown(str(error))}); fetch the file again") from None


def _require_fitting(config: LlamaConfig, files: Mapping[str, Any]) -> None:
    """Refuses tensors whose names, shapes or types are not those of the architecture."""
    expected = file_shapes(config, NAMES)
    embedding, head = NAMES["embedding"], NAMES["head"]
    tied = config.tied_head and head in files
    if tied:
        expected[head] = expected[embedding]
    slices = {name: file.get_slice(name) for name, file in files.items()}
    require_tensors(expected, {name: tuple(tensor.get_shape()) for name, tensor in slices.items()})
    for name, tensor in slices.items():
        if tensor.get_dtype() not in _DTYPES:
            raise InputError(f"tensor {name} has type {tensor.get_dtype()}; supported are {', '.join(_DTYPES)}")
    if tied and not _equal(slices[embedding], slices[head], config.vocab_size):
        raise InputError(f"tie_word_embeddings is true, but {head} differs from {embedding}; set it to false or remove {head}")


def _equal(one: Any, other: Any, rows: int) -> bool:
    """Whether two matrices on file are the same, some rows at a time."""
    bounds = ((start, min(start + _COMPARED_ROWS, rows)) for start in range(0, rows, _COMPARED_ROWS))
    return all(np.array_equal(one[start:end], other[start:end]) for start, end in bounds)
