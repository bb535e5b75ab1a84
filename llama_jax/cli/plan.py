"""`plan`: memory and time of a training, or of decoding, on chips that are not rented yet; nothing is compiled or run."""

import argparse
import dataclasses

from llama_jax.cli.counts import count
from llama_jax.cli.options import OptionParser
from llama_jax.cli.plan_compiled import compiled_rows
from llama_jax.cli.plan_json import decode_json, training_json
from llama_jax.cli.plan_text import decode_lines, training_lines
from llama_jax.cli.writing import as_json, prepare_output
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.planning.chips import CHIPS, Topology, parse_topology
from llama_jax.planning.decode import make_decode_plan
from llama_jax.planning.job import OPTIMIZERS, Job, parse_mesh
from llama_jax.planning.plan import best_remat, make_plan
from llama_jax.planning.search import outlook
from llama_jax.presets import preset

_FLOATS = ("float32", "bfloat16")


def make_parser(prog: str) -> OptionParser:
    """The options of `plan`."""
    parser = OptionParser(prog, "Memory and time of a training or of decoding in closed form, before anything is rented.")
    parser.add_argument("--model", required=True, metavar="PRESET", help="a published architecture, such as llama3.1-70b")
    names = ", ".join(chip.name for chip in CHIPS)
    parser.add_argument(
        "--topology", required=True, metavar="CHIPS", help=f"v5p:4x4x8, 2xv5p:4x4x8 (two slices), h100:8; of {names}"
    )
    parser.add_argument("--length", type=count, metavar="T", help="tokens of a row; the model's context, but at most 8192")
    axes = "such as fsdp=64,tensor=2, of data, fsdp, tensor, context; by default fsdp takes all of a slice"
    parser.add_argument("--mesh", metavar="SIZES", help=axes)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    ahead = "compile the step of a training for one slice of TPUs, on this machine: true memory, predicted time (minutes)"
    parser.add_argument("--compile", action="store_true", help=ahead)
    add_training_options(parser)
    group = parser.add_argument_group("decoding in place of training")
    group.add_argument("--decode", action="store_true", help="plan the generation of text")
    group.add_argument("--batch", type=count, metavar="B", help="rows at a time, all chips together; 1 a copy of the model")
    group.add_argument("--quantize", choices=("int8", "int4"), help="narrow weights")
    group.add_argument("--cache-dtype", choices=("bfloat16", "int8"), default="bfloat16", help="of keys and values")
    return parser


def add_training_options(parser: OptionParser) -> None:
    """What a training's memory and time depend on, under the names of its config."""
    group = parser.add_argument_group("the training")
    rounded = "of an update, such as 4M, rounded to whole rows a chip; one row a chip and micro-batch"
    group.add_argument("--batch-tokens", type=count, metavar="N", help=rounded)
    group.add_argument("--microbatches", type=count, default=1, metavar="A", help="into which an update is cut")
    kept = "none, full, names joined by + (compute.remat), or auto: the fastest that fits"
    group.add_argument("--remat", default="auto", metavar="NAMES", help=kept)
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer.name")
    group.add_argument("--moment-dtype", choices=_FLOATS, default="float32", help="optimizer.moments_dtype")
    group.add_argument("--param-dtype", choices=_FLOATS, default="float32", help="of the parameters that are trained")
    chunk = "tokens of the whole batch whose logits exist at one time (compute.loss_chunk); 2048 a chip"
    group.add_argument("--loss-chunk", type=count, metavar="N", help=chunk)
    group.add_argument("--rank", type=count, metavar="R", help="train adapters (LoRA) of this rank over a frozen model")
    group.add_argument("--base", choices=(*_FLOATS, "int8", "int4"), default="bfloat16", help="of the model under adapters")
    group.add_argument("--tokens", type=count, metavar="D", help="to be trained on, such as 15T: how many days")


def make_job(options: argparse.Namespace, config: LlamaConfig, topology: Topology, length: int) -> Job:
    """The training that the options describe.

    Raises:
      InputError: for choices that do not go together.
    """
    if options.moment_dtype != "float32" and options.optimizer == "adafactor":
        raise InputError("--moment-dtype bfloat16 given; adafactor keeps no mean of the gradient: leave it out")
    mesh = parse_mesh(options.mesh, topology)
    unit = mesh.rows * options.microbatches
    rows = unit * max(1, round((options.batch_tokens or 0) / length / unit))
    job = Job(
        config, topology, mesh, length, rows, options.microbatches,
        "full" if options.remat == "auto" else options.remat,
        options.optimizer, options.moment_dtype, options.param_dtype,
        loss_chunk=options.loss_chunk or 0, rank=options.rank or 0, base_dtype=options.base,
    )  # fmt: skip
    return dataclasses.replace(job, remat=best_remat(job)) if options.remat == "auto" else job


def main(arguments: list[str], prog: str = "plan") -> int:
    """Runs `plan` and returns its exit status: 0 also where a job does not fit, which is an answer."""
    options = make_parser(prog).parse(arguments)
    config, topology = preset(options.model), parse_topology(options.topology)
    length = options.length or min(config.context_length, 8192)
    if options.decode and options.compile:
        raise InputError("--decode and --compile given; only the step of a training is compiled ahead")
    if options.decode:
        mesh = parse_mesh(options.mesh, topology) if options.mesh else None
        dtype = options.quantize or "bfloat16"
        decoding = make_decode_plan(config, topology, options.batch, length, dtype, options.cache_dtype, mesh)
        rows, figures = decode_lines(options.model, decoding, dtype), decode_json(decoding)
    else:
        plan = make_plan(make_job(options, config, topology, length))
        around = outlook(plan)
        rows, figures = training_lines(options.model, plan, around, options.tokens), training_json(plan, around, options.tokens)
        if options.compile:
            more, compiled = compiled_rows(plan.job)
            rows, figures = rows + more, figures | {"compiled": compiled}
    prepare_output(json=options.json)
    if options.json:
        print(as_json({"model": options.model, "topology": topology.name, **figures}))
    else:
        print("\n".join(f"{name:14}{text}".rstrip() for name, text in rows))
    return 0
