"""LLaMA weights from a directory as Hugging Face lays it out: `config.json`, and safetensors files
or PyTorch's.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.hf_config import (
    config_from_hugging_face,
    dequantized,
    quantization,
    require_unquantized,
    split_scales,
)
from llama_jax.weights.pth import PthFile
from llama_jax.weights.safetensors import map_safetensors
from llama_jax.weights.source import (
    blamed_on,
    file_shapes,
    json_object,
    oriented,
    require_tensors,
    shown,
)

# --- hugging face files ---
#
# Which files of a directory of Hugging Face's hold its tensors: safetensors, or what `torch.save`
# wrote before.


# The one file, or the index of several, in the order in which transformers looks for them.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WHOLE)
_SHARD_NAME = re.compile(r"[\w.-]+(\.safetensors|\.bin)")
_TYPES = ("float64", "float32", "float16", "bfloat16")
_TYPES_OF_8_BITS = ("float8_e4m3fn", "float8_e5m2")
_BUFFER = "rotary_emb.inv_freq"  # that old versions stored


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the directory; a link may lead only into it, or into the blobs of the same download
    cache.

    Raises:
      InputError: for a link that leads elsewhere.
    """
    path = directory / name
    home = directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    target = path.resolve()
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise InputError(
            f"{name} links to {target}, outside of the directory; copy the file instead"
        )
    return path


def description(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in a small JSON file of the directory.

    Raises:
      InputError: naming the file, where it is missing or holds anything else.
    """
    path = inside(directory, name)
    with blamed_on(name):
        return json_object(path)


def stored_tensors(
    directory: pathlib.Path, fp8: bool
) -> tuple[dict[str, np.ndarray], dict[str, PthFile]]:
    """Every tensor by name, without the buffers that old versions stored; nothing is read but
    headers.

    Args:
      directory: where the files are.
      fp8: whether 8-bit floats are taken.

    Returns:
      Views of the files; and the file of each tensor that is one of PyTorch's, whose checksums its
      `read` compares.

    Raises:
      InputError: for missing or damaged files, and an index that names others or places tensors
        elsewhere.
    """
    index, weight_map = _weight_map(directory)
    tensors: dict[str, np.ndarray] = {}
    pickles: dict[str, PthFile] = {}
    held: dict[str, str] = {}
    for shard in [index] if weight_map is None else sorted(set(weight_map.values())):
        path = inside(directory, shard)
        file = None if shard.endswith(".safetensors") else _pickle(path)
        found = (
            map_safetensors(path, narrow=True)
            if file is None
            else {name: file.view(name) for name in file.tensors}
        )
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
            raise InputError(
                f"tensor {shown(name)} has type {tensor.dtype.name}; supported are "
                f"{', '.join(known)}"
            )


def _pickle(path: pathlib.Path) -> PthFile:
    """A file of PyTorch's, blamed by its name alone."""
    try:
        return PthFile.open(path)
    except InputError as error:
        raise InputError(str(error).replace(f"{path}: ", f"{path.name}: ", 1)) from None


def _weight_map(directory: pathlib.Path) -> tuple[str, dict[str, str] | None]:
    """The file that holds all tensors and `None`, or the index of several and which of them holds
    each tensor.
    """
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
            raise InputError(
                f"the index names the file {shown(name)}; a plain name ending in {suffix} expected"
            )
    return names


def _require_placed(index: str, weight_map: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Refuses an index that places tensors otherwise than the files: others read by it."""
    for name in sorted({*weight_map, *held}):
        there, here = weight_map.get(name), held.get(name)
        if there != here and not name.endswith(_BUFFER):
            found = "no file has it" if here is None else f"it is in {here}"
            placed = f"in {there}" if there else "nowhere"
            raise InputError(
                f"{index} places tensor {shown(name)} {placed}, but {found}; fetch the "
                "index and the files again"
            )


# --- hugging face ---


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

_COMPARED_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """A directory of Hugging Face's as a `Source`.

    Attributes:
      directory: where it is.
      config: the architecture that its `config.json` declares.
      tensors: by the name in the files, `[out, in]`, views of the mapped files.
      pickles: the file of PyTorch's that holds each tensor; empty for safetensors.
      scheme: how the weights are quantized, by `config.json`; `None` where they are not.
      scales: of the weights in 8-bit floats, by their names.
    """

    directory: pathlib.Path
    config: LlamaConfig
    tensors: dict[str, np.ndarray]
    pickles: Mapping[str, PthFile]
    scheme: Mapping[str, Any] | None
    scales: Mapping[str, np.ndarray]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "HuggingFaceSource":
        """Opens a directory and checks names, shapes and types of all tensors, reading none.

        (But for a head stored beside a tied embedding: the two are compared.)

        Raises:
          InputError: for missing or damaged files, another architecture, tensors that do not fit,
            or an index that names a file elsewhere.
        """
        directory = pathlib.Path(directory)
        with blamed_on(directory):
            values = description(directory, "config.json")
            with blamed_on("config.json"):
                config, scheme = config_from_hugging_face(values), quantization(values)
            tensors, pickles = stored_tensors(directory, scheme is not None)
            tensors, scales = (tensors, {}) if scheme is None else split_scales(tensors, scheme)
            _require_fitting(config, tensors)
        return cls(directory, config, tensors, pickles, scheme, scales)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor in the canonical orientation (a view of the file, where it is not quantized);
        see `Source.read`.

        Raises:
          InputError: for a tensor of a file of PyTorch's that does not match its checksum.
        """
        stored = NAMES[name].format(layer)
        tensor = (
            self.pickles[stored].read(stored) if stored in self.pickles else self.tensors[stored]
        )
        if stored in self.scales and self.scheme is not None:
            tensor = dequantized(tensor, self.scales[stored], self.scheme)
        return oriented(name, tensor)

    def dtype(self, name: str, layer: int | None) -> np.dtype:
        """The dtype that `read` gives; nothing is read."""
        stored = NAMES[name].format(layer)
        return np.dtype(np.float32) if stored in self.scales else self.tensors[stored].dtype


def _require_fitting(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses tensors whose names and shapes are not those of the architecture, and a tied head
    that is another.
    """
    expected = file_shapes(config, NAMES)
    embedding, head = NAMES["embedding"], NAMES["head"]
    tied = config.tied_head and head in tensors
    if tied:
        expected[head] = expected[embedding]
    require_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()})
    if tied and not _equal(tensors[embedding], tensors[head]):
        raise InputError(
            f"tie_word_embeddings is true, but {head} differs from {embedding}; set it "
            f"to false or remove {head}"
        )


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two matrices on file are the same, some rows at a time."""
    strips = (slice(start, start + _COMPARED_ROWS) for start in range(0, len(one), _COMPARED_ROWS))
    return all(np.array_equal(one[strip], other[strip]) for strip in strips)
