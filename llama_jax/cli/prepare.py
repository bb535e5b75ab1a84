"""`prepare`: text and conversations to token files. One line on standard output; progress is on
standard error.
"""

import argparse
import math
import os
import pathlib
import re
import shlex
import sys
import time
from typing import TYPE_CHECKING

from llama_jax.cli.options import OptionParser, count
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.data.shards import Text
    from llama_jax.text.chat import ChatTemplate
    from llama_jax.text.tokenizer import Tokenizer

_LINES = 10  # of progress a stage, where it does not go to a terminal
_STAGES = {"hash": "reading the sources", "encode": "encoding"}
_ENOUGH = 50_000  # bytes of sources below which plain lines say nothing


def make_parser(prog: str) -> OptionParser:
    """The options of `prepare`."""
    parser = OptionParser(
        prog,
        "Turn text into token files, in parallel; the same command goes on after an interruption.",
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="PATH",
        help="text, .json, .jsonl, .csv, .tsv (.gz, .zst ...), .parquet, or a folder of them",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write, for data.sources of a training",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="tokenizer file or folder, or a model with one",
    )
    parser.add_argument(
        "--template",
        default="auto",
        metavar="NAME|FILE",
        help="chat template: llama2, llama3, chatml or a file; auto: the one beside the tokenizer",
    )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="what the files call a field, as in text=body; may be given several times",
    )
    parser.add_argument(
        "--held-out",
        type=held_out,
        metavar="SHARE|TOKENS",
        help="kept for evaluation: 0.01 is 1 %% of the records, 10M about 10 million tokens, "
        "0 none "
        "(default: the smaller of 0.01 and 10M)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        metavar="N",
        help="processes that encode; the result does not depend on them",
    )
    parser.add_argument(
        "--shard-tokens",
        type=count,
        default=100_000_000,
        metavar="N",
        help="tokens at which a file ends, as in 100M",
    )
    parser.add_argument(
        "--bad-records",
        choices=("stop", "skip"),
        default="stop",
        help="a record that cannot be read: stop and name it (what is finished stays), or skip it "
        "and list it in DIR/bad_records.jsonl",
    )
    parser.add_argument(
        "--most-bad-records",
        type=count,
        default=1000,
        metavar="N",
        help="stop if more than N records are bad",
    )
    return parser


def main(arguments: list[str], prog: str = "prepare") -> int:
    """Runs `prepare` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    from llama_jax.data.shards import Settings, prepare_set
    from llama_jax.data.sources import left_out
    from llama_jax.data.token_set import BAD_RECORDS, TokenSet

    started = time.perf_counter()
    settings = Settings(
        options.held_out,
        options.shard_tokens,
        options.workers,
        read_fields(options.field),
        options.bad_records,
        options.most_bad_records,
    )
    missing = left_out(options.input)
    if missing is not None:
        print(f"--input: {missing}", file=sys.stderr, flush=True)
    directory = pathlib.Path(options.output)
    with Progress() as progress:
        manifest, kept = prepare_set(
            options.input,
            directory,
            read_text(options.tokenizer, options.template),
            settings,
            progress.show,
        )
    TokenSet.open(directory)
    seconds = time.perf_counter() - started
    documents, tokens = (
        sum(getattr(shard, of) for shard in manifest.held_out_shards)
        for of in ("documents", "tokens")
    )
    notes = [
        f"{manifest.documents:,} documents ({documents:,} held out)",
        f"{manifest.tokens:,} tokens ({tokens:,} held out)",
    ]
    notes += [f"empty and dropped: {manifest.dropped:,}"] * (manifest.dropped > 0)
    if manifest.bad_records:
        listed = shlex.quote(str(directory / BAD_RECORDS))
        notes.append(f"bad and skipped: {manifest.bad_records:,} ({listed})")
    notes += [
        f"shards: {len(manifest.shards)}" + (f" ({kept} of them from before)" if kept else "")
    ]
    print(f"{shlex.quote(options.output)}: {manifest.kind}, {', '.join(notes)}; {seconds:.1f} s")
    return 0


def held_out(text: str) -> float:
    """A share below 1 or a number of tokens, for argparse.

    Raises:
      ArgumentTypeError: for anything else.
    """
    from llama_jax.data.held_out import EXPECTED, is_held_out_amount

    try:
        value = float(text) if re.fullmatch(r"[\d.eE+-]+", text) else float(count(text))
    except (ValueError, argparse.ArgumentTypeError):
        value = math.nan
    if not is_held_out_amount(value):
        raise argparse.ArgumentTypeError(f"{text!r:.60} given; {EXPECTED} expected")
    return value


def read_fields(given: list[str]) -> dict[str, str]:
    """Fields of records with their names in the files, from `FIELD=NAME`.

    Raises:
      InputError: for another form, a field that records do not have, and one that is given twice.
    """
    from llama_jax.data.records import FIELD_NAMES

    fields: dict[str, str] = {}
    for pair in given:
        field, _, name = pair.partition("=")
        if field not in FIELD_NAMES or not name or field in fields:
            raise InputError(
                f"--field: {pair!r} given, FIELD=NAME expected, once a field, of "
                f"{', '.join(FIELD_NAMES)}"
            )
        fields[field] = name
    return fields


def read_text(path: str, template: str) -> "Text":
    """The tokenizer of a file, a folder or a model, and the chat template of that name, that file,
    or beside it.

    Raises:
      InputError: for a path without a tokenizer, and a template that does not exist or does not go
        with it.
    """
    from llama_jax.data.prepare import read_tokenizer_files
    from llama_jax.data.shards import Text
    from llama_jax.text.chat import template_from_directory
    from llama_jax.text.tokenizer import load_tokenizer

    place = pathlib.Path(path)
    if is_tokenizer(place):
        tokenizer, files = load_tokenizer(place), read_tokenizer_files(place)
        beside = template_from_directory(place if place.is_dir() else place.parent)
    else:
        from llama_jax.text.export import hugging_face_files
        from llama_jax.weights.open import open_model

        opened = open_model(path)
        if opened.tokenizer is None:
            raise InputError(f"--tokenizer: {path} has no tokenizer; name one")
        tokenizer, beside = opened.tokenizer, opened.template
        files = hugging_face_files(tokenizer, None if beside is None else beside.source)
    return Text(files, choose_template(template, tokenizer, beside))


def is_tokenizer(path: pathlib.Path) -> bool:
    """Whether a path is that of a tokenizer, rather than of a model in one file, on the Hub or in a
    format of its own.
    """
    if path.is_dir():
        return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return path.is_file() and path.suffix != ".gguf"


def choose_template(
    name: str, tokenizer: "Tokenizer", beside: "ChatTemplate | None"
) -> "ChatTemplate | None":
    """The template of a name or a file; for `auto` the one beside the tokenizer, else what its
    special tokens tell.
    """
    from llama_jax.cli.models import template_of
    from llama_jax.text.formats import format_for

    if name == "auto":
        return beside or format_for(tokenizer)
    return template_of(name, tokenizer)


class Progress:
    """How far the work is, on standard error: a bar on a terminal, some lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._bar = (
            Bar(console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None
        )
        self._stage, self._lines = "", 0

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def show(self, stage: str, done: int, total: int) -> None:
        """Takes note of how many bytes of the sources are done."""
        if stage != self._stage:
            self._stage, self._lines = stage, 0
            if self._bar is not None:
                self._bar.add_task(_STAGES[stage], total=total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[-1], completed=done)
        elif total >= _ENOUGH and done * _LINES // total > self._lines:
            self._lines = done * _LINES // total
            print(
                f"{_STAGES[stage]}: {done / total:4.0%} of {total / 1e6:.1f} MB",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
