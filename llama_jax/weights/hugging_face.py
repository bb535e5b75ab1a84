"""LLaMA weights from a directory as Hugging Face lays it out: `config.json`, and safetensors files or PyTorch's."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.hugging_face_config import config_from_hugging_face
from llama_jax.weights.hugging_face_files import description, stored_tensors
from llama_jax.weights.hugging_face_quantized import dequantized, quantization, split_scales
from llama_jax.weights.pth import PthFile
from llama_jax.weights.source import blamed_on, file_shapes, oriented, require_tensors

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
          InputError: for missing or damaged files, another architecture, tensors that do not fit, or an index that
            names a file elsewhere.
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
        """One tensor in the canonical orientation (a view of the file, where it is not quantized); see `Source.read`.

        Raises:
          InputError: for a tensor of a file of PyTorch's that does not match its checksum.
        """
        stored = NAMES[name].format(layer)
        tensor = self.pickles[stored].read(stored) if stored in self.pickles else self.tensors[stored]
        if stored in self.scales and self.scheme is not None:
            tensor = dequantized(tensor, self.scales[stored], self.scheme)
        return oriented(name, tensor)

    def dtype(self, name: str, layer: int | None) -> np.dtype:
        """The dtype that `read` gives; nothing is read."""
        stored = NAMES[name].format(layer)
        return np.dtype(np.float32) if stored in self.scales else self.tensors[stored].dtype


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
