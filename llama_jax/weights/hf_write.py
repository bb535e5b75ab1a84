"""A model written as a directory of Hugging Face's, readable by transformers 4 and 5 and by
`llama_jax.load`.

Everything streams from a `Source` tensor by tensor, so a model larger than memory can be written.
The directory appears under its name when it is whole; until then `config.json`, without which
nothing loads it, is missing as well.
"""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from llama_jax.axes import Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.storage import atomic_directory, write_synced
from llama_jax.text.chat import ChatTemplate, template_from_directory
from llama_jax.text.export import hugging_face_files
from llama_jax.text.files import read_json
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.assemble import ParameterSource, WatchedSource
from llama_jax.weights.gguf import NAMES as GGUF_NAMES
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hf_config import TokenIds, config_values, generation_values, model_card
from llama_jax.weights.hf_read import NAMES, HuggingFaceSource, inside
from llama_jax.weights.inspect import report
from llama_jax.weights.meta import NAMES as META_NAMES
from llama_jax.weights.meta import MetaSource
from llama_jax.weights.open import Opened, verified
from llama_jax.weights.run import RunSource
from llama_jax.weights.safetensors import (
    DTYPES,
    INDEX,
    TensorSpec,
    index_of,
    parse_size,
    plan_shards,
    write_safetensors,
)
from llama_jax.weights.source import Source, blamed_on, file_shapes, flat_shapes, oriented, shown

# --- hugging face beside ---
#
# What lies beside the weights in a directory of Hugging Face's: the tokenizer's files, special
# tokens, the chat template.


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_LARGEST_TOKENIZER_FILE = 128 << 20
_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "<PAD>",
    "[PAD]",
)  # as `text.export` writes for the tokenizer


class Beside(NamedTuple):
    """All that is written about a model but its weights and its architecture.

    Attributes:
      tokens: its special tokens.
      files: of the tokenizer and the chat template, by name.
      generation: what its earlier `generation_config.json` said.
      origin: one line that names its source.
      chat: whether it has a chat template.
    """

    tokens: TokenIds
    files: Mapping[str, bytes]
    generation: Mapping[str, Any]
    origin: str
    chat: bool


def files_beside(opened: Opened) -> Beside:
    """What is to lie beside the weights of a model on disk; files of Hugging Face's are taken as
    they are.

    Raises:
      InputError: for damaged files, links out of the directory, and a tokenizer that transformers
        could not read.
    """
    generation: Mapping[str, Any] = {}
    if opened.format == "hugging_face":
        generation = read_json(opened.path / "generation_config.json")
        declared = {**read_json(opened.path / "config.json"), **generation}
        own = opened.beside or opened.path
        files = _written(opened.tokenizer, opened.template) if opened.rewritten else _copied(own)
        if opened.template is not None and opened.template != template_from_directory(own):
            # It lies beside adapters.
            files["chat_template.jinja"] = opened.template.source.encode()
    else:
        declared = _declared(opened.source)
        files = _written(opened.tokenizer, opened.template)
    tokens = _token_ids(opened.source.config, opened.tokenizer, opened.stop_ids, declared)
    return Beside(tokens, files, generation, opened.origin, opened.template is not None)


def files_of(
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    stop_ids: tuple[int, ...],
) -> Beside:
    """What is to lie beside the weights of a model in memory.

    Raises:
      InputError: for a tokenizer that transformers could not read, and stops outside the
        vocabulary.
    """
    size = tokenizer.vocab_size if tokenizer else config.vocab_size
    wrong = next((token for token in stop_ids if not 0 <= token < size), None)
    if wrong is not None:
        raise InputError(
            f"stop_ids: {shown(wrong)} given, ids of the vocabulary, 0 to {size - 1}, expected"
        )
    tokens = _token_ids(config, tokenizer, tuple(sorted(set(stop_ids))), {})
    return Beside(
        tokens, _written(tokenizer, template), {}, "parameters in memory", template is not None
    )


def _declared(source: Source) -> dict[str, Any]:
    """What a GGUF file says about padding, in the words of Hugging Face."""
    metadata = source.file.metadata if isinstance(source, GgufSource) else {}
    return {"pad_token_id": metadata.get("tokenizer.ggml.padding_token_id")}


def _token_ids(
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    stops: tuple[int, ...],
    declared: Mapping[str, Any],
) -> TokenIds:
    """Special tokens; what the tokenizer does not know is taken from what the model's files
    declare.
    """
    begin = tokenizer.begin_id if tokenizer else _an_id(declared.get("bos_token_id"))
    pad = _an_id(declared.get("pad_token_id"))
    if pad is None and tokenizer is not None:
        special = tokenizer.special_tokens
        pad = next((special[token] for token in _PAD_TOKENS if token in special), None)
    # transformers makes the row of the padding token zero at a gradient, and refuses one that the
    # table does not have.
    return TokenIds(begin, stops, pad if pad is not None and pad < config.vocab_size else None)


def _an_id(value: object) -> int | None:
    """A token id out of a file; old files say -1 for none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _written(tokenizer: Tokenizer | None, template: ChatTemplate | None) -> dict[str, bytes]:
    """The files of a tokenizer that was read from elsewhere."""
    files = hugging_face_files(tokenizer) if tokenizer else {}
    return files if template is None else {**files, "chat_template.jinja": template.source.encode()}


def _copied(directory: pathlib.Path) -> dict[str, bytes]:
    """The files of the tokenizer in a directory of Hugging Face's, as they are."""
    files = {}
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            with blamed_on(directory):
                files[name] = _small(inside(directory, name))
    return files


def _small(path: pathlib.Path) -> bytes:
    if path.stat().st_size > _LARGEST_TOKENIZER_FILE:
        raise InputError(
            f"{path.name} is larger than {_LARGEST_TOKENIZER_FILE} bytes; a file of a "
            "tokenizer is not"
        )
    return path.read_bytes()


# --- order ---
#
# The order in which all tensors of a source are read and written elsewhere.


Place = tuple[str, int | None]  # canonical path and layer, the arguments of `Source.read`


def layered_places(source: Source) -> list[Place]:
    """The tensors of all layers: layer by layer, the order of use; those of a run path by path.

    A checkpoint of ours holds all layers of a parameter in one array: so that each is read once,
    and one at a time.
    """
    inner = source.source if isinstance(source, WatchedSource) else source
    paths = [path for path in flat_shapes(source.config) if path.startswith("layers/")]
    layers = range(source.config.layers)
    if isinstance(inner, RunSource):
        return [(path, layer) for path in paths for layer in layers]
    return [(path, layer) for layer in layers for path in paths]


def places(source: Source) -> list[Place]:
    """All tensors: the embedding, those of the layers, and the rest."""
    rest: list[Place] = [
        (path, None)
        for path in flat_shapes(source.config)
        if not path.startswith(("embedding", "layers/"))
    ]
    return [("embedding", None), *layered_places(source), *rest]


# --- hugging face export ---


Dtype = Literal["keep", "float32", "bfloat16", "float16"]
Watcher = Callable[[int], None]

DEFAULT_SHARD_SIZE = "5GB"

_SAVED_AS = {dtype.name: dtype for dtype in DTYPES.values()}


class Exported(NamedTuple):
    """A directory that was written.

    Attributes:
      directory: where it is.
      files: names of its files.
      nbytes: bytes of all of them.
      dtype: name of the dtype that most of the weights have.
    """

    directory: pathlib.Path
    files: tuple[str, ...]
    nbytes: int
    dtype: str


def export_hugging_face(
    opened: Opened,
    directory: str | os.PathLike[str],
    dtype: Dtype = "keep",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    watcher: Watcher | None = None,
) -> Exported:
    """Writes a model that lies on disk in any format as a directory of Hugging Face's.

    What `report` finds out about the model goes along, in the metadata of the files of weights.

    Args:
      opened: from `open_model`. Of a directory of Hugging Face's, the files of the tokenizer are
        copied as they are.
      directory: is to hold the model; nothing, or an empty directory.
      dtype: of the weights; `keep` leaves each tensor as it is, and makes float32 of quantised
        ones.
      max_shard_size: largest file of weights, such as `5GB`; decimal units.
      watcher: called after each tensor with its number of parameters.

    Raises:
      InputError: for a directory that is not empty, a disk without room, a value beyond the range
        of `dtype`, a model without a tokenizer that transformers could read, and whatever is wrong
        with the model itself.
    """
    return _export(
        opened.source, files_beside(opened), directory, dtype, max_shard_size, watcher, opened
    )


def save_hugging_face(
    params: Parameters,
    config: LlamaConfig,
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    stop_ids: tuple[int, ...] = (),
    dtype: Dtype = "keep",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
) -> Exported:
    """Writes parameters in memory as a directory of Hugging Face's.

    Args:
      params: the tree, stacked or unrolled.
      config: its architecture.
      directory: is to hold the model; nothing, or an empty directory.
      tokenizer: written in a form that transformers reads; without one there are weights alone.
      template: how the model wants a conversation written.
      stop_ids: tokens that end an answer.
      dtype: of the weights; `keep` leaves each array as it is.
      max_shard_size: largest file of weights, such as `5GB`; decimal units.

    Raises:
      InputError: if the tree is not of this architecture, and as for `export_hugging_face`.
    """
    source = ParameterSource(config, params)
    return _export(
        source,
        files_of(config, tokenizer, template, stop_ids),
        directory,
        dtype,
        max_shard_size,
        None,
        None,
    )


def main_dtype(source: Source) -> str:
    """Name of the dtype that most of a source's parameters have; that of quantised ones is
    float32.
    """
    return _main_dtype(_specs(source, "keep"))


def _export(
    source: Source,
    beside: Beside,
    directory: str | os.PathLike[str],
    dtype: Dtype,
    max_shard_size: str | int,
    watcher: Watcher | None,
    opened: Opened | None,
) -> Exported:
    target = pathlib.Path(directory)
    specs = _specs(source, dtype)
    shards = plan_shards(specs, parse_size(max_shard_size))
    nbytes = sum(spec.nbytes for spec in specs) + sum(map(len, beside.files.values()))
    with atomic_directory(target, nbytes) as partial:
        metadata: dict[str, str] = {}
        if opened is not None:
            whole = verified(opened)
            metadata, beside = report(whole).made_from(), beside._replace(origin=whole.origin)
        _write_weights(
            partial, shards, source if watcher is None else WatchedSource(source, watcher), metadata
        )
        for name, content in _texts(
            target.absolute().name, source.config, _main_dtype(specs), beside
        ).items():
            write_synced(partial / name, content)
    written = sorted(target.iterdir())
    nbytes = sum(path.stat().st_size for path in written)
    return Exported(target, tuple(path.name for path in written), nbytes, _main_dtype(specs))


def _write_weights(
    directory: pathlib.Path,
    shards: dict[str, list[TensorSpec]],
    source: Source,
    metadata: Mapping[str, str],
) -> None:
    at = _places(source)

    def read(name: str) -> np.ndarray:
        """A tensor of the source as the files have it, `[out, in]`."""
        return oriented(at[name][0], source.read(*at[name]))

    for file, specs in shards.items():
        write_safetensors(directory / file, specs, read, metadata)
    if len(shards) > 1:
        write_synced(directory / INDEX, _json(index_of(shards)))


def _texts(name: str, config: LlamaConfig, dtype: str, beside: Beside) -> dict[str, bytes]:
    """All files but the weights; the one without which nothing is loaded comes last."""
    return {
        **beside.files,
        "generation_config.json": _json(generation_values(beside.tokens, beside.generation)),
        "README.md": model_card(name, beside.origin, config, dtype, beside.chat).encode(),
        "config.json": _json(config_values(config, dtype, beside.tokens)),
    }


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _places(source: Source) -> dict[str, Place]:
    """Path and layer of each tensor by its name in the files, in their order."""
    return {NAMES[path].format(layer): (path, layer) for path, layer in places(source)}


def _specs(source: Source, dtype: Dtype) -> list[TensorSpec]:
    """What is to be written, in order."""
    if dtype not in ("keep", *_SAVED_AS):
        raise InputError(
            f"dtype {shown(dtype)} given; one of keep, {', '.join(_SAVED_AS)} expected"
        )
    shapes = file_shapes(source.config, NAMES)
    specs = []
    for name, (path, layer) in _places(source).items():
        kept = _stored_dtype(source, path, layer) if dtype == "keep" else _SAVED_AS[dtype]
        if kept not in _SAVED_AS.values():
            raise InputError(f"tensor {name} is {kept}; one of {', '.join(_SAVED_AS)} expected")
        specs.append(TensorSpec(name, kept, shapes[name]))
    return specs


def _stored_dtype(source: Source, path: str, layer: int | None) -> np.dtype:
    """The dtype in which a source gives a tensor, by the file's table where reading is work:
    decoding, merging shards.
    """
    if isinstance(source, MetaSource):
        return source.files[0].tensors[META_NAMES[path].format(layer)].storage.dtype
    if isinstance(source, GgufSource):
        return DTYPES.get(source.file.tensors[GGUF_NAMES[path].format(layer)].type, DTYPES["F32"])
    if isinstance(source, HuggingFaceSource):
        return source.dtype(path, layer)
    return source.dtype(path) if isinstance(source, RunSource) else source.read(path, layer).dtype


def _main_dtype(specs: list[TensorSpec]) -> str:
    sizes = collections.Counter[str]()
    for spec in specs:
        sizes[spec.dtype.name] += spec.nbytes // spec.dtype.itemsize
    return max(sizes, key=lambda name: sizes[name])
