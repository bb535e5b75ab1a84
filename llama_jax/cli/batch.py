"""Many prompts: JSON lines in, JSON lines out, in the same order; an interrupted output is
continued where it ends.

Requests are taken in windows of some batches; inside a window they are sorted by length, so that
little is padding. Windows lie where they lie whatever was answered before: a continued output is
the one that an undisturbed run writes.
"""

import argparse
import contextlib
import fcntl
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from llama_jax.cli.models import OWN, check_bias, penalised, settings_of
from llama_jax.cli.requests import Reader, Request, bound
from llama_jax.cli.writing import Meter, as_dict, as_json, note
from llama_jax.errors import InputError
from llama_jax.formatting import duration
from llama_jax.storage import sync_directory

if TYPE_CHECKING:
    from llama_jax.generation.generate import Generator, Prefix
    from llama_jax.generation.text import Completion, Piece
    from llama_jax.weights.load import Pretrained


# --- continued ---
#
# An output of JSON lines that is continued where it was interrupted, if it belongs to the same
# input.


class Answered(NamedTuple):
    """What an output holds already.

    Attributes:
      sequences: answers, one a line.
      size: bytes of whole lines; what is behind them was torn when the writing was interrupted.
      total: bytes in all; `None` if there is no such file.
    """

    sequences: int = 0
    size: int = 0
    total: int | None = None


def identity_of(request: Request, sample: int, samples: int) -> dict:
    """The fields of an answer that say what it is the answer to."""
    number = {"sample": sample} if samples > 1 else {}
    return {"id": request.id, "index": request.number, **number, "request_sha256": request.digest}


def answered(output: str, requests: Sequence[Request], samples: int) -> Answered:
    """What is in an output of these requests already; `-`, standard output, holds nothing.

    Raises:
      InputError: naming file and line, for an output of another input, another model or other
        settings; for a path that cannot be a file.
    """
    path = pathlib.Path(output)
    if output == "-":
        return Answered()
    try:
        if not path.exists():
            if not path.parent.is_dir():
                raise InputError(
                    f"{output}: there is no directory {path.parent}; create it, or name "
                    "another file"
                )
            return Answered()
        if not path.is_file():
            raise InputError(
                f"{output}: not a file; a file that is new or to be continued expected, "
                "or - for standard output"
            )
        with path.open("rb") as file:
            return _checked(output, file, requests, samples)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{output}: cannot be read ({reason}); name another file") from None


def _checked(
    output: str, file: io.BufferedIOBase, requests: Sequence[Request], samples: int
) -> Answered:
    """Compares every whole line with the answer that is expected there."""
    sequences = size = 0
    for line in file:
        expected = (
            identity_of(requests[sequences // samples], sequences % samples, samples)
            if sequences < len(requests) * samples
            else None
        )
        if expected is None or not (
            _belongs(line, expected) if line.endswith(b"\n") else _is_torn(line, expected)
        ):
            raise InputError(
                f"{output}, line {sequences + 1}: written for another input, another "
                "model or other settings; name another "
                "--output, or remove this one"
            )
        if line.endswith(b"\n"):
            sequences, size = sequences + 1, size + len(line)
    return Answered(sequences, size, pathlib.Path(output).stat().st_size)


def _is_torn(line: bytes, identity: dict) -> bool:
    """Whether a line without an end is the beginning of the answer to a request; a loss of power
    may leave zeros in it.
    """
    begun, head = line.rstrip(b"\0"), json.dumps(identity, ensure_ascii=False).encode()[:-1]
    return begun.startswith(head) or head.startswith(begun)


def _belongs(line: bytes, identity: dict) -> bool:
    """Whether a line is the answer to a request."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {name: values.get(name) for name in identity} == identity


@contextlib.contextmanager
def continued(output: str, before: Answered) -> Iterator[io.BufferedIOBase]:
    """The output, open behind its whole lines.

    Raises:
      InputError: if it has changed since, or another process is writing it.
    """
    if output == "-":
        yield cast(io.BufferedIOBase, sys.stdout.buffer)
        return
    path = pathlib.Path(output)
    try:
        file: io.BufferedIOBase = path.open("xb") if before.total is None else path.open("r+b")
    except FileExistsError:
        raise InputError(
            f"{output}: appeared only now; another process seems to be writing it"
        ) from None
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); name another file"
        ) from None
    with file:
        _lock(output, file)
        if path.stat().st_size != (before.total or 0):
            raise InputError(
                f"{output}: has changed since it was read; another process seems to be writing it"
            )
        file.truncate(before.size)
        file.seek(before.size)
        sync_directory(path.absolute().parent)
        yield file


def _lock(output: str, file: io.BufferedIOBase) -> None:
    """Keeps other processes of ours from writing the same file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{output}: another process is writing it; wait for it, or name another file"
        ) from None


# --- many ---


_WINDOW = 8  # batches
_SECONDS = 10.0  # between two lines of progress, where they do not go to a terminal
# What decides the answers beside the requests' own settings.
_IDENTITY = (
    "samples",
    "logprobs",
    "dtype",
    "quantize",
    "cache_dtype",
    "context",
    "rope_theta",
    "rope_scaling",
    "speculate",
)


class Job(NamedTuple):
    """What is to be done.

    Attributes:
      requests: all of the input.
      samples: answers to each; sequences of the output.
      logprobs: see `llama_jax.generation.text.stream`.
      batch_size: requests decoded together.
      done: sequences that are in the output already.
    """

    requests: list[Request]
    samples: int
    logprobs: int | None
    batch_size: int
    done: int


def answer_file(options: argparse.Namespace) -> int:
    """Answers the requests of `--input` into `--output`; returns the exit status."""
    settings = settings_of(options)
    requests = Reader(settings, options.chat, options.system).read(options.input)
    if options.speculate:
        require_no_penalties(requests, options.input)
    requests = bound(requests, identity(options))
    output = options.output or "-"
    before = answered(output, requests, options.samples)
    job = Job(requests, options.samples, options.logprobs, options.batch_size, before.sequences)
    if job.done == len(requests) * job.samples:
        note(f"{output}: all {len(requests)} requests are answered already")
        return 0
    from llama_jax.cli.models import load_model
    from llama_jax.generation.generate import shared_prefix

    model, generator = load_model(options)
    lengths, beginning = measured(model, requests, options.input)
    prefix = shared_prefix(generator, beginning, len(requests) - job.done // job.samples)
    if job.done:
        note(
            f"{output}: {job.done // job.samples} of {len(requests)} requests are "
            "answered already; going on"
        )
    _answer(model, generator, job, lengths, prefix, output, before)
    return 0


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the answers beside the requests: settings, and the contents of the models and
    the template.
    """
    from llama_jax.cli.models import template_source
    from llama_jax.weights.digest import files_digest

    paths = {"model": options.model, "draft": options.draft}
    models = {name: path and files_digest(pathlib.Path(path)) for name, path in paths.items()}
    template = template_source(options.chat_template) or options.chat_template
    return (
        {name: getattr(options, name) for name in _IDENTITY} | models | {"chat_template": template}
    )


def require_no_penalties(requests: Sequence[Request], name: str) -> None:
    """Refuses requests that cannot be guessed ahead.

    Raises:
      InputError: naming the line.
    """
    for request in requests:
        if penalised(request.settings):
            raise InputError(
                f"{name}, line {request.line}: a penalty given with --speculate, which "
                "cannot look at tokens "
                "not yet kept; leave out one"
            )


def measured(
    model: "Pretrained", requests: Sequence[Request], name: str
) -> tuple[list[int], list[int]]:
    """Tokens of each request's prompt, counted, and those that all of them begin with; the rest is
    not kept.

    Raises:
      InputError: naming the line, for a request that the model cannot take.
    """
    from llama_jax.generation.generate import common_prefix
    from llama_jax.generation.text import encode_user

    lengths, context = [], model.config.context_length

    def encoded() -> Iterator[list[int]]:
        """The prompts, one after the other."""
        for request in requests:
            try:
                ids = encode_user(model, request.prompt, chat=False)
                check_bias(request.settings, model.config)
                if not 1 <= len(ids) <= context:
                    raise InputError(
                        f"the prompt has {len(ids)} tokens; 1 to {context} (the model's "
                        "context) expected"
                    )
            except InputError as error:
                raise InputError(f"{name}, line {request.line}: {error}") from None
            lengths.append(len(ids))
            yield ids

    beginning = common_prefix(encoded())
    return lengths, beginning


def batches(job: Job, lengths: Sequence[int]) -> Iterator[list[Request]]:
    """The requests in batches of like limits and lengths, window after window, without those
    answered already.
    """
    window = _WINDOW * job.batch_size
    for start in range(0, len(job.requests), window):
        # A short answer would wait for a long one beside it: limits within a factor of two come
        # together.
        keys = [
            (
                request.settings["max_new_tokens"].bit_length(),
                lengths[request.number],
                request.number,
            )
            for request in job.requests[start : start + window]
        ]
        numbers = [number for *_, number in sorted(keys)]
        for at in range(0, len(numbers), job.batch_size):
            batch = numbers[at : at + job.batch_size]
            if any((number + 1) * job.samples > job.done for number in batch):
                yield [job.requests[number] for number in batch]


def batch_settings(batch: Sequence[Request], samples: int) -> dict[str, Any]:
    """Settings of `llama_jax.generation.text.stream` for a batch, one a sequence."""
    import jax.numpy as jnp

    from llama_jax.generation.sampling import sequence_keys

    sequences = [request.settings for request in batch for _ in range(samples)]
    per_sequence: dict[str, Any] = {
        name: [settings[name] for settings in sequences] for name in OWN
    }
    keys = jnp.concatenate(
        [sequence_keys(request.settings["seed"], samples, request.first_key) for request in batch]
    )
    return {**per_sequence, "seed": keys, "samples": samples}


def _answer(
    model: "Pretrained",
    generator: "Generator",
    job: Job,
    lengths: list[int],
    prefix: "Prefix | None",
    output: str,
    before: Answered,
) -> None:
    """Decodes batch after batch; writes every answer as soon as those before it are written."""
    from llama_jax.generation.generate import saved
    from llama_jax.generation.session import NotFiniteError
    from llama_jax.generation.text import stream

    meter, reused = Meter(), 0
    with continued(output, before) as file:
        writer = Writer(file, job, meter)
        for batch in batches(job, lengths):
            settings = batch_settings(batch, job.samples)
            prompts = [request.prompt for request in batch]
            settings |= {"generator": generator, "prefix": prefix, "logprobs": job.logprobs}
            pieces = stream(model, prompts, chunk=16, **settings)
            try:
                for piece in pieces:
                    meter.count(piece)
                    writer.take(batch, piece)
            except NotFiniteError as error:
                raise InputError(
                    f"line {batch[error.sequence // job.samples].line} of the input: {error}"
                ) from None
            writer.sync()
            reused += job.samples * saved(prefix, (lengths[request.number] for request in batch))
        writer.finish()
    note(meter.report(generator.programs.compilations, reused))


class Writer:
    """Puts answers in order, and tells how far it is."""

    def __init__(self, file: io.BufferedIOBase, job: Job, meter: Meter) -> None:
        self._file, self._job, self._meter = file, job, meter
        self._next = job.done
        self._waiting: dict[int, bytes] = {}
        self._live = sys.stderr.isatty()
        self._told = time.perf_counter()

    def take(self, batch: Sequence[Request], piece: "Piece") -> None:
        """Writes what is complete, up to the first answer that is still missing."""
        if piece.completion is not None:
            place, sample = divmod(piece.sequence, self._job.samples)
            sequence = batch[place].number * self._job.samples + sample
            if sequence >= self._next:  # an interrupted run has written some of its batch already
                self._waiting[sequence] = _line(
                    batch[place], sample, self._job.samples, piece.completion
                )
        while self._next in self._waiting:
            self._file.write(self._waiting.pop(self._next))
            self._next += 1
        self._tell()

    def sync(self) -> None:
        """Makes what is written last."""
        self._file.flush()
        if self._file is not sys.stdout.buffer:
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Ends the line of progress."""
        if self._live:
            print(f"\r\x1b[K{self._progress()}", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        """A line of progress, when it is time for one."""
        now = time.perf_counter()
        if now - self._told >= (0.2 if self._live else _SECONDS):
            self._told = now
            self._file.flush()
            print(
                *(["\r\x1b[K"] if self._live else []),
                self._progress(),
                sep="",
                end="" if self._live else "\n",
                file=sys.stderr,
                flush=True,
            )

    def _progress(self) -> str:
        """Answers, speed and time left."""
        total = len(self._job.requests) * self._job.samples
        finished, meter = self._next + len(self._waiting), self._meter
        here = finished - self._job.done
        left = meter.seconds / here * (total - finished) if here else float("inf")
        return (
            f"{finished}/{total} answers, {meter.tokens / meter.seconds:.1f} tokens/s, eta "
            f"{duration(left)}"
        )


def _line(request: Request, sample: int, samples: int, completion: "Completion") -> bytes:
    """An answer as a line of the output."""
    answer = {name: value for name, value in as_dict(completion).items() if name != "prompt"}
    return as_json({**identity_of(request, sample, samples), **answer}).encode() + b"\n"
