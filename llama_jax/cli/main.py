"""`python -m llama_jax VERB`, also installed as `llama-jax VERB`."""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable

from llama_jax import __version__
from llama_jax.errors import CorruptError, DeviceMemoryError, DivergedError, InputError

# --- program ---
#
# How a program ends: one line and a status in place of a traceback.


WRONG_INPUT = 2
DIVERGED = 4
DAMAGED = 5
INTERRUPTED = 130
BROKEN_PIPE = 141

# What a full or read-only disk, or an impossible path, is answered with: nothing to be traced in
# the program.
_OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EFBIG,
    errno.ENAMETOOLONG,
)


def run_program(main: Callable[[], int]) -> int:
    """Runs a program and gives its exit status.

    Returns:
      What `main` returns; after `error: LINE` on stderr, 2 for wrong input, a disk that is full or
      read-only or a device without memory enough, 4 for a training that cannot go on and 5 for a
      damaged file of ours; 130 when interrupted; 141 when the reader of our output has gone (as in
      `... | head -1`), without a word.
    """
    open_missing_streams()
    try:
        status = main()
        sys.stdout.flush()
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return DAMAGED if isinstance(error, CorruptError) else WRONG_INPUT
    except DivergedError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return DIVERGED
    except DeviceMemoryError as error:
        print("error:", "\n  ".join(error.args), file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        print(
            f"error: {error.filename or 'writing'}: {error.strerror}; make room or name "
            "another directory",
            file=sys.stderr,
        )
        return WRONG_INPUT
    return status


def open_missing_streams() -> None:
    """Puts the null device where standard input, output or error is closed (as by `>&-`).

    Otherwise the next file opened takes the place, and Python has no stream there: reading fails,
    and notes meant for standard error go to standard output.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (for the life of the program)


# --- main ---


_VERBS = {
    "train": ("llama_jax.cli.train", "train a LLaMA, or go on with a run"),
    "infer": ("llama_jax.cli.infer", "generate text"),
    "inspect": ("llama_jax.cli.inspect", "say what a model on disk is, and what is odd about it"),
    "eval": ("llama_jax.cli.evaluate", "loss on text files, accuracy on multiple-choice questions"),
    "adapters": (
        "llama_jax.cli.adapters",
        "adapters of a run: written apart, or merged into their model",
    ),
    "prepare": ("llama_jax.cli.prepare", "turn text and conversations into token files"),
    "data": ("llama_jax.cli.data", "data verify, data show: check prepared data, print it"),
    "checkpoint": (
        "llama_jax.cli.checkpoint",
        "those of a run: checkpoint list; checkpoint verify reads all of them",
    ),
    "convert": ("llama_jax.cli.convert", "write a model in another format"),
    "flops": ("llama_jax.cli.flops", "the compute of a training, as papers count it"),
    "plan": (
        "llama_jax.cli.plan",
        "memory and time of a training or of decoding, before chips are rented",
    ),
    "report": ("llama_jax.cli.report", "draw the curves of runs, as a picture or in the terminal"),
    "doctor": (
        "llama_jax.cli.doctor",
        "check versions, devices, collectives and disk of this machine",
    ),
    "selftest": (
        "llama_jax.cli.selftest",
        "the same loss for every mesh, accumulation, backend ... on your devices",
    ),
}


def usage() -> str:
    """The list of verbs."""
    verbs = "\n".join(f"  {verb:10} {meaning}" for verb, (_, meaning) in _VERBS.items())
    head, foot = (
        "usage: llama-jax VERB [options]",
        "llama-jax VERB --help lists the options of a verb.",
    )
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
