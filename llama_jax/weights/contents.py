"""What the files of an opened model hold, by their headers: types, bytes, parameters."""

import collections
import math
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (tells numpy of bfloat16)
import numpy as np

from llama_jax.accounting import parameter_count
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.gguf_config import DIVISORS
from llama_jax.weights.hugging_face import NAMES as HUGGING_FACE_NAMES
from llama_jax.weights.hugging_face import HuggingFaceSource
from llama_jax.weights.merged import MergedSource
from llama_jax.weights.meta import NAMES as META_NAMES
from llama_jax.weights.meta import MetaSource
from llama_jax.weights.run import RunSource
from llama_jax.weights.source import Source

_HEADS = (HUGGING_FACE_NAMES["head"], META_NAMES["head"])  # GGUF calls it as Meta does
_FREQUENCIES = (DIVISORS, "rope.freqs")  # follow from the configuration
_KEYS_AND_VALUES = (".wk.weight", ".wv.weight")


class Stored(NamedTuple):
    """One tensor in a file.

    Attributes:
      size: its numbers.
      type: name of their type, such as `bfloat16` or `Q4_1`.
      nbytes: bytes that it takes.
      counts: whether its numbers are parameters that no tensor before it holds.
    """

    size: int
    type: str
    nbytes: int
    counts: bool


class Contents(NamedTuple):
    """A summary of the files.

    Attributes:
      types: how many tensors of each type there are, the most frequent first.
      nbytes: bytes of all of them.
      parameters: numbers in them that are parameters of the model, each counted once.
      copied_head: whether the head is tied to the embedding and stored all the same.
    """

    types: dict[str, int]
    nbytes: int
    parameters: int
    copied_head: bool


def contents(source: Source) -> Contents:
    """The contents of a source that `open_model` gives; nothing but headers is looked at."""
    tensors = list(_stored(source))
    types = collections.Counter(tensor.type for tensor in tensors)
    copied = isinstance(source, HuggingFaceSource | MetaSource) and source.config.tied_head and _has_head(source)
    return Contents(
        types=dict(types.most_common()),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        parameters=sum(tensor.size for tensor in tensors if tensor.counts),
        copied_head=copied,
    )


def _has_head(source: HuggingFaceSource | MetaSource) -> bool:
    names = source.tensors if isinstance(source, HuggingFaceSource) else source.files[0].tensors
    return any(name in names for name in _HEADS)


def _stored(source: Source) -> Iterator[Stored]:
    """The tensors of a source, read from the tables that its format has."""
    if isinstance(source, HuggingFaceSource):
        for name, array in source.tensors.items():
            yield Stored(array.size, array.dtype.name, array.nbytes, _counts(name, source))
    elif isinstance(source, GgufSource):
        for name, tensor in source.file.tensors.items():
            yield Stored(math.prod(tensor.shape), tensor.type, tensor.nbytes, _counts(name, source))
    elif isinstance(source, MetaSource):
        yield from _of_shards(source)
    elif isinstance(source, RunSource):
        yield from _of_run(source)
    elif isinstance(source, MergedSource):
        yield from _stored(source.base)
        added = parameter_count(source.config) - parameter_count(source.base.config)  # a larger vocabulary, a head of its own
        if added:
            yield Stored(added, "float32", 4 * added, counts=True)


def _counts(name: str, source: Source) -> bool:
    return name not in _FREQUENCIES and not (source.config.tied_head and name in _HEADS)


def _of_shards(source: MetaSource) -> Iterator[Stored]:
    """Shards hold copies of norms and, if there are more of them than key/value heads, of these."""
    copies = max(1, len(source.files) // source.config.kv_heads)
    for number, file in enumerate(source.files):
        for name, window in file.tensors.items():
            size, dtype = math.prod(window.shape), window.storage.dtype
            repeated = number % copies != 0 if name.endswith(_KEYS_AND_VALUES) else number > 0 and name.endswith("norm.weight")
            yield Stored(size, dtype.name, size * dtype.itemsize, _counts(name, source) and not repeated)


def _of_run(source: RunSource) -> Iterator[Stored]:
    """The parameters in a checkpoint, without the state of the optimizer."""
    for path, record in source.manifest.arrays.items():
        if path.startswith("params/"):
            size = math.prod(record.shape)
            yield Stored(size, record.dtype, size * np.dtype(record.dtype).itemsize, counts=True)
