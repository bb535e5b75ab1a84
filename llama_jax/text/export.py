"""Tokenizers out: the files that transformers reads, and the metadata of a GGUF file.

Sources: transformers 5 (`tokenizer_config.json`, `chat_template.jinja`), llama.cpp (keys `tokenizer.ggml.*`).
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import pre_tokenizers

from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.merges import byte_pair_from_pieces, byte_pair_from_ranks, plain_model
from llama_jax.text.model_proto import Piece
from llama_jax.text.scores import falls_back_to_bytes, scored_pieces
from llama_jax.text.sentence_piece import SentencePieceTokenizer
from llama_jax.text.splitting import SPLIT_RULES
from llama_jax.text.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # token types of GGUF
_PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<PAD>", "[PAD]")


def hugging_face_files(tokenizer: Tokenizer, template: str | None = None) -> dict[str, bytes]:
    """The files of a Hugging Face directory with which transformers' `AutoTokenizer` gives the same ids.

    They are `tokenizer.json` and `tokenizer_config.json`, for SentencePiece models `tokenizer.model` too, and
    `chat_template.jinja` if there is a template.

    Args:
      tokenizer: any of `load_tokenizer` or `tokenizer_from_gguf`.
      template: source of a chat template.

    Returns:
      The content of each file by its name.

    Raises:
      InputError: for a tokenizer that `tokenizer.json` cannot repeat exactly.
    """
    files = _library_files(_as_byte_pair(tokenizer))
    if isinstance(tokenizer, SentencePieceTokenizer):
        files["tokenizer.model"] = tokenizer.processor.serialized_model_proto()
    return files if template is None else files | {"chat_template.jinja": template.encode()}


def gguf_metadata(tokenizer: Tokenizer) -> dict[str, object]:
    """The keys `tokenizer.ggml.*` from which `tokenizer_from_gguf` makes a tokenizer that gives the same ids.

    Returns:
      Text, numbers and lists of them: `model`, `pre`, `tokens`, `token_type`, `scores` or `merges`, `add_bos_token`,
      `add_eos_token`, for SentencePiece `add_space_prefix`, and the ids of special tokens that there are.

    Raises:
      InputError: for a tokenizer that GGUF has no name for, such as another rule of splitting words.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = plain_model(tokenizer)
        values = _piece_values(model.pieces, model.space_prefix)
    elif isinstance(tokenizer, BytePairTokenizer) and falls_back_to_bytes(tokenizer):
        values = _piece_values(*scored_pieces(tokenizer))
    else:
        values = _byte_pair_values(_as_byte_pair(tokenizer))
    ids = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id, "padding_token_id": _padding_id(tokenizer)}
    values |= {"add_bos_token": tokenizer.adds_begin, "add_eos_token": False, **ids}
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def _as_byte_pair(tokenizer: Tokenizer) -> BytePairTokenizer:
    """The tokenizer as one of the tokenizers library."""
    if isinstance(tokenizer, Llama3Tokenizer):
        return byte_pair_from_ranks(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return byte_pair_from_pieces(tokenizer)
    if isinstance(tokenizer, BytePairTokenizer):
        return tokenizer
    raise InputError(f"tokenizer: a {type(tokenizer).__name__} given, one of load_tokenizer or tokenizer_from_gguf expected")


def _padding_id(tokenizer: Tokenizer) -> int | None:
    """The special token meant for padding, which no file of ours declares, by its name."""
    return next((tokenizer.special_tokens[token] for token in _PADDING if token in tokenizer.special_tokens), None)


def _library_files(tokenizer: BytePairTokenizer) -> dict[str, bytes]:
    """`tokenizer.json` with a begin token where ours adds one, and what lies beside it."""
    state = json.loads(tokenizer.tokenizer.to_str())
    begin = tokenizer.begin_id if tokenizer.adds_begin else None
    if tokenizer.tokenizer.encode("", add_special_tokens=True).ids != ([] if begin is None else [begin]):
        state["post_processor"] = None if begin is None else _begins_with(tokenizer, begin)
    ids = {"bos_token": tokenizer.begin_id, "eos_token": tokenizer.end_id, "pad_token": _padding_id(tokenizer)}
    text = {role: tokenizer.tokenizer.id_to_token(token) for role, token in ids.items() if token is not None}
    # The class that takes tokenizer.json as it is; transformers 5 builds others anew from vocabulary and merges alone.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.adds_begin, "add_eos_token": False,
              "clean_up_tokenization_spaces": False, "unk_token": state["model"]["unk_token"], **text}  # fmt: skip
    # Without indentation, since Python writes the megabytes of a tokenizer ten times as fast so.
    return {
        "tokenizer.json": json.dumps(state, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }


def _begins_with(tokenizer: BytePairTokenizer, begin: int) -> dict[str, Any]:
    """The post-processor that puts a token before each text."""
    token = tokenizer.tokenizer.id_to_token(begin)
    first, second = (
        [{"SpecialToken": {"id": token, "type_id": n}}, {"Sequence": {"id": "AB"[n], "type_id": n}}] for n in (0, 1)
    )
    names = {token: {"id": token, "ids": [begin], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": names}


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
    tokens = [tokenizer.tokenizer.id_to_token(number) or f"[PAD{number}]" for number in range(tokenizer.vocab_size)]
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
    kinds = [_UNUSED if token == f"[PAD{number}]" else _NORMAL for number, token in enumerate(tokens)]
    for number, token in tokenizer.tokenizer.get_added_tokens_decoder().items():
        kinds[number] = _CONTROL if token.special else _USER_DEFINED
    return kinds


def _rule_name(tokenizer: BytePairTokenizer, whole_words: bool) -> str:
    """GGUF's name for how a tokenizer cuts words."""
    library = tokenizer.tokenizer
    steps = [] if library.pre_tokenizer is None else _steps(library.pre_tokenizer)
    for name, rule in SPLIT_RULES.items():
        if library.normalizer is None and steps == _steps(rule.splitter()) and whole_words == rule.whole_words:
            return name
    first = "first" if whole_words else "not first"
    raise InputError(f"tokenizer.json: cutting words by {steps!r:.120}, whole words {first}, has no name in GGUF here; "
                     f"known are {', '.join(SPLIT_RULES)}")  # fmt: skip


def _steps(splitter: pre_tokenizers.PreTokenizer) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what concerns only the places of tokens in the text."""
    state = json.loads(splitter.__getstate__())
    return [
        {key: value for key, value in step.items() if key != "trim_offsets"} for step in state.get("pretokenizers", [state])
    ]
