"""Tokenizers rebuilt from GGUF metadata: the real SmolLM2, the pattern of Llama 3, SentencePiece
models written as GGUF.
"""

import json
import pathlib
import random

import pytest
import regex
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from trained import byte_level

from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.export import gguf_metadata, hugging_face_files
from llama_jax.text.gguf import tokenizer_from_gguf
from llama_jax.text.sentencepiece import SentencePieceTokenizer
from llama_jax.text.tokenizer import Tokenizer, encode_prompt

Metadata = dict[str, object]

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def with_values(metadata: Metadata, **values: object) -> Metadata:
    """The metadata with some `tokenizer.ggml` values replaced, or taken out where `None`."""
    changed = metadata | {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    return {key: value for key, value in changed.items() if value is not None}


def test_smollm2_as_rebuilt_by_hand(
    smollm2: Tokenizer, smollm2_metadata: Metadata, texts: list[str]
):
    tokens, merges = (
        smollm2_metadata["tokenizer.ggml.tokens"],
        smollm2_metadata["tokenizer.ggml.merges"],
    )
    oracle = tokenizers.Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
        )
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    oracle.decoder = decoders.ByteLevel()
    assert len(texts) > 200
    for text in texts:
        ids = smollm2.encode(text)
        assert ids == oracle.encode(text).ids
        assert smollm2.decode(ids) == text


def test_smollm2_known_ids(smollm2: Tokenizer):
    # A digit takes no space along: " 2" is two tokens (transformers' conversion makes it one).
    parts = ("in", " ", "2", "0", "2", "4")
    assert smollm2.encode("in 2024") == [token for part in parts for token in smollm2.encode(part)]


def test_smollm2_special_tokens(smollm2: Tokenizer):
    assert (smollm2.vocab_size, smollm2.begin_id, smollm2.end_id, smollm2.adds_begin) == (
        49152,
        1,
        2,
        False,
    )
    assert len(smollm2.special_tokens) == 17
    assert smollm2.special_tokens["<|im_end|>"] == 2
    assert 2 not in smollm2.encode("<|im_end|>")


def words(pattern: str, text: str) -> list[str]:
    """Text cut by a pattern, what lies between matches being words too."""
    cut, start = [], 0
    for match in regex.finditer(pattern, text):
        cut += [text[start : match.start()], match.group()]
        start = match.end()
    return [word for word in [*cut, text[start:]] if word]


def cut_by(patterns: list[str], text: str) -> list[str]:
    """Text cut by one pattern after the other."""
    pieces = [text]
    for pattern in patterns:
        pieces = [word for piece in pieces for word in words(pattern, piece)]
    return pieces


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("llama-bpe", [LLAMA3]),
        ("llama3", [LLAMA3]),
        ("smaug-bpe", [LLAMA3]),
        ("gpt-2", [GPT2]),
        ("smollm", [r"\p{N}", GPT2]),
        ("default", [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
    ],
)
def test_words_are_cut_as_the_named_pattern_says(texts: list[str], name: str, patterns: list[str]):
    tokenizer = tokenizer_from_gguf(tiny(pre=name))
    assert isinstance(tokenizer, BytePairTokenizer)
    splitter = tokenizer.tokenizer.pre_tokenizer
    for text in texts:
        spans = [span for _, span in splitter.pre_tokenize_str(text)]
        assert [text[start:stop] for start, stop in spans] == cut_by(patterns, text)


def tiny(**values: object) -> Metadata:
    """Metadata of kind gpt2 for the letters a to d, in which no merges lead to `abcd`."""
    metadata = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": ["a", "b", "c", "d", "ab", "abcd", "<|x|>", "<u v>"],
        "token_type": [1, 1, 1, 1, 1, 1, 3, 4],
        "merges": ["a b"],
        "bos_token_id": 6,
        "eos_token_id": 6,
    }
    return with_values({}, **(metadata | values))


def test_llama3_takes_a_whole_word_where_it_is_a_token():
    assert tokenizer_from_gguf(tiny()).encode("abcd") == [5]
    assert tokenizer_from_gguf(tiny(pre="gpt-2")).encode("abcd") == [4, 2, 3]


@pytest.mark.parametrize(
    "name", ["falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"]
)
def test_other_names_of_llama3s_rule(name: str):
    """As llama.cpp has them: the pattern, whole words first, and a begin token."""
    tokenizer, llama3 = tokenizer_from_gguf(tiny(pre=name)), tokenizer_from_gguf(tiny())
    assert str(tokenizer.tokenizer.pre_tokenizer) == str(llama3.tokenizer.pre_tokenizer)
    assert encode_prompt(tokenizer, "abcd") == [6, 5]


@pytest.mark.parametrize("name", ["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"])
def test_llama3s_pattern_without_the_rest_of_its_rule(name: str):
    """As llama.cpp has them: merges decide about whole words too, and there is no begin token
    unless the file says so.
    """
    tokenizer, llama3 = tokenizer_from_gguf(tiny(pre=name)), tokenizer_from_gguf(tiny())
    assert str(tokenizer.tokenizer.pre_tokenizer) == str(llama3.tokenizer.pre_tokenizer)
    assert encode_prompt(tokenizer, "abcd") == [4, 2, 3]
    assert encode_prompt(tokenizer_from_gguf(tiny(pre=name, add_bos_token=True)), "abcd") == [
        6,
        4,
        2,
        3,
    ]


def test_user_defined_tokens_are_matched_in_text_and_control_tokens_are_not():
    tokenizer = tokenizer_from_gguf(tiny())
    assert tokenizer.encode("ab<u v>c") == [4, 7, 2]
    assert tokenizer.decode([4, 7, 6, 2]) == "ab<u v>c"
    assert 6 not in tokenizer.encode("<|x|>")
    assert tokenizer.special_tokens == {"<|x|>": 6}


@pytest.mark.parametrize(
    ("pre", "declared", "expected"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("smollm", True, True),
    ],
)
def test_begin_is_added_as_the_file_says_or_else_the_rule(
    pre: str, declared: bool | None, expected: bool
):
    tokenizer = tokenizer_from_gguf(tiny(pre=pre, add_bos_token=declared))
    assert tokenizer.adds_begin is expected
    assert encode_prompt(tokenizer, "ab") == ([6, 4] if expected else [4])


def sentence_piece_metadata(path: pathlib.Path, **values: object) -> Metadata:
    """A SentencePiece model's vocabulary as a converter to GGUF writes it."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(library.vocab_size())
    kinds = [
        2
        if library.is_unknown(i)
        else 3
        if library.is_control(i)
        else 6
        if library.is_byte(i)
        else 5
        if library.is_unused(i)
        else 1
        for i in ids
    ]
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": [library.id_to_piece(i) for i in ids],
        "scores": [library.get_score(i) for i in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return with_values({}, **(metadata | values))


def test_sentence_piece_in_gguf_is_the_original(
    sentence_piece_path: pathlib.Path, texts: list[str]
):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece_path))
    tokenizer, rng = (
        tokenizer_from_gguf(sentence_piece_metadata(sentence_piece_path)),
        random.Random(5),
    )
    for text in texts:
        assert tokenizer.encode(text) == library.encode(text)
        ids = [rng.randrange(library.vocab_size()) for _ in range(4)]
        assert tokenizer.decode(ids) == library.decode(ids) or "\ufffd" in library.decode(ids)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.adds_begin) == (1, 2, True)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2, "<|im_end|>": 3}


def test_sentence_piece_in_gguf_without_the_first_space(sentence_piece_path: pathlib.Path):
    metadata = sentence_piece_metadata(
        sentence_piece_path, add_space_prefix=False, add_bos_token=False
    )
    tokenizer, original = (
        tokenizer_from_gguf(metadata),
        sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece_path)),
    )
    assert tokenizer.encode(" for it") == original.encode("for it")
    assert tokenizer.decode(tokenizer.encode(" for it")) == " for it"
    assert not tokenizer.adds_begin


def merged_from_the_left(tokens: list[str], text: str) -> list[str]:
    """Pieces of a text when every pair is worth the same: the first that spells a token merges,
    again and again.
    """
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        at = next((n for n in range(len(pieces) - 1) if pieces[n] + pieces[n + 1] in tokens), None)
        if at is None:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    spelled = [
        [piece] if piece in tokens else [f"<0x{byte:02X}>" for byte in piece.encode()]
        for piece in pieces
    ]
    return [piece for run in spelled for piece in run]


@pytest.mark.parity
def test_what_the_gguf_packages_own_vocabulary_writes(
    tmp_path: pathlib.Path, sentence_piece: SentencePieceTokenizer
):
    """`LlamaHfVocab` calls `<unk>` control and gives every piece one score."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    for name, content in hugging_face_files(sentence_piece).items():
        (tmp_path / name).write_bytes(content)
    entries = list(gguf.LlamaHfVocab(tmp_path).all_tokens())
    tokens = [text.decode() for text, _, _ in entries]
    kinds = [int(kind) for _, _, kind in entries]
    assert 2 not in kinds
    assert kinds[tokens.index("<unk>")] == 3
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": [score for _, score, _ in entries],
        "token_type": kinds,
    }
    tokenizer = tokenizer_from_gguf(with_values({}, **values))
    assert "<unk>" not in tokenizer.special_tokens
    assert {"<s>", "</s>"} <= tokenizer.special_tokens.keys()
    for text in ("in the age of", "forth and  back", "ünd 中", "a"):
        assert [tokens[token] for token in tokenizer.encode(text)] == merged_from_the_left(
            tokens, text
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_absent_types_and_scores(sentence_piece_path: pathlib.Path, texts: list[str]):
    metadata = sentence_piece_metadata(sentence_piece_path)
    whole, untyped = (
        tokenizer_from_gguf(with_values(metadata, **more)) for more in ({}, {"token_type": None})
    )
    for text in texts:
        assert untyped.encode(text) == whole.encode(text)
    assert untyped.special_tokens == whole.special_tokens == {"<s>": 1, "</s>": 2, "<|im_end|>": 3}
    unscored = tokenizer_from_gguf(with_values(metadata, scores=None))
    tokens = metadata["tokenizer.ggml.tokens"]
    ordinary = [
        token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == 1
    ]
    for text in ("in the age of", "for it", "ünd"):
        assert [tokens[token] for token in unscored.encode(text)] == merged_from_the_left(
            ordinary, text
        )
    byte_pairs = tokenizer_from_gguf(tiny(token_type=None))
    assert byte_pairs.special_tokens == {"<|x|>": 6}
    assert byte_pairs.encode("abcd") == [5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: 'bert' given, gpt2 or llama expected"),
        ({"model": None}, "tokenizer.ggml.model: None given"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre: 'qwen2' is unknown; known are llama-bpe"),
        ({"pre": 3}, "tokenizer.ggml.pre: 3 given, a str expected"),
        ({"tokens": None}, "tokenizer.ggml.tokens: None given, a list expected"),
        ({"tokens": [1] * 8}, "tokenizer.ggml.tokens: a list of str expected"),
        ({"tokens": ["a", "a", *"cdefgh"]}, "tokenizer.ggml.tokens: 'a' stands there 2 times"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: 1 types given for 8 tokens"),
        ({"token_type": [9] * 8}, "type 9 given, 1 to 6 expected"),
        ({"merges": ["a z"]}, "tokenizer.ggml.merges: they do not fit the tokens"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: they do not fit the tokens"),
        ({"bos_token_id": 8}, "tokenizer.ggml.bos_token_id: 8 given, an id below 8 expected"),
        ({"eos_token_id": "x"}, "tokenizer.ggml.eos_token_id: 'x' given"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token: 1 given, a bool expected"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores: 1 given for 8 tokens"),
        (
            {"model": "llama", "scores": [0.0] * 8},
            r"0 unknown tokens \(type 2\) given, one expected",
        ),
        (
            {"model": "llama", "scores": [0.0] * 8, "token_type": [2] + [6] * 7},
            "tokenizer.ggml.tokens: not a SentencePiece model",
        ),
    ],
)
def test_what_is_wrong_is_named(values: Metadata, message: str):
    with pytest.raises(InputError, match=message):
        tokenizer_from_gguf(tiny(**values))


def test_byte_level_vocabulary_reads_the_same_from_gguf(texts: list[str]):
    original = byte_level()
    vocabulary = sorted(original.get_vocab().items(), key=lambda entry: entry[1])
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    tokenizer = tokenizer_from_gguf(
        tiny(
            pre="gpt-2",
            tokens=[piece for piece, _ in vocabulary],
            token_type=[3] * 3 + [1] * 597,
            merges=merges,
        )
    )
    for text in texts:
        if not any(special in text for special in tokenizer.special_tokens):
            assert tokenizer.encode(text) == original.encode(text).ids


@pytest.mark.parametrize(
    "tokens", [["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"], ["<|endoftext|>"]]
)
def test_files_that_do_not_say_how_words_are_cut(tokens: list[str], texts: list[str]):
    """Llama 3's rule for Llama 3's tokens, also by the name of `llama-v3`; else the default of
    llama.cpp.
    """
    library = byte_level()
    library.add_special_tokens(tokens)
    metadata = gguf_metadata(BytePairTokenizer(library, None, 2, adds_begin=False))
    rule, other = ("llama-v3", "default") if len(tokens) == 3 else ("default", "llama-bpe")
    assumed = tokenizer_from_gguf(with_values(metadata, pre=None))
    named, different = (
        tokenizer_from_gguf(with_values(metadata, pre=name)) for name in (rule, other)
    )
    assert [assumed.encode(text) for text in texts] == [named.encode(text) for text in texts]
    assert [assumed.encode(text) for text in texts] != [different.encode(text) for text in texts]
