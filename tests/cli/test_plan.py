"""`plan`: what it prints and gives as JSON, that it starts without JAX, and that bad input is one
line.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import pytest

from llama_jax.cli.main import run_program
from llama_jax.cli.options import count
from llama_jax.cli.plan import main

EIGHT = pathlib.Path(__file__).parent.parent.parent / "configs" / "pods" / "llama3.1-8b-h100-8.yaml"
POD = "--model llama3.1-70b --topology v5p:4x4x8 --length 8192 --batch-tokens 4M"


def output(capsys, arguments: str) -> str:
    assert run_program(lambda: main(arguments.split())) == 0
    return capsys.readouterr().out


def figures(capsys, arguments: str) -> dict:
    return json.loads(output(capsys, f"{arguments} --json"))


def test_a_pod_in_words(capsys):
    text = output(capsys, f"{POD} --tokens 15T")
    for words in (
        "70,553,706,496 parameters",
        "128 x v5p, 102.8 GB and 459 TFLOP/s",
        "512 rows of 8,192 tokens",
        "parameters ",
        "optimizer",
        "gradients",
        "activations",
        "gathered",
        "working",
        "logits",
        "head",
        "in all",
        "fits, ",
        "causal MFU",
        "expected, closed form, at 64.6% of peak",
        "4.492e+11 a token",
        "bound by compute",
        "for 1.5e+13 tokens",
        "modelled",
        "an assumption, from MaxText, Llama 2 70B on 512 v5p",
    ):
        assert words in text, words
    assert all(len(line.split(None, 1)) == 2 for line in text.splitlines())


def test_a_pod_in_numbers(capsys):
    got = figures(capsys, f"{POD} --remat full --tokens 15T")
    memory = got["memory"]
    lasting = sum(memory[name] for name in ("parameters", "frozen", "optimizer", "gradients"))
    passes = sum(memory[name] for name in ("activations", "gathered", "working", "logits", "head"))
    assert memory["total"] == lasting + max(passes, memory["update"])
    assert memory["parameters"] + memory["optimizer"] == pytest.approx(
        70.55e9 * 12 / 128, rel=0.003
    )  # norms are whole
    assert memory["activations"] == 4 * 8192 * 80 * (
        8192 * 2 + 2 * 4
    )  # 4 rows: input of every layer, bfloat16, and two roots
    assert got["tokens_per_step"] == 512 * 8192
    assert got["seconds"]["step"] == pytest.approx(
        got["tokens_per_step"] / got["tokens_per_second"]
    )
    assert got["days"] == pytest.approx(15e12 / got["tokens_per_second"] / 86400)
    assert got["mfu"] == pytest.approx(
        got["flops_per_token"] * got["tokens_per_second"] / 128 / 459e12
    )


def test_what_does_not_fit_comes_with_flags_that_do(capsys):
    got = figures(capsys, f"{POD} --remat none")
    assert not got["fits"]
    assert got["remedies"]
    for remedy in got["remedies"]:
        again = (
            POD + " " + remedy["flags"]
            if "--compute.remat" in remedy["flags"]
            else f"{POD} --remat none {remedy['flags']}"
        )
        assert figures(capsys, again)["fits"]
        assert figures(capsys, again)["memory"]["total"] == remedy["total"]
    text = output(capsys, f"{POD} --remat none")
    assert "does not fit: " in text
    assert got["remedies"][0]["flags"] in text


def test_one_gpu_needs_adapters_or_another_optimizer(capsys):
    one = "--model llama3.1-8b --topology h100:1 --length 4096"
    assert not figures(capsys, one)["fits"]
    assert figures(capsys, f"{one} --optimizer adafactor --param-dtype bfloat16")["fits"]
    lora = figures(capsys, f"{one} --rank 16")
    assert lora["fits"]
    assert lora["memory"]["frozen"] == pytest.approx(16.06e9, rel=0.001)


def test_more_chips_are_named_where_nothing_else_helps(capsys):
    text = output(capsys, "--model llama3.1-405b --topology h100:8 --remat full")
    assert "more chips (h100:" in text
    assert "--adapter.rank 16 --adapter.base int8" in text


def test_keys_of_the_config_are_options_too(capsys):
    short = (
        "--model llama3.1-8b --topology h100:8 --mesh fsdp=4,tensor=2 --remat full "
        "--microbatches 2 --rank 8 --base int8"
    )
    long = (
        "--model llama3.1-8b --topology h100:8 --mesh fsdp=8 --mesh.fsdp 4 --mesh.tensor "
        "2 --compute.remat full "
        "--data.accumulation 2 --adapter.rank 8 --adapter.base int8"
    )
    assert figures(capsys, short) == figures(capsys, long)


def test_a_config_is_planned_as_it_stands(capsys):
    got = figures(capsys, f"--config {EIGHT} --topology h100:8 --tokens 1T")
    assert (got["mesh"]["fsdp"], got["microbatches"], got["remat"]) == (8, 128, "all")
    assert got["fits"]
    assert f"model         {EIGHT}: 8,030,261,248 parameters" in output(
        capsys, f"--config {EIGHT} --topology h100:8"
    )


@pytest.mark.parametrize(
    ("asked", "tokens", "said"),
    [
        ("100k", 524_288, "100,000 asked for; an update is a multiple of 524,288"),
        ("1M", 1_048_576, "1,000,000 asked for; an update is a multiple of 524,288"),
        ("525k", 524_288, None),
    ],
)
def test_whole_rows_that_are_not_what_was_asked_for_are_told(capsys, asked, tokens, said):
    arguments = f"--model llama3.1-8b --topology v5p:4x4x4 --length 8192 --batch-tokens {asked}"
    text = output(capsys, arguments)
    assert f"{tokens:,} an update" in text
    assert said in text if said else "asked for; an update" not in text
    got = figures(capsys, arguments)
    assert (got["tokens_per_step"], got["tokens_asked"]) == (tokens, count(asked))
    assert "tokens_asked" not in figures(capsys, "--model llama3.1-8b --topology v5p:4x4x4")


def test_decoding(capsys):
    arguments = "--model llama3.1-8b --topology h100:1 --decode --batch 8 --length 1024"
    got = figures(capsys, arguments)
    assert got["tokens_per_second_limit"] == pytest.approx(
        1666, rel=0.001
    )  # (15.01 GB + 8 * 1024 * 128 KiB) at 3.35 TB/s
    assert got["bytes_per_token"] == pytest.approx(16.08e9 / 8, rel=0.001)
    text = output(capsys, f"{arguments} --quantize int8")
    for words in (
        "weights int8",
        "8 rows of 1,024 tokens",
        "memory bandwidth alone",
        "tokens/s",
        "fits, ",
    ):
        assert words in text
    assert "does not fit" in output(capsys, "--model llama3.1-405b --topology h100:1 --decode")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model llama3.1-70b", "--topology"),
        ("--topology h100:8", "--model"),
        ("--model lama3-8b --topology h100:8", "nearest"),
        ("--model llama3-8b --topology h100:3", "multiple of 8"),
        ("--model llama3-8b --topology h100:8 --mesh fsdp=3", "does not make up the 8 chips"),
        ("--model llama3-8b --topology h100:16 --mesh tensor=16", "does not divide kv_heads (8)"),
        ("--model llama3-8b --topology h100:8 --remat some", "is unknown; none, all, no_up"),
        ("--model llama3-8b --topology h100:8 --length 9000", "at most the model's context (8192)"),
        (
            "--model llama3-8b --topology h100:8 --batch-tokens many",
            "whole number such as 4096, 4M",
        ),
        (
            "--model llama3-8b --topology h100:8 --optimizer adafactor --moment-dtype bfloat16",
            "adafactor keeps no mean",
        ),
        (
            "--model llama3-8b --topology h100:8 --decode --mesh data=8 --batch 3",
            "multiple of the copies of the model (8)",
        ),
        (
            "--model llama3-8b --topology h100:8 --decode --mesh fsdp=8",
            "decoding takes data and tensor",
        ),
        ("--config configs/none.yaml --topology h100:8", "cannot be read"),
        (f"--config {EIGHT} --topology h100:8 --remat full", "--remat given beside --config"),
        (f"--config {EIGHT} --topology h100:8 --batch 2", "--batch given beside --config"),
        (
            "--model llama3-8b --topology h100:8 --run.init model",
            "--run.init given without --config",
        ),
        ("--model llama3-8b --topology h100:8 --compile", "programs are compiled ahead for TPUs"),
        (
            "--model llama3-8b --topology v5p:4x4x4 --rank 8 --compile",
            "only the training of whole models is compiled",
        ),
        (f"--config {EIGHT} --topology h100:16", "set one axis to -1"),
        ("--model llama3-8b --topology h100:8 --mesh.fsdp many", "AXIS=SIZE of data, fsdp"),
        ("--model llama3-8b --topology h100:8 --rematt full", "the nearest is --remat"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    assert run_program(lambda: main(arguments.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="the compiler for TPUs is here"
)
@pytest.mark.parametrize("more", ["", " --decode"])
def test_without_the_compiler_for_tpus_it_says_what_to_install(capsys, more):
    assert (
        run_program(lambda: main(f"--model llama3-8b --topology v5e:4x4 --compile{more}".split()))
        == 2
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: topology v5e:4x4: no compiler for TPUs here")
    assert "pip install 'jax[tpu]'" in captured.err
    assert captured.err.count("\n") == 1


@pytest.fixture
def pretended(monkeypatch):
    """The bytes of temporaries that a compiler says are too many, one program after the other."""
    found: list[float] = []
    monkeypatch.setattr("llama_jax.planning.compile.topology_devices", lambda topology: [])
    monkeypatch.setattr("llama_jax.cli.plan._prepare", lambda: None)
    monkeypatch.setattr("llama_jax.cli.plan._attempt", lambda compile_step: found.pop(0))
    return found


def test_remat_auto_is_what_fits_as_compiled(capsys, pretended):
    """As `train.py` decides: the settings that may fit in turn, the last of all as it comes."""
    line = "--model llama3-8b --topology v5p:4x4x4 --batch-tokens 512k --compile"
    pretended[:] = [120e9, 110e9, 10e9, 10e9]
    assert run_program(lambda: main(line.split())) == 0
    rows = [
        row
        for row in capsys.readouterr().out.splitlines()
        if row.startswith(("compiled", "remat "))
    ]
    assert [row.split()[1:4] for row in rows[-4:-2]] == [
        ["remat", "all", "takes"],
        ["remat", "no_up", "takes"],
    ]
    assert rows[-4].endswith("of 102.8 GB a chip, more than 95 %; no_up is next")
    assert rows[-2].split() == ["remat", "attention,", "as", "compiled"]
    pretended[:] = [10e9]
    assert run_program(lambda: main(f"{line} --remat full --json".split())) == 0
    assert json.loads(capsys.readouterr().out)["compiled"]["remat"] == "full"
    pretended[:] = [120e9] * 7
    assert run_program(lambda: main(f"{line} --json".split())) == 0
    compiled = json.loads(capsys.readouterr().out)["compiled"]
    assert (compiled["remat"], compiled["fits"]) == ("full", False)


@pytest.mark.parametrize("more", ["", " --json", " --decode", " --decode --json"])
def test_what_takes_minutes_is_told_before_it_begins_apart_from_the_answer(
    capsys, monkeypatch, more
):
    said = []

    def compile_nothing(compile_step):
        said.append(capsys.readouterr())
        return 50e9  # bytes of temporaries: too many

    monkeypatch.setattr("llama_jax.planning.compile.topology_devices", lambda topology: [])
    monkeypatch.setattr("llama_jax.cli.plan._prepare", lambda: None)
    monkeypatch.setattr("llama_jax.cli.plan._attempt", compile_nothing)
    assert (
        run_program(lambda: main(f"--model llama3-8b --topology v5e:4x4 --compile{more}".split()))
        == 0
    )
    assert said == [("", "compiling the step for v5e:4x4, which takes minutes\n")]
    answer = capsys.readouterr()
    assert answer.err == ""
    assert (
        json.loads(answer.out)["compiled"]["temporaries"] == 50e9
        if "--json" in more
        else "compiled" in answer.out
    )


def test_it_starts_without_jax():
    begin = time.perf_counter()
    code = (
        "import sys; from llama_jax.cli.plan import main; main(sys.argv[1:]); sys.exit('jax' "
        "in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *POD.split()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < 30


def refusal(capsys, arguments: str) -> str:
    assert run_program(lambda: main(arguments.split())) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error


@pytest.mark.parametrize(
    "words",
    [
        "--quantize int8",
        "--batch 4",
        "--cache-dtype int8",
        "--cache-dtype bfloat16",
        "--cache-dtype=bfloat16",
    ],
)
def test_choices_of_decoding_are_refused_beside_a_training(capsys, words):
    name = words.replace("=", " ").split()[0]
    assert f"{name} given without --decode" in refusal(
        capsys, f"--model llama3.2-1b --topology h100:1 {words}"
    )


@pytest.mark.parametrize(
    "words",
    [
        "--batch-tokens 4M",
        "--tokens 15T",
        "--microbatches 1",
        "--data.accumulation 2",
        "--remat auto",
        "--compute.remat=full",
        "--optimizer adamw",
        "--optimizer.name lion",
        "--moment-dtype float32",
        "--optimizer.moments_dtype bfloat16",
        "--param-dtype float32",
        "--optimizer.param_dtype bfloat16",
        "--loss-chunk 2048",
        "--compute.loss_chunk 1024",
        "--rank 8",
        "--adapter.rank 8",
        "--base int8",
        "--adapter.base bfloat16",
    ],
)
def test_choices_of_a_training_are_refused_beside_decoding(capsys, words):
    """Also where they say what holds by default."""
    name = words.replace("=", " ").split()[0]
    decoding = "--model llama3.2-1b --topology h100:1 --batch 2 --length 512 --decode"
    assert f"{name} given beside --decode" in refusal(capsys, f"{decoding} {words}")
    assert f"{name} given beside --decode" in refusal(capsys, f"{words} {decoding}")
