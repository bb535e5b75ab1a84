"""Tokenizers written as a Hugging Face directory, read by transformers; as GGUF metadata, read
back.
"""

import io
import json
import pathlib
import random

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from matrix import ALL
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from trained import PROSE, byte_level

from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer, load_byte_pair
from llama_jax.text.chat import template_from_directory
from llama_jax.text.export import gguf_metadata, hugging_face_files
from llama_jax.text.gguf import tokenizer_from_gguf
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.sentencepiece import SentencePieceTokenizer, load_sentence_piece
from llama_jax.text.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from llama_jax.weights.gguf_read import GgufFile

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def llama3_like() -> tokenizers.Tokenizer:
    """A small tokenizer.json in the form of Llama 3's: its pattern, whole words first, special
    tokens at the end.
    """
    trained = json.loads(byte_level().to_str())
    trained["model"]["ignore_merges"] = True
    trained["added_tokens"] = []
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(trained))
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token in ("<|begin_of_text|>", "<|eot_id|>", "<pad>")
        ]
    )
    tokenizer.add_tokens(["<tool é>"])
    begin = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 600)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begin]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_json() -> BytePairTokenizer:
    return BytePairTokenizer(llama3_like(), begin_id=600, end_id=601, adds_begin=True)


@pytest.fixture(scope="module")
def without_begin(sentence_piece_path: pathlib.Path) -> SentencePieceTokenizer:
    """The model as a GGUF file may have it: no space put before the text, no begin token."""
    metadata = gguf_metadata(load_sentence_piece(sentence_piece_path))
    changes = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    return tokenizer_from_gguf(metadata | changes)


@pytest.fixture(scope="module")
def ranks(llama3: Llama3Tokenizer) -> Llama3Tokenizer:
    """The first of Llama 3's ranks, with all of its special tokens behind them."""
    return Llama3Tokenizer(llama3.tokens[:8000])


# In `make test` the whole of Llama 3 is left to the tests of its merges and of its chat format in
# Meta's words.
KINDS = [
    "sentence_piece",
    "without_begin",
    "byte_pair",
    "smollm2",
    "tokenizer_json",
    "ranks",
    pytest.param("llama3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", ["sentence_piece", "without_begin"])
def test_tokenizer_json_of_llama2s_kind_goes_to_gguf(
    name: str, texts: list[str], tmp_path: pathlib.Path, request: pytest.FixtureRequest
):
    """By way of `tokenizer.json` alone, scores and all, against the library on the original
    model.
    """
    original = request.getfixturevalue(name)
    (tmp_path / "tokenizer.json").write_bytes(
        write(tmp_path, original).joinpath("tokenizer.json").read_bytes()
    )
    (tmp_path / "tokenizer.model").unlink()
    read = load_tokenizer(tmp_path)
    assert isinstance(read, BytePairTokenizer)
    metadata = gguf_metadata(read)
    same_ids(tokenizer_from_gguf(metadata), original, texts)
    library, ids = original.processor, list(range(original.vocab_size))
    assert metadata["tokenizer.ggml.tokens"] == library.id_to_piece(ids)
    assert metadata["tokenizer.ggml.scores"] == [library.get_score(number) for number in ids]
    assert metadata == gguf_metadata(original)
    again = load_tokenizer(write(tmp_path, tokenizer_from_gguf(metadata)))
    for text in texts:
        assert again.encode(text) == library.encode(text)


def test_scores_follow_the_merges_of_a_tokenizer_trained_as_one(texts: list[str]):
    """The list names one pair for each piece, and not every pair of pieces that make one up."""
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False, max_token_length=8
    )
    library.train_from_iterator(PROSE.splitlines(), trainer)
    state = json.loads(library.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = BytePairTokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), 1, 2, True)
    scored = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer_from_gguf(gguf_metadata(tokenizer)).processor.serialized_model_proto()
    )
    assert len(state["model"]["merges"]) > 200
    for text in texts:
        assert (
            scored.encode(text) == tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        ), text
    state["model"]["merges"].pop(len(state["model"]["merges"]) // 2)
    with pytest.raises(
        InputError, match="do not merge; scores, which GGUF has here, cannot say so"
    ):
        gguf_metadata(
            BytePairTokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), 1, 2, True)
        )


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model", {"ignore_merges": True}, "whole words first"),
        ("model", {"unk_token": None}, "without <unk>"),
        (
            "pre_tokenizer",
            {"type": "Digits", "individual_digits": True},
            "byte fallback after .*Digits",
        ),
    ],
)
def test_byte_fallback_that_scores_cannot_repeat_is_refused(
    part, changes, message, sentence_piece: SentencePieceTokenizer
):
    state = json.loads(hugging_face_files(sentence_piece)["tokenizer.json"])
    state[part] = (state[part] or {}) | changes
    with pytest.raises(InputError, match=message):
        gguf_metadata(
            BytePairTokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), 1, 2, True)
        )


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def write(
    directory: pathlib.Path, tokenizer: Tokenizer, template: str | None = None
) -> pathlib.Path:
    for name, content in hugging_face_files(tokenizer, template).items():
        (directory / name).write_bytes(content)
    return directory


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} é{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def directory(kind: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tokenizer's files in the directory of a LLaMA."""
    path = tmp_path_factory.mktemp("exported")
    (path / "config.json").write_text('{"model_type": "llama"}')
    return write(path, kind, TEMPLATE)


@pytest.fixture(scope="module")
def theirs(directory: pathlib.Path):
    return transformers.AutoTokenizer.from_pretrained(directory)


def plain(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """Texts without special tokens, which transformers reads as such."""
    special = [*tokenizer.special_tokens, "<unk>"]
    return [text for text in texts if not any(token in text for token in special)]


def test_transformers_gives_the_same_ids(kind: Tokenizer, theirs, texts: list[str]):
    chosen = plain(texts, kind)
    assert len(chosen) > 200
    for text in chosen:
        assert theirs.encode(text) == encode_prompt(kind, text), text
        assert theirs.encode(text, add_special_tokens=False) == kind.encode(text)
        assert theirs.decode(kind.encode(text)) == kind.decode(kind.encode(text))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (kind.begin_id, kind.end_id)
    assert len(theirs) == kind.vocab_size


@pytest.mark.parametrize("name", ["sentence_piece", "without_begin", "tokenizer_json"])
def test_transformers_needs_no_config_json(
    name: str, texts: list[str], tmp_path: pathlib.Path, request: pytest.FixtureRequest
):
    tokenizer = request.getfixturevalue(name)
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, tokenizer))
    for text in plain(texts, tokenizer):
        assert theirs.encode(text) == encode_prompt(tokenizer, text), text


def test_special_tokens_stay_special_in_transformers(kind: Tokenizer, theirs):
    for token, number in kind.special_tokens.items():
        assert theirs.convert_tokens_to_ids(token) == number
        assert theirs.encode(token, add_special_tokens=False) == [number]
        assert theirs.decode([number], skip_special_tokens=True) == ""


def test_our_reader_gives_the_same_tokenizer(
    kind: Tokenizer, directory: pathlib.Path, texts: list[str]
):
    ours = load_tokenizer(directory)
    assert isinstance(ours, BytePairTokenizer)
    assert (ours.begin_id, ours.end_id, ours.adds_begin) == (
        kind.begin_id,
        kind.end_id,
        kind.adds_begin,
    )
    assert ours.vocab_size == kind.vocab_size
    assert ours.special_tokens.items() >= kind.special_tokens.items()
    for text in texts:  # special tokens in text stay text
        assert ours.encode(text) == kind.encode(text)
        assert ours.decode(ours.encode(text)) == kind.decode(kind.encode(text))


def test_template_and_padding(kind: Tokenizer, theirs, directory: pathlib.Path):
    messages = [{"role": "user", "content": "hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    end = theirs.eos_token or ""
    assert rendered == f"{theirs.bos_token or ''}hi é{end}"
    ours = template_from_directory(directory)
    assert ours is not None
    assert ours.render(messages, add_generation_prompt=False) == rendered
    padding = {"<|finetune_right_pad_id|>", "<pad>"} & set(kind.special_tokens)
    assert {theirs.pad_token} - {None} == padding


@pytest.fixture(scope="module")
def metadata(kind: Tokenizer) -> dict[str, object]:
    return gguf_metadata(kind)


def test_the_original_of_a_sentence_piece_model_goes_along(
    sentence_piece: SentencePieceTokenizer,
    sentence_piece_path: pathlib.Path,
    texts: list[str],
    tmp_path: pathlib.Path,
):
    write(tmp_path, sentence_piece)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece_path))
    assert theirs.encode(texts) == original.encode(texts)


def test_llama3_merges_as_meta_does(
    llama3: Llama3Tokenizer, llama3_files: dict[str, bytes], meta_llama3
):
    """Long words, in which thousands of pairs compete."""
    written, rng = llama3_files["tokenizer.json"].decode(), random.Random(8)
    assert (
        len(json.loads(written)["model"]["merges"]) == 280_147
    )  # as many as in Meta's tokenizer.json of Llama 3
    library = tokenizers.Tokenizer.from_str(written)
    for alphabet in ("ab", "aA", "=-", "的一是", "\u0430\u0431\u0432", "xyzzy'", "ααβ"):
        text = "".join(rng.choices(alphabet, k=2000))
        assert library.encode(text, add_special_tokens=False).ids == meta_llama3.encode(
            text, bos=False, eos=False
        )
    # Some tokens come from no merge: a word that is such a token is found whole.
    words = [token.decode(errors="ignore") for token in llama3.tokens[:: 3 if ALL else 30]]
    for word, encoding in zip(words, library.encode_batch(words, add_special_tokens=False)):
        assert encoding.ids == meta_llama3.encode(word, bos=False, eos=False)


def same_ids(read: Tokenizer, tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        assert read.encode(text) == tokenizer.encode(text)
    assert (read.begin_id, read.end_id, read.adds_begin) == (
        tokenizer.begin_id,
        tokenizer.end_id,
        tokenizer.adds_begin,
    )
    assert read.special_tokens == tokenizer.special_tokens
    assert read.token_bytes == tokenizer.token_bytes


def test_gguf_reads_back_as_the_same(
    kind: Tokenizer, metadata: dict[str, object], texts: list[str]
):
    read = tokenizer_from_gguf(metadata)
    same_ids(read, kind, texts)
    assert gguf_metadata(read) == metadata


WRITERS = {
    "tokens": "token_list",
    "token_type": "token_types",
    "scores": "token_scores",
    "merges": "token_merges",
    "model": "tokenizer_model",
    "pre": "tokenizer_pre",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
    "unknown_token_id": "unk_token_id",
    "add_bos_token": "add_bos_token",
    "add_eos_token": "add_eos_token",
    "add_space_prefix": "add_space_prefix",
}


def test_gguf_package_writes_every_value(metadata: dict[str, object], tmp_path: pathlib.Path):
    """Names and types are those of the reference writer: nothing is lost on the way through a
    file.
    """
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    for key, value in metadata.items():
        getattr(writer, "add_" + WRITERS[key.removeprefix("tokenizer.ggml.")])(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = GgufFile.open(tmp_path / "vocab.gguf").metadata
    assert {key: value for key, value in read.items() if key.startswith("tokenizer.")} == metadata


def test_what_came_from_gguf_goes_back_unchanged(smollm2_metadata: dict[str, object]):
    written = gguf_metadata(tokenizer_from_gguf(smollm2_metadata))
    for name in (
        "model",
        "pre",
        "tokens",
        "token_type",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "add_bos_token",
    ):
        key = f"tokenizer.ggml.{name}"
        assert written[key] == smollm2_metadata.get(key, written[key]), name


def test_pieces_go_to_gguf_as_they_stand_in_the_model(sentence_piece_path: pathlib.Path):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece_path))
    metadata = gguf_metadata(load_sentence_piece(sentence_piece_path))
    ids = list(range(library.vocab_size()))
    assert metadata["tokenizer.ggml.tokens"] == library.id_to_piece(ids)
    assert metadata["tokenizer.ggml.scores"] == library.get_score(ids)
    assert [kind == 6 for kind in metadata["tokenizer.ggml.token_type"]] == library.is_byte(ids)
    assert [kind == 3 for kind in metadata["tokenizer.ggml.token_type"]] == library.is_control(ids)
    assert metadata["tokenizer.ggml.token_type"][library.unk_id()] == 2


def test_ids_without_a_token_are_filled(tmp_path: pathlib.Path):
    state = json.loads(byte_level().to_str())
    state["added_tokens"][2]["content"] = "<|im_end|>"
    state["model"]["vocab"]["zzzz"] = 605
    tokenizer = BytePairTokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), None, 2, False)
    metadata = gguf_metadata(tokenizer)
    assert metadata["tokenizer.ggml.tokens"][600:] == [
        *(f"[PAD{number}]" for number in range(600, 605)),
        "zzzz",
    ]
    assert metadata["tokenizer.ggml.token_type"][600:] == [5] * 5 + [1]
    assert gguf_metadata(tokenizer_from_gguf(metadata)) == metadata


def trained_model(**options: object) -> SentencePieceTokenizer:
    """A SentencePiece model of another kind than LLaMA's."""
    model = io.BytesIO()
    defaults = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **(defaults | options),
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return SentencePieceTokenizer(processor, 1, 2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "unigram, word or character model given"),
        (
            {"normalization_rule_name": "nmt_nfkc"},
            "it changes characters or spaces before encoding",
        ),
        ({"remove_extra_whitespaces": True}, "it changes characters or spaces before encoding"),
        ({"treat_whitespace_as_suffix": True}, "it changes characters or spaces before encoding"),
    ],
)
def test_models_unlike_llamas_are_refused(options: dict[str, object], message: str):
    tokenizer = trained_model(**options)
    with pytest.raises(InputError, match=message):
        hugging_face_files(tokenizer)
    with pytest.raises(InputError, match=message):
        gguf_metadata(tokenizer)


def test_user_defined_pieces_become_added_tokens(texts: list[str]):
    tokenizer = trained_model(user_defined_symbols=["<sep>"])
    same_ids(
        tokenizer_from_gguf(gguf_metadata(tokenizer)), tokenizer, [*texts, "a<sep>b", "<sep> "]
    )
    written = json.loads(hugging_face_files(tokenizer)["tokenizer.json"])
    number = tokenizer.processor.piece_to_id("<sep>")
    assert [(t["content"], t["special"]) for t in written["added_tokens"] if t["id"] == number] == [
        ("<sep>", False)
    ]
    library = tokenizers.Tokenizer.from_str(json.dumps(written))
    for text in plain(texts, tokenizer):
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text
    assert library.encode("a<sep>b", add_special_tokens=False).ids.count(number) == 1
    tokenizer = trained_model(user_defined_symbols=["a\u2581b"])
    with pytest.raises(InputError, match="is user-defined and has a space"):
        hugging_face_files(tokenizer)


def test_padded_vocabularies_come_back_out_of_gguf(
    sentence_piece: SentencePieceTokenizer, texts: list[str], tmp_path: pathlib.Path
):
    """As `write_gguf` fills up a vocabulary that is smaller than the model's."""
    metadata, size = gguf_metadata(sentence_piece), sentence_piece.vocab_size
    filler = {
        "tokens": [f"[PAD{size}]", f"[PAD{size + 1}]"],
        "token_type": [5, 5],
        "scores": [-10000.0] * 2,
    }
    padded = metadata | {
        f"tokenizer.ggml.{k}": metadata[f"tokenizer.ggml.{k}"] + more for k, more in filler.items()
    }
    theirs = transformers.AutoTokenizer.from_pretrained(
        write(tmp_path, tokenizer_from_gguf(padded))
    )
    assert len(theirs) == size + 2
    for text in [*plain(texts, sentence_piece), f"[PAD{size}]"]:
        assert theirs.encode(text, add_special_tokens=False) == sentence_piece.encode(text)


def test_an_open_order_of_merges_is_refused(sentence_piece: SentencePieceTokenizer):
    metadata = gguf_metadata(sentence_piece)
    level = tokenizer_from_gguf(metadata | {"tokenizer.ggml.scores": [0.0] * 500})
    with pytest.raises(InputError, match=r"have one score, 0.0; tokenizer.json needs an order"):
        hugging_face_files(level)


def test_rules_that_gguf_cannot_name_are_refused():
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(InputError, match=r"cutting words by .*Punctuation.* known are llama-bpe"):
        gguf_metadata(BytePairTokenizer(tokenizer, None, 2, False))
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(InputError, match="has no name in GGUF here"):
        gguf_metadata(BytePairTokenizer(tokenizer, None, 2, False))
    tokenizer = byte_level()
    tokenizer.model.ignore_merges = True
    with pytest.raises(InputError, match="whole words first"):
        gguf_metadata(BytePairTokenizer(tokenizer, None, 601, False))


def test_a_rank_that_spells_a_special_token_is_refused():
    tokenizer = Llama3Tokenizer((*(bytes([byte]) for byte in range(256)), b"<|eot_id|>"))
    with pytest.raises(InputError, match=r"'<\|eot_id\|>' is both special and an ordinary token"):
        hugging_face_files(tokenizer)


def test_what_a_post_processor_adds_is_what_ours_adds(tmp_path: pathlib.Path):
    """A file whose post-processor says one thing and whose add_bos_token says another is written to
    say the same.
    """
    (tmp_path / "tokenizer.json").write_text(llama3_like().to_str())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<|begin_of_text|>", "add_bos_token": false}'
    )
    tokenizer = load_byte_pair(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, tokenizer))
    assert tokenizer.adds_begin
    assert theirs.encode("a b") == encode_prompt(tokenizer, "a b")
    written = json.loads(hugging_face_files(tokenizer)["tokenizer_config.json"])
    assert written["add_bos_token"] is True
