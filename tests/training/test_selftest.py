"""`selftest`: it passes here, and it notices what is broken."""

import json

import jax
import numpy as np
import pytest

from llama_jax.cli.main import run_program
from llama_jax.cli.selftest import main
from llama_jax.model import attention
from llama_jax.training.selftest import Case, SelfTest, alone, meshes, random_batch, tiny_config
from llama_jax.weights.checkpoint import Checkpoints


def cases(tmp_path, *groups, devices=2) -> dict[str, Case]:
    return {
        case.name: case
        for case in SelfTest(jax.devices()[:devices], "float32", tmp_path).cases(groups)
    }


def require_success(capsys, groups: list[str]) -> None:
    """The program finds all cases of mesh and resume within their bounds."""
    assert run_program(lambda: main(["--devices", "2", "--only", "mesh,resume", "--json"])) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [case["group"] for case in found] == groups
    assert all(case["ok"] for case in found)
    assert "about a minute on one device" in err.splitlines()[0]
    assert f"{len(groups)} of {len(groups)} within their bounds" in err


@pytest.fixture
def _short_sequences(monkeypatch):
    monkeypatch.setattr("llama_jax.training.selftest._LENGTH", 32)


@pytest.mark.usefixtures("_short_sequences")
def test_the_program_passes_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr("llama_jax.training.selftest.meshes", lambda *given: [(1, 2, 1, 1)])
    require_success(capsys, ["mesh", "resume"])


@pytest.mark.slow
def test_the_program_passes_with_every_mesh(capsys):
    require_success(
        capsys, ["mesh"] * 5 + ["resume"]
    )  # tensor, context gathered and ring, fsdp, data


@pytest.mark.usefixtures("_short_sequences")
def test_attention_that_ignores_documents_is_noticed(tmp_path, monkeypatch, capsys):
    def blind(q, k, v, mask, causal, scales=None):
        return attention.reference_attention(q, k, v, mask._replace(documents=None), causal, scales)

    monkeypatch.setattr("llama_jax.training.selftest.BACKENDS", ["reference"])
    monkeypatch.setitem(attention.BACKENDS, "reference", blind)
    assert run_program(lambda: main(["--devices", "1", "--only", "documents"])) == 1
    out, err = capsys.readouterr()
    assert "DIFFERS" in out
    assert "0 of 1 within their bounds" in err


@pytest.mark.usefixtures("_short_sequences")
def test_a_restore_that_loses_a_bit_is_noticed(tmp_path, monkeypatch):
    whole = Checkpoints.restore

    def damaged(self, step, like):
        state = whole(self, step, like)
        scale = np.array(state.params["final_norm"]["scale"])
        scale[0] = np.nextafter(scale[0], 9)
        state.params["final_norm"]["scale"] = jax.device_put(
            scale, state.params["final_norm"]["scale"].sharding
        )
        return state

    monkeypatch.setattr(Checkpoints, "restore", damaged)
    (case,) = cases(tmp_path, "resume").values()
    assert case.difference >= 1
    assert not case.ok


@pytest.mark.usefixtures("_short_sequences")
def test_what_cannot_be_computed_has_failed(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("no such\nkernel here")

    monkeypatch.setattr("llama_jax.training.selftest.BACKENDS", ["reference", "blockwise"])
    monkeypatch.setitem(attention.BACKENDS, "blockwise", refuse)
    (case,) = cases(tmp_path, "attention", devices=1).values()
    assert not case.ok
    assert case.note == "NotImplementedError: no such kernel here"


@pytest.mark.parametrize(
    ("devices", "count"),
    [(1, 1), (2, 4), (4, 10), (8, 20), (3, 4), (6, 16), (12, None), (256, None)],
)
def test_every_mesh_fits(devices, count):
    config = tiny_config(devices, "float32")
    found = meshes(devices, config.model)
    assert (
        count is None or len(found) == count
    )  # ordered ways to write the number as a product of four
    assert all(np.prod(sizes) == devices for sizes in found)
    assert config.data.batch_size % (4 * devices) == 0


def test_documents_alone_are_the_same_documents():
    packed = random_batch(tiny_config(1, "float32"), 0)
    single = alone(packed)
    assert single.weights.sum() == packed.weights.sum()
    pairs = lambda batch: sorted(
        zip(batch.tokens[batch.weights > 0], batch.targets[batch.weights > 0])
    )
    assert pairs(single) == pairs(packed)
    assert set(np.unique(single.documents)) == {0, 1}


def test_the_help_says_how_long_it_takes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "about a minute on one device" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "mesh,remats"], "--only: 'remats' given; some of mesh,accumulation,"),
        (["--devices", "99"], "--devices: 99 given; 1 to 8 expected"),
    ],
)
def test_wrong_use_is_one_line(capsys, arguments, words):
    assert run_program(lambda: main(arguments)) == 2
    assert words in capsys.readouterr().err
