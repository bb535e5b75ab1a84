"""`flops`: the compute of a training, as papers and model cards count it; nothing is run."""

import argparse
import json

from llama_jax.accounting import (
    REPORTING_THRESHOLD,
    TrainingCompute,
    delivered_flops,
    matmul_parameters,
    parameter_count,
    training_compute,
    training_flops_per_token,
)
from llama_jax.cli.options import OptionParser, count, positive
from llama_jax.cli.writing import prepare_output
from llama_jax.config import LlamaConfig
from llama_jax.presets import preset

_CHINCHILLA = 20  # tokens a parameter, arXiv:2203.15556


def make_parser(prog: str) -> OptionParser:
    """The options of `flops`."""
    parser = OptionParser(
        prog,
        "FLOPs of a training by 6·N·D and with causal attention, and what hardware makes of them.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", metavar="PRESET", help="a published architecture, such as llama3-8b"
    )
    model.add_argument(
        "--parameters", type=count, metavar="N", help="in place of a model, such as 405B"
    )
    parser.add_argument(
        "--tokens", type=count, required=True, metavar="D", help="trained on, such as 15T"
    )
    parser.add_argument(
        "--length",
        type=count,
        metavar="T",
        help="tokens of a sequence; the model's context, but at most 8192",
    )
    group = parser.add_argument_group("hardware, where something is known of it")
    group.add_argument(
        "--gpu-hours", type=count, metavar="H", help="hours of one chip, such as 1.3M"
    )
    group.add_argument(
        "--tflops", type=positive, metavar="X", help="TFLOP/s that one chip gets done"
    )
    group.add_argument("--chips", type=count, metavar="N", help="chips at work together")
    group.add_argument(
        "--peak",
        type=positive,
        metavar="X",
        help="TFLOP/s of one chip at best: 989 for an H100 in bf16, dense",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def model_lines(
    config: LlamaConfig | None, compute: TrainingCompute, length: int
) -> list[tuple[str, str]]:
    """Rows about model and tokens."""
    best = _CHINCHILLA * compute.parameters
    rows = [
        ("parameters", f"N = {compute.parameters:,}"),
        (
            "tokens",
            f"D = {compute.tokens:.4g}, {compute.tokens_per_parameter:,.4g} a parameter "
            f"(Chinchilla: about {_CHINCHILLA}, here {best:.3g} tokens)",
        ),
        ("6·N·D", f"{compute.six_n_d:.3g} FLOP"),
    ]
    if config is not None:
        each = training_flops_per_token(config, length)
        formula = (
            f"6·{matmul_parameters(config):,} matmul parameters + "
            f"6·layers·heads·head_dim·{length:,}"
        )
        rows.append(
            ("with attention", f"{compute.causal:.3g} FLOP, {each:.4g} a token: {formula}, causal")
        )
    verdict = "below" if compute.six_n_d < REPORTING_THRESHOLD else "at or above"
    rows.append(
        (
            "threshold",
            f"6·N·D is {compute.threshold_share:.2%} of 1e26 FLOP: {verdict} the US "
            "order's reporting threshold",
        )
    )
    return rows


def hardware_figures(options: argparse.Namespace, compute: TrainingCompute) -> dict[str, float]:
    """What follows from the hardware that was named; only what can be told."""
    hours, tflops, chips, peak = options.gpu_hours, options.tflops, options.chips, options.peak
    needed = compute.six_n_d if compute.causal is None else compute.causal
    figures = {}
    if hours and tflops:
        figures["delivered"] = delivered_flops(hours, tflops * 1e12)
        figures["delivered_per_six_n_d"] = figures["delivered"] / compute.six_n_d
    if hours:
        figures["model_tflops"] = needed / hours / 3600 / 1e12
    elif tflops:
        figures["gpu_hours_needed"] = needed / tflops / 1e12 / 3600
    if chips and (hours or tflops):
        figures["days"] = (hours or figures["gpu_hours_needed"]) / chips / 24
    if peak and tflops:
        figures["peak_share"] = tflops / peak
    if peak and hours:
        figures["mfu"] = figures["model_tflops"] / peak
    return figures


def hardware_lines(
    options: argparse.Namespace, figures: dict[str, float], counted: str
) -> list[tuple[str, str]]:
    """Rows about hardware: each says what it was reckoned from."""
    words = {
        "delivered": "{:.3g} FLOP in {hours:.3g} chip hours at {tflops:g} TFLOP/s",
        "delivered_per_six_n_d": "{:.2f} times 6·N·D: attention, recomputation, repeated runs and "
        "all "
        "else "
        "that "
        "the hours hold",
        "model_tflops": "{:.1f} TFLOP/s a chip, if " + counted + " took {hours:.3g} chip hours",
        "gpu_hours_needed": "{:.3g} chip hours for " + counted + " at {tflops:g} TFLOP/s",
        "days": "{:.3g} days on {chips:,} chips",
        "peak_share": "{:.1%} of a chip's peak of {peak:g} TFLOP/s, at {tflops:g}",
        "mfu": "{:.1%}: these TFLOP/s of the peak of {peak:g}",
    }
    names = {
        "delivered_per_six_n_d": "",
        "model_tflops": "achieved",
        "gpu_hours_needed": "needed",
        "days": "time",
        "peak_share": "utilisation",
        "mfu": "MFU",
    }
    known = {
        "hours": options.gpu_hours,
        "tflops": options.tflops,
        "chips": options.chips,
        "peak": options.peak,
    }
    return [
        (names.get(name, name), words[name].format(value, **known))
        for name, value in figures.items()
    ]


def main(arguments: list[str], prog: str = "flops") -> int:
    """Runs `flops` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    config = None if options.model is None else preset(options.model)
    length = options.length or (0 if config is None else min(config.context_length, 8192))
    parameters = options.parameters if config is None else parameter_count(config)
    compute = training_compute(parameters, options.tokens, config, length)
    figures = hardware_figures(options, compute)
    if options.json:
        print(json.dumps({**compute._asdict(), "length": length or None, **figures}))
        return 0
    prepare_output(json=False)
    counted = "6·N·D" if config is None else "the FLOPs with attention"
    rows = [("model", options.model or "of the given size"), *model_lines(config, compute, length)]
    for name, text in rows + hardware_lines(options, figures, counted):
        print(f"{name:15} {text}")
    return 0
