"""tokenizer.json against transformers and the tokenizers library."""

import json
import pathlib
import random

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from trained import byte_level

from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer, load_byte_pair
from llama_jax.text.sentencepiece import SentencePieceTokenizer
from llama_jax.text.tokenizer import encode_prompt


def save(
    directory: pathlib.Path, tokenizer: tokenizers.Tokenizer, **config: object
) -> pathlib.Path:
    """Writes tokenizer.json and, if there is something to say, tokenizer_config.json."""
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_ids_and_text_are_transformers(tmp_path: pathlib.Path, texts: list[str]):
    path = save(tmp_path, byte_level())
    ours = load_byte_pair(path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), split_special_tokens=True
    )
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_random_ids_read_as_the_library_reads_them(byte_pair: BytePairTokenizer):
    library, rng = byte_level(), random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(byte_pair.vocab_size) for _ in range(8)]
        assert byte_pair.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_special_tokens_in_text_stay_text(byte_pair: BytePairTokenizer):
    ids = byte_pair.encode("a<|im_end|>b")
    assert 2 not in ids
    assert byte_pair.decode(ids) == "a<|im_end|>b"
    assert byte_pair.decode([1, *ids, 2]) == "a<|im_end|>b"


def test_added_tokens_that_are_not_special_are_text(tmp_path: pathlib.Path):
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool é>"])
    ours = load_byte_pair(save(tmp_path, tokenizer))
    assert ours.encode("<tool é>") == [600]
    assert ours.decode([600]) == "<tool é>"
    assert (ours.vocab_size, "<tool é>" in ours.special_tokens) == (601, False)


def with_begin(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("prepends", "config", "expected"),
    [
        (False, {}, (None, None, False)),
        (True, {}, (0, None, True)),
        (
            True,
            {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}},
            (0, 2, True),
        ),
        (False, {"bos_token": "<|im_start|>"}, (1, None, False)),
        (False, {"bos_token": "<|im_start|>", "add_bos_token": True}, (1, None, False)),
        (True, {"bos_token": "<|endoftext|>", "add_bos_token": False}, (0, None, True)),
    ],
)
def test_begin_and_end_are_those_of_the_models_files(
    tmp_path: pathlib.Path, prepends: bool, config: dict, expected: tuple
):
    tokenizer = with_begin(byte_level()) if prepends else byte_level()
    ours = load_byte_pair(save(tmp_path, tokenizer, **config))
    assert (ours.begin_id, ours.end_id, ours.adds_begin) == expected


@pytest.mark.parity
@pytest.mark.parametrize("declared", [None, True, False])
@pytest.mark.parametrize("prepends", [False, True])
def test_prompts_begin_as_in_transformers_5(
    tmp_path: pathlib.Path, prepends: bool, declared: bool | None
):
    """The post-processor of tokenizer.json decides, whatever `add_bos_token` says."""
    tokenizer = with_begin(byte_level()) if prepends else byte_level()
    config = {} if declared is None else {"add_bos_token": declared}
    path = save(
        tmp_path,
        tokenizer,
        bos_token="<|endoftext|>",
        tokenizer_class="PreTrainedTokenizerFast",
        **config,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert encode_prompt(load_byte_pair(path), "in the age") == theirs("in the age").input_ids


def test_special_tokens_map_is_read_too(tmp_path: pathlib.Path):
    (tmp_path / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}'
    )
    ours = load_byte_pair(save(tmp_path, byte_level()))
    assert (ours.begin_id, ours.end_id) == (1, 2)


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path: pathlib.Path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    ours = load_byte_pair(save(tmp_path, tokenizer))
    assert (
        ours.decode(ours.encode("a long text, longer than four tokens"))
        == "a long text, longer than four tokens"
    )
    assert len(ours.encode("a")) == 1


def spaced(library: SentencePieceTokenizer, metaspace: str | None) -> tokenizers.Tokenizer:
    """The SentencePiece model as a tokenizer.json, in the older form (normalizer) or the newer
    (Metaspace).
    """
    processor = library.processor
    pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    joined = [
        (a, b)
        for p in pieces
        for a, b in ((p[:i], p[i:]) for i in range(1, len(p)))
        if a in vocabulary and b in vocabulary
    ]
    merges = sorted(joined, key=lambda pair: vocabulary["".join(pair)])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if metaspace is None:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("metaspace", [None, "first", "always"])
def test_llama2s_tokenizer_json(
    tmp_path: pathlib.Path, sentence_piece: SentencePieceTokenizer, texts: list[str], metaspace
):
    path = save(tmp_path, spaced(sentence_piece, metaspace))
    ours, library = load_byte_pair(path), tokenizers.Tokenizer.from_file(str(path))
    for text in filter(None, texts):
        if not any(special in text for special in ours.special_tokens):
            assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
            assert (
                ours.encode_after_special(text)
                == library.encode("<s>" + text, add_special_tokens=False).ids[1:]
            )
        # Metaspace adds no space before one that is there, and the decoder then takes that one
        # away: so does the library's.
        ids = ours.encode(text)
        assert ours.decode([1, *ids, 2]) == library.decode(ids) or "\ufffd" in library.decode(ids)
        assert ours.decode(ids).lstrip(" ") == text.replace("▁", " ").lstrip(" ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not a tokenizer.json"),
        (b"{", "not a tokenizer.json"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: pathlib.Path, content: bytes, message: str):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_byte_pair(path)


def test_other_models_and_decoders_are_refused(tmp_path: pathlib.Path):
    with pytest.raises(InputError, match="model 'WordLevel' given, BPE expected"):
        load_byte_pair(
            save(tmp_path, tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        )
    tokenizer = byte_level()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="decoder 'WordPiece' given"):
        load_byte_pair(save(tmp_path, tokenizer))


def test_a_declared_token_that_is_not_there_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(
        InputError, match="eos_token '</s>' is declared, but the vocabulary does not hold it"
    ):
        load_byte_pair(save(tmp_path, byte_level(), eos_token="</s>"))


def test_half_a_character_is_refused(byte_pair: BytePairTokenizer):
    with pytest.raises(InputError, match="half of a surrogate pair"):
        byte_pair.encode("\udc80")
