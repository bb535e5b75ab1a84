"""Fixtures of the fault tests: a corpus, one undisturbed run for all of them, children that do not
outlive their test.
"""

import pathlib

import pytest
from faults.harness import make_run, spawner
from faults.rows import ROWS
from tiny_runs import write_corpus


def pytest_collection_modifyitems(items):
    """Marks what is in this folder, and what the catalogue names elsewhere."""
    named = {test for tests in ROWS.values() for test in tests}
    for item in items:
        if item.nodeid.split("[")[0] in named or item.path.is_relative_to(
            pathlib.Path(__file__).parent
        ):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def spawn(tmp_path):
    """Starts children: `spawn(["train", ...], fault="in_data:3:kill9")`, `spawn.train(config)`."""
    logs = tmp_path / "logs"
    logs.mkdir()
    with spawner(logs) as children:
        yield children


@pytest.fixture(scope="session")
def reference(tmp_path_factory, corpus):
    """A run of 12 steps that nothing disturbed; only to be read and copied."""
    directory = tmp_path_factory.mktemp("reference")
    config = make_run(directory / "run", corpus)
    with spawner(directory) as children:
        children.train(config).expect(0)
    return config


@pytest.fixture
def run(tmp_path, corpus, reference):
    """The same run, yet to be begun, in the test's own directory."""
    return make_run(tmp_path / "run", corpus, reference)
