"""The catalogue of faults and the contract name tests that exist; the tests of this folder say
which of its rows they are.
"""

import ast
import re

import pytest
from faults.rows import ROWS
from tiny_runs import ROOT


@pytest.mark.parametrize(
    ("row", "test"), [(row, test) for row, tests in ROWS.items() for test in tests]
)
def test_a_row_names_a_test(row, test):
    file, _, name = test.partition("::")
    functions = {
        node.name: node
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert name in functions
    if file.startswith("tests/faults/"):
        numbers = re.match(r"([\d, ]+)[,:]", ast.get_docstring(functions[name]) or "")
        assert numbers, f"{test} does not begin with the numbers of its rows"
        assert row.split()[0] in numbers[1].split(", ")


def test_the_contract_names_tests_that_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    file, found = "", 0
    for name, function in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", text):
        file = name or file
        if function:
            assert f"def {function}(" in files[file], f"{file}::{function}"
        if name or function:
            assert file in files
            found += 1
    assert found > 40
