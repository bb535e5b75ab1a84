"""`inspect`: what a model on disk is, before it is trusted; no weight is read."""

import io
import json
import sys

from llama_jax.cli.options import OptionParser


def make_parser(prog: str) -> OptionParser:
    """The options of `inspect`."""
    parser = OptionParser(
        prog, "What a model on disk is, and what is odd about it; its weights are not read."
    )
    parser.add_argument(
        "model",
        metavar="PATH",
        help="run directory, Hugging Face or Meta directory, .gguf file, or a name on the Hub",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def main(arguments: list[str], prog: str = "inspect") -> int:
    """Runs `inspect` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    from llama_jax.weights.inspect import report
    from llama_jax.weights.open import open_model

    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a terminal may lack characters that tokens are spelled in
        sys.stdout.reconfigure(errors="backslashreplace")
    found = report(open_model(options.model))
    print(json.dumps(found.to_dict()) if options.json else "\n".join(found.lines()))
    return 0
