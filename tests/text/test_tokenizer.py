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
from llama_jax.text.sentence_piece import SentencePieceTokenizer
from llama_jax.text.stops import declared_stop_ids, declared_stop_ids_from_gguf, stop_ids
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer


def test_all_kinds_fulfil_the_protocol(tokenizer: Tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert len(tokenizer.surface.pieces) == tokenizer.vocab_size


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


def test_added_tokens_that_the_model_file_lacks_are_refused(tmp_path: pathlib.Path, sentence_piece_path: pathlib.Path):
    shutil.copy(sentence_piece_path, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<s>": 1, "<|im_end|>": 3}')
    load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 500}')
    with pytest.raises(InputError, match=r"'<\|im_start\|>' is not in tokenizer.model"):
        load_tokenizer(tmp_path)


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


def test_stop_ids_are_those_of_all_files_and_known_names(tmp_path: pathlib.Path, byte_pair: BytePairTokenizer):
    assert stop_ids(byte_pair) == (0, 2)  # <|endoftext|> and <|im_end|>, by name
    assert declared_stop_ids(tmp_path) == ()
    write_eos(tmp_path, [7, 9], 8)
    assert stop_ids(byte_pair, declared_stop_ids(tmp_path)) == (0, 2, 7, 8, 9)
    write_eos(tmp_path, 7, None)
    assert declared_stop_ids(tmp_path) == (7,)


def test_stop_ids_of_gguf(smollm2: Tokenizer, smollm2_metadata: dict[str, object]):
    assert stop_ids(smollm2, declared_stop_ids_from_gguf(smollm2_metadata)) == (0, 2)
    assert declared_stop_ids_from_gguf({"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 6}) == (5, 6)


def test_stop_ids_that_are_none_are_refused(tmp_path: pathlib.Path, sentence_piece: SentencePieceTokenizer):
    assert stop_ids(sentence_piece) == (2, 3)
    with pytest.raises(InputError, match="eos_token_id 500: the tokenizer has 500 tokens"):
        stop_ids(sentence_piece, [500])
    write_eos(tmp_path, "</s>", None)
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id: '</s>' given, a token id"):
        declared_stop_ids(tmp_path)
