"""Numbers out of other people's configuration: present, of the right kind, or refused by the name of their key."""

from collections.abc import Mapping
from typing import Any

from llama_jax.errors import InputError
from llama_jax.weights.source import shown

_LARGEST = 1 << 63  # JSON has no bound of its own


def whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number; a null or absent one is the default. Its range is the business of `LlamaConfig`.

    Raises:
      InputError: naming the key, for another kind of value or a missing one without a default.
    """
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        raise InputError(f"{key} is {shown(value)}; a whole number expected")
    return value


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A real number; as `whole` otherwise."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{key} is {shown(value)}; a number expected")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{key} is {shown(value)}; a smaller number expected") from None


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; as `whole` otherwise."""
    value = _given(values, key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key} is {shown(value)}; true or false expected")
    return value


def quotient(values: Mapping[str, Any], dim_key: str, heads_key: str) -> int:
    """The width of a head that nothing else states: the width of the model shared out evenly.

    Raises:
      InputError: naming both keys, where it does not come out even.
    """
    dim, heads = whole(values, dim_key), whole(values, heads_key)
    if heads < 1 or dim % heads:
        raise InputError(f"{dim_key} {shown(dim)} is not a multiple of {heads_key} {shown(heads)}")
    return dim // heads


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(f"{key} is missing")
    return value
