"""Adapters in files of their own, as the package PEFT writes and reads them.

A directory with `adapter_config.json` and `adapter_model.safetensors`: of each matrix `lora_A [r, in]` and `lora_B [out, r]`.
Heads of queries and keys have the same layout there as here, so nothing is reordered.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.axes import Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.files import json_object
from llama_jax.weights.forms import stack
from llama_jax.weights.fresh_directory import fresh_directory, write_synced
from llama_jax.weights.hugging_face import NAMES
from llama_jax.weights.hugging_face_files import inside
from llama_jax.weights.hugging_face_write import DTYPES, TensorSpec, write_safetensors
from llama_jax.weights.merged import CONFIG
from llama_jax.weights.safetensors_file import map_safetensors
from llama_jax.weights.source import Shape, blamed_on, flat_shapes, require_tensors, shown, tree_shapes
from llama_jax.weights.values import flag, real, whole

TENSORS = "adapter_model.safetensors"

_PATHS = {path.rsplit("/", 1)[-1]: path for path in NAMES if path.rsplit("/", 1)[-1] in LAYER_MATRICES}
_FACTORS = {"a": "lora_A", "b": "lora_B"}
# Keys of the description that say nothing about what the adapters compute, or that are read here. Every other one must be
# empty: a key that is not understood may change the result.
_HARMLESS = frozenset(
    {"alora_invocation_tokens", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
     "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
     "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
     "target_modules", "task_type", "use_rslora"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters apart from their model.

    Attributes:
      tree: stacked, `{"a", "b"}` at the names that are adapted.
      scale: what `a b` is multiplied by, alpha / rank.
      base: where the model is that they belong to; `None` where the files do not say.
    """

    tree: Parameters
    scale: float
    base: str | None = None

    @property
    def rank(self) -> int:
        """Columns of `a`."""
        return jax.tree.leaves(self.tree)[0].shape[-1]


def require_fit(tree: Parameters, config: LlamaConfig) -> None:
    """Refuses adapters, stacked or unrolled, that do not fit a model.

    Raises:
      InputError: for factors of no matrix of its layers, for one without the other, and for other shapes.
    """
    found = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    rank = min((shape[-1] for path, shape in found.items() if path.endswith("/a")), default=0)
    shapes: dict[str, Shape] = {}
    for path, shape in tree_shapes(config, stacked="layers" in tree).items():
        if path.rsplit("/", 1)[-1] in _PATHS and {f"{path}/a", f"{path}/b"} & found.keys():
            *above, inputs, outputs = shape
            shapes |= {f"{path}/a": (*above, inputs, rank), f"{path}/b": (*above, rank, outputs)}
    require_tensors(shapes, found)


def _file_name(path: str, layer: int, factor: str) -> str:
    """The name of a factor in the file."""
    return f"base_model.model.{NAMES[path].format(layer).removesuffix('.weight')}.{_FACTORS[factor]}.weight"


def save_adapters(adapters: Adapters, directory: str | os.PathLike[str], dtype: str = "float32", dropout: float = 0.0) -> None:
    """Writes adapters as PEFT does; the directory appears when it is whole.

    Args:
      adapters: the tree, stacked or unrolled, its scale and its base.
      directory: nothing, or an empty directory.
      dtype: of the file, `float32`, `bfloat16` or `float16`.
      dropout: that they were trained with; for the description alone.

    Raises:
      InputError: for a directory that is not empty, a disk without room, and another dtype.
    """
    kinds = {kind.name: kind for kind in DTYPES.values()}
    if dtype not in kinds:
        raise InputError(f"dtype {shown(dtype)} given; one of {', '.join(kinds)} expected")
    arrays = _by_file_name(adapters.tree)
    specs = [TensorSpec(name, kinds[dtype], array.shape) for name, array in sorted(arrays.items())]
    with fresh_directory(pathlib.Path(directory), sum(spec.nbytes for spec in specs)) as partial:
        write_safetensors(partial / TENSORS, specs, arrays.__getitem__)
        write_synced(partial / CONFIG, (json.dumps(_description(adapters, dropout), indent=2) + "\n").encode())


def _by_file_name(tree: Parameters) -> dict[str, np.ndarray]:
    """Every factor of every layer, turned as the file has it."""
    arrays = {}
    for path, stacked in flatten_dict(stack(tree), sep="/").items():
        matrix, factor = path.rsplit("/", 1)
        for layer, array in enumerate(np.asarray(stacked)):
            arrays[_file_name(matrix, layer, factor)] = array.T
    return arrays


def _description(adapters: Adapters, dropout: float) -> dict[str, Any]:
    """The values of `adapter_config.json`."""
    targets = sorted({path[-2] for path in flatten_dict(adapters.tree)})
    modules = [NAMES[_PATHS[name]].split(".")[-2] for name in targets]
    return {
        "base_model_name_or_path": adapters.base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": adapters.scale * adapters.rank, "lora_dropout": dropout,
        "modules_to_save": None, "peft_type": "LORA", "r": adapters.rank, "target_modules": modules,
        "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip


def read_adapters(directory: str | os.PathLike[str], config: LlamaConfig) -> Adapters:
    """Reads adapters that PEFT or `save_adapters` wrote, into memory.

    Args:
      directory: where they are.
      config: the architecture of the model that they belong to.

    Raises:
      InputError: for missing or damaged files, another method than plain LoRA, and tensors that do not fit the model.
    """
    directory = pathlib.Path(directory)
    with blamed_on(directory):
        values = _checked_description(directory)
        rank = whole(values, "r")
        tensors = map_safetensors(inside(directory, TENSORS))
        shapes = _expected(config, rank, tensors)
        require_tensors(shapes, {name: tensor.shape for name, tensor in tensors.items()})
        if rank < 1 or not shapes:
            raise InputError(f"rank {rank} and {len(shapes)} tensors; one or more of both expected")
        scale = real(values, "lora_alpha") / (rank**0.5 if flag(values, "use_rslora", False) else rank)
        if not abs(scale) <= np.finfo(np.float32).max:  # nor is it for what is no number
            raise InputError(f"lora_alpha is {shown(values['lora_alpha'])}; a finite number expected")
        base = values.get("base_model_name_or_path")
    return Adapters(_tree(config, tensors), scale, base if isinstance(base, str) and base else None)


def _checked_description(directory: pathlib.Path) -> Mapping[str, Any]:
    """The description, of plain LoRA alone."""
    with blamed_on(CONFIG):
        values = json_object(inside(directory, CONFIG))
        plain = values.get("peft_type") == "LORA" and values.get("bias", "none") == "none"
        if not plain:
            kind = f"peft_type {shown(values.get('peft_type'))}, bias {shown(values.get('bias'))}"
            raise InputError(f"{kind}; LORA and none expected")
        if values.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
            raise InputError(f"init_lora_weights {shown(values['init_lora_weights'])} changes the base; save them converted")
        strange = [key for key, value in values.items() if value and key not in _HARMLESS]
        if strange:
            raise InputError(f"{shown(strange[0])} is {shown(values[strange[0]])}; nothing expected there for plain LoRA")
    return values


def _expected(config: LlamaConfig, rank: int, tensors: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    """Names and shapes of all factors of the matrices that the file has any factor of."""
    shapes: dict[str, Shape] = {}
    for path in _PATHS.values():
        _, inputs, outputs = flat_shapes(config)[path]
        sides = {"a": (rank, inputs), "b": (outputs, rank)}
        names = {_file_name(path, layer, factor): side for layer in range(config.layers) for factor, side in sides.items()}
        shapes |= names if any(name in tensors for name in names) else {}
    return shapes


def _tree(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> Parameters:
    """The factors stacked, float32."""
    tree = {}
    for path in _PATHS.values():
        for factor in _FACTORS:
            names = [_file_name(path, layer, factor) for layer in range(config.layers)]
            if names[0] in tensors:
                tree[f"{path}/{factor}"] = np.stack([tensors[name].T.astype(np.float32) for name in names])
    return unflatten_dict(tree, sep="/")
