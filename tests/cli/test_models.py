"""The model of a command line: narrow weights as it is loaded, and what is said of a draft."""

import argparse

import jax
import numpy as np
import pytest

from llama_jax.cli.models import _group, load_model
from llama_jax.cli.options import OptionParser, add_model_options, add_run_options
from llama_jax.errors import InputError
from llama_jax.model.quantize import parameter_bytes, quantize
from llama_jax.weights.load import load


def options_of(*arguments) -> argparse.Namespace:
    parser = OptionParser("infer", "")
    add_model_options(parser)
    add_run_options(parser)
    parser.add_argument("--chat", action="store_true")
    return parser.parse_args(list(map(str, arguments)))


@pytest.mark.parametrize(
    ("widths", "group"),
    [
        ((4096, 4096, 14336), 32),
        ((48, 60, 64), 4),
        ((72, 96, 136), 8),
        ((66, 66, 198), 22),
        ((2, 4, 6), 2),
    ],
)
def test_groups_divide_all_rows(widths, group):
    assert _group(*widths) == group


def test_rows_that_nothing_divides():
    with pytest.raises(
        InputError,
        match=r"--quantize int4 given for matrices of 48, 75, 64 inputs, even .*; take int8",
    ):
        _group(48, 75, 64)


@pytest.mark.parametrize(("kind", "bits", "group"), [("int8", 8, 32), ("int4", 4, 4)])
def test_weights_are_narrowed_as_they_come(tiny_directory, kind, bits, group, capsys):
    """The tiny model's rows are of 48, 60 and 64 weights."""
    model, generator = load_model(options_of("--model", tiny_directory, "--quantize", kind))
    wide = load(tiny_directory).params
    expected = quantize(wide, bits, group)
    assert jax.tree.structure(generator.params) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, expected))
    sizes = f"{parameter_bytes(wide) / 1e6:.1f} -> {parameter_bytes(expected) / 1e6:.1f} MB"
    assert f"weights in {kind}: {sizes}\n" in capsys.readouterr().err


def test_a_draft_is_reported_as_well(tiny_directory, capsys):
    load_model(options_of("--model", tiny_directory, "--speculate", 3, "--draft", tiny_directory))
    brief, odd = load(tiny_directory).report.brief()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [f"{brief}; guesses 3 tokens ahead", odd]
    assert lines.count(odd) == 2
