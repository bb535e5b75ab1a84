"""`plan --config` of a training that begins with a model: the architecture is that model's, as
`train.py` has it.
"""

import pathlib

import pytest
import yaml

from llama_jax.accounting import parameter_count
from llama_jax.cli.main import run_program
from llama_jax.cli.plan import main
from llama_jax.presets import preset
from llama_jax.weights.open import open_model

ROOT = pathlib.Path(__file__).parent.parent.parent
ADAPTERS = {"adapter": {"rank": 4}}


@pytest.fixture
def config(tmp_path):
    """Writes a config that begins with the model at a path, its own architecture or none in it."""

    def write(init: object, **sections) -> pathlib.Path:
        path = tmp_path / "run.yaml"
        rows = {"length": 32, "batch_size": 4}
        path.write_text(
            yaml.safe_dump(
                {"run": {} if init is None else {"init": str(init)}, "data": rows} | sections
            )
        )
        return path

    return write


def plan(capsys, *words, status: int = 0) -> tuple[str, str]:
    """What is on stdout and on stderr."""
    assert run_program(lambda: main([*map(str, words), "--topology", "h100:1"])) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def planned(text: str) -> int:
    """Parameters of the model that a plan is for."""
    return int(text.splitlines()[0].partition(" parameters")[0].rpartition(" ")[2].replace(",", ""))


@pytest.mark.parametrize(
    "sections", [{}, ADAPTERS, {"model": "llama3.2-1b"}, {"model": "llama3.2-1b"} | ADAPTERS]
)
@pytest.mark.parametrize("typed", [False, True])
def test_the_architecture_is_that_of_the_model_at_the_path(
    capsys, config, tiny_directory, sections, typed
):
    """Whatever the file's own; the path in the file, or on the command line."""
    path = config(None if typed else tiny_directory, **sections)
    out, err = plan(capsys, "--config", path, *(["--run.init", tiny_directory] if typed else []))
    assert planned(out) == parameter_count(open_model(tiny_directory).source.config)
    assert err == ""


def test_without_the_model_the_files_own_architecture_is_taken_and_that_is_told(capsys, config):
    out, err = plan(capsys, "--config", config("nowhere", model="llama3.2-1b", **ADAPTERS))
    assert planned(out) == parameter_count(preset("llama3.2-1b"))
    assert err == "run.init: nowhere is not here; the architecture is that of the key model\n"


def test_a_config_without_an_architecture_can_be_given_one(capsys, config):
    out, err = plan(capsys, "--config", config("nowhere"), "--model", "smollm2-135m")
    assert planned(out) == parameter_count(preset("smollm2-135m"))
    assert err.startswith("run.init: nowhere is not here; ")


def test_a_preset_on_the_command_line_wins(capsys, config, tiny_directory):
    out, _ = plan(capsys, "--config", config(tiny_directory), "--model", "smollm2-135m")
    assert planned(out) == parameter_count(preset("smollm2-135m"))


def test_the_config_of_the_docstrings_is_planned_over_any_model(capsys, tiny_directory):
    out, err = plan(
        capsys, "--config", ROOT / "configs" / "docstrings_lora.yaml", "--run.init", tiny_directory
    )
    assert "adapters of rank 16" in out
    assert err == ""


@pytest.mark.parametrize("init", ["nowhere", "meta-llama/Llama-3.2-1B"])
def test_without_any_architecture_a_line_says_what_is_missing(capsys, config, init):
    """A name on the Hub is not fetched for a plan."""
    out, err = plan(capsys, "--config", config(init), status=2)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: run.init: {init} is not here; model.")
    assert "--model llama3.2-1b" in err
    assert "--run.init PATH" in err


def test_what_lies_at_the_path_and_is_no_model_is_refused(capsys, config, tmp_path):
    out, err = plan(capsys, "--config", config(tmp_path, model="llama3.2-1b"), status=2)
    assert (out, err.count("\n")) == ("", 1)
    assert f"{tmp_path}: a directory without a model given" in err
