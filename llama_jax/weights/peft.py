"""Adapters in files of their own, as the package PEFT writes and reads them.

A directory with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`): of each matrix
`lora_A [r, in]` and `lora_B [out, r]`, and whole tensors in the place of the model's
(`modules_to_save`, a resized vocabulary). What ranks and scales of their own single matrices have
becomes one rank, with zeros, and one scale, the rest of it in `b`. Heads of queries and keys have
the same layout there as here, so nothing is reordered.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.axes import Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.storage import atomic_directory, write_synced
from llama_jax.weights.assemble import stack
from llama_jax.weights.checkpoint import Restored
from llama_jax.weights.hf_read import NAMES, inside
from llama_jax.weights.pth import PthFile
from llama_jax.weights.restore import restore_parameters
from llama_jax.weights.run import RUN_CHECKPOINTS, has_adapters, run_config, run_manifest
from llama_jax.weights.safetensors import DTYPES, TensorSpec, map_safetensors, write_safetensors
from llama_jax.weights.source import (
    CONFIG,
    Shape,
    blamed_on,
    flag,
    flat_shapes,
    json_object,
    oriented,
    real,
    require_tensors,
    shown,
    tree_shapes,
    whole,
)

# --- peft targets ---
#
# Which modules of a model PEFT's files adapt or replace, by the names of their tensors and the
# words of their description.
#
# What is targeted need not be read from `target_modules`, which may be a regular expression: the
# tensors say it. Only the keys of `alpha_pattern` are matched with names, since they decide about
# scales.
#
# Source: PEFT (`tuners/tuners_utils.py`, `utils/other.py`, `utils/save_and_load.py`).


Place = tuple[str, int | None]  # canonical path and layer

PREFIX = "base_model.model."
# How a tensor that replaces one of the model ends, since when: all of them are found in files.
WHOLE = (".weight", ".modules_to_save.weight", ".base_layer.weight")
_FACTORS = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
_FACTORS_OF_EMBEDDING = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
_MOST_PATTERNS = 64  # regular expressions; names are not counted
_LONGEST_PATTERN = 500


def places(config: LlamaConfig) -> Iterator[Place]:
    """Every tensor of a model, as `Source.read` names it."""
    for path in flat_shapes(config):
        yield from (
            (path, layer)
            for layer in (range(config.layers) if path.startswith("layers/") else (None,))
        )


def module_of(place: Place) -> str:
    """The module whose weight a tensor is, such as `model.layers.0.mlp.up_proj`."""
    return NAMES[place[0]].format(place[1]).removesuffix(".weight")


def factor_name(place: Place, factor: str) -> str:
    """The name in the file of one of the two factors of a matrix."""
    ends = _FACTORS_OF_EMBEDDING if place[0] == "embedding" else _FACTORS
    return f"{PREFIX}{module_of(place)}{ends[factor]}"


def chosen_layers(values: Mapping[str, Any]) -> list[int] | None:
    """The layers that are adapted, by `layers_to_transform`; `None` for all of them.

    Raises:
      InputError: for anything but numbers of layers.
    """
    layers = values.get("layers_to_transform")
    chosen: list[Any] = layers if isinstance(layers, list) else [layers]
    if layers is not None and any(type(layer) is not int for layer in chosen):
        raise InputError(f"layers_to_transform is {shown(layers)}; numbers of layers expected")
    return None if layers is None else chosen


def listed(values: Mapping[str, Any], place: Place, layers: list[int] | None) -> bool:
    """Whether a description says, name by name, that a matrix is adapted; regular expressions and
    exceptions say nothing.
    """
    targets = values.get("target_modules")
    named = (
        isinstance(targets, list)
        and module_of(place).split(".")[-1] in targets
        and not values.get("exclude_modules")
    )
    return named and (layers is None or place[1] in layers)


def ranks(values: Mapping[str, Any]) -> set[int]:
    """The ranks that matrices may have."""
    return {
        whole(values, "r"),
        *(
            whole(patterns, key)
            for patterns in [_patterns(values, "rank_pattern")]
            for key in patterns
        ),
    }


def alpha(values: Mapping[str, Any], place: Place) -> float:
    """`lora_alpha`, or what `alpha_pattern` has for a matrix: that of the first key that matches
    the end of its name.

    Raises:
      InputError: for a value that is no number, and a regular expression that might take long.
    """
    patterns = _patterns(values, "alpha_pattern")
    name = module_of(place)
    key = next((key for key in patterns if _matches(key, name)), None)
    return real(values, "lora_alpha") if key is None else real(patterns, key)


def _patterns(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{key} is {shown(patterns)}; an object expected")
    if sum(not _is_name(pattern) for pattern in patterns) > _MOST_PATTERNS:
        raise InputError(
            f"{key} has more than {_MOST_PATTERNS} regular expressions; names of modules expected"
        )
    return patterns


def _is_name(pattern: str) -> bool:
    return re.fullmatch(r"[\w.]+", pattern) is not None


def _matches(pattern: str, name: str) -> bool:
    if _is_name(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    if not _is_quick(pattern):
        raise InputError(
            f"the pattern {shown(pattern)} is not known to take little time; give names of modules"
        )
    try:
        return (
            re.fullmatch(pattern if pattern.startswith("^") else rf"(?:.*\.)?(?:{pattern})", name)
            is not None
        )
    except re.error:
        raise InputError(f"the pattern {shown(pattern)} is no regular expression") from None


def _is_quick(pattern: str) -> bool:
    """Whether a regular expression of a file takes little time on a name: little in it repeats, and
    no group.
    """
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # without what only stands for one character
    repeats = len(re.findall(r"[*+{]", bare))
    return (
        0 < len(pattern) <= _LONGEST_PATTERN
        and repeats <= 2
        and not re.search(r"\)[*+{?]|\(\?(?!:)", bare)
    )


# --- peft ---


TENSORS = "adapter_model.safetensors"

PICKLE = "adapter_model.bin"
_TYPES = ("float64", "float32", "float16", "bfloat16")

_PATHS = {
    path.rsplit("/", 1)[-1]: path for path in NAMES if path.rsplit("/", 1)[-1] in LAYER_MATRICES
}
# Keys of the description that say nothing about what the adapters compute, or that are read here.
# Every other one must be empty: a key that is not understood may change the result.
_HARMLESS = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters apart from their model.

    Attributes:
      tree: stacked, `{"a", "b"}` at the names that are adapted.
      scale: what `a b` is multiplied by, alpha / rank.
      base: where the model is that they belong to; `None` where the files do not say.
      replaced: whole tensors that take the place of the model's, by canonical path and layer, as
        `Source.read` gives them.
      tied: whether a head that is tied to the embedding follows it where that is adapted or
        replaced.
    """

    tree: Parameters
    scale: float
    base: str | None = None
    replaced: Mapping[Place, np.ndarray] = dataclasses.field(default_factory=dict)
    tied: bool = False

    @property
    def rank(self) -> int:
        """Columns of `a`."""
        return jax.tree.leaves(self.tree)[0].shape[-1]


def require_fit(tree: Parameters, config: LlamaConfig) -> None:
    """Refuses adapters, stacked or unrolled, that do not fit a model.

    Raises:
      InputError: for factors of no matrix of its layers, for one without the other, and for other
        shapes.
    """
    found = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    rank = min((shape[-1] for path, shape in found.items() if path.endswith("/a")), default=0)
    shapes: dict[str, Shape] = {}
    for path, shape in tree_shapes(config, stacked="layers" in tree).items():
        if path.rsplit("/", 1)[-1] in _PATHS and {f"{path}/a", f"{path}/b"} & found.keys():
            *above, inputs, outputs = shape
            shapes |= {f"{path}/a": (*above, inputs, rank), f"{path}/b": (*above, rank, outputs)}
    new = len(tree.get("new_tokens", {}).get("inputs", ()))
    if new:
        shapes["new_tokens/inputs"] = (new, config.dim)
        if not config.tied_head:
            shapes["new_tokens/outputs"] = (config.dim, new)
    require_tensors(shapes, found)


def save_adapters(
    adapters: Adapters,
    directory: str | os.PathLike[str],
    dtype: str = "float32",
    dropout: float = 0.0,
) -> None:
    """Writes adapters as PEFT does; the directory appears when it is whole.

    Args:
      adapters: the tree, stacked or unrolled, its scale and its base.
      directory: nothing, or an empty directory.
      dtype: of the file, `float32`, `bfloat16` or `float16`.
      dropout: that they were trained with; for the description alone.

    Raises:
      InputError: for a directory that is not empty, a disk without room, another dtype, and for
        adapters of other tensors than the matrices of the layers.
    """
    if "new_tokens" in adapters.tree:
        raise InputError(
            "adapters with trained new tokens given, which are not written apart; merge them: "
            "llama-jax adapters merge BASE RUN DST"
        )
    others = [
        *adapters.tree.keys() & {"embedding", "head"},
        *(path for path, _ in adapters.replaced),
    ]
    if others:
        raise InputError(
            f"adapters of {shown(others[0])} given; those of the matrices of the layers "
            "alone can be written"
        )
    kinds = {kind.name: kind for kind in DTYPES.values()}
    if dtype not in kinds:
        raise InputError(f"dtype {shown(dtype)} given; one of {', '.join(kinds)} expected")
    arrays = _by_file_name(adapters.tree)
    specs = [TensorSpec(name, kinds[dtype], array.shape) for name, array in sorted(arrays.items())]
    with atomic_directory(pathlib.Path(directory), sum(spec.nbytes for spec in specs)) as partial:
        write_safetensors(partial / TENSORS, specs, arrays.__getitem__)
        write_synced(
            partial / CONFIG,
            (json.dumps(_description(adapters, dropout), indent=2) + "\n").encode(),
        )


def _by_file_name(tree: Parameters) -> dict[str, np.ndarray]:
    """Every factor of every layer, turned as the file has it."""
    arrays = {}
    for path, stacked in flatten_dict(stack(tree), sep="/").items():
        matrix, factor = path.rsplit("/", 1)
        for layer, array in enumerate(np.asarray(stacked)):
            arrays[factor_name((matrix, layer), factor)] = array.T
    return arrays


def _description(adapters: Adapters, dropout: float) -> dict[str, Any]:
    """The values of `adapter_config.json`."""
    targets = sorted({path[-2] for path in flatten_dict(adapters.tree)})
    modules = [NAMES[_PATHS[name]].split(".")[-2] for name in targets]
    return {
        "base_model_name_or_path": adapters.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapters.scale * adapters.rank,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapters.rank,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def read_adapters(directory: str | os.PathLike[str], config: LlamaConfig) -> Adapters:
    """Reads adapters that PEFT or `save_adapters` wrote, into memory.

    Args:
      directory: where they are.
      config: the architecture of the model that they belong to.

    Raises:
      InputError: for missing or damaged files, another method than plain LoRA, and tensors that do
        not fit the model.
    """
    directory = pathlib.Path(directory)
    with blamed_on(directory):
        values = _checked_description(directory)
        tensors = _without_copies(config, _stored(directory))
        size = _vocabulary(config, tensors)
        whole_ones = _whole_ones(config, values, tensors)
        adapted = _adapted(config, values, tensors)
        wide = dataclasses.replace(config, vocab_size=size)
        _require_fitting(wide, tensors, whole_ones, adapted)
        if not (whole_ones or adapted) or min(adapted.values(), default=1) < 1:
            raise InputError(
                f"rank {shown(values.get('r'))} and {len(tensors)} tensors; one or more "
                "of both expected"
            )
        scales = {
            place: _scale(values, alpha(values, place), rank) for place, rank in adapted.items()
        }
        scale = _scale(values, real(values, "lora_alpha"), whole(values, "r"))
        scale = scale if scale or not any(scales.values()) else 1.0
        replaced = {place: oriented(place[0], tensors[name]) for place, name in whole_ones.items()}
        resized, together = size != config.vocab_size, flag(values, "ensure_weight_tying", False)
        alone = not together and not {("embedding", None), ("head", None)}.isdisjoint(adapted)
        if alone and resized and config.tied_head and ("head", None) not in replaced:
            replaced["head", None] = replaced["embedding", None].T  # what is adapted is not tied
        tied = together or (not alone and _is_tied(replaced, resized))
        base = values.get("base_model_name_or_path")
    tree = _tree(wide, tensors, adapted, scales, scale)
    return Adapters(tree, scale, base if isinstance(base, str) and base else None, replaced, tied)


def _checked_description(directory: pathlib.Path) -> Mapping[str, Any]:
    """The description, of plain LoRA alone."""
    with blamed_on(CONFIG):
        values = json_object(inside(directory, CONFIG))
        plain = values.get("peft_type") == "LORA" and values.get("bias", "none") == "none"
        if not plain:
            kind = f"peft_type {shown(values.get('peft_type'))}, bias {shown(values.get('bias'))}"
            raise InputError(f"{kind}; LORA and none expected")
        if values.get("init_lora_weights", True) not in (
            True,
            False,
            "gaussian",
            "eva",
            "orthogonal",
        ):
            raise InputError(
                f"init_lora_weights {shown(values['init_lora_weights'])} changes the "
                "base; save them converted "
                "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
            )
        strange = [key for key, value in values.items() if value and key not in _HARMLESS]
        if strange:
            raise InputError(
                f"{shown(strange[0])} is {shown(values[strange[0]])}, which is not plain "
                "LoRA and not supported; "
                "merge the adapters with PEFT's merge_and_unload, and give the merged model"
            )
    return values


def _stored(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of the one file that there is, by name, without the name that PEFT gives adapters
    in memory.
    """
    if not (directory / TENSORS).exists() and (directory / PICKLE).is_file():
        file = PthFile.open(inside(directory, PICKLE))
        found = {name: file.read(name) for name in file.tensors}
    else:
        found = map_safetensors(inside(directory, TENSORS))
    strange = next(
        (name for name, tensor in found.items() if tensor.dtype.name not in _TYPES), None
    )
    if strange is not None:
        raise InputError(
            f"tensor {shown(strange)} has type {found[strange].dtype}; supported are "
            f"{', '.join(_TYPES)}"
        )
    return {
        name.replace(".default.", ".").removesuffix(".default"): tensor
        for name, tensor in found.items()
    }


def _without_copies(
    config: LlamaConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Without what PEFT writes beside `modules_to_save` of a resized vocabulary: the same tensor
    under a second name, and the one that it replaced.

    Raises:
      InputError: where the two that should be the same differ.
    """
    left = dict(tensors)
    for place in places(dataclasses.replace(config, tied_head=False)):
        module = f"{PREFIX}{module_of(place)}"
        name, second = (module + end for end in WHOLE[:2])
        if name in left and second in left and not np.array_equal(left[name], left.pop(second)):
            raise InputError(f"tensors {name!r} and {second!r} differ; the same one expected")
        if name in left or second in left:
            left.pop(f"{module}.original_module.weight", None)
    return left


def _whole_ones(
    config: LlamaConfig, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[Place, str]:
    """The tensors of the model that the file has whole, with their names there.

    Raises:
      InputError: where the description lists others.
    """
    everything = places(dataclasses.replace(config, tied_head=False))
    found = {place: name for place in everything for name in _whole_names(place) if name in tensors}
    saved = values.get("modules_to_save") or []
    held = [f".{module_of(place)}." for place in found]  # of a matrix, or of several such as `mlp`
    missing = (
        next((name for name in saved if not any(f".{name}." in path for path in held)), None)
        if isinstance(saved, list)
        else saved
    )
    if missing is not None:
        raise InputError(
            f"'modules_to_save' names {shown(missing)}, which the file does not have as "
            "a tensor of this model"
        )
    return found


def _require_fitting(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    whole_ones: Mapping[Place, str],
    adapted: Mapping[Place, int],
) -> None:
    """Refuses other names and shapes than those of whole tensors and of the factors of what is
    adapted.
    """
    expected = {name: _shape(config, place) for place, name in whole_ones.items()}
    for place, rank in adapted.items():
        inputs, outputs = _sides(config, place)
        expected |= {
            factor_name(place, "a"): (rank, inputs),
            factor_name(place, "b"): (outputs, rank),
        }
    require_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()})


def _whole_names(place: Place) -> list[str]:
    return [f"{PREFIX}{module_of(place)}{end}" for end in WHOLE]


def _vocabulary(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> int:
    """The size of the vocabulary: that of an embedding or a head in the file, which a fine-tuning
    may have resized.

    Raises:
      InputError: where one of the two is resized and the other is the model's.
    """
    sizes = {
        path: len(tensors[name])
        for path in ("embedding", "head")
        for name in _whole_names((path, None))
        if name in tensors and tensors[name].ndim == 2
    }
    size = next(iter(sizes.values()), config.vocab_size)
    missing = {"embedding", "head"} - sizes.keys() if size != config.vocab_size else set()
    if "embedding" in missing or (missing and not config.tied_head):
        raise InputError(
            f"the vocabulary is resized from {config.vocab_size} to {size}, and there is no "
            f"{missing.pop()} of that size; save both with modules_to_save"
        )
    return size


def _shape(config: LlamaConfig, place: Place) -> Shape:
    """The shape of a tensor in the file that replaces one of the model."""
    shape = flat_shapes(dataclasses.replace(config, tied_head=False))[place[0]]
    shape = shape if place[1] is None else shape[1:]
    return shape if place[0] == "embedding" else shape[::-1]


def _sides(config: LlamaConfig, place: Place) -> tuple[int, int]:
    """Inputs and outputs of a matrix; those of the embedding are the vocabulary and the width."""
    outputs, inputs = _shape(config, place)
    return (outputs, inputs) if place[0] == "embedding" else (inputs, outputs)


def _adapted(
    config: LlamaConfig, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[Place, int]:
    """The matrices that are adapted, or should be by the description, with their ranks."""
    known, rank, layers = ranks(values), whole(values, "r"), chosen_layers(values)
    found = {}
    for place in places(dataclasses.replace(config, tied_head=False)):
        if place[0] not in ("embedding", "head", *_PATHS.values()):
            continue
        first = tensors.get(factor_name(place, "a"))
        if (
            first is not None
            or factor_name(place, "b") in tensors
            or (listed(values, place, layers) and place[1] is not None)
        ):
            own = first.shape[0] if first is not None and first.ndim else rank
            found[place] = own if own in known else rank
    return found


def _scale(values: Mapping[str, Any], numerator: float, rank: int) -> float:
    scale = numerator / (max(rank, 1) ** 0.5 if flag(values, "use_rslora", False) else max(rank, 1))
    if not abs(scale) <= np.finfo(np.float32).max:  # nor is it for what is no number
        raise InputError(f"lora_alpha is {shown(numerator)}; a finite number expected")
    return scale


def _is_tied(replaced: Mapping[Place, np.ndarray], resized: bool) -> bool:
    """Whether a tied head is the embedding still: saved with the same numbers, or resized and not
    saved.
    """
    embedding, head = (replaced.get((path, None)) for path in ("embedding", "head"))
    if embedding is None or head is None:
        return resized
    return np.array_equal(embedding, head.T)


def _tree(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    adapted: Mapping[Place, int],
    scales: Mapping[Place, float],
    scale: float,
) -> Parameters:
    """The factors, float32, those of the layers stacked: of one rank, with zeros where there are
    less columns or none.
    """
    tree: dict[str, np.ndarray] = {}
    rank = max(adapted.values(), default=0)
    for place in adapted:
        path, layer = place
        inputs, outputs = _sides(config, place)
        for factor, shape in (("a", (inputs, rank)), ("b", (rank, outputs))):
            stacked = shape if layer is None else (config.layers, *shape)
            whole_factor = tree.setdefault(f"{path}/{factor}", np.zeros(stacked, np.float32))
            own = tensors[factor_name(place, factor)].T.astype(np.float32)
            if factor == "b" and scales[place] != scale:
                own *= np.float32(scales[place] / scale)
            (whole_factor if layer is None else whole_factor[layer])[
                : own.shape[0], : own.shape[1]
            ] = own
    return unflatten_dict(tree, sep="/")


# --- run adapters ---
#
# The adapters that a run trained.


def restore_adapters(directory: pathlib.Path) -> tuple[Adapters, Restored]:
    """The adapters of a run's newest checkpoint that is whole, and that checkpoint.

    Args:
      directory: of the run.

    Raises:
      InputError: for a run without checkpoints, and one that trained a whole model.
      CorruptError: if all checkpoints are damaged.
    """
    manifest = run_manifest(directory)
    if not has_adapters(manifest):
        raise InputError(f"{directory}: a run without adapters given; convert writes its model")
    restored = restore_parameters(directory / RUN_CHECKPOINTS)
    with blamed_on(f"{directory / RUN_CHECKPOINTS}: step {restored.step}"):
        require_fit(restored.state, run_config(directory, manifest))
    settings, made_from = restored.metadata.get("adapter"), restored.metadata.get("made_from")
    if not isinstance(settings, dict) or not isinstance(made_from, dict):
        raise InputError(
            f"{directory}: step {restored.step} does not say of which model and how its "
            "adapters are"
        )
    return Adapters(
        jax.device_get(restored.state), settings["alpha"] / settings["rank"], made_from["path"]
    ), restored
