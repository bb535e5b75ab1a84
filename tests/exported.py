"""What an exported directory holds, read by the safetensors library, and what it should hold."""

import itertools
import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file
from support import torch_name

from llama_jax.weights.assemble import unstack


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor, read by the safetensors library."""
    files = sorted(directory.glob("*.safetensors"))
    for path in files:  # the tensors begin at a multiple of eight bytes
        with path.open("rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0
    return dict(itertools.chain.from_iterable(load_file(path).items() for path in files))


def expected_tensors(params) -> dict[str, np.ndarray]:
    """A parameter tree under transformers' names, `[out, in]`."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(unstack(jax.device_get(params)))[0]:
        names = tuple(part.key for part in path)
        tensors[torch_name(names)] = leaf.T if leaf.ndim == 2 and names[0] != "embedding" else leaf
    return tensors


def values_of(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def require_equal(given: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(given[name], tensor, err_msg=name)
