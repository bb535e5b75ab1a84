"""A run that begins with a model on disk: its numbers, its words, its origin in the checkpoints,
its template kept.
"""

import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import read_lines, tiny_config, write_corpus, write_yaml

import llama_jax
from llama_jax.cli.main import run_program
from llama_jax.cli.train import main
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import setup
from llama_jax.training.config import TrainConfig
from llama_jax.training.loop import RUN_CHECKPOINTS
from llama_jax.weights.checkpoint import read_metadata


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_directory) -> pathlib.Path:
    """The directory of a run of three steps that began with the tiny Hugging Face model."""
    home = tmp_path_factory.mktemp("init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        assert main(arguments(home, tiny_directory)) == 0
    return home / "run"


def arguments(home: pathlib.Path, model: pathlib.Path, **changes) -> list[str]:
    corpus = home / "text"
    if not corpus.exists():
        write_corpus(corpus)
    config: TrainConfig = tiny_config(
        home / "run",
        corpus,
        run={"steps": 3, "eval_every": 0, **changes},
        optimizer={"learning_rate": 0.0},
    )
    return ["--config", str(write_yaml(home / "tiny.yaml", config)), "--run.init", str(model)]


def test_it_begins_with_that_model(run, tiny_directory):
    """At a learning rate of zero it also ends with it, whatever the model in the YAML file was."""
    before, after = llama_jax.load(tiny_directory), llama_jax.load(run)
    assert after.config == before.config
    tokens = jnp.arange(24)[None] % 200
    np.testing.assert_array_equal(
        llama_jax.logits(after.params, tokens, after.config),
        llama_jax.logits(before.params, tokens, before.config),
    )


def test_words_template_and_stops_come_along(run, tiny_directory):
    before, after = llama_jax.load(tiny_directory), llama_jax.load(run)
    text = "The cat sat on the mat. 你好 <|im_end|>"
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert after.template.source == before.template.source
    assert after.stop_ids == before.stop_ids


def test_checkpoints_say_where_they_come_from(run, tiny_directory):
    made_from = read_metadata(run / RUN_CHECKPOINTS)["made_from"]
    assert made_from == llama_jax.load(tiny_directory).report.to_dict()
    assert made_from["format"] == "hugging_face"
    assert made_from["path"] == str(tiny_directory)


def test_it_goes_on(run, tiny_directory, capsys, on_devices):
    """From its own checkpoint, in its own words."""
    on_devices(1)
    assert main([*arguments(run.parent, tiny_directory), "--run.steps", "4"]) == 0
    assert [line["step"] for line in read_lines(run) if "event" not in line] == [1, 2, 3, 4]
    assert "resumed from step 3" in capsys.readouterr().out


def test_adapters_go_on_over_their_own_model_only(tmp_path, tiny_directory, capsys, on_devices):
    """Moved, with a file more beside it, a model is the same; with one number changed it is
    another.
    """
    on_devices(1)
    moved, other = (shutil.copytree(tiny_directory, tmp_path / name) for name in ("moved", "other"))
    (moved / "README.md").write_text("moved")
    weights = sorted(other.glob("*.safetensors"))[0]
    tensors = load_file(weights)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] * np.asarray(2, tensors[name].dtype)
    save_file(tensors, weights, {"format": "pt"})
    more = ["--adapter.rank", "2", "--run.checkpoint_every", "1"]
    assert main([*arguments(tmp_path, tiny_directory), *more]) == 0
    assert main([*arguments(tmp_path, moved), *more, "--run.steps", "4"]) == 0
    assert "resumed from step 3" in capsys.readouterr().out
    assert run_program(lambda: main([*arguments(tmp_path, other), *more, "--run.steps", "5"])) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert f"holds adapters over {moved} (" in line
    assert f"but run.init is {other} (" in line
    assert [line["step"] for line in read_lines(tmp_path / "run") if "event" not in line] == [
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.layers", "5"], "another architecture than that of run.init"),
        (["--run.init", "nowhere"], "nowhere: no such file or directory"),
    ],
)
def test_what_does_not_fit(tmp_path, tiny_directory, more, words, capsys, on_devices):
    on_devices(1)
    assert run_program(lambda: main([*arguments(tmp_path, tiny_directory), *more])) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
