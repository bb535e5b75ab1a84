"""How much of a matrix of settings, and of a stream of mutations, a run of the tests goes through.

`make test` takes all pairs of settings and a few hundred mutations, `make test-all`
(LLAMA_JAX_TESTS=all) everything.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from allpairspy import AllPairs

ALL = os.environ.get("LLAMA_JAX_TESTS") == "all"


def combinations(settings: Mapping[str, Sequence[Any]]) -> list[tuple]:
    """Values of several settings such that any two values of two settings occur together; every
    combination in `make test-all`.

    Args:
      settings: possible values by name; values may be `pytest.param` with an id.
    """
    values = [list(choices) for choices in settings.values()]
    if ALL or len(values) < 3:
        return list(itertools.product(*values))
    chosen = AllPairs([range(len(choices)) for choices in values])
    return [
        tuple(choices[number] for choices, number in zip(values, numbers)) for numbers in chosen
    ]


def matrix(**settings: Sequence[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over `combinations` of settings, named by their values."""
    chosen = []
    for row in combinations(settings):
        parts = [
            value if isinstance(value, type(pytest.param())) else pytest.param(value)
            for value in row
        ]
        name = "-".join(part.id or str(part.values[0]) for part in parts)
        chosen.append(pytest.param(*(part.values[0] for part in parts), id=name))
    return pytest.mark.parametrize(tuple(settings), chosen)


def rounds(few: int, many: int) -> int:
    """How many mutations to try: `few` in `make test`, `many` in `make test-all`."""
    return many if ALL else few
