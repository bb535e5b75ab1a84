"""Command-line options of the verbs without a YAML file; wrong use is one line with the nearest option."""

import argparse
import difflib
from typing import NoReturn

from llama_jax.errors import InputError


class OptionParser(argparse.ArgumentParser):
    """argparse with our manners: no abbreviations, `InputError` in place of a usage dump."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would have printed and exited with."""
        raise InputError(f"{message}; see --help")

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """The options of a command line.

        Raises:
          InputError: for an unknown option, with the nearest known one, and for values of the wrong type.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for word in arguments:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                near = [name for name in known if name.startswith(option)] if len(option) > 3 else []
                near += difflib.get_close_matches(option, known, n=1, cutoff=0.4)
                raise InputError(f"argument {option!r} is unknown; " + (f"the nearest is {near[0]}" if near else "see --help"))
        return self.parse_args(arguments)


def add_model_options(parser: OptionParser) -> None:
    """`--model` and `--dtype`, which every verb that runs a model has."""
    parser.add_argument("--model", required=True, metavar="PATH", help="run directory, Hugging Face directory or .gguf file")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of weights and activations; auto: float32 on a CPU",
    )


def resolve_dtype(name: str) -> str:
    """The dtype that `auto` stands for on the devices at hand."""
    import jax

    on_cpu = jax.devices()[0].platform == "cpu"
    return name if name != "auto" else "float32" if on_cpu else "bfloat16"
