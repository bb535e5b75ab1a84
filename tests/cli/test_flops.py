"""`flops`: the published compute accounting, number by number, and counts that are none."""

import argparse
import json

import pytest

from llama_jax.cli.flops import main
from llama_jax.cli.main import run_program
from llama_jax.cli.options import count, positive


def figures(capsys, *arguments) -> dict:
    assert run_program(lambda: main([*arguments, "--json"])) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("model", "hours", "delivered", "six_n_d"),
    [
        (
            ["--model", "llama3-8b"],
            "1.3M",
            1.9e24,
            7.2e23,
        ),  # Meta's model card of Llama 3: GPU hours of H100-80GB
        (["--model", "llama3-70b"], "6.4M", 9.2e24, 6.3e24),
    ],
)
def test_llama_3_as_published(capsys, model, hours, delivered, six_n_d):
    got = figures(capsys, *model, "--tokens", "15T", "--gpu-hours", hours, "--tflops", "400")
    assert got["delivered"] == pytest.approx(delivered, rel=0.02)
    assert got["six_n_d"] == pytest.approx(six_n_d, rel=0.01)
    assert got["delivered_per_six_n_d"] == pytest.approx(delivered / six_n_d, rel=0.02)


def test_a_model_of_400b_stays_below_the_threshold(capsys):
    got = figures(capsys, "--parameters", "400B", "--tokens", "15T")
    assert got["six_n_d"] == pytest.approx(3.6e25)
    assert got["threshold_share"] == pytest.approx(0.36)
    assert got["tokens_per_parameter"] == pytest.approx(37.5)
    assert got["causal"] is None


def test_the_405b_run_of_the_paper(capsys):
    """arXiv:2407.21783: 15.6T tokens, 3.8e25 FLOPs; 16,000 H100s at 400 TFLOP/s are at 41 % of
    their peak.
    """
    got = figures(
        capsys,
        "--model",
        "llama3.1-405b",
        "--tokens",
        "15.6T",
        "--chips",
        "16000",
        "--tflops",
        "400",
        "--peak",
        "989",
    )
    assert got["six_n_d"] == pytest.approx(3.8e25, rel=0.01)
    assert got["peak_share"] == pytest.approx(0.404, abs=0.001)
    assert got["days"] == pytest.approx(got["causal"] / (16000 * 400e12) / 86400)
    assert 60 < got["days"] < 80


@pytest.mark.parametrize(("tflops", "share"), [(430, 43), (400, 41), (380, 38)])
def test_utilisation_of_the_405b_run(capsys, tflops, share):
    """The paper's table 4: TFLOP/s a GPU of 16,000 and fewer H100s, and the per cent of the dense
    peak that they are.
    """
    got = figures(
        capsys,
        "--model",
        "llama3.1-405b",
        "--tokens",
        "15.6T",
        "--tflops",
        str(tflops),
        "--peak",
        "989",
    )
    assert 100 * got["peak_share"] == pytest.approx(share, abs=0.6)


def test_chinchilla_says_twenty_tokens_a_parameter(capsys):
    """arXiv:2203.15556: 70B parameters on 1.4T tokens."""
    assert figures(capsys, "--parameters", "70B", "--tokens", "1.4T")[
        "tokens_per_parameter"
    ] == pytest.approx(20)
    assert run_program(lambda: main(["--model", "llama3-8b", "--tokens", "15T"])) == 0
    assert "Chinchilla: about 20, here 1.61e+11 tokens" in capsys.readouterr().out  # 20 * 8.03e9


def test_attention_is_counted_as_causal(capsys):
    """Llama 3 8B written out: 4 * 4096 * 4096 wide, 8 of 32 heads for keys, 3 * 4096 * 14336, the
    head; half of all pairs.
    """
    matmul = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    scores = (
        2 * 2 * 4096 * 8192 / 2 * 3
    )  # scores and values, 2 FLOPs a pair, half of the pairs, forward and twice that
    got = figures(capsys, "--model", "llama3-8b", "--tokens", "1T", "--length", "8192")
    assert got["causal"] == pytest.approx((6 * matmul + 32 * scores) * 1e12)


def test_mfu_from_hours_and_peak(capsys):
    got = figures(
        capsys, "--parameters", "1B", "--tokens", "20B", "--gpu-hours", "100", "--peak", "1000"
    )
    assert got["mfu"] == pytest.approx(6e9 * 20e9 / (100 * 3600) / 1000e12)


def test_the_table_is_text(capsys):
    arguments = "--model llama3-8b --tokens 15T --gpu-hours 1.3M --tflops 400 --peak 989"
    assert run_program(lambda: main(arguments.split())) == 0
    out = capsys.readouterr().out
    for words in (
        "7.23e+23 FLOP",
        "1.87e+24 FLOP",
        "0.72% of 1e26",
        "below",
        "1,868 a parameter",
        "causal",
        "MFU",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4,096", 4096),
        ("1_000_000", 10**6),
        ("15T", 15 * 10**12),
        ("15.6t", 15_600_000_000_000),
        ("1.3M", 1_300_000),
        ("405B", 405 * 10**9),
        ("7G", 7 * 10**9),
        ("2e12", 2 * 10**12),
        ("3 k", 3000),
        ("0.5K", 500),
    ],
)
def test_counts(text, value):
    assert count(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "T",
        "-1",
        "0",
        "0T",
        "1.5",
        "1.00005K",
        "nan",
        "inf",
        "15X",
        "15TT",
        "1,00",
        "1,000,00",
        "0x10",
        "1e99",
        "٣",
        "1e400P",
        "9" * 500,
        "1e-3M",
        "15 T tokens",
        "1__0",
    ],
)
def test_what_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        count(text)
    assert "expected" in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "4OO"])
def test_what_is_no_positive_number(text):
    with pytest.raises(argparse.ArgumentTypeError):
        positive(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--model llama3-8b --tokens 15X",
            "argument --tokens: '15X' given; a whole number such as 4096",
        ),
        ("--model llama9-8b --tokens 15T", "preset 'llama9-8b' is unknown; the nearest are"),
        ("--tokens 15T", "one of the arguments --model --parameters is required"),
        ("--model llama3-8b --parameters 8B --tokens 1T", "not allowed with argument --model"),
        ("--model llama3-8b --tokens 1T --tflops -4", "a number above 0 expected"),
    ],
)
def test_wrong_use_is_one_line(capsys, arguments, words):
    assert run_program(lambda: main(arguments.split())) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
