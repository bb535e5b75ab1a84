"""How a program ends: one line and a status in place of a traceback."""

import sys
from collections.abc import Callable

from llama_jax.errors import CorruptError, InputError

WRONG_INPUT = 2
DAMAGED = 5
INTERRUPTED = 130
BROKEN_PIPE = 141


def run_program(main: Callable[[], int]) -> int:
    """Runs a program and gives its exit status.

    Returns:
      What `main` returns; 2 for wrong input and 5 for a damaged file of ours, after `error: LINE` on stderr; 130 when
      interrupted; 141 when the reader of our output has gone (as in `... | head -1`), without a word.
    """
    try:
        status = main()
        sys.stdout.flush()
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return DAMAGED if isinstance(error, CorruptError) else WRONG_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    return status
