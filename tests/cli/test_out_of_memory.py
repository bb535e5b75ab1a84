"""A device that runs out of memory in training: a clear line and advice in place of a traceback."""

import dataclasses

import jax
import pytest
from tiny_runs import tiny_config, write_corpus, write_yaml

from llama_jax.cli.main import run_program
from llama_jax.cli.train import main
from llama_jax.training import loop

TEXT = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes."


@pytest.fixture
def config(tmp_path):
    config = tiny_config(tmp_path / "run", write_corpus(tmp_path / "text"))
    rows = dataclasses.replace(config.data, batch_size=16)
    return write_yaml(tmp_path / "config.yaml", dataclasses.replace(config, data=rows))


def failing(monkeypatch, error: Exception) -> None:
    """Lets the step fail as the runtime does when it is called."""

    def step(*_):
        raise error

    monkeypatch.setattr(loop, "sharded_step", lambda *_: step)


def test_it_is_said_in_a_few_lines_with_what_may_help(monkeypatch, capsys, config):
    failing(monkeypatch, jax.errors.JaxRuntimeError(TEXT))
    assert run_program(lambda: main(["--config", str(config), "--mesh.data", "8"])) == 2
    lines = capsys.readouterr().err.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    told = lines[begin:]
    assert "a device (cpu) has run out of memory (4.29 GB more were asked for)" in told[0]
    assert 2 <= len(told) <= 4
    assert "by the closed form this training needs" in told[1]
    assert told[2].strip().startswith("try --")
    assert not any("Traceback" in line for line in lines)


def test_other_errors_of_the_runtime_are_not_swallowed(monkeypatch, config):
    failing(monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(["--config", str(config), "--mesh.data", "8"])
