"""A model in several GGUF files, as the original library splits it: read as one, or refused naming
what is wrong.
"""

import shutil

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.gguf_read import GgufFile, open_gguf


def refusal(path) -> str:
    with pytest.raises(InputError) as refused:
        open_gguf(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def edit(path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize("small_first", [False, True])
def test_any_part_opens_the_whole_model(write_parts, write_gguf, tensors, small_first):
    parts = write_parts(9, small_first)
    assert len(parts) == 3 + small_first
    whole = GgufSource.open(write_gguf())
    for part in parts:
        source = GgufSource.open(part)
        assert source.config == whole.config
        assert source.file.path == parts[0]
        assert source.file.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(source.file.read(name), tensor)
        np.testing.assert_array_equal(
            source.read("layers/attention/wq", 1), whole.read("layers/attention/wq", 1)
        )


def test_one_part_alone_holds_its_own_tensors(write_parts):
    parts = write_parts()
    assert (
        sum(len(GgufFile.open(part).tensors) for part in parts)
        == len(open_gguf(parts[0]).tensors)
        == 21
    )


def test_missing_parts_are_named(write_parts):
    parts = write_parts(5)
    parts[1].unlink()
    assert "parts, of which tiny-00002-of-00005.gguf cannot be found" in refusal(parts[0])
    for part in parts[2:]:
        part.unlink()
    message = refusal(parts[0])
    assert message.startswith(f"{parts[0]}: ")
    assert (
        "tiny-00002-of-00005.gguf, tiny-00003-of-00005.gguf, tiny-00004-of-00005.gguf and 1 more"
        in message
    )


def test_a_name_that_contradicts_the_metadata_is_refused(write_parts, tmp_path):
    parts = write_parts()
    for name in (
        "model.gguf",
        "tiny-00002-of-00004.gguf",
        "tiny-00003-of-00003.gguf",
        "-00002-of-00003.gguf",
    ):
        path = shutil.copy(parts[1], tmp_path / name)
        assert "NAME-00002-of-00003.gguf expected" in refusal(path)


def test_exchanged_parts_are_refused(write_parts, tmp_path):
    parts = write_parts()
    shutil.copy(parts[2], parts[1])
    assert refusal(parts[0]).startswith(f"{parts[1]}: split.no is 2, 1 expected")


def test_parts_that_do_not_agree_are_refused(write_parts):
    key = b"split.tensors.count" + bytes([5, 0, 0, 0])
    for index, expected in (
        (1, "'split.tensors.count' is 20 but 21 in tiny-00001-of-00003.gguf"),
        (0, "is 21 but 20 in"),
    ):
        parts = write_parts()
        edit(parts[index], key + bytes([21, 0, 0, 0]), key + bytes([20, 0, 0, 0]))
        assert expected in refusal(parts[2])


def test_a_wrong_number_of_tensors_is_refused(write_parts):
    key = b"split.tensors.count" + bytes([5, 0, 0, 0])
    parts = write_parts()
    for part in parts:
        edit(part, key + bytes([21, 0, 0, 0]), key + bytes([22, 0, 0, 0]))
    assert "split.tensors.count is 22 but the parts hold 21" in refusal(parts[1])


def test_a_tensor_in_two_parts_is_refused(write_parts):
    parts = write_parts()
    edit(parts[2], b"blk.1.ffn_down.weight", b"blk.0.ffn_down.weight")
    assert "tensor 'blk.0.ffn_down.weight' is in an earlier part" in refusal(parts[0])


def test_metadata_of_its_own_in_a_later_part_is_refused(write_parts):
    parts = write_parts()
    edit(parts[1], b"split.tensors.count", b"llama.expert_count_")
    message = refusal(parts[0])
    assert message.startswith(f"{parts[1]}: 'llama.expert_count_' is 21 but None in")


def test_damage_is_blamed_on_the_part_that_has_it(write_parts):
    parts = write_parts()
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    assert refusal(parts[0]).startswith(f"{parts[2]}: ")
