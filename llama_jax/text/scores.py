"""Byte-pair tokenizers with SentencePiece's spelling (Llama 1 and 2 as `tokenizer.json`) as pieces with scores.

A list of merges names pairs, a table of scores names what they become. Which pair of parts becomes a piece is settled by
the better merges inside it, so the piece's score is the place in the list of the one merge that completes it.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.model_proto import Piece

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
    """Whether a tokenizer writes characters that no piece holds in bytes, as those made of SentencePiece models do."""
    return bool(json.loads(tokenizer.tokenizer.model.__getstate__())["byte_fallback"])


def scored_pieces(tokenizer: BytePairTokenizer) -> ScoredPieces:
    """The pieces of a tokenizer for which `falls_back_to_bytes`, scored so that the same merges happen in the same order.

    A pre-tokenizer that puts a space only before texts without one (`Metaspace`) is taken for one that always puts it.

    Raises:
      InputError: for what merging by score cannot repeat: other treatment of spaces, whole words first, no unknown token
        or not all bytes, and merges left out of the list although both parts and the whole are pieces.
    """
    state = json.loads(tokenizer.tokenizer.to_str())
    model, space_prefix = state["model"], _space_prefix(state)
    unknown, vocabulary = model["unk_token"], model["vocab"]
    if model["ignore_merges"] or model["dropout"] or unknown is None or not vocabulary.keys() >= set(_BYTES):
        raise InputError("tokenizer.json: byte fallback without <unk> or all 256 bytes, with dropout or whole words first, "
                         "has no name in GGUF here; merges alone expected")  # fmt: skip
    kinds = {token["content"]: _CONTROL if token["special"] else _USER_DEFINED for token in state["added_tokens"]}
    kinds |= {**dict.fromkeys(_BYTES, _BYTE), unknown: _UNKNOWN}
    normal = [piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if piece not in kinds]
    scores = _scores(normal, {(left, right): rank for rank, (left, right) in enumerate(model["merges"])})
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
    steps = [] if state["normalizer"] is None else state["normalizer"].get("normalizers", [state["normalizer"]])
    splitter = state["pre_tokenizer"]
    if splitter is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return len(steps) == 2
    if not steps and splitter is not None and splitter["type"] == "Metaspace" and splitter.get("split", True) is False:
        return splitter.get("prepend_scheme", "always") != "never"
    raise InputError(f"tokenizer.json: byte fallback after {[*steps, splitter]!r:.120} has no name in GGUF here; "
                     "spaces written as ▁ and nothing else expected")  # fmt: skip


def _scores(pieces: list[str], ranks: Mapping[Pair, int]) -> dict[str, float]:
    """Score of each piece, 0 for the first to merge and one less for each that follows; pieces that never merge last."""
    known, completed = set(pieces), {}
    for piece in pieces:
        parts, last = _merged(piece, ranks)
        if len(parts) == 2 and known.issuperset(parts):
            raise InputError(f"tokenizer.json: {piece!r:.60} is a piece and so are {parts[0]!r:.40} and {parts[1]!r:.40}, but "
                             "they do not merge; scores, which GGUF has here, cannot say so")  # fmt: skip
        if len(parts) == 1 and last is not None:
            completed[piece] = last
    order = [*sorted(completed, key=completed.__getitem__), *(piece for piece in pieces if piece not in completed)]
    return {piece: -float(place) for place, piece in enumerate(order)}


def _merged(piece: str, ranks: Mapping[Pair, int]) -> tuple[list[str], int | None]:
    """The parts that merging by a list makes of a piece, and the rank of the last merge."""
    parts, last = list(piece), None
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[at : at + 2], last = ["".join(parts[at : at + 2])], rank
    return parts, last
