"""`plan --compile` from beginning to end: steps of tiny models, and of one too large, for chips
that are not here.
"""

import json
import subprocess
import sys

import pytest
import yaml

from llama_jax.cli import plan
from llama_jax.config import LlamaConfig
from llama_jax.planning.cost_model import CALIBRATION

pytest.importorskip("libtpu", reason="the compiler for TPUs; `make test-tpu` installs it")
pytestmark = pytest.mark.tpu

MODEL = {
    "vocab_size": 512,
    "dim": 256,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 128,
    "ffn_dim": 512,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "context_length": 512,
    "tied_head": False,
}


@pytest.fixture
def config(tmp_path):
    """Writes a file of a training, 16 sequences in two micro-batches, for a mesh."""

    def write(**mesh):
        data = {
            "paths": ["text"],
            "length": 512,
            "batch_size": 16,
            "accumulation": 2,
            "vocab_size": 512,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"model": MODEL, "data": data, "mesh": mesh}))
        return path

    return write


def figures(capsys, *words) -> dict:
    assert plan.main([*map(str, words), "--compile", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_training_in_words(config):
    """As a user runs it: what is predicted is called so, with its calibration; no library says
    anything.
    """
    command = [
        sys.executable,
        "-m",
        "llama_jax",
        "plan",
        "--config",
        str(config(fsdp=4)),
        "--topology",
        "v5e:2x2",
        "--compile",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (
        0,
        "compiling the step for v5e:2x2, which takes minutes\n",
    )
    sequences = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert [line.split()[0] for line in sequences[-4:]] == [
        "compiled",
        "predicted",
        "transfers",
        "copies",
    ]
    for words in (
        " s: fits; a chip has 16.9 GB",
        " of state and batch + ",
        " of temporaries = ",
        "the closed form says",
        " a step, causal MFU ",
        " tokens/s",
        f"from the compiler's own estimates, not measured: {CALIBRATION}",
    ):
        assert words in done.stdout, words


def test_a_training_in_numbers(config, capsys):
    found = figures(capsys, "--config", config(fsdp=4), "--topology", "v5e:2x2")
    compiled = found["compiled"]
    assert compiled["fits"]
    assert compiled["total"] == compiled["arguments"] + compiled["temporaries"]
    assert compiled["closed_form"] == found["memory"]["total"]
    assert compiled["seconds"] > 0
    predicted = compiled["predicted"]
    assert 0 < predicted["compute"] <= predicted["simulated"]
    assert set(predicted["mfu"]) == {"compute", "synchronous", "simulated"}
    assert predicted["unknown_loops"] == 0
    assert predicted["calibration"] == CALIBRATION


def test_slices_add_up_their_parts_of_the_gradients_alone(config, capsys):
    """Over the network goes a quarter of what a model has, in bfloat16, once an update; all else
    stays inside of the slices.
    """
    found = figures(capsys, "--config", config(data=2, fsdp=4), "--topology", "2xv5e:2x2")
    moved = found["compiled"]["predicted"]["moved"]["sum between slices"]
    dim, ffn, vocab = MODEL["dim"], MODEL["ffn_dim"], MODEL["vocab_size"]
    layer = dim * 128 * (2 * 4 + 2 * 2) + 3 * dim * ffn
    assert moved / 2 == pytest.approx(2 * (MODEL["layers"] * layer + 2 * vocab * dim) / 4, rel=0.1)


def test_a_training_that_is_too_large_comes_with_what_to_do(capsys):
    large = [
        "--model",
        "llama3.2-1b",
        "--topology",
        "v5e:2x2",
        "--length",
        "8192",
        "--remat",
        "none",
    ]
    compiled = figures(capsys, *large)["compiled"]
    assert not compiled["fits"]
    assert compiled["temporaries"] > compiled["limit"] == 15.75 * 2**30
    assert compiled["remedies"]
    assert plan.main([*large, "--compile"]) == 0
    text = capsys.readouterr().out
    assert "compiled      does not fit: " in text
    assert compiled["remedies"][0]["flags"] in text.partition("compiled  ")[2]


@pytest.mark.parametrize("quantize", [[], ["--quantize", "int8"]])
def test_decoding(capsys, monkeypatch, quantize):
    monkeypatch.setattr(plan, "preset", lambda name: LlamaConfig(**MODEL, rope_scaling=None))
    words = [
        "--model",
        "tiny",
        "--topology",
        "v5e:2x2",
        "--decode",
        "--batch",
        "4",
        "--length",
        "256",
        *quantize,
    ]
    found = figures(capsys, *words)
    compiled = found["compiled"]
    assert compiled["fits"]
    assert compiled["closed_form"] == pytest.approx(compiled["arguments"], rel=0.05)
    predicted = compiled["predicted"]
    assert found["seconds"] < predicted["simulated"] <= predicted["simulated_drawn"]
    assert predicted["share_of_limit"] == pytest.approx(found["seconds"] / predicted["simulated"])
    assert plan.main([*words, "--compile"]) == 0
    text = capsys.readouterr().out
    for part in (
        " of weights and cache + ",
        " of the limit; ",
        "compared with no decoding that was",
    ):
        assert part in text
