"""Which file of a directory is read, which tokens end an answer, what is refused."""

import base64
import json
import pathlib
import shutil

import pytest
from trained import byte_level

from llama_jax.errors import InputError
from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.llama3 import Llama3Tokenizer
from llama_jax.text.sentencepiece import SentencePieceTokenizer
from llama_jax.text.stops import declared_stop_ids, declared_stop_ids_from_gguf, stop_ids
from llama_jax.text.tokenizer import Tokenizer, encode_prompt, load_tokenizer


def test_all_kinds_fulfil_the_protocol(tokenizer: Tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert len(tokenizer.token_bytes.pieces) == tokenizer.vocab_size


def test_a_directory_or_a_file_of_it(tmp_path: pathlib.Path, sentence_piece_path: pathlib.Path):
    path = shutil.copy(sentence_piece_path, tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer(tmp_path), BytePairTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.json"), BytePairTokenizer)
    assert isinstance(load_tokenizer(pathlib.Path(path)), SentencePieceTokenizer)


def test_nothing_there_names_what_was_looked_for(tmp_path: pathlib.Path):
    with pytest.raises(InputError, match=r"should hold tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_llama3s_ranks_are_told_from_a_sentence_piece_model(tmp_path: pathlib.Path):
    lines = (base64.b64encode(bytes([rank])) + b" %d\n" % rank for rank in range(256))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    assert isinstance(load_tokenizer(tmp_path), Llama3Tokenizer)


def added(number: int, text: str, special: bool) -> dict:
    """An entry of `added_tokens_decoder`."""
    flags = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return {str(number): {"content": text, "special": special} | flags}


@pytest.fixture
def with_config(tmp_path: pathlib.Path, sentence_piece_path: pathlib.Path):
    """Writes a directory with a SentencePiece model and what `tokenizer_config.json` says beside
    it.
    """
    shutil.copy(sentence_piece_path, tmp_path / "tokenizer.model")

    def write(**values: object) -> pathlib.Path:
        """The directory."""
        named = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | values))
        return tmp_path

    return write


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("file", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_beside_a_sentence_piece_model(with_config, legacy: bool | None, file: str):
    """Against transformers 5: ids of texts with tokens that only the files beside the model
    know.
    """
    transformers = pytest.importorskip("transformers")
    size = load_tokenizer(with_config()).vocab_size
    own = {} if legacy is None else {"legacy": legacy}
    if file == "added_tokens.json":
        directory = with_config(add_bos_token=True, pad_token="<pad>", **own)
        (directory / file).write_text(json.dumps({"<sep>": size + 1, "<pad>": size}))
    else:
        decoder = (
            added(size, "<pad>", True) | added(size + 1, "<sep>", False) | added(1, "<s>", True)
        )
        directory = with_config(add_bos_token=True, added_tokens_decoder=decoder, **own)
    tokenizer, theirs = (
        load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(str(directory)),
    )
    assert (tokenizer.vocab_size, tokenizer.special_tokens["<pad>"]) == (size + 2, size)
    assert "<sep>" not in tokenizer.special_tokens
    for text in ("", "a", "in the<sep>and <sep> of", "<sep>the", "  and\n<sep>\n", "ünd 中<sep>"):
        assert encode_prompt(tokenizer, text) == theirs(text).input_ids
        assert tokenizer.decode(theirs(text).input_ids) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True
        )
    assert size not in tokenizer.encode("a <pad> in a text stays text")


def test_added_tokens_that_cannot_be_are_refused(with_config):
    directory = with_config()
    size = load_tokenizer(directory).vocab_size
    (directory / "added_tokens.json").write_text('{"<s>": 1}')
    assert isinstance(load_tokenizer(directory), SentencePieceTokenizer)
    for content, words in (
        ({"<a>": size + 1}, "ids"),
        ({"<a>": "7"}, "its id expected"),
        ({"": size}, "its id expected"),
    ):
        (directory / "added_tokens.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=words):
            load_tokenizer(directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<a>": size}))
    with pytest.raises(InputError, match=f"id {size} is '<b>' here and '<a>' elsewhere"):
        load_tokenizer(with_config(added_tokens_decoder=added(size, "<b>", True)))


@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_token_beside_a_sentence_piece_model(with_config, adds: bool):
    assert load_tokenizer(with_config(add_bos_token=adds)).adds_begin is adds


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000])
def test_damaged_json_beside_a_tokenizer_is_refused(tmp_path: pathlib.Path, content: str):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_config.json: (not JSON|a JSON list given)"):
        load_tokenizer(tmp_path)


def test_a_special_token_that_is_no_text_is_refused(tmp_path: pathlib.Path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 7}')
    with pytest.raises(InputError, match="bos_token is 7, a string expected"):
        load_tokenizer(tmp_path)


def write_eos(directory: pathlib.Path, generation: object, config: object) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": config}))


def test_stop_ids_are_those_of_all_files_and_known_names(
    tmp_path: pathlib.Path, byte_pair: BytePairTokenizer
):
    assert stop_ids(byte_pair) == (0, 2)  # <|endoftext|> and <|im_end|>, by name
    assert declared_stop_ids(tmp_path) == ()
    write_eos(tmp_path, [7, 9], 8)
    assert stop_ids(byte_pair, declared_stop_ids(tmp_path)) == (0, 2, 7, 8, 9)
    write_eos(tmp_path, 7, None)
    assert declared_stop_ids(tmp_path) == (7,)


def test_stop_ids_of_gguf(smollm2: Tokenizer, smollm2_metadata: dict[str, object]):
    assert stop_ids(smollm2, declared_stop_ids_from_gguf(smollm2_metadata)) == (0, 2)
    assert declared_stop_ids_from_gguf(
        {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 6}
    ) == (5, 6)


def test_stop_ids_that_are_none_are_refused(
    tmp_path: pathlib.Path, sentence_piece: SentencePieceTokenizer
):
    assert stop_ids(sentence_piece) == (2, 3)
    with pytest.raises(InputError, match="eos_token_id 500: the tokenizer has 500 tokens"):
        stop_ids(sentence_piece, [500])
    write_eos(tmp_path, "</s>", None)
    with pytest.raises(
        InputError, match=r"generation_config.json: eos_token_id: '</s>' given, a token id"
    ):
        declared_stop_ids(tmp_path)
