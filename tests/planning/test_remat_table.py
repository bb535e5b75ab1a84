"""The table of rungs in `docs/performance.md` against the functions of the plan, of two
architectures; its figures of 8B.
"""

import dataclasses
import math
import pathlib
import re

import pytest

from llama_jax.accounting import training_flops_per_token
from llama_jax.config import LlamaConfig
from llama_jax.model.remat import NAMES, REMAT_POLICIES, saved_names
from llama_jax.planning.memory import recomputed_flops, saved_bytes
from llama_jax.presets import preset

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "performance.md"
LENGTH = 8192
EIGHT = preset("llama3.1-8b")
UNEVEN = dataclasses.replace(
    EIGHT, dim=1152, heads=9, kv_heads=3, head_dim=64, ffn_dim=2000, layers=5
)


def rows() -> dict[str, list[str]]:
    """The cells after the name, by rung."""
    cells = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in PAGE.read_text("utf8").splitlines()
    ]
    return {
        row[0].strip("`"): row[1:]
        for row in cells
        if len(row) == 6 and row[0].strip("`") in REMAT_POLICIES
    }


def value(text: str, config: LlamaConfig) -> int:
    """Of a sum of products such as `2·N·H + F`."""
    letters = {
        "D": config.dim,
        "N": config.heads,
        "K": config.kv_heads,
        "H": config.head_dim,
        "F": config.ffn_dim,
        "T": LENGTH,
    }
    factors = [
        [int(word) if word.isdecimal() else letters[word] for word in term.split("·")]
        for term in text.split(" + ")
    ]
    return sum(math.prod(term) for term in factors)


def test_the_table_has_every_rung_in_order():
    assert tuple(rows()) == REMAT_POLICIES


@pytest.mark.parametrize("config", [EIGHT, UNEVEN], ids=["8b", "uneven"])
@pytest.mark.parametrize("rung", REMAT_POLICIES)
def test_a_row_is_what_the_plan_reckons_with(rung, config):
    kept, numbers, again, kilobytes, share = rows()[rung]
    roots = 16 if rung == "none" else 8  # of the mean squares in two norms
    beside = 4 * config.heads * ("context" in saved_names(rung)) + roots  # logsumexp
    assert saved_bytes(config, rung, 2) == 2 * value(numbers, config) + beside
    assert recomputed_flops(config, rung, LENGTH) == config.layers * value(again, config)
    if rung != "none":
        assert [word for word in re.findall(r"\w+", kept) if word != "input"] == [
            n for n in NAMES if n in saved_names(rung)
        ]
    if config is EIGHT:
        assert kilobytes == f"{saved_bytes(config, rung, 2) / 1e3:.1f}"
        again_8b = recomputed_flops(config, rung, LENGTH) / training_flops_per_token(config, LENGTH)
        assert share == f"{100 * again_8b:.1f} %"
