"""Files that nobody vouches for, opened with care: mapped bytes, and descriptions in JSON."""

import json
import os
import pathlib
from typing import Any

import numpy as np

from llama_jax.errors import InputError

_LARGEST_JSON = 16 << 20


def mapped(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a regular file, `[size]`, mapped read-only: nothing is read until it is looked at.

    Raises:
      InputError: for a file that is missing, unreadable, or not a regular one (a pipe would make the reader wait).
    """
    try:
        size = _regular(pathlib.Path(path)).stat().st_size
        # An empty file cannot be mapped; the parser says what it lacks.
        return np.asarray(np.memmap(path, np.uint8, "r")) if size else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a small JSON file holds.

    Raises:
      InputError: for a file that is missing, unreadable or larger than a description is, for other text than JSON,
        and for another kind of JSON value.
    """
    try:
        if _regular(pathlib.Path(path)).stat().st_size > _LARGEST_JSON:
            raise InputError(f"larger than {_LARGEST_JSON} bytes; a description of a model is not")
        values = json.loads(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("not valid JSON; fetch the file again") from None
    if not isinstance(values, dict):
        raise InputError("does not hold a JSON object")
    return values


def _regular(path: pathlib.Path) -> pathlib.Path:
    if path.exists() and not path.is_file():
        raise InputError("cannot be read: not a regular file")
    return path
