"""What is strange about a model's files, in plain sentences: none of it stops a model from loading, all of it misleads."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.presets import PRESETS
from llama_jax.text.chat import template_names
from llama_jax.text.files import read_json
from llama_jax.text.gguf import assumed_rule
from llama_jax.text.stops import declared_stop_ids, declared_stop_ids_from_gguf
from llama_jax.weights.contents import Contents
from llama_jax.weights.files import json_object
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hugging_face import HuggingFaceSource
from llama_jax.weights.hugging_face_config import unknown_keys
from llama_jax.weights.open import Opened
from llama_jax.weights.source import shown

_SIZES = ("dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim")


def oddities(opened: Opened, held: Contents) -> list[str]:
    """A sentence for everything about an opened model that its maker may not have meant.

    Args:
      opened: the model.
      held: `contents` of its source.
    """
    config = opened.source.config
    found = [*_of_tokenizer(opened), *_of_promoted(opened), *_of_rule(opened), *_of_stops(opened), *_of_architecture(config)]
    if held.copied_head:
        found.append("the head is tied to the embedding, and a copy of the embedding is stored as a head all the same")
    if isinstance(opened.source, HuggingFaceSource):
        found += _of_description(json_object(opened.source.directory / "config.json"), held)
        found += [*_of_quantization(opened.source), *_of_begin(opened, opened.source.directory)]
    return found


def _of_tokenizer(opened: Opened) -> Iterator[str]:
    size = opened.source.config.vocab_size
    if opened.tokenizer is None:
        yield "there is no tokenizer among the files"
    elif opened.tokenizer.vocab_size > size:
        yield f"the tokenizer has {opened.tokenizer.vocab_size} tokens, the model {size}: ids from {size} on are of no use"


def _of_promoted(opened: Opened) -> Iterator[str]:
    promoted = getattr(opened.tokenizer, "promoted", ())
    if promoted:
        yield f"{', '.join(map(shown, promoted[:6]))} structure conversations, yet the tokenizer's file calls them ordinary"


def _of_rule(opened: Opened) -> Iterator[str]:
    metadata = opened.source.file.metadata if isinstance(opened.source, GgufSource) else {}
    if metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in metadata:
        yield f"the file does not say how words are cut (tokenizer.ggml.pre); {assumed_rule(metadata)} is taken"
    if "tokenizer.ggml.tokens" in metadata and "tokenizer.ggml.token_type" not in metadata:
        yield "the file has no types of tokens: control are those that begin, end and fill, and known marks of turns"
    scores = metadata.get("tokenizer.ggml.scores")
    if metadata.get("tokenizer.ggml.model") == "llama" and (not isinstance(scores, list) or len({*scores}) == 1):
        yield "all pieces have one score, so that pairs merge from left to right; the original tokenizer may cut otherwise"


def _of_stops(opened: Opened) -> Iterator[str]:
    if not opened.stop_ids:
        yield "no token is known to end a text: generation goes on to its limit"
    if opened.template is None or opened.tokenizer is None:
        return
    undeclared = set(opened.stop_ids) - set(_declared(opened))
    for text, token in opened.tokenizer.special_tokens.items():
        if token in undeclared and text in opened.template.source:
            yield f"the chat template ends turns with {shown(text)} ({token}), which the files do not declare as a stop"


def _declared(opened: Opened) -> tuple[int, ...]:
    """The stops that the files themselves name; all there are where a format has no place for them."""
    if isinstance(opened.source, HuggingFaceSource):
        return declared_stop_ids(opened.source.directory)
    if isinstance(opened.source, GgufSource):
        return declared_stop_ids_from_gguf(opened.source.file.metadata)
    return opened.stop_ids


def _of_architecture(config: LlamaConfig) -> Iterator[str]:
    """Beside the published models: the sizes of one and other numbers, a context that its scaling does not reach."""
    alike = {name: known for name, known in PRESETS.items() if all(getattr(known, s) == getattr(config, s) for s in _SIZES)}
    differences = {name: _differences(config, known) for name, known in alike.items()}
    if differences:
        nearest = min(differences, key=lambda name: len(differences[name]))
        if differences[nearest]:
            yield f"the sizes are those of {nearest}, but {'; '.join(differences[nearest])}"
    scaling = config.rope_scaling
    if scaling is None or scaling.original_context is None:
        return
    published = [known.context_length for known in PRESETS.values() if known.rope_scaling == scaling]
    reach = max([int(scaling.original_context * scaling.factor), *published])
    if config.context_length > reach:
        yield f"a context of {config.context_length} tokens is declared, {reach} are what its RoPE scaling is known to reach"


def _differences(config: LlamaConfig, known: LlamaConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(LlamaConfig) if field.name not in _SIZES]
    pairs = {name: (getattr(config, name), getattr(known, name)) for name in names}
    return [f"{name} is {_plain(one)} and there {_plain(other)}" for name, (one, other) in pairs.items() if one != other]


def _plain(value: object) -> str:
    """A number of the architecture, or a scaling in few words."""
    if isinstance(value, RopeScaling):
        return f"{value.rope_type} by {value.factor:g}"
    return "none" if value is None else str(value).lower()


def _of_begin(opened: Opened, directory: pathlib.Path) -> Iterator[str]:
    """What `tokenizer_config.json` says against what is done: about the begin token, and about chat templates."""
    declared, tokenizer = read_json(directory / "tokenizer_config.json").get("add_bos_token"), opened.tokenizer
    if tokenizer is not None and isinstance(declared, bool) and declared != tokenizer.adds_begin:
        does = "puts the begin token before every text" if tokenizer.adds_begin else "puts no begin token before a text"
        yield (f"tokenizer_config.json says add_bos_token: {str(declared).lower()}, yet tokenizer.json {does}; the latter is "
               "followed, as in transformers 5")  # fmt: skip
    names = template_names(directory)
    if opened.template is None and names:
        yield f"there are chat templates named {', '.join(map(shown, names[:6]))} and none named default: none is used"


def _of_quantization(source: HuggingFaceSource) -> Iterator[str]:
    if source.scheme is not None:
        yield (f"{len(source.scales)} weights are 8-bit floats and are dequantized when read; activations are not quantized "
               "here, as they are where these weights are served")  # fmt: skip


def _of_description(values: Mapping[str, Any], held: Contents) -> Iterator[str]:
    """What `config.json` says against what the tensors are."""
    declared = values.get("dtype") or values.get("torch_dtype")
    if isinstance(declared, str) and declared.removeprefix("torch.") not in held.types:
        yield f"config.json says the weights are {shown(declared)}, they are {' and '.join(held.types)}"
    if len(held.types) > 1:
        counted = ", ".join(f"{count} of {kind}" for kind, count in collections.Counter(held.types).items())
        yield f"the tensors are of several types: {counted}"
    ignored = unknown_keys(values)
    if ignored:
        named = ", ".join(f"{shown(key)}: {shown(values[key])}" for key in ignored[:4])
        rest = f" and {len(ignored) - 4} more" if len(ignored) > 4 else ""
        yield f"config.json has keys that are unknown here, with values that change nothing: {named}{rest}"
    if values.get("tie_word_embeddings") is None:
        yield "config.json does not say whether the head is tied to the embedding; false, as in transformers, is taken"
