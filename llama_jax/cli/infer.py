"""`infer`: prompts in, text out. Text goes to standard output, everything else to standard error.

Three ways to ask: prompts of the command line or of standard input (`--prompt`), a file of many
(`--input`, see `llama_jax.cli.batch`), and a conversation (`--chat` alone, see
`llama_jax.cli.chat`).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli.models import check_bias, settings_of
from llama_jax.cli.options import (
    OptionParser,
    add_model_options,
    add_run_options,
    add_sampling_options,
)
from llama_jax.cli.writing import AnswerWriter, Meter, note, prepare_output
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.generation.text import Prompt

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_DESCRIPTION = """Generate text with a LLaMA. Prompts come from --prompt, from --input, or
from standard input, one a line; --chat alone opens a conversation, in a terminal or line by line
with a program."""


def make_parser(prog: str) -> OptionParser:
    """The options of `infer`."""
    parser = OptionParser(prog, _DESCRIPTION)
    add_model_options(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; - is all of standard input",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are user messages through the chat template; without any, a conversation",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message of every conversation; with --chat or --input",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='one JSON object for each text; in a conversation also {"error": TEXT} for a message '
        'refused and {"command": NAME, "note": TEXT} for a command',
    )
    group = parser.add_argument_group("many prompts")
    group.add_argument(
        "--input",
        metavar="FILE",
        help="""JSON lines {"prompt": TEXT} or {"messages": [...]}, each with an "id"
                       and settings of its own if it likes; - is standard input""",
    )
    group.add_argument(
        "--output",
        metavar="FILE",
        help="JSON lines in the order of --input; an interrupted one is continued; "
        "- (where not given) is standard output",
    )
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts decoded together"
    )
    add_sampling_options(parser)
    add_run_options(parser)
    return parser


def main(arguments: list[str], prog: str = "infer") -> int:
    """Runs `infer` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    _check(options)
    prepare_output(options.json or options.input is not None)
    if options.input is not None:
        from llama_jax.cli.batch import answer_file

        return answer_file(options)
    if options.chat and not options.prompt:
        from llama_jax.cli.chat import converse

        return converse(options)
    return _complete(options, read_prompts(options.prompt))


def _check(options: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if options.input is None and options.output is not None:
        raise InputError("--output given without --input; --input FILE expected with it, or --json")
    if options.input is not None and options.prompt:
        raise InputError("--prompt and --input given; one of them expected")
    if options.system is not None and not options.chat and options.input is None:
        raise InputError(
            "--system given without --chat; a system message belongs to a conversation"
        )
    if options.logprobs is not None and not options.json and options.input is None:
        raise InputError("--logprobs given without --json; they are written in JSON only")
    if options.batch_size < 1:
        raise InputError(f"--batch-size: {options.batch_size} given; 1 or more expected")


def read_prompts(given: list[str] | None) -> list[str]:
    """The prompts of the command line, or one a line from standard input.

    Raises:
      InputError: if there is none, and for standard input that is not UTF-8.
    """
    if given:
        return [_read_standard_input() if prompt == "-" else prompt for prompt in given]
    if sys.stdin.isatty():
        raise InputError(
            "no prompt given; --prompt TEXT, --input FILE, lines on standard input, or "
            "--chat expected"
        )
    # Not `splitlines`: that also ends a line at a form feed or U+2028, which are text here.
    prompts = [
        line.removesuffix("\r") for line in _read_standard_input().split("\n") if line.strip()
    ]
    if not prompts:
        raise InputError("standard input is empty; one prompt a line expected")
    return prompts


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8 text at byte {error.start}; convert it first"
        ) from None


def _complete(options: argparse.Namespace, prompts: list[str]) -> int:
    """Texts for prompts, `--batch-size` decoded together."""
    settings: dict[str, Any] = settings_of(options)
    # Only now: --help and wrong options need neither JAX nor seconds.
    from llama_jax.cli.models import load_model
    from llama_jax.generation.checks import check_prompts
    from llama_jax.generation.generate import common_prefix, saved, shared_prefix
    from llama_jax.generation.sampling import sequence_keys
    from llama_jax.generation.text import encode_user, stream

    model, generator = load_model(options)
    check_bias(settings, model.config)
    meter, reused = Meter(), 0
    asked = _with_system(prompts, options.system)
    encoded = check_prompts(
        [encode_user(model, prompt, options.chat) for prompt in asked], model.config
    )
    prefix = shared_prefix(generator, common_prefix(encoded), len(encoded))
    seed = settings.pop("seed")
    for start in range(0, len(asked), options.batch_size):
        batch = slice(start, start + options.batch_size)
        sequences = len(asked[batch]) * options.samples
        keys = sequence_keys(
            seed, sequences, start * options.samples
        )  # a text has the same random numbers, whatever its batch
        writer = AnswerWriter(_echoed(options, prompts[batch]), options.json, options.samples)
        for piece in stream(
            model,
            asked[batch],
            chat=options.chat,
            generator=generator,
            prefix=prefix,
            seed=keys,
            **settings,
        ):
            meter.count(piece)
            writer.take(piece)
        reused += options.samples * saved(prefix, map(len, encoded[batch]))
    note(meter.report(generator.programs.compilations, reused))
    return 0


def _echoed(options: argparse.Namespace, prompts: list[str]) -> list[str]:
    """What stands before each answer: on a terminal the prompt that it continues."""
    if not sys.stdout.isatty() or options.chat:
        return [""] * (len(prompts) * options.samples)
    return [f"{_DIM}{prompt}{_PLAIN}" for prompt in prompts for _ in range(options.samples)]


def _with_system(prompts: list[str], system: str | None) -> "Sequence[Prompt]":
    """The prompts, each behind the system message if there is one."""
    if system is None:
        return prompts
    return [
        [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        for prompt in prompts
    ]
