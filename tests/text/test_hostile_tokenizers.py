"""Tokenizer files that nobody vouches for: damaged, or made to hang, to fill the memory or to bring
the library down.
"""

import base64
import copy
import io
import json
import pathlib
import random
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
import tokenizers
from matrix import rounds
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from trained import byte_level

from llama_jax.errors import InputError
from llama_jax.text.byte_level import GPT2_PATTERN, LLAMA3_PATTERN, is_bounded
from llama_jax.text.gguf import tokenizer_from_gguf
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer, encode_prompt, load_tokenizer

TEXT = "for x in range(10):\n    print('é 你好 🎉', x)  # aaaaaaaa  <|im_end|> \t\n"
ROUNDS = rounds(120, 1100)  # mutations of each kind of file
SOME = ROUNDS // 55  # of them, if few, are read
SECONDS = 2.0  # of the processor, for what takes milliseconds


def use(tokenizer: Tokenizer) -> None:
    """What a program does with a tokenizer."""
    ids = encode_prompt(tokenizer, TEXT) + tokenizer.encode_after_special(TEXT)
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)
    assert len(tokenizer.token_bytes.pieces) == tokenizer.vocab_size
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.special_tokens.values())


def survives(load: Callable[[], Tokenizer]) -> bool:
    """Whether a tokenizer was read (else: refused in one line), in bounded time and memory either
    way.
    """
    start, size = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    complaint = ""
    try:
        use(load())
    except InputError as error:
        complaint = str(error)
    assert "\n" not in complaint
    assert len(complaint) < 1000
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < 512 << 10  # KiB
    return not complaint


def damaged(good: bytes, rng: random.Random) -> bytes:
    """The bytes cut short, or with some of them changed, repeated or taken out."""
    content = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.15 else good)
    for _ in range(rng.choice([1, 1, 3, 8])):
        at = rng.randrange(len(content) or 1)
        how = rng.randrange(4)
        if how == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            content[at : at + rng.randrange(1, 9)] = b""
        elif how == 2:
            content[at:at] = content[at : at + rng.randrange(1, 30)]
        else:
            content[at : at + 1] = bytes([(content[at] if content else 0) ^ 1 << rng.randrange(8)])
    return bytes(content)


VALUES = [
    None,
    True,
    0,
    -1,
    1 << 31,
    (1 << 32) - 1,
    1 << 64,
    1e308,
    -0.5,
    "",
    "x",
    "▁",
    "a b",
    "<unk>",
    "\ud800",
    "\0",
    "y" * 5000,
    "(a+)+$",
    [],
    {},
    [[]],
    [1, 2],
    {"type": "Sequence"},
    {"String": ""},
    {"Regex": "(a|a)*$"},
]


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it, at any depth, replaced by something it was not meant to
    be.
    """
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(VALUES))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    result = copy.copy(value)
    if rng.random() < 0.1:
        del result[key]
    elif rng.random() < 0.1:
        result[key] = result[rng.choice(keys)]
    else:
        result[key] = changed(value[key], rng)
    return result


def small() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of some 300 pieces, in which every part of the file is there."""
    state = json.loads(byte_level().to_str())
    vocabulary = dict(sorted(state["model"]["vocab"].items(), key=lambda entry: entry[1])[:300])
    merges = [pair for pair in state["model"]["merges"] if "".join(pair) in vocabulary]
    state["model"] |= {"vocab": vocabulary, "merges": merges}
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Digits(), characters])
    tokenizer.add_tokens(["<tool>"])
    ids = [("<|im_start|>", 1)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=ids
    )
    return tokenizer


def spaced() -> tokenizers.Tokenizer:
    """A small tokenizer in the manner of Llama 2's tokenizer.json."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"forxinage",
        "in",
        "▁f",
        "or",
        "▁for",
    ]
    merges = [("i", "n"), ("▁", "f"), ("o", "r"), ("▁f", "or")]
    model = models.BPE(
        {p: n for n, p in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [small, spaced])
def test_tokenizer_json_with_changed_values(
    tmp_path: pathlib.Path, make: Callable[[], tokenizers.Tokenizer]
):
    state, rng, read = json.loads(make().to_str()), random.Random(11), 0
    path = tmp_path / "tokenizer.json"
    for _ in range(ROUNDS):
        path.write_text(json.dumps(changed(state, rng)))
        read += survives(lambda: load_tokenizer(tmp_path))
    assert SOME < read < ROUNDS - SOME // 2


def test_tokenizer_json_with_changed_bytes(tmp_path: pathlib.Path):
    good, rng = small().to_str().encode(), random.Random(12)
    path = tmp_path / "tokenizer.json"
    for _ in range(ROUNDS):
        path.write_bytes(damaged(good, rng))
        survives(lambda: load_tokenizer(path))


def test_what_lies_beside_a_tokenizer_json(tmp_path: pathlib.Path):
    small().save(str(tmp_path / "tokenizer.json"))
    rng, config = (
        random.Random(13),
        {
            "bos_token": {"content": "<|im_start|>"},
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
        },
    )
    for _ in range(rounds(60, 200)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed(config, rng)))
        survives(lambda: load_tokenizer(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ' + "9" * 5000 + "}")
    assert not survives(lambda: load_tokenizer(tmp_path))


def test_rank_files(tmp_path: pathlib.Path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"in", b" f", b"or", b" for"]
    good = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    rng, path, read = random.Random(14), tmp_path / "tokenizer.model", 0
    for _ in range(ROUNDS):
        path.write_bytes(damaged(good, rng))
        read += survives(lambda: load_tokenizer(path))
    assert read < ROUNDS // 7


@pytest.fixture(scope="module")
def small_model() -> bytes:
    """A SentencePiece model with a normalizer table."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["for x in range of all the lines there are"] * 9),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
        normalization_rule_name="nfkc",
        num_threads=1,
    )
    return model.getvalue()


def test_sentence_piece_models(tmp_path: pathlib.Path, small_model: bytes):
    rng, path, read = random.Random(15), tmp_path / "tokenizer.model", 0
    for _ in range(ROUNDS):
        path.write_bytes(damaged(small_model, rng))
        read += survives(lambda: load_tokenizer(path))
    assert SOME < read < ROUNDS - SOME // 2


def test_added_tokens_beside_a_sentence_piece_model(tmp_path: pathlib.Path, small_model: bytes):
    (tmp_path / "tokenizer.model").write_bytes(small_model)
    for content in (
        '{"\\ud800": 1}',
        '{"' + "x" * 100_000 + '": 1}',
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ):
        (tmp_path / "added_tokens.json").write_text(content)
        assert not survives(lambda: load_tokenizer(tmp_path))


def gguf_values() -> list[dict[str, object]]:
    """GGUF metadata of both kinds."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"forxinage",
        "in",
        "▁f",
        "or",
        "▁for",
    ]
    scores, kinds = (
        [-float(n) for n in range(len(pieces))],
        [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
    )
    llama = {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": True,
        "add_space_prefix": True,
    }
    library = small()
    vocabulary = sorted(library.get_vocab().items(), key=lambda entry: entry[1])
    merges = [" ".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
    gpt2 = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [piece for piece, _ in vocabulary],
        "merges": merges,
        "token_type": [3] * 3 + [1] * (len(vocabulary) - 4) + [4],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return [
        {f"tokenizer.ggml.{name}": value for name, value in values.items()}
        for values in (llama, gpt2)
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["llama", "gpt2"])
def test_gguf_metadata(kind: int):
    metadata, rng, read = gguf_values()[kind], random.Random(16), 0
    for _ in range(ROUNDS):
        values = changed(metadata, rng)
        read += isinstance(values, dict) and survives(
            lambda values=values: tokenizer_from_gguf(values)
        )
    assert SOME < read < ROUNDS - SOME // 2


SCORES = [float("nan"), float("inf"), 1e300]


@pytest.mark.parametrize("score", SCORES)
def test_scores_that_are_no_float32_are_refused(score: float):
    metadata = gguf_values()[0]
    with pytest.raises(InputError, match=r"tokenizer.ggml.scores: finite numbers expected"):
        tokenizer_from_gguf(
            metadata | {"tokenizer.ggml.scores": [score] * len(metadata["tokenizer.ggml.tokens"])}
        )


def sequence(kind: str, *steps: dict) -> dict:
    return {"type": "Sequence", kind: list(steps)}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: object, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TOKEN = {
    "id": 9,
    "content": "<x>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
BEGIN = {"SpecialToken": {"id": "a", "type_id": 0}}
TRAPS = {
    "catastrophic pattern": {"pre_tokenizer": split(r"(a|a|b)+$")},
    "quadratic pattern": {"pre_tokenizer": split(r"a*a*a*b")},
    "pattern that explodes when compiled": {
        "pre_tokenizer": split(r"((((a{999}){999}){999}){999})")
    },
    "pattern inside a sequence": {
        "pre_tokenizer": sequence("pretokenizers", BYTES, split(r"(a+)+$"))
    },
    "sequence inside a sequence": {
        "pre_tokenizer": sequence("pretokenizers", sequence("pretokenizers", split("(a+)+$")))
    },
    "text that doubles with each step": {"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 16)},
    "replacement that grows": {
        "normalizer": sequence("normalizers", *[replace({"String": "a"}, "aa")] * 16)
    },
    "replacement by pattern": {"normalizer": replace({"Regex": "(a+)+$"}, "")},
    "replacement of nothing": {"normalizer": replace({"String": ""}, "a")},
    "replacement in two spellings": {"normalizer": replace({"String": "a", "Regex": "(a+)+$"}, "")},
    "long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}},
    "table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "replacement on the way out": {
        "decoder": sequence(
            "decoders",
            replace({"String": "a"}, "a" * 99),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        )
    },
    "many tokens before a text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [BEGIN] * 10_000,
            "pair": [],
            "special_tokens": {"a": {"id": "a", "ids": [1] * 10_000, "tokens": ["a"] * 10_000}},
        }
    },
    "template with a token that it lacks": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [BEGIN],
            "pair": [],
            "special_tokens": {},
        }
    },
    "template with an id that is none": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [BEGIN],
            "pair": [],
            "special_tokens": {"a": {"id": "a", "ids": [1 << 30], "tokens": ["a"]}},
        }
    },
    "an id that fills the memory": {"model": {"vocab": {"a": (1 << 32) - 1}, "merges": []}},
    "one id for two pieces": {"model": {"vocab": {"a": 0, "b": 0}, "merges": []}},
    "piece without end": {"model": {"vocab": {"a" * 100_000: 0}, "merges": []}},
    "chance": {"model": {"dropout": 0.5}},
    "prefix that the library stumbles over": {"model": {"continuing_subword_prefix": "ééé"}},
    "suffix": {"model": {"end_of_word_suffix": "</w>"}},
    "unknown token that is unknown": {"model": {"unk_token": "<nowhere>"}},
    "too many added tokens": {"added_tokens": [TOKEN] * 70_000},
    "added token without end": {"added_tokens": [TOKEN | {"content": "x" * 100_000}]},
    "kind by its fields alone": {
        "pre_tokenizer": {"pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    },
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_refused(tmp_path: pathlib.Path, name: str):
    state = json.loads(small().to_str())
    for part, value in TRAPS[name].items():
        state[part] = state[part] | value if part == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert not survives(lambda: load_tokenizer(tmp_path))


def test_a_key_that_stands_twice_is_refused(tmp_path: pathlib.Path):
    """The library would act on the first of them where the second is null."""
    text = small().to_str()
    hidden = f'"pre_tokenizer": {json.dumps(split("(a+)+$"))}, "pre_tokenizer": null, '
    (tmp_path / "tokenizer.json").write_text("{" + hidden + text.lstrip()[1:])
    with pytest.raises(InputError, match="a key stands twice"):
        load_tokenizer(tmp_path)


def test_padding_of_a_file_is_not_tried(tmp_path: pathlib.Path):
    state = json.loads(small().to_str())
    state["padding"] = {
        "strategy": {"Fixed": (1 << 32) - 1},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert survives(lambda: load_tokenizer(tmp_path))


def test_a_byte_that_is_none_is_text(tmp_path: pathlib.Path):
    tokenizer = spaced()
    tokenizer.add_tokens(["<0xZZ>", "<0x 1>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert survives(lambda: load_tokenizer(tmp_path))
    state = json.loads(spaced().to_str())
    state["model"]["vocab"]["<0xZZ>"] = len(state["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert survives(lambda: load_tokenizer(tmp_path))


BOUNDED = [
    LLAMA3_PATTERN,
    GPT2_PATTERN,
    r"\p{N}{1,3}",
    r"[0-9][0-9][0-9]",
    r"[\r\n]",
    r"\s?[!-/:-~]+",
    r"[一-龥ࠀ-一]+",
    r"\d",
    " ?a+|b",
]
UNBOUNDED = [
    r"(a+)+$",
    r"(?:a|a)*b",
    r"a*a*b",
    r"a+b",
    r"a{99}{99}",
    r"[[:alpha:]]+",
    r"(?=x)",
    r"(a)\1",
    r"\s+\s+",
    r"[a&&[b]]+",
    "a?" * 20 + "a" * 20,
    r"a{1,999}",
    "",
    "|",
    "a" * 3000,
    r"\X+",
    r"^a",
    r"(?<=a)b",
]


def test_patterns_are_told_apart():
    assert [pattern for pattern in BOUNDED if not is_bounded(pattern)] == []
    assert [pattern for pattern in UNBOUNDED if is_bounded(pattern)] == []


@pytest.mark.parametrize("pattern", BOUNDED)
def test_accepted_patterns_are_quick(pattern: str):
    splitter, start = pre_tokenizers.Split(Regex(pattern), behavior="isolated"), time.process_time()
    for unit in (" ", "a", "1", "!", "龥", "\n", "é ", "'"):
        splitter.pre_tokenize_str(unit * 20_000)
    assert time.process_time() - start < 2 * SECONDS


def test_a_table_that_makes_text_grow_is_refused(tmp_path: pathlib.Path):
    """One letter becomes thousands: a short text would fill the memory."""
    rule = tmp_path / "rule.tsv"
    rule.write_text("61\t" + " ".join(["62"] * 5000) + "\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["b c d e f"] * 9),
        model_writer=model,
        vocab_size=270,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_tsv=str(rule),
        minloglevel=2,
        num_threads=1,
    )
    assert (
        len(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).normalize("aaa"))
        > 15_000
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(
        InputError, match="a replacement of 5000 bytes given, at most 1024 and 256 expected"
    ):
        load_tokenizer(tmp_path)
