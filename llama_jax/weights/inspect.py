"""What was found out about a model before it is trusted: a report for the screen, for JSON, and for
checkpoints made of it.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from llama_jax.accounting import parameter_count
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.presets import PRESETS, name_of
from llama_jax.text.chat import template_names
from llama_jax.text.files import read_json
from llama_jax.text.formats import recognise
from llama_jax.text.gguf import assumed_rule
from llama_jax.text.stops import declared_stop_ids, declared_stop_ids_from_gguf
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.gguf import DIVISORS, GgufSource
from llama_jax.weights.hf_config import unknown_keys
from llama_jax.weights.hf_read import NAMES as HUGGING_FACE_NAMES
from llama_jax.weights.hf_read import HuggingFaceSource
from llama_jax.weights.meta import NAMES as META_NAMES
from llama_jax.weights.meta import MetaSource
from llama_jax.weights.open import Opened
from llama_jax.weights.run import RunSource
from llama_jax.weights.source import MergedSource, Source, json_object, shown

# --- contents ---
#
# What the files of an opened model hold, by their headers: types, bytes, parameters.


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
    copied = (
        isinstance(source, HuggingFaceSource | MetaSource)
        and source.config.tied_head
        and _has_head(source)
    )
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
        added = parameter_count(source.config) - parameter_count(
            source.base.config
        )  # a larger vocabulary, a head of its own
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
            repeated = (
                number % copies != 0
                if name.endswith(_KEYS_AND_VALUES)
                else number > 0 and name.endswith("norm.weight")
            )
            yield Stored(
                size, dtype.name, size * dtype.itemsize, _counts(name, source) and not repeated
            )


def _of_run(source: RunSource) -> Iterator[Stored]:
    """The parameters in a checkpoint, without the state of the optimizer."""
    for path, record in source.manifest.arrays.items():
        if path.startswith("params/"):
            size = math.prod(record.shape)
            yield Stored(size, record.dtype, size * np.dtype(record.dtype).itemsize, counts=True)


# --- warnings_of ---
#
# What is strange about a model's files, in plain sentences: none of it stops a model from loading,
# all of it misleads.


_SIZES = ("dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim")


def warnings_of(opened: Opened, held: Contents) -> list[str]:
    """A sentence for everything about an opened model that its maker may not have meant.

    Args:
      opened: the model.
      held: `contents` of its source.
    """
    config = opened.source.config
    found = [
        *_of_tokenizer(opened),
        *_of_promoted(opened),
        *_of_rule(opened),
        *_of_stops(opened),
        *_of_architecture(config),
    ]
    if held.copied_head:
        found.append(
            "the head is tied to the embedding, and a copy of the embedding is stored as "
            "a head all the same"
        )
    if isinstance(opened.source, HuggingFaceSource):
        found += _of_description(json_object(opened.source.directory / "config.json"), held)
        found += [*_of_quantization(opened.source), *_of_begin(opened, opened.source.directory)]
    return found


def _of_tokenizer(opened: Opened) -> Iterator[str]:
    size = opened.source.config.vocab_size
    if opened.tokenizer is None:
        yield "there is no tokenizer among the files"
    elif opened.tokenizer.vocab_size > size:
        yield (
            f"the tokenizer has {opened.tokenizer.vocab_size} tokens, the model {size}: ids "
            f"from {size} on are of no use"
        )


def _of_promoted(opened: Opened) -> Iterator[str]:
    promoted = getattr(opened.tokenizer, "promoted", ())
    if promoted:
        yield (
            f"{', '.join(map(shown, promoted[:6]))} structure conversations, yet the "
            "tokenizer's file calls them ordinary"
        )


def _of_rule(opened: Opened) -> Iterator[str]:
    metadata = opened.source.file.metadata if isinstance(opened.source, GgufSource) else {}
    if metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in metadata:
        yield (
            "the file does not say how words are cut (tokenizer.ggml.pre); "
            f"{assumed_rule(metadata)} is taken"
        )
    if "tokenizer.ggml.tokens" in metadata and "tokenizer.ggml.token_type" not in metadata:
        yield (
            "the file has no types of tokens: control are those that begin, end and fill, "
            "and known marks of turns"
        )
    scores = metadata.get("tokenizer.ggml.scores")
    if metadata.get("tokenizer.ggml.model") == "llama" and (
        not isinstance(scores, list) or len({*scores}) == 1
    ):
        yield (
            "all pieces have one score, so that pairs merge from left to right; the original "
            "tokenizer may cut otherwise"
        )


def _of_stops(opened: Opened) -> Iterator[str]:
    if not opened.stop_ids:
        yield "no token is known to end a text: generation goes on to its limit"
    if opened.template is None or opened.tokenizer is None:
        return
    undeclared = set(opened.stop_ids) - set(_declared(opened))
    for text, token in opened.tokenizer.special_tokens.items():
        if token in undeclared and text in opened.template.source:
            yield (
                f"the chat template ends turns with {shown(text)} ({token}), which the files "
                "do not declare as a stop"
            )


def _declared(opened: Opened) -> tuple[int, ...]:
    """The stops that the files themselves name; all there are where a format has no place for
    them.
    """
    if isinstance(opened.source, HuggingFaceSource):
        return declared_stop_ids(opened.source.directory)
    if isinstance(opened.source, GgufSource):
        return declared_stop_ids_from_gguf(opened.source.file.metadata)
    return opened.stop_ids


def _of_architecture(config: LlamaConfig) -> Iterator[str]:
    """Beside the published models: the sizes of one and other numbers, a context that its scaling
    does not reach.
    """
    alike = {
        name: known
        for name, known in PRESETS.items()
        if all(getattr(known, s) == getattr(config, s) for s in _SIZES)
    }
    differences = {name: _differences(config, known) for name, known in alike.items()}
    if differences:
        nearest = min(differences, key=lambda name: len(differences[name]))
        if differences[nearest]:
            yield f"the sizes are those of {nearest}, but {'; '.join(differences[nearest])}"
    scaling = config.rope_scaling
    if scaling is None or scaling.original_context is None:
        return
    published = [
        known.context_length for known in PRESETS.values() if known.rope_scaling == scaling
    ]
    reach = max([int(scaling.original_context * scaling.factor), *published])
    if config.context_length > reach:
        yield (
            f"a context of {config.context_length} tokens is declared, {reach} are what its "
            "RoPE scaling is known to reach"
        )


def _differences(config: LlamaConfig, known: LlamaConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(LlamaConfig) if field.name not in _SIZES]
    pairs = {name: (getattr(config, name), getattr(known, name)) for name in names}
    return [
        f"{name} is {_plain(one)} and there {_plain(other)}"
        for name, (one, other) in pairs.items()
        if one != other
    ]


def _plain(value: object) -> str:
    """A number of the architecture, or a scaling in few words."""
    if isinstance(value, RopeScaling):
        return f"{value.rope_type} by {value.factor:g}"
    return "none" if value is None else str(value).lower()


def _of_begin(opened: Opened, directory: pathlib.Path) -> Iterator[str]:
    """Contradictions between `tokenizer_config.json` and the tokenizer: about the begin token, and
    about chat templates.
    """
    declared, tokenizer = (
        read_json(directory / "tokenizer_config.json").get("add_bos_token"),
        opened.tokenizer,
    )
    if tokenizer is not None and isinstance(declared, bool) and declared != tokenizer.adds_begin:
        does = (
            "puts the begin token before every text"
            if tokenizer.adds_begin
            else "puts no begin token before a text"
        )
        yield (
            f"tokenizer_config.json says add_bos_token: {str(declared).lower()}, yet "
            f"tokenizer.json {does}; the latter is "
            "followed, as in transformers 5"
        )
    names = template_names(directory)
    if opened.template is None and names:
        yield (
            f"there are chat templates named {', '.join(map(shown, names[:6]))} and none "
            "named default: none is used"
        )


def _of_quantization(source: HuggingFaceSource) -> Iterator[str]:
    if source.scheme is not None:
        yield (
            f"{len(source.scales)} weights are 8-bit floats and are dequantized when "
            "read; activations are not quantized "
            "here, as they are where these weights are served"
        )


def _of_description(values: Mapping[str, Any], held: Contents) -> Iterator[str]:
    """Contradictions between `config.json` and the tensors."""
    declared = values.get("dtype") or values.get("torch_dtype")
    if isinstance(declared, str) and declared.removeprefix("torch.") not in held.types:
        yield (
            f"config.json says the weights are {shown(declared)}, they are "
            f"{' and '.join(held.types)}"
        )
    if len(held.types) > 1:
        counted = ", ".join(
            f"{count} of {kind}" for kind, count in collections.Counter(held.types).items()
        )
        yield f"the tensors are of several types: {counted}"
    ignored = unknown_keys(values)
    if ignored:
        named = ", ".join(f"{shown(key)}: {shown(values[key])}" for key in ignored[:4])
        rest = f" and {len(ignored) - 4} more" if len(ignored) > 4 else ""
        yield (
            "config.json has keys that are unknown here, with values that change nothing: "
            f"{named}{rest}"
        )
    if values.get("tie_word_embeddings") is None:
        yield (
            "config.json does not say whether the head is tied to the embedding; false, as "
            "in transformers, is taken"
        )


# --- report ---


_LAYOUTS = {"run": "halves", "hugging_face": "halves", "meta": "adjacent", "gguf": "adjacent"}
_LAYOUT_WORDS = {
    "halves": "pairs half a head apart, as here",
    "adjacent": "adjacent pairs, reordered when loaded",
}
_LONGEST_LINE = 1000
MADE_FROM = "llama_jax.made_from"  # key of the report in what is made from a model
_FEW = 8  # special tokens on the screen; Llama 3 has 256


@dataclasses.dataclass(frozen=True)
class Report:
    """Facts about a model on disk, all from headers and small files.

    Attributes:
      origin: one line that describes it.
      path: where it is.
      format: `run`, `hugging_face`, `meta` or `gguf`.
      preset: name of the published architecture that it has, number for number; `None` for any
        other.
      model: the architecture.
      parameters: counted from the shapes in the files.
      expected_parameters: by the closed form.
      layout: which channels of queries and keys turn together in the files: `halves` of a head
        apart, or `adjacent` ones.
      types: how many tensors of each type the files hold.
      nbytes: bytes of the tensors.
      tokenizer_vocab_size: token ids of the tokenizer; `None` without one.
      begin: text of the token that begins a text; `None` if there is none.
      adds_begin: whether a plain prompt begins with it.
      stops: tokens that end a text, their texts by id; `None` for a text that only a tokenizer
        would know.
      special_tokens: special tokens and their ids.
      chat_template: `none`, a built-in format to which it is equivalent (`llama2`, `llama3`,
        `chatml`), or `foreign`.
      odd: a sentence for everything strange.
    """

    origin: str
    path: str
    format: str
    preset: str | None
    model: LlamaConfig
    parameters: int
    expected_parameters: int
    layout: str
    types: dict[str, int]
    nbytes: int
    tokenizer_vocab_size: int | None
    begin: str | None
    adds_begin: bool
    stops: dict[int, str | None]
    special_tokens: dict[str, int]
    chat_template: str
    odd: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self) | {
            "stops": {str(token): text for token, text in self.stops.items()},
            "odd": [*self.odd],
        }

    def made_from(self) -> dict[str, str]:
        """All of it but the path, which concerns nobody else, as the metadata of a model made from
        this one.
        """
        values = {name: value for name, value in self.to_dict().items() if name != "path"}
        return {MADE_FROM: json.dumps(values)}

    def brief(self) -> list[str]:
        """One line, and another if anything is odd."""
        kinds = "+".join(self.types)
        size = f"{_scaled(self.parameters)} parameters in {kinds}, {_scaled(self.nbytes)}B"
        line = (
            f"{self.origin}: {self.preset or 'custom architecture'}, {size}, chat template "
            f"{self.chat_template}"
        )
        more = f" (and {len(self.odd) - 1} more; see inspect)" if len(self.odd) > 1 else ""
        return [
            _printable(text)
            for text in (line, *(f"odd: {sentence}{more}" for sentence in self.odd[:1]))
        ]

    def lines(self) -> list[str]:
        """All of it for a screen, a fact a line."""
        rows = {
            "model": self.origin,
            "path": self.path,
            "architecture": self.preset or "custom",
            "parameters": f"{self.parameters:,} in the files, {self.expected_parameters:,} by the "
            "architecture",
            "sizes": _sizes(self.model),
            "head": "tied to the embedding" if self.model.tied_head else "separate",
            "context": f"{self.model.context_length} tokens",
            "RoPE": _rope(self.model),
            "query, key": _LAYOUT_WORDS[self.layout],
            "tensors": ", ".join(f"{count} {kind}" for kind, count in self.types.items())
            + f"; {_scaled(self.nbytes)}B, {8 * self.nbytes / self.parameters:.3g} bits a "
            "parameter",
            "vocabulary": self._vocabulary(),
            "begin": "none"
            if self.begin is None
            else f"{self.begin}, {'' if self.adds_begin else 'not '}put before prompts",
            "stops": ", ".join(
                f"{token} {text or '(text unknown)'}" for token, text in self.stops.items()
            )
            or "none",
            "special": self._special(),
            "chat template": self.chat_template,
        }
        pairs = [*rows.items(), *(("odd", sentence) for sentence in self.odd)]
        return [f"{name:15}{_printable(value)}" for name, value in pairs]

    def _vocabulary(self) -> str:
        tokenizer = (
            "no tokenizer"
            if self.tokenizer_vocab_size is None
            else f"{self.tokenizer_vocab_size} of the tokenizer"
        )
        return f"{self.model.vocab_size} tokens of the model, {tokenizer}"

    def _special(self) -> str:
        texts = [
            f"{token} {text}"
            for text, token in sorted(self.special_tokens.items(), key=lambda item: item[1])
        ]
        rest = [f"and {len(texts) - _FEW} more"] if len(texts) > _FEW else []
        return ", ".join(texts[:_FEW] + rest) or "none"


def report(opened: Opened) -> Report:
    """What the files of an opened model say; no weight is read."""
    held, config, tokenizer = contents(opened.source), opened.source.config, opened.tokenizer
    return Report(
        origin=opened.origin,
        path=str(opened.path),
        format=opened.format,
        preset=name_of(config),
        model=config,
        parameters=held.parameters,
        expected_parameters=parameter_count(config),
        layout=_LAYOUTS[opened.format],
        types=held.types,
        nbytes=held.nbytes,
        tokenizer_vocab_size=tokenizer.vocab_size if tokenizer else None,
        begin=_text(tokenizer, tokenizer.begin_id)
        if tokenizer and tokenizer.begin_id is not None
        else None,
        adds_begin=tokenizer is not None and tokenizer.adds_begin,
        stops={token: _text(tokenizer, token) for token in opened.stop_ids},
        special_tokens=dict(tokenizer.special_tokens) if tokenizer else {},
        chat_template="none"
        if opened.template is None
        else recognise(opened.template) or "foreign",
        odd=tuple(warnings_of(opened, held)),
    )


def _text(tokenizer: Tokenizer | None, token: int) -> str | None:
    """The text of a token, special or not."""
    if tokenizer is None:
        return None
    special = {number: text for text, number in tokenizer.special_tokens.items()}
    return special.get(token) or tokenizer.decode([token])


def _printable(text: str) -> str:
    """Text from files as it may go to a terminal: control characters spelled out, and cut where it
    is long.
    """
    spelled = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_LONGEST_LINE]
    )
    return spelled + (" ..." if len(text) > _LONGEST_LINE else "")


def _sizes(config: LlamaConfig) -> str:
    heads = f"{config.heads} heads of {config.head_dim} ({config.kv_heads} of keys and values)"
    return (
        f"{config.layers} layers, width {config.dim}, {heads}, feed-forward "
        f"{config.ffn_dim}, epsilon {config.norm_eps:g}"
    )


def _rope(config: LlamaConfig) -> str:
    scaling = config.rope_scaling
    base = f"base {config.rope_theta:g}"
    if scaling is None:
        return f"default, {base}"
    original = f", original context {scaling.original_context}" if scaling.original_context else ""
    return f"{scaling.rope_type}, {base}, factor {scaling.factor:g}{original}"


def _scaled(number: int) -> str:
    """A number with three digits and a prefix: 1.24 G."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number} "
