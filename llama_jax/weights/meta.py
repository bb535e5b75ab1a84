"""LLaMA weights as Meta publishes them: `params.json` and one `consolidated.NN.pth` for every
shard.

Each shard holds a part of every matrix, cut along one axis; norms are copies. Queries and keys are
in the layout of adjacent rotary pairs.

Source: the model-parallel layers in Meta's llama, llama3 and llama-models repositories; what is cut
  how, in `_CUT` below.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import InputError
from llama_jax.presets import PRESETS
from llama_jax.weights.gguf import half_layout
from llama_jax.weights.pth import PthFile
from llama_jax.weights.source import (
    Shape,
    blamed_on,
    file_shapes,
    flag,
    json_object,
    oriented,
    quotient,
    real,
    require_tensors,
    shown,
    whole,
)

# --- meta config ---
#
# The architecture that Meta's `params.json` declares, together with what only the weights and the
# published models say.
#
# Source of the keys: `ModelArgs` of Meta's llama, llama3 and llama-models repositories.


_READ = {
    "dim",
    "max_seq_len",
    "n_heads",
    "n_kv_heads",
    "n_layers",
    "norm_eps",
    "rope_high_freq_factor",
    "rope_scaling_factor",
    "rope_theta",
    "use_scaled_rope",
    "vocab_size",
}

# How the width of the feed-forward layer was chosen, which the weights show, and the size of a
# cache.
_HARMLESS = {"ffn_dim_multiplier", "max_batch_size", "multiple_of"}

# Keys that Meta's code knows, of models that are more than a LLaMA of text in floating point.
_OTHERS = {
    "lora_args": "LoRA adapters",
    "moe_args": "mixtures of experts",
    "quantization_args": "quantised weights",
    "vision_args": "images",
    "vision_chunk_size": "images",
    "vision_max_num_chunks": "images",
    "vision_model": "images",
    "vision_num_cross_attention_layers": "images",
}

# Context of models that nobody published, by the base of their rotary embedding: LLaMA 1, Llama 3,
# Code Llama.
_CONTEXTS = {1e4: 2048, 5e5: 8192, 1e6: 16384}
_SCALED = PRESETS[
    "llama3.1-8b"
]  # all published models with scaled frequencies differ in the factor only


def config_from_meta(
    values: Mapping[str, Any], vocab_size: int, ffn_dim: int, tied_head: bool
) -> LlamaConfig:
    """The architecture of a LLaMA by the values of its `params.json` and by its weights.

    Context length and factor of the scaling are in no file of Meta's: they are those of the
    published model with the same numbers, unless `rope_scaling_factor` and, for a model that nobody
    published, `max_seq_len` state them.

    Args:
      values: the content of `params.json`.
      vocab_size: rows of the embedding table.
      ffn_dim: rows of the gate.
      tied_head: whether the weights have no head of their own.

    Raises:
      InputError: naming the key, for a missing or wrong value, another kind of model, or a key
        whose effect is unknown.
    """
    _require_plain_llama(values)
    heads = whole(values, "n_heads")
    stated = whole(values, "vocab_size", -1)  # LLaMA 1 and 2 leave it to the tokenizer
    plain = LlamaConfig(
        vocab_size=vocab_size if stated == -1 else stated,
        dim=whole(values, "dim"),
        layers=whole(values, "n_layers"),
        heads=heads,
        kv_heads=whole(values, "n_kv_heads", heads),
        head_dim=quotient(values, "dim", "n_heads"),
        ffn_dim=ffn_dim,
        norm_eps=real(values, "norm_eps"),
        rope_theta=real(values, "rope_theta", 10000.0),
        rope_scaling=None,
        context_length=1,
        tied_head=tied_head,
    )
    scaled = flag(values, "use_scaled_rope", False)
    published = _published(plain, scaled)
    context = published.context_length if published else _context(values, plain.rope_theta, scaled)
    return dataclasses.replace(
        plain, rope_scaling=_scaling(values, scaled, published), context_length=context
    )


def _require_plain_llama(values: Mapping[str, Any]) -> None:
    for key, meaning in _OTHERS.items():
        if values.get(key) is not None:
            raise InputError(
                f"{key} is given: a model with {meaning}, which is not supported; only "
                "LLaMAs of text are"
            )
    unknown = sorted(values.keys() - _READ - _HARMLESS - _OTHERS.keys())
    if unknown:
        raise InputError(
            f"keys {shown(unknown)} are unknown and might change the model; remove those "
            "that do not"
        )


def _published(plain: LlamaConfig, scaled: bool) -> LlamaConfig | None:
    """The published model with these numbers; its vocabulary may have been extended, its head tied
    or cut loose since.
    """
    apart = ("vocab_size", "tied_head", "rope_scaling", "context_length")
    for known in PRESETS.values():
        alike = (
            dataclasses.replace(plain, **{name: getattr(known, name) for name in apart}) == known
        )
        if alike and scaled == (known.rope_scaling is not None):
            return known
    return None


def _scaling(
    values: Mapping[str, Any], scaled: bool, published: LlamaConfig | None
) -> RopeScaling | None:
    stated = values.get("rope_scaling_factor") is not None
    if stated and not scaled:
        raise InputError(
            "rope_scaling_factor is given, but use_scaled_rope is not true; set it to "
            "true or remove the factor"
        )
    if scaled and not stated and published is None:
        raise InputError(
            "use_scaled_rope is true, but these are not the numbers of a published model; "
            "add rope_scaling_factor (8 in Llama 3.1 and 3.3, 32 in Llama 3.2)"
        )
    known = (published or _SCALED).rope_scaling if scaled else None
    if known is None:
        return None
    factor = real(values, "rope_scaling_factor", known.factor)
    high = real(values, "rope_high_freq_factor", known.high_freq_factor)
    return dataclasses.replace(known, factor=factor, high_freq_factor=high)


def _context(values: Mapping[str, Any], theta: float, scaled: bool) -> int:
    """The context of a model that nobody published."""
    default = _SCALED.context_length if scaled else _CONTEXTS.get(theta)
    if default is None and values.get("max_seq_len") is None:
        raise InputError(
            f"rope_theta {theta} is that of no published model; add max_seq_len, the "
            "length of its context"
        )
    return whole(values, "max_seq_len", default)


# --- meta ---


__all__ = ["NAMES", "MetaSource", "config_from_meta"]

NAMES = {
    "embedding": "tok_embeddings.weight",
    "layers/attention_norm/scale": "layers.{}.attention_norm.weight",
    "layers/attention/wq": "layers.{}.attention.wq.weight",
    "layers/attention/wk": "layers.{}.attention.wk.weight",
    "layers/attention/wv": "layers.{}.attention.wv.weight",
    "layers/attention/wo": "layers.{}.attention.wo.weight",
    "layers/feed_forward_norm/scale": "layers.{}.ffn_norm.weight",
    "layers/feed_forward/gate": "layers.{}.feed_forward.w1.weight",
    "layers/feed_forward/up": "layers.{}.feed_forward.w3.weight",
    "layers/feed_forward/down": "layers.{}.feed_forward.w2.weight",
    "final_norm/scale": "norm.weight",
    "head": "output.weight",
}

# The axis of `[out, in]` along which the shards are put together; `None` for copies. The embedding
# table is cut along axis 1 in LLaMA 1 and 2 and along axis 0 in Llama 3: its shape tells.
_CUT: dict[str, int | None] = {
    "layers/attention_norm/scale": None,
    "layers/attention/wq": 0,
    "layers/attention/wk": 0,
    "layers/attention/wv": 0,
    "layers/attention/wo": 1,
    "layers/feed_forward_norm/scale": None,
    "layers/feed_forward/gate": 0,
    "layers/feed_forward/up": 0,
    "layers/feed_forward/down": 1,
    "final_norm/scale": None,
    "head": 0,
}

_QUERIES, _KEYS, _VALUES = (f"layers/attention/{name}" for name in ("wq", "wk", "wv"))
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth", re.ASCII)
_SINGLE = "consolidated.pth"
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_COMPARED_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class MetaSource:
    """A directory of Meta's as a `Source`.

    Attributes:
      directory: where it is.
      config: the architecture that `params.json`, the weights and the published models declare
        together.
      files: the open shards in their order.
      cut: by canonical path, the axis along which the shards of a tensor are put together; `None`
        for copies.
    """

    directory: pathlib.Path
    config: LlamaConfig
    files: tuple[PthFile, ...]
    cut: Mapping[str, int | None]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "MetaSource":
        """Opens a directory and checks names, shapes and types of all tensors in all shards.

        Nothing of the weights is read but, where there is a head, as many rows as it takes to tell
        it from the embedding.

        Raises:
          InputError: for missing or damaged files, a gap in their numbers, another kind of model,
            tensors that do not fit.
        """
        directory = pathlib.Path(directory)
        with blamed_on(directory):
            paths = _shards(directory)
        with blamed_on(directory / "params.json"):
            values = json_object(directory / "params.json")
        files = tuple(PthFile.open(path) for path in paths)
        with blamed_on(directory / "params.json"):
            config = config_from_meta(values, *_sizes(files))
        with blamed_on(directory):
            cut = {**_CUT, "embedding": _cut_of_embedding(config, files)}
            _require_fitting(config, files, cut)
            tied = config.tied_head or _head_is_embedding(files, cut["embedding"])
        return cls(directory, dataclasses.replace(config, tied_head=tied), files, cut)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor in the canonical orientation and rotary layout; see `Source.read`."""
        stored = NAMES[name].format(layer)
        parts = [file.read(stored) for file in self.files]
        cut = self.cut[name]
        copies = len(parts) if cut is None else _copies(self.config, name, len(parts))
        with blamed_on(self.directory):
            parts = _distinct(stored, parts, copies)
        if name in (_QUERIES, _KEYS):
            return oriented(name, _joined_halves(parts, self.config.head_dim))
        return oriented(name, parts[0] if len(parts) == 1 else np.concatenate(parts, cut or 0))


def _shards(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that make up the model, which are numbered from 00 without a gap."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None
    numbers = {int(match[1]): name for name in names if (match := _SHARD.fullmatch(name))}
    if _SINGLE in names and numbers:
        raise InputError(
            f"{_SINGLE} and {numbers[min(numbers)]} are both there; remove one of the two models"
        )
    if _SINGLE in names:
        return [directory / _SINGLE]
    missing = [number for number in range(max(numbers, default=0) + 1) if number not in numbers]
    if missing:
        raise InputError(
            f"consolidated.{missing[0]:02}.pth is missing ({len(numbers)} shards found); "
            "fetch all of them"
        )
    return [directory / numbers[number] for number in sorted(numbers)]


def _sizes(files: Sequence[PthFile]) -> tuple[int, int, bool]:
    """`V` and `F` by the shapes of the first shard, and whether there is no head."""
    gate, dim = _shape(files[0], NAMES["layers/feed_forward/gate"].format(0))
    rows, width = _shape(files[0], NAMES["embedding"])
    return (
        rows * len(files) if width == dim else rows,
        gate * len(files),
        NAMES["head"] not in files[0].tensors,
    )


def _shape(file: PthFile, name: str) -> Shape:
    """The shape of a matrix."""
    tensor = file.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise InputError(
            f"{file.path.name}: tensor {name} is {'missing' if tensor is None else 'no matrix'}"
        )
    return tensor.shape


def _cut_of_embedding(config: LlamaConfig, files: Sequence[PthFile]) -> int:
    _, width = _shape(files[0], NAMES["embedding"])
    return 0 if width == config.dim else 1


def _copies(config: LlamaConfig, path: str, count: int) -> int:
    """How many neighbouring shards hold the same part: with more shards than key/value heads, a
    head is in several.
    """
    return count // config.kv_heads if path in (_KEYS, _VALUES) and count > config.kv_heads else 1


def _require_fitting(
    config: LlamaConfig, files: Sequence[PthFile], cut: Mapping[str, int | None]
) -> None:
    """Refuses shards whose tensors are not exactly the parts of those of the architecture."""
    count = len(files)
    if config.heads % count or max(config.kv_heads, count) % min(config.kv_heads, count):
        raise InputError(
            f"{count} shards given for {config.heads} heads and {config.kv_heads} key/value heads; "
            "one of the files is missing or from another model"
        )
    expected = _part_shapes(config, count, cut)
    for file in files:
        found = {
            name: tensor for name, tensor in file.tensors.items() if not name.endswith("rope.freqs")
        }
        with blamed_on(file.path.name):
            require_tensors(expected, {name: tensor.shape for name, tensor in found.items()})
            for name, tensor in found.items():
                kind, first = tensor.storage.dtype, files[0].tensors[name].storage.dtype
                if kind != first or kind.name not in _DTYPES:
                    raise InputError(
                        f"tensor {shown(name)} is {kind}, {first} in the first file; one "
                        f"of {_DTYPES} expected"
                    )


def _part_shapes(
    config: LlamaConfig, count: int, cut: Mapping[str, int | None]
) -> dict[str, Shape]:
    """Names and shapes that each of `count` shards has to hold."""
    shapes = file_shapes(config, NAMES)
    for path, name in NAMES.items():
        axis = cut[path]
        for layer in range(config.layers if path.startswith("layers/") else 1):
            stored = name.format(layer)
            if axis is not None and stored in shapes:
                shapes[stored] = _part(
                    stored, shapes[stored], axis, count // _copies(config, path, count)
                )
    return shapes


def _part(name: str, shape: Shape, axis: int, count: int) -> Shape:
    if shape[axis] % count:
        raise InputError(
            f"tensor {name} {shape} cannot be cut in {count} along axis {axis}; is a shard missing?"
        )
    return tuple(size // count if number == axis else size for number, size in enumerate(shape))


def _head_is_embedding(files: Sequence[PthFile], axis: int | None) -> bool:
    """Whether the head on file is the embedding table once more, a few rows at a time, up to the
    first that differ.
    """
    name, head = NAMES["embedding"], NAMES["head"]
    if axis == 0 and all(file.tensors[name] == file.tensors[head] for file in files):
        return True
    return all(np.array_equal(one, other) for one, other in _rows_of_both(files, axis, name, head))


def _rows_of_both(
    files: Sequence[PthFile], axis: int | None, name: str, head: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows of the embedding table and of the head, which is always cut along the
    vocabulary.
    """
    tables = [file.view(name) for file in files]
    for number, file in enumerate(files):
        rows = file.view(head)
        for start in range(0, len(rows), _COMPARED_ROWS):
            some = rows[start : start + _COMPARED_ROWS]
            at = start if axis == 0 else start + number * len(rows)
            parts = tables[number : number + 1] if axis == 0 else tables
            yield np.concatenate([part[at : at + len(some)] for part in parts], 1), some


def _distinct(name: str, parts: Sequence[np.ndarray], copies: int) -> list[np.ndarray]:
    """The first of every `copies` neighbours, which have to be equal."""
    for number, part in enumerate(parts):
        first = parts[number - number % copies]
        if part is not first and part.tobytes() != first.tobytes():
            raise InputError(
                f"tensor {name} differs between shards that hold copies of it; fetch the "
                "files again"
            )
    return list(parts[::copies])


def _joined_halves(parts: Sequence[np.ndarray], head_dim: int) -> np.ndarray:
    """Queries or keys of all shards, from adjacent rotary pairs to halves, a head at a time: one
    copy in all.
    """
    heads = [
        part[start : start + head_dim] for part in parts for start in range(0, len(part), head_dim)
    ]
    joined = np.empty((len(heads) * head_dim, parts[0].shape[1]), parts[0].dtype)
    for number, head in enumerate(heads):
        joined[number * head_dim : (number + 1) * head_dim] = half_layout(head, head_dim)
    return joined
