"""Tokenizers out: the files that transformers reads, and the metadata of a GGUF file.

Sources: transformers 5 (`tokenizer_config.json`, `chat_template.jinja`), llama.cpp (keys
  `tokenizer.ggml.*`).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import pre_tokenizers

from llama_jax.errors import InputError
from llama_jax.text.byte_level import SPLIT_RULES
from llama_jax.text.byte_pair import (
    BytePairTokenizer,
    byte_pair_from_pieces,
    byte_pair_from_ranks,
    plain_model,
)
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.sentencepiece import Piece, SentencePieceTokenizer
from llama_jax.text.tokenizer import Tokenizer

# --- scores ---
#
# Byte-pair tokenizers with SentencePiece's spelling (Llama 1 and 2 as `tokenizer.json`) as pieces
# with scores.
#
# A list of merges names pairs, a table of scores names what they become. Which pair of parts
# becomes a piece is settled by the better merges inside it, so the piece's score is the place in
# the list of the one merge that completes it.


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of pieces
_SPACE = "\u2581"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}

Pair = tuple[str, str]


class ScoredPieces(NamedTuple):
    """A vocabulary that merges by score.

    Attributes:
      pieces: in the order of ids.
      space_prefix: whether a text is encoded as if a space came before it.
    """

    pieces: list[Piece]
    space_prefix: bool


def falls_back_to_bytes(tokenizer: BytePairTokenizer) -> bool:
    """Whether a tokenizer writes characters that no piece holds in bytes, as those made of
    SentencePiece models do.
    """
    return bool(json.loads(tokenizer.tokenizer.model.__getstate__())["byte_fallback"])


def scored_pieces(tokenizer: BytePairTokenizer) -> ScoredPieces:
    """The pieces of a tokenizer for which `falls_back_to_bytes`, scored so that the same merges
    happen in the same order.

    A pre-tokenizer that puts a space only before texts without one (`Metaspace`) is taken for one
    that always puts it.

    Raises:
      InputError: for what merging by score cannot repeat: other treatment of spaces, whole words
        first, no unknown token or not all bytes, and merges left out of the list although both
        parts and the whole are pieces.
    """
    state = json.loads(tokenizer.tokenizer.to_str())
    model, space_prefix = state["model"], _space_prefix(state)
    unknown, vocabulary = model["unk_token"], model["vocab"]
    if (
        model["ignore_merges"]
        or model["dropout"]
        or unknown is None
        or not vocabulary.keys() >= set(_BYTES)
    ):
        raise InputError(
            "tokenizer.json: byte fallback without <unk> or all 256 bytes, with dropout "
            "or whole words first, "
            "has no name in GGUF here; merges alone expected"
        )
    kinds = {
        token["content"]: _CONTROL if token["special"] else _USER_DEFINED
        for token in state["added_tokens"]
    }
    kinds |= {**dict.fromkeys(_BYTES, _BYTE), unknown: _UNKNOWN}
    normal = [
        piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if piece not in kinds
    ]
    scores = _scores(
        normal, {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    )
    texts = [tokenizer.tokenizer.id_to_token(number) for number in range(tokenizer.vocab_size)]
    pieces = [
        Piece(f"[PAD{number}]", min(scores.values(), default=0.0), _UNUSED)
        if text is None
        else Piece(text, scores.get(text, 0.0), kinds.get(text, _NORMAL))
        for number, text in enumerate(texts)
    ]
    return ScoredPieces(pieces, space_prefix)


def _space_prefix(state: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text whose spaces are otherwise only written `▁`."""
    steps = (
        []
        if state["normalizer"] is None
        else state["normalizer"].get("normalizers", [state["normalizer"]])
    )
    splitter = state["pre_tokenizer"]
    if splitter is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return len(steps) == 2
    if (
        not steps
        and splitter is not None
        and splitter["type"] == "Metaspace"
        and splitter.get("split", True) is False
    ):
        return splitter.get("prepend_scheme", "always") != "never"
    raise InputError(
        f"tokenizer.json: byte fallback after {[*steps, splitter]!r:.120} has no name in "
        "GGUF here; "
        "spaces written as ▁ and nothing else expected"
    )


def _scores(pieces: list[str], ranks: Mapping[Pair, int]) -> dict[str, float]:
    """Score of each piece, 0 for the first to merge and one less for each that follows; pieces that
    never merge last.
    """
    known, completed = set(pieces), {}
    for piece in pieces:
        parts, last = _merged(piece, ranks)
        if len(parts) == 2 and known.issuperset(parts):
            raise InputError(
                f"tokenizer.json: {piece!r:.60} is a piece and so are {parts[0]!r:.40} "
                f"and {parts[1]!r:.40}, but "
                "they do not merge; scores, which GGUF has here, cannot say so"
            )
        if len(parts) == 1 and last is not None:
            completed[piece] = last
    order = [
        *sorted(completed, key=completed.__getitem__),
        *(piece for piece in pieces if piece not in completed),
    ]
    return {piece: -float(place) for place, piece in enumerate(order)}


def _merged(piece: str, ranks: Mapping[Pair, int]) -> tuple[list[str], int | None]:
    """The parts that merging by a list makes of a piece, and the rank of the last merge."""
    parts, last = list(piece), None
    while len(parts) > 1:
        rank, at = min(
            (ranks.get(pair, len(ranks)), at) for at, pair in enumerate(itertools.pairwise(parts))
        )
        if rank == len(ranks):
            break
        parts[at : at + 2], last = ["".join(parts[at : at + 2])], rank
    return parts, last


# --- export ---


_PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<PAD>", "[PAD]")


def hugging_face_files(tokenizer: Tokenizer, template: str | None = None) -> dict[str, bytes]:
    """The files of a Hugging Face directory with which transformers' `AutoTokenizer` gives the same
    ids.

    They are `tokenizer.json` and `tokenizer_config.json`, for SentencePiece models
    `tokenizer.model` too, and `chat_template.jinja` if there is a template.

    Args:
      tokenizer: any of `load_tokenizer` or `tokenizer_from_gguf`.
      template: source of a chat template.

    Returns:
      The content of each file by its name.

    Raises:
      InputError: for a tokenizer that `tokenizer.json` cannot repeat exactly.
    """
    files = _library_files(as_byte_pair(tokenizer))
    if isinstance(tokenizer, SentencePieceTokenizer):
        files["tokenizer.model"] = tokenizer.processor.serialized_model_proto()
    return files if template is None else files | {"chat_template.jinja": template.encode()}


def gguf_metadata(tokenizer: Tokenizer) -> dict[str, object]:
    """The keys `tokenizer.ggml.*` from which `tokenizer_from_gguf` makes a tokenizer that gives the
    same ids.

    Returns:
      Text, numbers and lists of them: `model`, `pre`, `tokens`, `token_type`, `scores` or `merges`,
      `add_bos_token`, `add_eos_token`, for SentencePiece `add_space_prefix`, and the ids of special
      tokens that there are.

    Raises:
      InputError: for a tokenizer that GGUF has no name for, such as another rule of splitting
        words.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = plain_model(tokenizer)
        values = _piece_values(model.pieces, model.space_prefix)
    elif isinstance(tokenizer, BytePairTokenizer) and falls_back_to_bytes(tokenizer):
        values = _piece_values(*scored_pieces(tokenizer))
    else:
        values = _byte_pair_values(as_byte_pair(tokenizer))
    ids = {
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": tokenizer.end_id,
        "padding_token_id": _padding_id(tokenizer),
    }
    values |= {"add_bos_token": tokenizer.adds_begin, "add_eos_token": False, **ids}
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def as_byte_pair(tokenizer: Tokenizer) -> BytePairTokenizer:
    """The tokenizer as one of the tokenizers library."""
    if isinstance(tokenizer, Llama3Tokenizer):
        return byte_pair_from_ranks(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return byte_pair_from_pieces(tokenizer)
    if isinstance(tokenizer, BytePairTokenizer):
        return tokenizer
    raise InputError(
        f"tokenizer: a {type(tokenizer).__name__} given, one of load_tokenizer or "
        "tokenizer_from_gguf expected"
    )


def _padding_id(tokenizer: Tokenizer) -> int | None:
    """The special token meant for padding, which no file of ours declares, by its name."""
    return next(
        (
            tokenizer.special_tokens[token]
            for token in _PADDING
            if token in tokenizer.special_tokens
        ),
        None,
    )


def _library_files(tokenizer: BytePairTokenizer) -> dict[str, bytes]:
    """`tokenizer.json` with a begin token where ours adds one, and what lies beside it."""
    state = json.loads(tokenizer.tokenizer.to_str())
    begin = tokenizer.begin_id if tokenizer.adds_begin else None
    if tokenizer.tokenizer.encode("", add_special_tokens=True).ids != (
        [] if begin is None else [begin]
    ):
        state["post_processor"] = None if begin is None else _begins_with(tokenizer, begin)
    ids = {
        "bos_token": tokenizer.begin_id,
        "eos_token": tokenizer.end_id,
        "pad_token": _padding_id(tokenizer),
    }
    text = {
        role: tokenizer.tokenizer.id_to_token(token)
        for role, token in ids.items()
        if token is not None
    }
    # The class that takes tokenizer.json as it is; transformers 5 builds others anew from
    # vocabulary and merges alone.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_begin,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": state["model"]["unk_token"],
        **text,
    }
    # Without indentation, since Python writes the megabytes of a tokenizer ten times as fast so.
    return {
        "tokenizer.json": json.dumps(state, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }


def _begins_with(tokenizer: BytePairTokenizer, begin: int) -> dict[str, Any]:
    """The post-processor that puts a token before each text."""
    token = tokenizer.tokenizer.id_to_token(begin)
    first, second = (
        [{"SpecialToken": {"id": token, "type_id": n}}, {"Sequence": {"id": "AB"[n], "type_id": n}}]
        for n in (0, 1)
    )
    names = {token: {"id": token, "ids": [begin], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": names,
    }


def _piece_values(pieces: Sequence[Piece], space_prefix: bool) -> dict[str, Any]:
    """Kind `llama`: pieces with scores."""
    kinds = [piece.kind for piece in pieces]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": kinds,
        "unknown_token_id": kinds.index(_UNKNOWN),
        "add_space_prefix": space_prefix,
    }


def _byte_pair_values(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    """Kind `gpt2`: byte-level pieces with a list of merges."""
    model = json.loads(tokenizer.tokenizer.to_str())["model"]
    tokens = [
        tokenizer.tokenizer.id_to_token(number) or f"[PAD{number}]"
        for number in range(tokenizer.vocab_size)
    ]
    unknown = model["unk_token"]
    return {
        "model": "gpt2",
        "pre": _rule_name(tokenizer, model["ignore_merges"]),
        "tokens": tokens,
        "token_type": _types(tokenizer, tokens),
        "merges": [" ".join(pair) for pair in model["merges"]],
        "unknown_token_id": None if unknown is None else tokenizer.tokenizer.token_to_id(unknown),
    }


def _types(tokenizer: BytePairTokenizer, tokens: list[str]) -> list[int]:
    """Type of each token; `[PAD7]` in place 7 is llama.cpp's name for an id without a token."""
    kinds = [
        _UNUSED if token == f"[PAD{number}]" else _NORMAL for number, token in enumerate(tokens)
    ]
    for number, token in tokenizer.tokenizer.get_added_tokens_decoder().items():
        kinds[number] = _CONTROL if token.special else _USER_DEFINED
    return kinds


def _rule_name(tokenizer: BytePairTokenizer, whole_words: bool) -> str:
    """GGUF's name for how a tokenizer cuts words."""
    library = tokenizer.tokenizer
    steps = [] if library.pre_tokenizer is None else _steps(library.pre_tokenizer)
    for name, rule in SPLIT_RULES.items():
        if (
            library.normalizer is None
            and steps == _steps(rule.splitter())
            and whole_words == rule.whole_words
        ):
            return name
    first = "first" if whole_words else "not first"
    raise InputError(
        f"tokenizer.json: cutting words by {steps!r:.120}, whole words {first}, has no "
        "name in GGUF here; "
        f"known are {', '.join(SPLIT_RULES)}"
    )


def _steps(splitter: pre_tokenizers.PreTokenizer) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what concerns only the places of tokens in the text."""
    state = json.loads(splitter.__getstate__())
    return [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in state.get("pretokenizers", [state])
    ]
