"""`convert`: a model on disk in another format. The result is one line on standard output, progress
is on standard error.
"""

import contextlib
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from llama_jax.cli.options import OptionParser
from llama_jax.cli.writing import note
from llama_jax.errors import InputError

if TYPE_CHECKING:
    import argparse

    from llama_jax.weights.open import Opened

_DTYPES = {
    "hugging_face": ("keep", "float32", "bfloat16", "float16"),
    "gguf": ("keep", "float32", "float16", "bfloat16", "q8_0"),
}
_BYTES_PER_WEIGHT = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "q8_0": 34 / 32,
}  # q8_0: blocks of 32 and a scale
_LINES = 10  # of progress, where it does not go to a terminal


def make_parser(prog: str) -> OptionParser:
    """The options of `convert`."""
    parser = OptionParser(
        prog, "Write a model in another format, tensor by tensor: memory for one of them is enough."
    )
    parser.add_argument(
        "source", metavar="SRC", help="run directory, Hugging Face or Meta directory, or .gguf file"
    )
    parser.add_argument(
        "target",
        metavar="DST",
        help="directory (hugging_face) or .gguf file that does not exist yet",
    )
    parser.add_argument("--format", required=True, choices=tuple(_DTYPES), help="of DST")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=tuple(dict.fromkeys(sum(_DTYPES.values(), ()))),
        help="of the weights; keep: as in SRC, float32 where it is quantised; q8_0 is for "
        "gguf only",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="largest file of weights, for hugging_face (default: 5GB)",
    )
    parser.add_argument(
        "--new-token",
        action="append",
        default=[],
        metavar="TEXT",
        help="special token to add to the vocabulary, such as '<|tool|>'; may be given several "
        "times",
    )
    parser.add_argument(
        "--vocab-multiple",
        type=int,
        default=1,
        metavar="N",
        help="pad the vocabulary with new tokens to a multiple of N, for sharding",
    )
    return parser


def main(arguments: list[str], prog: str = "convert") -> int:
    """Runs `convert` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    _check(options)
    from llama_jax.weights.inspect import report
    from llama_jax.weights.open import open_model

    started = time.perf_counter()
    opened = open_model(options.source)
    for line in report(opened).brief():
        note(line)
    if options.new_token:
        opened = _with_new_tokens(opened, options.new_token, options.vocab_multiple)
    with _unwinding():
        nbytes = (_to_gguf if options.format == "gguf" else _to_hugging_face)(opened, options)
    seconds = time.perf_counter() - started
    use = f"python -m llama_jax infer --model {shlex.quote(options.target)} --prompt TEXT"
    use = use if opened.tokenizer else "there was no tokenizer to go with it"
    print(f"{options.target}: {options.format}, {nbytes / 1e6:.1f} MB in {seconds:.1f} s; {use}")
    return 0


def _with_new_tokens(opened: "Opened", tokens: list[str], multiple: int) -> "Opened":
    """The model with tokens added to its vocabulary; says which ids they have."""
    from llama_jax.weights.vocabulary import add_tokens

    changed, added = add_tokens(opened, tokens, multiple)
    for token, number in added.present.items():
        note(f"{token} is in the vocabulary already (id {number})")
    ids = ", ".join(f"{token} {number}" for token, number in added.tokens.items()) or "none"
    note(
        f"new tokens: {ids}; vocabulary of {added.size:,}, entries from {added.first:,} on begin "
        "as the mean of the others; with adapters, train them by --adapter.new_tokens "
        f"{added.size - added.first}"
    )
    return changed


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """While the block runs, SIGTERM leaves nothing half written, as Ctrl-C does; the exit status is
    143.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        """Ends the program by way of all that has to be undone."""
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(options: "argparse.Namespace") -> None:
    """Refuses options that do not go together."""
    expected = _DTYPES[options.format]
    if options.dtype not in expected:
        raise InputError(
            f"--dtype {options.dtype} given, one of {', '.join(expected)} expected with "
            f"--format {options.format}"
        )
    if options.vocab_multiple < 1 or (options.vocab_multiple > 1 and not options.new_token):
        raise InputError(
            f"--vocab-multiple {options.vocab_multiple} given; at least 1, with --new-token, "
            "expected"
        )
    if options.max_shard_size is not None and options.format != "hugging_face":
        raise InputError(
            f"--max-shard-size given with --format {options.format}; only hugging_face "
            "has several files"
        )


def _to_hugging_face(opened: "Opened", options: "argparse.Namespace") -> int:
    """Writes a directory; returns its bytes."""
    from llama_jax.weights.hf_write import DEFAULT_SHARD_SIZE, export_hugging_face

    size = options.max_shard_size or DEFAULT_SHARD_SIZE
    with Progress(opened) as progress:
        return export_hugging_face(
            opened, options.target, options.dtype, size, progress.advance
        ).nbytes


def _to_gguf(opened: "Opened", options: "argparse.Namespace") -> int:
    """Writes a file; returns its bytes."""
    from llama_jax.accounting import parameter_count
    from llama_jax.storage import require_room
    from llama_jax.text.export import gguf_metadata
    from llama_jax.text.stops import gguf_stops
    from llama_jax.weights.assemble import WatchedSource
    from llama_jax.weights.gguf_write import write_gguf
    from llama_jax.weights.hf_write import main_dtype
    from llama_jax.weights.inspect import report
    from llama_jax.weights.open import verified

    target = pathlib.Path(options.target)
    if target.exists():
        raise InputError(
            f"{target}: there is something already; name another file, or remove it yourself"
        )
    dtype = main_dtype(opened.source) if options.dtype == "keep" else options.dtype
    dtype = dtype if dtype in _BYTES_PER_WEIGHT else "float32"  # there are sources in float64
    require_room(target, int(parameter_count(opened.source.config) * _BYTES_PER_WEIGHT[dtype]))
    if opened.tokenizer is None:
        raise InputError(
            f"{opened.path} has no tokenizer; put its tokenizer.json or tokenizer.model "
            "there: GGUF needs it"
        )
    template = opened.template.source if opened.template else None
    stops = gguf_stops(opened.tokenizer, opened.stop_ids)
    if stops.lost:
        note(
            f"stop ids {', '.join(map(str, stops.lost))} do not fit into GGUF, which has "
            "places for three; give them at use"
        )
    with Progress(opened) as progress:
        source = WatchedSource(opened.source, progress.advance)
        name = opened.path.absolute().name.removesuffix(".gguf")
        metadata = gguf_metadata(opened.tokenizer) | stops.metadata
        write_gguf(
            source, target, dtype, metadata, template, name, report(verified(opened)).made_from()
        )
    return target.stat().st_size


class Progress:
    """How far a conversion is, on standard error: a bar on a terminal, some lines elsewhere."""

    def __init__(self, opened: "Opened") -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        from llama_jax.accounting import parameter_count

        self._origin = opened.origin
        self._total = parameter_count(opened.source.config)
        self._done = self._lines = 0
        self._bar = (
            Bar(console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None
        )

    def __enter__(self) -> "Progress":
        if self._bar is None:
            print(
                f"converting {self._origin}, {self._total:,} parameters",
                file=sys.stderr,
                flush=True,
            )
        else:
            self._bar.start()
            self._bar.add_task(self._origin, total=self._total)
        return self

    def advance(self, parameters: int) -> None:
        """Counts parameters that were read."""
        self._done += parameters
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], parameters)
        elif self._done * _LINES // self._total > self._lines:
            self._lines = self._done * _LINES // self._total
            print(f"  {self._done / self._total:4.0%} read", file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
