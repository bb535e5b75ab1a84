"""The catalogue of faults names tests that exist, and the tests of this folder say which of its rows they are."""

import ast
import re

import pytest
from faults.rows import ROWS
from tiny_runs import ROOT


@pytest.mark.parametrize(("row", "test"), [(row, test) for row, tests in ROWS.items() for test in tests])
def test_a_row_names_a_test(row, test):
    file, _, name = test.partition("::")
    functions = {node.name: node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions
    if file.startswith("tests/faults/"):
        numbers = re.match(r"([\d, ]+)[,:]", ast.get_docstring(functions[name]) or "")
        assert numbers, f"{test} does not begin with the numbers of its rows"
        assert row.split()[0] in numbers[1].split(", ")
