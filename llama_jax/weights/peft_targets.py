"""Which modules of a model PEFT's files adapt or replace, by the names of their tensors and the words of their description.

What is targeted need not be read from `target_modules`, which may be a regular expression: the tensors say it. Only the keys of
`alpha_pattern` are matched with names, since they decide about scales.

Source: PEFT (`tuners/tuners_utils.py`, `utils/other.py`, `utils/save_and_load.py`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.hugging_face import NAMES
from llama_jax.weights.source import flat_shapes, shown
from llama_jax.weights.values import real, whole

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
        yield from ((path, layer) for layer in (range(config.layers) if path.startswith("layers/") else (None,)))


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
    """Whether a description says, name by name, that a matrix is adapted; regular expressions and exceptions say nothing."""
    targets = values.get("target_modules")
    named = isinstance(targets, list) and module_of(place).split(".")[-1] in targets and not values.get("exclude_modules")
    return named and (layers is None or place[1] in layers)


def ranks(values: Mapping[str, Any]) -> set[int]:
    """The ranks that matrices may have."""
    return {whole(values, "r"), *(whole(patterns, key) for patterns in [_patterns(values, "rank_pattern")] for key in patterns)}


def alpha(values: Mapping[str, Any], place: Place) -> float:
    """`lora_alpha`, or what `alpha_pattern` has for a matrix: that of the first key that matches the end of its name.

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
        raise InputError(f"{key} has more than {_MOST_PATTERNS} regular expressions; names of modules expected")
    return patterns


def _is_name(pattern: str) -> bool:
    return re.fullmatch(r"[\w.]+", pattern) is not None


def _matches(pattern: str, name: str) -> bool:
    if _is_name(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    if not _is_quick(pattern):
        raise InputError(f"the pattern {shown(pattern)} is not known to take little time; give names of modules")
    try:
        return re.fullmatch(pattern if pattern.startswith("^") else rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error:
        raise InputError(f"the pattern {shown(pattern)} is no regular expression") from None


def _is_quick(pattern: str) -> bool:
    """Whether a regular expression of a file takes little time on a name: little in it repeats, and no group."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # without what only stands for one character
    repeats = len(re.findall(r"[*+{]", bare))
    return 0 < len(pattern) <= _LONGEST_PATTERN and repeats <= 2 and not re.search(r"\)[*+{?]|\(\?(?!:)", bare)
