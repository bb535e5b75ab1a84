"""Tokenizers that merge by rank or by score, as tokenizers of the `tokenizers` library that merge by a list of pairs.

Either way the pair to merge next is the one whose union ranks best, so the list holds, best union first, every pair of
known parts that a known token can be cut into. Of several such cuts of one token no two can ever compete: when the
token is about to be formed, all better merges inside it have been made, which leaves a single cut.
"""

import itertools
from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer, byte_level_piece
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.model_proto import Model, Piece, read_model
from llama_jax.text.sentence_piece import SentencePieceTokenizer
from llama_jax.text.splitting import SPLIT_RULES

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # types of pieces
_SPACE = "\u2581"


def byte_pair_from_ranks(tokenizer: Llama3Tokenizer) -> BytePairTokenizer:
    """Llama 3's ranks as a byte-level tokenizer with a list of merges, in the manner of its `tokenizer.json`.

    Raises:
      InputError: if a rank spells a special token, which could then not be told from it.
    """
    rule = SPLIT_RULES["llama-bpe"]
    ranks = {byte_level_piece(token): rank for rank, token in enumerate(tokenizer.tokens)}
    clash = next((token for token in tokenizer.special_tokens if token in ranks), None)
    if clash is not None:
        raise InputError(f"tokenizer: {clash!r} is both special and an ordinary token, which tokenizer.json cannot say")
    library = tokenizers.Tokenizer(models.BPE(ranks, _cuts(ranks), ignore_merges=rule.whole_words))
    library.pre_tokenizer = rule.splitter()
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, normalized=False) for token in tokenizer.special_tokens])
    return BytePairTokenizer(library, tokenizer.begin_id, tokenizer.end_id, tokenizer.adds_begin)


def byte_pair_from_pieces(tokenizer: SentencePieceTokenizer) -> BytePairTokenizer:
    """A SentencePiece model as a tokenizer with a list of merges, in the manner of Llama 2's `tokenizer.json`.

    Unused pieces keep their ids, and no text becomes one. User-defined pieces become added tokens, as transformers has
    them: where a text is encoded with a space before it, so is then what stands behind such a piece.

    Raises:
      InputError: for what such a tokenizer cannot do alike: other models than byte pairs, tables of characters,
        user-defined pieces with spaces, unused ones that merge, and scores that leave the order of merges open.
    """
    model = plain_model(tokenizer)
    ranked = _mergeable(model)
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.text for piece in model.pieces if piece.kind == _UNKNOWN)
    merges = _cuts({piece: rank for rank, piece in enumerate(ranked)})
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    )
    replace, prefix = normalizers.Replace(" ", _SPACE), [normalizers.Prepend(_SPACE)] if model.space_prefix else []
    library.normalizer = normalizers.Sequence([*prefix, replace])
    strip = [decoders.Strip(" ", 1, 0)] if model.space_prefix else []
    library.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = (piece.text for piece in model.pieces if piece.kind in (_UNKNOWN, _CONTROL))
    library.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    own = (piece.text for piece in model.pieces if piece.kind == _USER_DEFINED)
    library.add_tokens([AddedToken(token, normalized=False) for token in own])
    return BytePairTokenizer(library, tokenizer.begin_id, tokenizer.end_id, tokenizer.adds_begin)


def plain_model(tokenizer: SentencePieceTokenizer) -> Model:
    """The model inside, which leaves text as it is apart from spaces and merges by score.

    Raises:
      InputError: if it does anything else; neither `tokenizer.json` nor GGUF says such things exactly.
    """
    model = read_model(tokenizer.processor.serialized_model_proto())
    if not model.byte_pair:
        raise InputError("SentencePiece model: unigram, word or character model given, byte pairs (BPE) expected")
    if model.charsmap or not model.plain_spaces:
        raise InputError("SentencePiece model: it changes characters or spaces before encoding; only LLaMA's kind, which "
                         "leaves them alone (rule `identity`), can be written in other forms")  # fmt: skip
    return model


def _mergeable(model: Model) -> list[str]:
    """The normal pieces, those that merge first in front.

    Raises:
      InputError: for types of pieces, and scores, whose effect a list of merges cannot repeat.
    """
    normal = [piece for piece in model.pieces if piece.kind == _NORMAL]
    _require_plain_others(model)
    ranked = sorted(normal, key=lambda piece: -piece.score)
    _require_order([piece for piece in ranked if len(piece.text) > 1])
    known = {piece.text for piece in normal}
    stray = next((piece.text for piece in normal if not known.issuperset(piece.text)), None)
    if stray is not None:
        raise InputError(f"SentencePiece model: piece {stray!r:.60} has characters that are no pieces of their own")
    return [piece.text for piece in ranked]


def _require_plain_others(model: Model) -> None:
    """Refuses user-defined pieces that spell a space otherwise than texts do, and unused ones in which parts merge."""
    parts = {piece.text for piece in model.pieces if piece.kind in (_NORMAL, _UNUSED)}
    for piece in model.pieces:
        text, cuts = piece.text, range(1, len(piece.text))
        if piece.kind == _USER_DEFINED and _SPACE in text:
            raise InputError(
                f"SentencePiece model: piece {text!r:.60} is user-defined and has a space; tokenizer.json cannot say so"
            )
        if piece.kind == _UNUSED and any(text[:cut] in parts and text[cut:] in parts for cut in cuts):
            raise InputError(
                f"SentencePiece model: piece {text!r:.60} is unused and yet merges on the way; tokenizer.json cannot say so"
            )


def _require_order(ranked: list[Piece]) -> None:
    """Pieces of one score merge from left to right, wherever they stand; a list of merges puts one before the other."""
    for piece, other in itertools.pairwise(ranked):
        if piece.score == other.score:
            raise InputError(f"SentencePiece model: {piece.text!r:.60} and {other.text!r:.60} have one score, {piece.score}; "
                             "tokenizer.json needs an order of merges")  # fmt: skip


def _cuts(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make up a piece, in the order of its rank (in which the pieces stand) and then of theirs."""
    merges: list[tuple[str, str]] = []
    for piece in ranks:
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
