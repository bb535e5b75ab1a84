"""LLaMA weights from a directory as Hugging Face lays it out: `config.json` and safetensors files."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.files import json_object
from llama_jax.weights.hugging_face_config import config_from_hugging_face
from llama_jax.weights.safetensors_file import map_safetensors
from llama_jax.weights.source import blamed_on, file_shapes, oriented, require_tensors, shown

__all__ = ["NAMES", "HuggingFaceSource", "config_from_hugging_face", "inside"]

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

_INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
_COMPARED_ROWS = 1024
_BUFFER = "rotary_emb.inv_freq"  # that old versions stored


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """A directory of Hugging Face's as a `Source`.

    Attributes:
      directory: where it is.
      config: the architecture that its `config.json` declares.
      tensors: by the name in the files, `[out, in]`, views of the mapped files.
    """

    directory: pathlib.Path
    config: LlamaConfig
    tensors: dict[str, np.ndarray]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "HuggingFaceSource":
        """Opens a directory and checks names, shapes and types of all tensors, reading none.

        (But for a head stored beside a tied embedding: the two are compared.)

        Raises:
          InputError: for missing or damaged files, another architecture, tensors that do not fit, or an index that
            names a file elsewhere.
        """
        directory = pathlib.Path(directory)
        with blamed_on(directory):
            values = _description(directory, "config.json")
            with blamed_on("config.json"):
                config = config_from_hugging_face(values)
            tensors = _tensors(directory)
            _require_fitting(config, tensors)
        return cls(directory, config, tensors)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor in the canonical orientation (a view of the file); see `Source.read`."""
        return oriented(name, self.tensors[NAMES[name].format(layer)])


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


def _description(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in a small JSON file of the directory."""
    path = inside(directory, name)
    with blamed_on(name):
        return json_object(path)


def _weight_map(directory: pathlib.Path) -> dict[str, str] | None:
    """Which safetensors file holds each tensor, by the index; `None` where one file holds all."""
    if (directory / "model.safetensors").is_file():
        return None
    if not (directory / _INDEX).is_file():
        raise InputError(f"neither model.safetensors nor {_INDEX}; save the model as safetensors")
    names = _description(directory, _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError("the index has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise InputError(f"the index names the file {shown(name)}; a plain name ending in .safetensors expected")
    return names


def _tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor by name, without the buffers that old versions stored."""
    tensors: dict[str, np.ndarray] = {}
    held: dict[str, str] = {}
    weight_map = _weight_map(directory)
    for shard in ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values())):
        for name, tensor in map_safetensors(inside(directory, shard)).items():
            if name in tensors:
                raise InputError(f"tensor {shown(name)} is in two files, one of them {shard}")
            tensors[name], held[name] = tensor, shard
    if weight_map is not None:
        _require_placed(weight_map, held)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFER)}


def _require_placed(weight_map: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Refuses an index that places tensors otherwise than the files: others read by it."""
    for name in sorted({*weight_map, *held}):
        there, here = weight_map.get(name), held.get(name)
        if there != here and not name.endswith(_BUFFER):
            found = "no file has it" if here is None else f"it is in {here}"
            placed = f"in {there}" if there else "nowhere"
            raise InputError(f"{_INDEX} places tensor {shown(name)} {placed}, but {found}; fetch the index and the files again")


def _require_fitting(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses tensors whose names and shapes are not those of the architecture, and a tied head that is another."""
    expected = file_shapes(config, NAMES)
    embedding, head = NAMES["embedding"], NAMES["head"]
    tied = config.tied_head and head in tensors
    if tied:
        expected[head] = expected[embedding]
    require_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()})
    if tied and not _equal(tensors[embedding], tensors[head]):
        raise InputError(f"tie_word_embeddings is true, but {head} differs from {embedding}; set it to false or remove {head}")


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two matrices on file are the same, some rows at a time."""
    strips = (slice(start, start + _COMPARED_ROWS) for start in range(0, len(one), _COMPARED_ROWS))
    return all(np.array_equal(one[strip], other[strip]) for strip in strips)
