"""LLaMA weights from a GGUF file."""

import dataclasses
import os

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.gguf_blocks import DECODERS
from llama_jax.weights.gguf_config import DIVISORS, config_from_gguf
from llama_jax.weights.gguf_file import GgufFile, GgufTensor
from llama_jax.weights.gguf_split import open_gguf
from llama_jax.weights.source import blamed_on, file_shapes, oriented, require_tensors, shown

__all__ = ["NAMES", "GgufFile", "GgufSource", "GgufTensor", "adjacent_layout", "config_from_gguf", "half_layout"]

NAMES = {
    "embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/wq": "blk.{}.attn_q.weight",
    "layers/attention/wk": "blk.{}.attn_k.weight",
    "layers/attention/wv": "blk.{}.attn_v.weight",
    "layers/attention/wo": "blk.{}.attn_output.weight",
    "layers/feed_forward_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/feed_forward/gate": "blk.{}.ffn_gate.weight",
    "layers/feed_forward/up": "blk.{}.ffn_up.weight",
    "layers/feed_forward/down": "blk.{}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "head": "output.weight",
}

ROTATED = ("layers/attention/wq", "layers/attention/wk")  # rows in the order of the rotary layout


@dataclasses.dataclass(frozen=True, eq=False)
class GgufSource:
    """A GGUF file, or the parts of a split one, as a `Source`.

    Attributes:
      file: the open file; its metadata hold the tokenizer.
      config: the architecture that it declares.
    """

    file: GgufFile
    config: LlamaConfig

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GgufSource":
        """Opens a file, or all parts of a model by one of them, and checks names, shapes and types of all tensors.

        No tensor is read.

        Raises:
          InputError: for a damaged or missing file, another architecture, tensors or element types that do not fit.
        """
        file = open_gguf(path)
        config = config_from_gguf(file)
        with blamed_on(path):
            tensors = {name: tensor for name, tensor in file.tensors.items() if name != DIVISORS}
            require_tensors(file_shapes(config, NAMES), {name: tensor.shape for name, tensor in tensors.items()})
            _require_decoders(tensors)
        return cls(file, config)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor in the canonical orientation and rotary layout; see `Source.read`."""
        tensor = self.file.read(NAMES[name].format(layer))
        if name in ROTATED:
            tensor = half_layout(tensor, self.config.head_dim)
        return oriented(name, tensor)


def half_layout(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a query or key projection, from adjacent rotary pairs to pairs half a head apart.

    Args:
      rows: `[heads * H, D]`, where rows `2i` and `2i + 1` of a head turn together (Meta's files and GGUF).
      head_dim: `H`.

    Returns:
      The rows, reordered so that `i` and `i + H / 2` of a head turn together (Hugging Face, and this project).
    """
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def adjacent_layout(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `half_layout`: rows of a query or key projection as GGUF has them."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _require_decoders(tensors: dict[str, GgufTensor]) -> None:
    unsupported = {tensor.type: name for name, tensor in tensors.items() if tensor.type not in DECODERS}
    if unsupported:
        named = ", ".join(f"{kind} ({shown(name)})" for kind, name in unsupported.items())
        raise InputError(
            f"element types not supported: {named}; take a file of, or requantize this one to, one of {', '.join(DECODERS)}"
        )
