"""How a program ends: one line and a status in place of a traceback."""

import errno
import os
import sys
from collections.abc import Callable

from llama_jax.errors import CorruptError, DeviceMemoryError, DivergedError, InputError

WRONG_INPUT = 2
DIVERGED = 4
DAMAGED = 5
INTERRUPTED = 130
BROKEN_PIPE = 141

# What a full or read-only disk, or an impossible path, is answered with: nothing to be traced in the program.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.ENAMETOOLONG)


def run_program(main: Callable[[], int]) -> int:
    """Runs a program and gives its exit status.

    Returns:
      What `main` returns; after `error: LINE` on stderr, 2 for wrong input, a disk that is full or read-only or a device
      without memory enough, 4 for a training that cannot go on and 5 for a damaged file of ours; 130 when interrupted; 141
      when the reader of our output has gone (as in `... | head -1`), without a word.
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
        print(f"error: {error.filename or 'writing'}: {error.strerror}; make room or name another directory", file=sys.stderr)
        return WRONG_INPUT
    return status


def open_missing_streams() -> None:
    """Puts the null device where standard input, output or error is closed (as by `>&-`).

    Otherwise the next file opened takes the place, and Python has no stream there: reading fails, and notes meant for
    standard error go to standard output.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (for the life of the program)
