"""`infer`: prompts in, text out. Text goes to standard output, everything else to standard error."""

import argparse
import io
import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llama_jax.cli.compilation import keep_compiled_programs
from llama_jax.cli.options import OptionParser, add_model_options, resolve_dtype
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.generation.text import Completion, Piece

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def make_parser(prog: str) -> OptionParser:
    """The options of `infer`."""
    parser = OptionParser(prog, "Generate text with a LLaMA. Prompts come from --prompt, or one a line from standard input.")
    add_model_options(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times; - is all of standard input"
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is a user message through the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="limit of new tokens a prompt")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most probable token, always")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the tokens that reach probability P")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws; prompt i draws with S + i")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt instead of text")
    return parser


def read_prompts(given: list[str] | None) -> list[str]:
    """The prompts of the command line, or one a line from standard input.

    Raises:
      InputError: if there is none, and for standard input that is not UTF-8.
    """
    if given:
        return [_read_standard_input() if prompt == "-" else prompt for prompt in given]
    if sys.stdin.isatty():
        raise InputError("no prompt given; --prompt TEXT, or lines on standard input expected")
    # Not `splitlines`: that also ends a line at a form feed or U+2028, which are text here.
    prompts = [line.removesuffix("\r") for line in _read_standard_input().split("\n") if line.strip()]
    if not prompts:
        raise InputError("standard input is empty; one prompt a line expected")
    return prompts


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text at byte {error.start}; convert it first") from None


def prepare_output(json: bool) -> None:
    """JSON is UTF-8 wherever it goes; text is in the terminal's encoding, with `?` for characters that it lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8" if json else None, errors="strict" if json else "replace")


def main(arguments: list[str], prog: str = "infer") -> int:
    """Runs `infer` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    prompts = read_prompts(options.prompt)
    prepare_output(options.json)
    # Only now: --help and wrong options need neither JAX nor seconds.
    from llama_jax.generation.text import stream
    from llama_jax.weights.load import load

    keep_compiled_programs()
    started = time.perf_counter()
    dtype = resolve_dtype(options.dtype)
    model = load(options.model, dtype)
    note(f"{model.origin} loaded in {time.perf_counter() - started:.1f} s, {dtype}")
    pieces = stream(
        model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        chat=options.chat,
        dtype=dtype,
    )
    meter = Meter()
    completions = write(meter.watch(pieces), prompts, options)
    note(meter.report(completions))
    return 0


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def write(pieces: Iterable["Piece"], prompts: list[str], options: argparse.Namespace) -> list["Completion"]:
    """Writes the answers to standard output in the order of the prompts, each as it comes; returns them."""
    completions: dict[int, Completion] = {}
    texts = ["" for _ in prompts]
    written, current = 0, 0
    echo = not options.json and not options.chat and sys.stdout.isatty()
    emit = (lambda text: None) if options.json else (lambda text: print(text, end="", flush=True))
    emit(f"{_DIM}{prompts[0]}{_PLAIN}" if echo else "")
    for piece in pieces:
        texts[piece.row] += piece.text
        if piece.completion is not None:
            completions[piece.row] = piece.completion
        while current < len(prompts):
            emit(texts[current][written:])
            written = len(texts[current])
            if current not in completions:
                break
            emit("\n")
            if options.json:
                print(json.dumps(completions[current]._asdict(), ensure_ascii=False), flush=True)
            current, written = current + 1, 0
            emit(f"{_DIM}{prompts[current]}{_PLAIN}" if echo and current < len(prompts) else "")
    return [completions[row] for row in range(len(prompts))]


class Meter:
    """Times a stream of pieces: to the first token, and the speed after it."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._last = self._start
        self._tokens_at_first = self._tokens = 0

    def watch(self, pieces: Iterable["Piece"]) -> Iterable["Piece"]:
        """The same pieces, timed."""
        for piece in pieces:
            self._last = time.perf_counter()
            self._tokens += piece.tokens
            if self._first == self._start:
                self._first, self._tokens_at_first = self._last, self._tokens
            yield piece

    def report(self, completions: list["Completion"]) -> str:
        """One line of statistics; times include compilation, which happens once for each size of batch and prompt."""
        prompt = sum(completion.prompt_tokens for completion in completions)
        seconds = max(self._last - self._first, 1e-9)
        speed = (
            f"{(self._tokens - self._tokens_at_first) / seconds:.1f} tokens/s" if self._tokens > self._tokens_at_first else "-"
        )
        reasons = ", ".join(sorted({completion.stop_reason for completion in completions}))
        return (
            f"prompt {prompt} tokens, first token after {self._first - self._start:.2f} s; "
            f"{self._tokens} new tokens, then {speed} (compilation included); ended by {reasons}"
        )
