"""A larger vocabulary for a model: special tokens that are added, with entries of the embedding and
of the head that begin as the mean of those that are there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers

from llama_jax.axes import Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.export import as_byte_pair
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.open import Opened
from llama_jax.weights.source import MergedSource, shown

_MOST_TOKENS = 10_000


def resize_vocabulary(
    params: Parameters, config: LlamaConfig, size: int, known: int | None = None
) -> tuple[Parameters, LlamaConfig]:
    """The same model with more entries in its vocabulary.

    New entries of the embedding and of the head are the mean of the known ones, as in transformers'
    `resize_token_embeddings(mean_resizing=True)`, without its noise.

    Args:
      params: plain parameters, stacked or unrolled.
      config: their architecture.
      size: of the new vocabulary, at least that of the old one.
      known: entries that have a meaning; those after them, which some models have as padding,
        begin anew too. All of them by default.

    Raises:
      InputError: for a size or a number of known entries out of range.
    """
    known = config.vocab_size if known is None else known
    if not 0 < known <= config.vocab_size <= size:
        raise InputError(
            f"vocabulary: {size} entries after {known} given; at least {config.vocab_size} "
            f"after 1 to {config.vocab_size} expected"
        )
    resized = dict(params)
    resized["embedding"] = _resized(params["embedding"], size, known, jnp)
    if not config.tied_head:
        resized["head"] = _resized(params["head"].T, size, known, jnp).T
    return resized, dataclasses.replace(config, vocab_size=size)


def _resized(table: Any, size: int, known: int, library: Any) -> Any:
    """A table `[V, D]` with the mean of its first `known` entries behind them."""
    mean = table[:known].astype("float32").mean(axis=0, keepdims=True).astype(table.dtype)
    return library.concatenate([table[:known], library.repeat(mean, size - known, axis=0)])


class Added(NamedTuple):
    """What `add_tokens` did.

    Attributes:
      tokens: new tokens with their ids.
      present: tokens that the vocabulary had already, with their ids.
      first: id of the first entry that begins anew.
      size: of the vocabulary now.
    """

    tokens: Mapping[str, int]
    present: Mapping[str, int]
    first: int
    size: int


@dataclasses.dataclass(frozen=True)
class _Tables:
    """Embedding and head that replace a model's; see `Factors`."""

    replaced: Mapping[tuple[str, int | None], np.ndarray]
    tied: bool
    tree: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale: float = 0.0


def add_tokens(opened: Opened, tokens: Sequence[str], multiple: int = 1) -> tuple[Opened, Added]:
    """A model on disk with special tokens added to its vocabulary.

    Args:
      opened: from `open_model`.
      tokens: such as `<|tool|>`; those that the vocabulary has already are left as they are.
      multiple: the vocabulary grows to a multiple of it, such as 128 for sharding; entries without
        a token are padding.

    Raises:
      InputError: for a model without a tokenizer, a tokenizer that cannot take tokens, and tokens
        that are none.
    """
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise InputError(f"{opened.path} has no tokenizer; give a model with one")
    wrong = [token for token in tokens if not token or token != token.strip()]
    if wrong or len(set(tokens)) != len(tokens) or len(tokens) > _MOST_TOKENS:
        raise InputError(
            f"new tokens: {shown(wrong[0] if wrong else list(tokens))} given; different texts "
            f"without space around them expected, at most {_MOST_TOKENS}"
        )
    if multiple < 1:
        raise InputError(f"multiple: {multiple} given, at least 1 expected")
    library = as_byte_pair(tokenizer)
    grown, ids = _with_tokens(library, tokens)
    config = opened.source.config
    # A tokenizer may have tokens that the model has no entries for, or fewer.
    first = min(tokenizer.vocab_size, config.vocab_size)
    size = -(-max(config.vocab_size, grown.vocab_size) // multiple) * multiple
    tables: dict[tuple[str, int | None], np.ndarray] = {}
    tables["embedding", None] = _resized(opened.source.read("embedding", None), size, first, np)
    if not config.tied_head:
        head = opened.source.read("head", None).T
        tables["head", None] = _resized(head, size, first, np).T
    known = tokenizer.vocab_size
    new = {token: number for token, number in ids.items() if number >= known}
    present = {token: number for token, number in ids.items() if number < known}
    changed = opened._replace(
        source=MergedSource(opened.source, _Tables(tables, config.tied_head)),
        tokenizer=grown,
        rewritten=True,
        origin=f"{opened.origin}; {len(new)} new tokens",
    )
    return changed, Added(new, present, first, size)


def _with_tokens(
    tokenizer: BytePairTokenizer, tokens: Sequence[str]
) -> tuple[Tokenizer, dict[str, int]]:
    """A copy of a tokenizer with special tokens added, and the ids of all of them."""
    library = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    taken = library.get_vocab(with_added_tokens=True)
    new = [token for token in tokens if token not in taken]
    library.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in new])
    vocabulary = library.get_vocab(with_added_tokens=True)
    grown = dataclasses.replace(tokenizer, tokenizer=library)
    return grown, {token: vocabulary[token] for token in tokens}
