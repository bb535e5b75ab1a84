"""Byte-pair tokenizers of the `tokenizers` library: `tokenizer.json`, the form Llama 3 and its kin
are shared in.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llama_jax.errors import InputError
from llama_jax.text.byte_level import SPLIT_RULES, TokenBytes, require_characters
from llama_jax.text.files import role_tokens, special_token, template_text
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.sentencepiece import Model, Piece, SentencePieceTokenizer, read_model
from llama_jax.text.tokenizer_json import read_tokenizer_json

_SPACE = "\u2581"
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _byte_characters() -> dict[int, int]:
    """For `str.translate`: character that stands for a byte in byte-level vocabularies -> that byte
    (GPT-2's code).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + n: byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}


def byte_level_piece(token: bytes) -> str:
    """A piece in which one character stands for each byte, the spelling of byte-level
    vocabularies.
    """
    return token.decode("latin-1").translate(_CHARACTER_OF_BYTE)


def _byte_level_bytes(piece: str) -> bytes:
    """Bytes of a piece in which one character stands for each byte."""
    try:
        return piece.translate(_BYTE_OF_CHARACTER).encode("latin-1")
    except (
        UnicodeEncodeError
    ):  # not spelled in that code: an entry that the vocabulary holds as plain text
        return piece.encode()


def _spaced_bytes(piece: str) -> bytes:
    """Bytes of a piece spelled as SentencePiece does: `▁` for a space, `<0x0A>` for a byte."""
    if _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(_SPACE, " ").encode()


_SPELLINGS: dict[frozenset[str], Callable[[str], bytes]] = {
    frozenset({"ByteLevel"}): _byte_level_bytes,
    frozenset({"Metaspace"}): _spaced_bytes,
    frozenset({"Replace", "ByteFallback", "Fuse"}): _spaced_bytes,
    frozenset({"Replace", "ByteFallback", "Fuse", "Strip"}): _spaced_bytes,
}


def _decoder_parts(tokenizer: tokenizers.Tokenizer) -> frozenset[str]:
    """Names of the steps that turn pieces into text."""
    decoder: dict[str, Any] = (
        json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {"type": "none"}
    )
    return frozenset(step["type"] for step in decoder.get("decoders", [decoder]))


def _spelling(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How the vocabulary spells bytes, told by the decoder."""
    parts = _decoder_parts(tokenizer)
    if parts not in _SPELLINGS:
        raise InputError(
            f"tokenizer.json: decoder {'+'.join(sorted(parts))} given, ByteLevel, "
            "Metaspace or ByteFallback expected"
        )
    return _SPELLINGS[parts]


@dataclasses.dataclass(frozen=True)
class BytePairTokenizer:
    """A `llama_jax.text.tokenizer.Tokenizer` around one of the `tokenizers` library.

    Attributes:
      tokenizer: the library's object; set here to leave special tokens inside text as text and
        never to cut or pad.
      begin_id: id of the token that begins a text, or `None`.
      end_id: id of the token that ends a text, or `None`.
      adds_begin: whether a plain prompt begins with `begin_id`.
      promoted: special tokens that their file calls ordinary, see `llama_jax.text.files`.

    Raises:
      InputError: for a model that is not byte-pair, or spelled in an unknown way.
    """

    tokenizer: tokenizers.Tokenizer = dataclasses.field(
        repr=False
    )  # its own repr is a screenful of merges
    begin_id: int | None
    end_id: int | None
    adds_begin: bool
    promoted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer.model, models.BPE):
            raise InputError(
                f"tokenizer.json: model {type(self.tokenizer.model).__name__} given, BPE expected"
            )
        _spelling(self.tokenizer)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()  # tokenizer.json may ask for 512 tokens at most, unseen
        self.tokenizer.no_padding()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of token ids: one more than the largest."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens and their ids."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {entry.content: token for token, entry in added.items() if entry.special}

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token."""
        spelling = _spelling(self.tokenizer)
        pieces = [b""] * self.vocab_size
        for piece, token in self.tokenizer.get_vocab(with_added_tokens=False).items():
            pieces[token] = spelling(piece)
        for token, added in self.tokenizer.get_added_tokens_decoder().items():
            pieces[token] = b"" if added.special else added.content.encode()
        spaced = (
            token
            for token, piece in enumerate(pieces)
            if piece.startswith(b" ") and spelling is _spaced_bytes
        )
        return TokenBytes(
            tuple(pieces), {token: self.tokenizer.decode([token]).encode() for token in spaced}
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it stay text, nothing is added.

        Raises:
          InputError: for text that is not valid Unicode.
        """
        return self.tokenizer.encode(require_characters(text), add_special_tokens=False).ids

    def encode_after_special(self, text: str) -> list[int]:
        """Ids of text after a special token, where no word begins unless the tokenizer says so for
        every stretch.
        """
        return self._inner.encode(require_characters(text), add_special_tokens=False).ids

    @functools.cached_property
    def _inner(self) -> tokenizers.Tokenizer:
        """The tokenizer as it acts inside a text: a copy if it marks only the very first word, else
        itself.
        """
        splitter = self.tokenizer.pre_tokenizer
        if not isinstance(splitter, pre_tokenizers.Metaspace) or splitter.prepend_scheme != "first":
            return self.tokenizer
        inner = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        inner.encode_special_tokens = True
        inner.pre_tokenizer = pre_tokenizers.Metaspace(
            splitter.replacement, prepend_scheme="never", split=splitter.split
        )
        return inner

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.token_bytes.decode(tokens)


def load_byte_pair(path: pathlib.Path) -> BytePairTokenizer:
    """Reads a `tokenizer.json`, and begin and end tokens from the files beside it.

    Whether prompts begin with the begin token is said by the tokenizer's own post-processor. An
    `add_bos_token` in `tokenizer_config.json` is passed over where there is a `tokenizer.json`, as
    in transformers 5.

    Raises:
      InputError: for a damaged file, and for declared tokens that the vocabulary does not hold.
    """
    tokenizer = read_tokenizer_json(path)
    ordinary = (
        entry.content
        for entry in tokenizer.get_added_tokens_decoder().values()
        if not entry.special
    )
    promoted = role_tokens(ordinary, template_text(path.parent))
    tokenizer = _with_special(tokenizer, promoted)
    first = next(iter(tokenizer.encode("", add_special_tokens=True).ids), None)
    if first is not None and tokenizer.id_to_token(first) is None:
        raise InputError(
            f"{path}: post_processor adds id {first}, which the vocabulary does not hold"
        )
    begin_id = _declared_id(path, tokenizer, "bos_token")
    end_id = _declared_id(path, tokenizer, "eos_token")
    if begin_id is None and first != end_id:
        begin_id = first
    return BytePairTokenizer(
        tokenizer, begin_id, end_id, begin_id is not None and first == begin_id, promoted
    )


def _with_special(tokenizer: tokenizers.Tokenizer, tokens: tuple[str, ...]) -> tokenizers.Tokenizer:
    """The tokenizer with some of its added tokens made special."""
    if not tokens:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    for entry in state["added_tokens"]:
        if entry["content"] in tokens:
            entry.update(special=True, normalized=False)
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _declared_id(path: pathlib.Path, tokenizer: tokenizers.Tokenizer, role: str) -> int | None:
    """Id of the token that the files beside a tokenizer.json declare for a role."""
    token = special_token(path.parent, role)
    found = None if token is None else tokenizer.token_to_id(token)
    if token is not None and found is None:
        raise InputError(
            f"{path}: {role} {token!r:.60} is declared, but the vocabulary does not hold it"
        )
    return found


# --- merges ---
#
# Tokenizers that merge by rank or by score, as tokenizers of the `tokenizers` library that merge by
# a list of pairs.
#
# Either way the pair to merge next is the one whose union ranks best, so the list holds, best union
# first, every pair of known parts that a known token can be cut into. Of several such cuts of one
# token no two can ever compete: when the token is about to be formed, all better merges inside it
# have been made, which leaves a single cut.


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # types of pieces


def byte_pair_from_ranks(tokenizer: Llama3Tokenizer) -> BytePairTokenizer:
    """Llama 3's ranks as a byte-level tokenizer with a list of merges, in the manner of its
    `tokenizer.json`.

    Raises:
      InputError: if a rank spells a special token, from which it could not be distinguished.
    """
    rule = SPLIT_RULES["llama-bpe"]
    ranks = {byte_level_piece(token): rank for rank, token in enumerate(tokenizer.tokens)}
    clash = next((token for token in tokenizer.special_tokens if token in ranks), None)
    if clash is not None:
        raise InputError(
            f"tokenizer: {clash!r} is both special and an ordinary token, which "
            "tokenizer.json cannot say"
        )
    library = tokenizers.Tokenizer(models.BPE(ranks, _cuts(ranks), ignore_merges=rule.whole_words))
    library.pre_tokenizer = rule.splitter()
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(
        [AddedToken(token, normalized=False) for token in tokenizer.special_tokens]
    )
    return BytePairTokenizer(library, tokenizer.begin_id, tokenizer.end_id, tokenizer.adds_begin)


def byte_pair_from_pieces(tokenizer: SentencePieceTokenizer) -> BytePairTokenizer:
    """A SentencePiece model as a tokenizer with a list of merges, in the manner of Llama 2's
    `tokenizer.json`.

    Unused pieces keep their ids, and no text becomes one. User-defined pieces become added tokens,
    as transformers has them: where a text is encoded with a space before it, so is then what stands
    behind such a piece.

    Raises:
      InputError: for what such a tokenizer cannot do alike: other models than byte pairs, tables of
        characters, user-defined pieces with spaces, unused ones that merge, and scores that leave
        the order of merges open.
    """
    model = plain_model(tokenizer)
    ranked = _mergeable(model)
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.text for piece in model.pieces if piece.kind == _UNKNOWN)
    merges = _cuts({piece: rank for rank, piece in enumerate(ranked)})
    library = tokenizers.Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
        )
    )
    replace, prefix = (
        normalizers.Replace(" ", _SPACE),
        [normalizers.Prepend(_SPACE)] if model.space_prefix else [],
    )
    library.normalizer = normalizers.Sequence([*prefix, replace])
    strip = [decoders.Strip(" ", 1, 0)] if model.space_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = (piece.text for piece in model.pieces if piece.kind in (_UNKNOWN, _CONTROL))
    library.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    own = (piece.text for piece in model.pieces if piece.kind == _USER_DEFINED)
    library.add_tokens([AddedToken(token, normalized=False) for token in own])
    return BytePairTokenizer(library, tokenizer.begin_id, tokenizer.end_id, tokenizer.adds_begin)


def plain_model(tokenizer: SentencePieceTokenizer) -> Model:
    """The model inside, which leaves text as it is apart from spaces and merges by score.

    Raises:
      InputError: if it does anything else; neither `tokenizer.json` nor GGUF says such things
        exactly.
    """
    model = read_model(tokenizer.processor.serialized_model_proto())
    if not model.byte_pair:
        raise InputError(
            "SentencePiece model: unigram, word or character model given, byte pairs (BPE) expected"
        )
    if model.charsmap or not model.plain_spaces:
        raise InputError(
            "SentencePiece model: it changes characters or spaces before encoding; only "
            "LLaMA's kind, which "
            "leaves them alone (rule `identity`), can be written in other forms"
        )
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
        raise InputError(
            f"SentencePiece model: piece {stray!r:.60} has characters that are no pieces "
            "of their own"
        )
    return [piece.text for piece in ranked]


def _require_plain_others(model: Model) -> None:
    """Refuses user-defined pieces that spell a space otherwise than texts do, and unused ones in
    which parts merge.
    """
    parts = {piece.text for piece in model.pieces if piece.kind in (_NORMAL, _UNUSED)}
    for piece in model.pieces:
        text, cuts = piece.text, range(1, len(piece.text))
        if piece.kind == _USER_DEFINED and _SPACE in text:
            raise InputError(
                f"SentencePiece model: piece {text!r:.60} is user-defined and has a "
                "space; tokenizer.json cannot say so"
            )
        if piece.kind == _UNUSED and any(
            text[:cut] in parts and text[cut:] in parts for cut in cuts
        ):
            raise InputError(
                f"SentencePiece model: piece {text!r:.60} is unused and yet merges on "
                "the way; tokenizer.json cannot say so"
            )


def _require_order(ranked: list[Piece]) -> None:
    """Pieces of one score merge from left to right, wherever they stand; a list of merges puts one
    before the other.
    """
    for piece, other in itertools.pairwise(ranked):
        if piece.score == other.score:
            raise InputError(
                f"SentencePiece model: {piece.text!r:.60} and {other.text!r:.60} have "
                f"one score, {piece.score}; "
                "tokenizer.json needs an order of merges"
            )


def _cuts(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make up a piece, in the order of its rank (in which the pieces
    stand) and then of theirs.
    """
    merges: list[tuple[str, str]] = []
    for piece in ranks:
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
