"""A LLaMA as one GGUF file, as llama.cpp and our own reader open it.

Source: `convert_hf_to_gguf.py` and `src/llama-model.cpp` of the llama.cpp project.
"""

import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.storage import atomic_write
from llama_jax.weights.gguf import (
    DIVISORS,
    NAMES,
    ROTATED,
    adjacent_layout,
    divisors_from_config,
    metadata_from_config,
)
from llama_jax.weights.gguf_blocks import BLOCK_TYPES, ENCODINGS, Q8_0_BLOCK, Encoding, strips
from llama_jax.weights.hf_write import Place, layered_places
from llama_jax.weights.source import Shape, Source, file_shapes, flat_shapes, oriented, shown

# --- gguf write ---
#
# Writing a GGUF file, version 3: typed metadata, a record a tensor, and the tensors one after the
# other.
#
# Source: the GGUF specification of the ggml project.


_VERSION = 3
_ALIGNMENT = 32

# Metadata types by the type in Python: number and `struct` letter. Ids and counts are unsigned; a
# list may have any sign.
_SINGLE = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
_LISTED = _SINGLE | {int: (5, "i")}
_TEXT, _LIST = 8, 9

_TYPE_NUMBERS = {block.name: number for number, block in BLOCK_TYPES.items()}


class NewTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: as in the file.
      shape: in numpy order, the fastest axis last; rows are whole blocks of the type.
      type: name of the element type, such as `F16` or `Q8_0`.
      content: gives its bytes, uint8 and contiguous, piece by piece; called once, when its turn has
        come.
    """

    name: str
    shape: Shape
    type: str
    content: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        block = BLOCK_TYPES[_TYPE_NUMBERS[self.type]]
        return math.prod(self.shape) // block.length * block.nbytes


def write_gguf_file(
    path: pathlib.Path, metadata: Mapping[str, object], tensors: Sequence[NewTensor]
) -> None:
    """Writes a file that is whole or absent, whatever happens; an older one at its place stays
    until then.

    Args:
      path: the file; its directory exists.
      metadata: text, `bool`, `int` (stored as UINT32), `float` (FLOAT32), and lists of these, each
        of one type (`int` as INT32); an empty list is one of texts. `general.alignment` is added.
      tensors: in the order of the file.

    Raises:
      InputError: naming the key, for metadata of another type or out of range; and what reading the
        content raises.
      OSError: where the file cannot be written.
    """
    header = _header({**metadata, "general.alignment": _ALIGNMENT}, tensors)
    with atomic_write(path) as file:
        file.write(header + _padding(len(header)))
        for tensor in tensors:
            _write_content(file, tensor)


def _header(metadata: Mapping[str, object], tensors: Sequence[NewTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    parts += [_entry(key, value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        parts.append(_record(tensor, offset))
        offset += tensor.nbytes + len(_padding(tensor.nbytes))
    return b"".join(parts)


def _write_content(file: BinaryIO, tensor: NewTensor) -> None:
    written = sum(file.write(piece.data) for piece in tensor.content())
    if written != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name}: {written} bytes given, {tensor.nbytes} expected")
    file.write(_padding(written))


def _record(tensor: NewTensor, offset: int) -> bytes:
    shape = tensor.shape[::-1]  # the file has the fastest axis first
    layout = struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *shape, _TYPE_NUMBERS[tensor.type], offset
    )
    return _text(tensor.name) + layout


def _entry(key: str, value: object) -> bytes:
    try:
        return _text(key) + _value(value)
    except (KeyError, struct.error, OverflowError, UnicodeEncodeError):
        raise InputError(
            f"metadata {key}: {shown(value)} cannot be stored; a text, true or false, a "
            "number of 32 bits "
            "or a list of one of these expected"
        ) from None


def _value(value: object) -> bytes:
    if isinstance(value, list):
        return struct.pack("<I", _LIST) + _list(value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    kind, letter = _SINGLE[type(value)]
    return struct.pack(f"<I{letter}", kind, value)


def _list(values: list) -> bytes:
    types = {type(value) for value in values} or {str}
    if types == {str}:
        return struct.pack("<IQ", _TEXT, len(values)) + b"".join(map(_text, values))
    kind, letter = _LISTED[types.pop() if len(types) == 1 else object]
    return struct.pack(f"<IQ{len(values)}{letter}", kind, len(values), *values)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(length: int) -> bytes:
    return bytes(-length % _ALIGNMENT)


# --- gguf export ---


_QUANTIZATION_VERSION = 2
_NOTHING_MORE: Mapping[str, object] = {}
_UNUSED, _UNUSED_SCORE = 5, -10000.0  # type and score of a token that no text becomes


def write_gguf(
    source: Source,
    path: str | os.PathLike[str],
    dtype: str,
    tokenizer_metadata: Mapping[str, object],
    template: str | None,
    name: str,
    more: Mapping[str, object] = _NOTHING_MORE,
) -> None:
    """Writes a model as a GGUF file, tensor by tensor; the file appears at its place when it is
    whole.

    Matrices are stored as `dtype`, norms always as float32. Where the tokenizer has fewer tokens
    than the model has rows, unused tokens fill the gap: llama.cpp wants as many of both.

    Args:
      source: the weights.
      path: the file, ending in `.gguf`; an existing one is replaced.
      dtype: `float32`, `float16`, `bfloat16` or `q8_0`.
      tokenizer_metadata: keys `tokenizer.*` and their values, types as for `write_gguf_file`.
        Without any, the file holds a model alone, which llama.cpp does not run.
      template: the chat template, `None` for a model without.
      name: of the model, for people.
      more: metadata beside those of the model, such as `Report.made_from` gives.

    Raises:
      InputError: for another `dtype`, a path that cannot be a file, a rotary scaling that GGUF
        cannot tell, a tokenizer larger than the model, metadata of a type that GGUF has not; naming
        the tensor, for a weight that is not finite or out of the range of the type, and a matrix
        too narrow for the blocks of `q8_0`.
      OSError: where the file cannot be written.
    """
    path, config = pathlib.Path(path), source.config
    _require_file_path(path)
    encoding = _encoding(dtype)
    metadata = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": encoding.file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        **metadata_from_config(config),
        **_tokenizer(tokenizer_metadata, config.vocab_size),
        **({} if template is None else {"tokenizer.chat_template": template}),
        **more,
    }
    write_gguf_file(path, metadata, [*_divisors(config), *_tensors(source, encoding)])


def _require_file_path(path: pathlib.Path) -> None:
    if path.suffix != ".gguf" or path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"{path}: a file name ending in .gguf, in a directory that exists, expected"
        )


def _encoding(dtype: str) -> Encoding:
    if dtype not in ENCODINGS:
        raise InputError(f"dtype {shown(dtype)} given, one of {', '.join(ENCODINGS)} expected")
    return ENCODINGS[dtype]


def _tokenizer(metadata: Mapping[str, object], vocab_size: int) -> dict[str, object]:
    """The metadata of a tokenizer, with as many tokens as the model has."""
    foreign = next((key for key in metadata if not key.startswith("tokenizer.")), None)
    if foreign is not None:
        raise InputError(f"tokenizer metadata: {shown(foreign)} given, keys tokenizer.* expected")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return dict(metadata)
    if len(tokens) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokens)} tokens, the model {vocab_size}; a "
            "tokenizer of the model expected"
        )
    unused = range(len(tokens), vocab_size)
    fillers: dict[str, list] = {
        "tokenizer.ggml.tokens": [f"[PAD{number}]" for number in unused],
        "tokenizer.ggml.token_type": [_UNUSED for _ in unused],
        "tokenizer.ggml.scores": [_UNUSED_SCORE for _ in unused],
    }
    return {key: _filled(value, fillers.get(key, [])) for key, value in metadata.items()}


def _filled(value: object, filler: list) -> object:
    return value + filler if isinstance(value, list) else value


def _divisors(config: LlamaConfig) -> Iterator[NewTensor]:
    """The tensor that stands for the scaling of Llama 3.1, if the model has it."""
    divisors = divisors_from_config(config)
    if divisors is not None:
        yield NewTensor(DIVISORS, divisors.shape, "F32", lambda: [divisors.view(np.uint8)])


def _tensors(source: Source, encoding: Encoding) -> Iterator[NewTensor]:
    """All weights: those outside of the layers, then those of the layers."""
    shapes = file_shapes(source.config, NAMES)
    outside: list[Place] = [
        (path, None) for path in flat_shapes(source.config) if not path.startswith("layers/")
    ]
    for path, layer in [*outside, *layered_places(source)]:
        yield _tensor(source, path, layer, shapes, encoding)


def _tensor(
    source: Source,
    path: str,
    layer: int | None,
    shapes: Mapping[str, tuple[int, ...]],
    encoding: Encoding,
) -> NewTensor:
    name = NAMES[path].format(layer)
    shape = shapes[name]
    encoding = encoding if len(shape) == 2 else ENCODINGS["float32"]
    if encoding.type == "Q8_0" and shape[-1] % Q8_0_BLOCK:
        raise InputError(
            f"tensor {name}: rows of {shape[-1]} weights, multiples of {Q8_0_BLOCK} "
            "expected for q8_0; take float16"
        )
    return NewTensor(
        name,
        shape,
        encoding.type,
        lambda: strips(name, _stored(source, path, layer), encoding.encode),
    )


def _stored(source: Source, path: str, layer: int | None) -> np.ndarray:
    """A tensor in the orientation and rotary layout of the file."""
    tensor = oriented(path, source.read(path, layer))
    return adjacent_layout(tensor, source.config.head_dim) if path in ROTATED else tensor
