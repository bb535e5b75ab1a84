"""Command-line options of the verbs without a YAML file; wrong use is one line with the nearest
option.
"""

import argparse
import decimal
import difflib
import re
from typing import NoReturn

from llama_jax.errors import InputError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help
            if action.default is None or action.default is False
            else super()._get_help_string(action)
        )


class OptionParser(argparse.ArgumentParser):
    """argparse with our manners: no abbreviations, `InputError` in place of a usage dump."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would have printed and exited with."""
        raise InputError(f"{message}; see --help")

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """The options of a command line.

        Raises:
          InputError: for an unknown option, with the nearest known one, and for values of the wrong
            type.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for word in arguments:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                near = (
                    [name for name in known if name.startswith(option)] if len(option) > 3 else []
                )
                near += difflib.get_close_matches(option, known, n=1, cutoff=0.4)
                raise InputError(
                    f"argument {option!r} is unknown; "
                    + (f"the nearest is {near[0]}" if near else "see --help")
                )
        return self.parse_args(arguments)

    def options_of(self, title: str) -> set[str]:
        """All names of the options of a group."""
        groups = [group for group in self._action_groups if group.title == title]
        return {
            name
            for group in groups
            for action in group._group_actions
            for name in action.option_strings
        }


def given_options(arguments: list[str]) -> list[str]:
    """Options of a command line by their names, as they are written."""
    return [word.partition("=")[0] for word in arguments if word.startswith("--")]


def add_model_options(parser: OptionParser) -> None:
    """`--model` and `--dtype`, which every verb that runs a model has."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="run directory, Hugging Face or Meta directory, .gguf file, or a name on the Hub",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of weights and activations; auto: float32 on a CPU",
    )


def add_run_options(parser: OptionParser) -> None:
    """How a model is run, where it differs from what its files say."""
    group = parser.add_argument_group("the model, run otherwise than its files say")
    group.add_argument(
        "--quantize", choices=("int8", "int4"), help="narrow the weights as they are loaded"
    )
    group.add_argument(
        "--cache-dtype",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
        default="auto",
        help="of keys and values; auto: that of the activations",
    )
    group.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="K",
        help="guess K tokens ahead, check them in one pass; texts are as probable as without",
    )
    group.add_argument(
        "--draft",
        metavar="PATH",
        help="smaller model that guesses; without one, what followed the same words before",
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together, in place of the model's",
    )
    group.add_argument(
        "--rope-theta", type=float, metavar="X", help="base of the rotary frequencies"
    )
    group.add_argument(
        "--rope-scaling",
        metavar="KIND",
        help="linear:FACTOR, llama3:FACTOR:LOW:HIGH:ORIGINAL_CONTEXT, or none",
    )
    group.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="llama2, llama3, chatml, or a file with a Jinja template",
    )


def add_sampling_options(parser: OptionParser) -> None:
    """How tokens are drawn and when a text ends: the settings of
    `llama_jax.generation.text.stream`.
    """
    group = parser.add_argument_group("the text")
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="limit of new tokens a prompt"
    )
    group.add_argument(
        "--stop",
        action="append",
        type=unescaped,
        metavar="TEXT",
        help=r"ends a text before it; \n and \t are understood; may be given several times",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="texts for each prompt, which share its prefill",
    )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="log-probability of each token, and those of the N best; with --json or --output",
    )
    group = parser.add_argument_group("drawing tokens")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most probable token, always",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K most probable tokens; 0 for all",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the tokens that reach probability P",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from tokens at least P times as probable as the best",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divides logits of tokens of prompt and text; 1 for none",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="taken off tokens of the text",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="taken off for each time in the text",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=bias,
        metavar="ID=VALUE",
        help="added to the logit of a token; may be given several times",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of sampling; every text has random numbers of its own",
    )


def unescaped(text: str) -> str:
    r"""A text of the command line with `\n`, `\t`, `\r` and `\\` understood."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text given; at least one character expected")
    return re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)


def bias(text: str) -> tuple[int, float]:
    """`ID=VALUE` as a token id and a number."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} given; ID=VALUE expected, as in 42=-5"
        ) from None


# --- counts ---
#
# Counts as people write them: `15T` tokens, `1.3M` hours, `405B` parameters; the letters are powers
# of ten.


_POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12, "P": 15}
_WRITTEN = re.compile(
    r"(\d{1,3}(?:[,_]\d{3})+|\d+)(\.\d+)?(?:[eE]\+?(\d{1,2}))?\s?([kKmMbBgGtTpP]?)", re.ASCII
)
_LARGEST = 10**24
_EXPECTED = (
    "a whole number such as 4096, 4M, 1.3M or 15T (powers of ten: K, M, B or G, T, P) expected"
)


def count(text: str) -> int:
    """The whole number, at least 1, that a text such as `15T`, `1.3M`, `4,096` or `2e12` stands
    for; a type for argparse.

    Raises:
      ArgumentTypeError: for anything else, half tokens and numbers beyond 1e24 included.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r:.60} given; {_EXPECTED}")
    digits, fraction, exponent, letter = found.groups()
    power = int(exponent or 0) + _POWERS[letter.upper()]
    value = decimal.Decimal(re.sub("[,_]", "", digits)[:40] + (fraction or "")[:40]).scaleb(power)
    if value != value.to_integral_value() or not 1 <= value <= _LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} given; {_EXPECTED}, at least 1 and at most 1e24"
        )
    return int(value)


def positive(text: str) -> float:
    """A number above 0, for argparse.

    Raises:
      ArgumentTypeError: for anything else, infinity included.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r:.60} given; a number above 0 expected")
    return value
