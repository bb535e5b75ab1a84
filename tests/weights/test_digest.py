"""The name of a model's files: another one for every tensor that is another, whichever the
format.
"""

import json
import shutil

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.errors import InputError
from llama_jax.weights.digest import files_digest

COUNT, ROWS = 60, 300  # tensors, and rows of 256 bytes each: 4.6 MB in all


def tensors(changed: int | None = None) -> dict[str, np.ndarray]:
    values = {
        f"t{number}": np.random.default_rng(number).random((ROWS, 64), np.float32)
        for number in range(COUNT)
    }
    if changed is not None:
        values[f"t{changed}"] += 1
    return values


def write_safetensors(path, values):
    save_file(values, path / "model.safetensors")
    return path


def write_gguf(path, values):
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    for name, tensor in values.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "model.gguf"


def write_pth(path, values):
    """A zip archive with a member a tensor, as PyTorch's are."""
    with (path / "consolidated.00.pth").open("wb") as file:
        np.savez(file, **values)
    return path


@pytest.mark.parametrize("write", [write_safetensors, write_gguf, write_pth])
def test_each_of_sixty_tensors_counts(tmp_path, write):
    path = write(tmp_path, tensors())
    before = files_digest(path)
    assert before == files_digest(write(tmp_path, tensors()))
    others = {files_digest(write(tmp_path, tensors(number))) for number in range(0, COUNT, 5)}
    assert len(others) == COUNT // 5
    assert before not in others


def test_one_name_counts(tmp_path):
    values = tensors()
    before = files_digest(write_safetensors(tmp_path, values))
    values["other"] = values.pop("t7")
    assert files_digest(write_safetensors(tmp_path, values)) != before


@pytest.mark.parametrize("place", [0, 1_500_000, -1])
def test_of_a_file_without_tensors_every_byte_counts(tmp_path, place):
    data = bytearray(np.random.default_rng(0).bytes(3_000_000))
    (tmp_path / "tokenizer.json").write_bytes(data)
    before = files_digest(tmp_path)
    data[place] ^= 1
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert files_digest(tmp_path) != before


def test_adapters_are_known_by_their_model_too(tmp_path, tiny_directory):
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(tiny_directory, base)
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base)})
    )
    before = files_digest(adapters)
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    assert files_digest(adapters) != before
    shutil.rmtree(base)
    with pytest.raises(InputError, match="not here; name it"):
        files_digest(adapters)
