"""`python -m llama_jax VERB`, also installed as `llama-jax VERB`."""

import difflib
import importlib
import sys

from llama_jax import __version__
from llama_jax.cli.program import run_program
from llama_jax.errors import InputError

_VERBS = {
    "train": ("llama_jax.cli.train", "train a LLaMA, or go on with a run"),
    "infer": ("llama_jax.cli.infer", "generate text"),
    "inspect": ("llama_jax.cli.inspect", "say what a model on disk is, and what is odd about it"),
    "eval": ("llama_jax.cli.evaluate", "loss on text files, accuracy on multiple-choice questions"),
    "adapters": ("llama_jax.cli.adapters", "adapters of a run: written apart, or merged into their model"),
    "prepare": ("llama_jax.cli.prepare", "turn text and conversations into token files"),
    "data": ("llama_jax.cli.data", "data verify: check token files, hash the batch of a step"),
    "checkpoint": (
        "llama_jax.cli.checkpoint",
        "those of a run: checkpoint list; checkpoint verify reads all of them",
    ),
    "convert": ("llama_jax.cli.convert", "write a model in another format"),
    "flops": ("llama_jax.cli.flops", "the compute of a training, as papers count it"),
    "plan": ("llama_jax.cli.plan", "memory and time of a training or of decoding, before chips are rented"),
    "report": ("llama_jax.cli.report", "draw the curves of runs, as a picture or in the terminal"),
    "doctor": ("llama_jax.cli.doctor", "check versions, devices, collectives and disk of this machine"),
    "selftest": ("llama_jax.cli.selftest", "the same loss for every mesh, accumulation, backend ... on your devices"),
}


def usage() -> str:
    """The list of verbs."""
    verbs = "\n".join(f"  {verb:10} {meaning}" for verb, (_, meaning) in _VERBS.items())
    head, foot = "usage: llama-jax VERB [options]", "llama-jax VERB --help lists the options of a verb."
    return f"llama_jax {__version__}\n{head}\n\n{verbs}\n\n{foot}"


def run_verb(arguments: list[str]) -> int:
    """Runs the verb that the first argument names.

    Raises:
      InputError: for an unknown verb, with the nearest known one.
    """
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        print(__version__ if arguments == ["--version"] else usage())
        return 0
    verb, *rest = arguments
    if verb not in _VERBS:
        near = difflib.get_close_matches(verb, _VERBS, n=1, cutoff=0.4) or list(_VERBS)
        raise InputError(f"verb {verb!r} is unknown; the nearest is {near[0]}")
    return importlib.import_module(_VERBS[verb][0]).main(rest)


def main() -> None:
    """The console script."""
    sys.exit(run_program(lambda: run_verb(sys.argv[1:])))
