"""`infer`: prompts in, text out. Text goes to standard output, everything else to standard error."""

import io
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
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
    ordered = in_order(meter.watch(pieces), len(prompts))
    echo = sys.stdout.isatty() and not options.chat
    echoed = [f"{_DIM}{prompt}{_PLAIN}" if echo else "" for prompt in prompts]
    completions = write_json(ordered) if options.json else write_text(ordered, echoed)
    note(meter.report(completions))
    return 0


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def in_order(pieces: Iterable["Piece"], prompts: int) -> Iterator["Piece"]:
    """The same pieces, those of a prompt held back until the prompts before it have ended."""
    held: list[list[Piece]] = [[] for _ in range(prompts)]
    current = 0
    for piece in pieces:
        held[piece.row].append(piece)
        while current < prompts and held[current]:
            ready, held[current] = held[current], []
            yield from ready
            current += ready[-1].completion is not None


def write_json(pieces: Iterable["Piece"]) -> list["Completion"]:
    """Writes one JSON object a prompt, each as it is complete; returns the completions."""
    completions: list[Completion] = []
    for piece in pieces:
        if piece.completion is not None:
            print(json.dumps(piece.completion._asdict(), ensure_ascii=False), flush=True)
            completions.append(piece.completion)
    return completions


def write_text(pieces: Iterable["Piece"], echoed: Sequence[str]) -> list["Completion"]:
    """Writes texts as they come, each after what is to be echoed before it; returns the completions."""
    completions: list[Completion] = []
    begun = -1
    for piece in pieces:
        print((echoed[piece.row] if piece.row > begun else "") + piece.text, end="", flush=True)
        begun = piece.row
        if piece.completion is not None:
            print(flush=True)
            completions.append(piece.completion)
    return completions


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
