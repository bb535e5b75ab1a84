"""Whole runs with another optimizer: what is told, what may change at a resume and what may not."""

import functools
import json
import pathlib
import shutil

import jax
import pytest
from test_loop import Recorder, changed, forget
from tiny_runs import read_state, tiny_config, write_corpus

from llama_jax.errors import InputError
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import setup
from llama_jax.training.loop import prepare
from llama_jax.training.setup import fingerprint

STEPS = 4


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))


@pytest.fixture
def config(tmp_path):
    corpus = write_corpus(tmp_path / "text")
    return changed(
        tiny_config(tmp_path / "run", corpus),
        run={"steps": STEPS, "eval_every": 0, "checkpoint_every": 2},
        optimizer={
            "name": "muon",
            "schedule": "wsd",
            "decay_fraction": 0.5,
            "warmup_steps": 1,
            "schedule_steps": STEPS,
            "moments_dtype": "bfloat16",
            "z_loss": 1e-3,
        },
    )


def test_a_run_with_muon_tells_the_z_loss_and_goes_on_bit_for_bit(config, tmp_path):
    prepare(config, Recorder()).train()
    lines = [
        json.loads(line)
        for line in pathlib.Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    ]
    numbers = [line for line in lines if "train/loss" in line]
    rates = [1e-2, 1e-2, 1e-3 + 9e-3 * (1 - 0.5**0.5), 1e-3]  # the peak, then two updates of decay
    assert [line["train/learning_rate"] for line in numbers] == pytest.approx(rates, rel=1e-5)
    assert all(
        0 < line["train/z_loss"] < 0.1 for line in numbers
    )  # 1e-3 times the square of about log 320, or less

    shutil.copytree(config.run.dir, tmp_path / "stopped")
    stopped = changed(config, run={"dir": str(tmp_path / "stopped")})
    forget(stopped, STEPS)
    with pytest.raises(InputError) as caught:
        prepare(changed(stopped, optimizer={"name": "lion"}), Recorder())
    assert "holds a run with optimizer.name 'muon', 'lion' was asked for" in str(caught.value)
    with pytest.raises(
        InputError, match=r"optimizer\.moments_dtype 'bfloat16', 'float32' was asked for"
    ):
        prepare(changed(stopped, optimizer={"moments_dtype": "float32"}), Recorder())
    prepare(stopped, Recorder()).train()
    assert fingerprint(read_state(stopped, STEPS)) == fingerprint(read_state(config, STEPS))
    # What does not change the state may change.
    longer = changed(
        stopped, run={"steps": STEPS + 1}, optimizer={"learning_rate": 1e-3, "schedule": "constant"}
    )
    assert prepare(longer, Recorder()).train().step == STEPS + 1
