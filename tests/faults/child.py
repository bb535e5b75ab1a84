"""The command line with faults put in from outside: `LLAMA_JAX_FAULT="point:step:action,..." python
child.py train ...`.

The product has no hooks: its functions are wrapped before its `main` is called.

A point is `in_data` (the batch of a step is made), `before_update` (it is handed to the update),
`before_save` (a save begins), `in_async_commit` (all files of a save are written, under their
temporary name), `after_commit_before_gc` (they have their name, older checkpoints are still there),
`in_eval` or `in_eval_batch` (a batch of an evaluation is made). A step counts updates: `in_data:1`
is the first. `5` is that step, the first time that it comes; `3-5` is each of them every time, `*`
every step. An action may have a number: `slow=0.5`.
"""

import ctypes
import errno
import faulthandler
import hashlib
import os
import pathlib
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

POINTS = (
    "in_data",
    "before_update",
    "before_save",
    "in_async_commit",
    "after_commit_before_gc",
    "in_eval",
    "in_eval_batch",
)
_CLONE_NEWNET = 0x40000000  # of Linux's sched.h
UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


class Fault:
    """One entry of `LLAMA_JAX_FAULT`."""

    def __init__(self, text: str) -> None:
        self.point, steps, action = text.split(":")
        assert self.point in POINTS, text
        self.name, _, number = action.partition("=")
        assert self.name in ACTIONS, text
        self.number = float(number or 0)
        self.once = steps.isdecimal()
        first, _, last = steps.partition("-")
        self.first, self.last = (0, 10**9) if steps == "*" else (int(first), int(last or first))

    def act(self, value: Any) -> Any:
        """Does it, if it is not spent; gives back the value that passes the point."""
        if self.once:
            self.last = -1
        return ACTIONS[self.name](self.number, value)


def _raise(number: float, value: Any) -> None:
    raise RuntimeError("a fault of the test")


def _no_space(number: float, value: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _hang(number: float, value: Any) -> None:
    while True:
        time.sleep(1)


def _slow(number: float, value: Any) -> Any:
    time.sleep(number)
    return value


def _signal(kind: signal.Signals) -> Callable[[float, Any], Any]:
    def send(number: float, value: Any) -> Any:
        os.kill(os.getpid(), kind)
        return value

    return send


def _full(number: float, value: Any) -> Any:
    """From now on no file may grow beyond so many bytes: what a full disk is to a test without
    privileges.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), UNLIMITED[1]))
    return value


def _space(number: float, value: Any) -> Any:
    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
    return value


def _settled(number: float, value: Any) -> Any:
    """Waits until no save is under way, so that what becomes of it is known however slow the
    machine is.
    """
    while OPEN[0]._manager.is_saving_in_progress():
        time.sleep(0.01)
    return value


def _nan(number: float, value: Any) -> Any:
    """A batch whose loss is not a number."""
    return value._replace(weights=value.weights * float("nan"))


def _hash(number: float, value: Any) -> Any:
    """Tells which batch this is."""
    import numpy as np

    content = b"".join(np.asarray(part).tobytes() for part in value)
    print(f"hash {hashlib.sha256(content).hexdigest()[:16]}", file=sys.stderr, flush=True)
    return value


def _bit_flip(number: float, value: Any) -> Any:
    """Flips a bit in the middle of the largest file of the newest committed checkpoint."""
    directory = pathlib.Path(CHECKPOINTS[0])
    flip_bit(
        directory
        / str(max(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal()))
    )
    return value


ACTIONS: dict[str, Callable[[float, Any], Any]] = {
    "kill9": _signal(signal.SIGKILL),
    "term": _signal(signal.SIGTERM),
    "int": _signal(signal.SIGINT),
    "usr1": _signal(signal.SIGUSR1),
    "stop": _signal(signal.SIGSTOP),
    "raise": _raise,
    "enospc": _no_space,
    "hang": _hang,
    "slow": _slow,
    "full": _full,
    "space": _space,
    "settled": _settled,
    "nan": _nan,
    "hash": _hash,
    "bitflip": _bit_flip,
}
CHECKPOINTS: list[str] = []  # the directory of the run's checkpoints, once it is known
OPEN: list[Any] = []  # its checkpoints


def flip_bit(step_directory: pathlib.Path, place: float = 0.5) -> pathlib.Path:
    """Flips one bit of the largest file of a checkpoint; returns the file."""
    files = sorted(path for path in step_directory.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[int(len(content) * place)] ^= 1
    largest.write_bytes(content)
    return largest


def install(faults: Sequence[Fault]) -> None:
    """Wraps the functions that the faults stand at."""
    from orbax.checkpoint import CheckpointManager
    from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

    from llama_jax.training import evaluate as evaluate_module
    from llama_jax.training import loop
    from llama_jax.weights.checkpoint import Checkpoints

    now = {"step": 0}

    def at(point: str, step: int, value: Any = None) -> Any:
        for fault in faults:
            if fault.point == point and fault.first <= step <= fault.last:
                print(f"fault: {point} {step} {fault.name}", file=sys.stderr, flush=True)
                value = fault.act(value)
        return value

    global_batch, sharded_step, evaluate = loop.global_batch, loop.sharded_step, loop.evaluate
    opened, save = Checkpoints.open, Checkpoints.save
    commit, finalize = AtomicRenameTemporaryPath.finalize, CheckpointManager._finalize_checkpoint

    def faulty_batch(batches: Any, step: int, *more: Any) -> Any:
        now["step"] = step + 1
        return at("in_data", step + 1, global_batch(batches, step, *more))

    def faulty_program(*given: Any) -> Any:
        program = sharded_step(*given)
        return lambda state, batch, *more: program(
            state, at("before_update", now["step"], batch), *more
        )

    def faulty_evaluate(*given: Any, **named: Any) -> Any:
        at("in_eval", now["step"])
        return evaluate(*given, **named)

    placed_sequences = evaluate_module.placed_sequences

    def faulty_sequences(*given: Any) -> Any:
        return at("in_eval_batch", now["step"], placed_sequences(*given))

    def faulty_open(directory: pathlib.Path, *more: Any, **named: Any) -> Any:
        CHECKPOINTS[:] = [str(directory)]
        OPEN[:] = [opened(directory, *more, **named)]
        return OPEN[0]

    def faulty_save(self: Any, step: int, *more: Any, **named: Any) -> Any:
        at("before_save", step)
        return save(self, step, *more, **named)

    async def faulty_commit(self: Any) -> None:
        if self._final_path.name.isdecimal():  # not that of an item within the step
            at("in_async_commit", int(self._final_path.name))
        await commit(self)

    def faulty_finalize(self: Any, step: int) -> None:
        finalize(self, step)
        at("after_commit_before_gc", step)

    loop.global_batch, loop.sharded_step, loop.evaluate = (
        faulty_batch,
        faulty_program,
        faulty_evaluate,
    )
    evaluate_module.placed_sequences = faulty_sequences
    Checkpoints.open, Checkpoints.save = faulty_open, faulty_save  # type: ignore[method-assign]
    AtomicRenameTemporaryPath.finalize = faulty_commit
    CheckpointManager._finalize_checkpoint = faulty_finalize


def forbid_network() -> None:
    """Takes the network away: from the process where that is allowed (root on Linux), and from
    Python anyway.
    """
    isolated = ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0

    def refuse(event: str, given: tuple) -> None:
        if event in (
            "socket.connect",
            "socket.bind",
            "socket.getaddrinfo",
            "socket.gethostbyname",
            "socket.sendto",
        ):
            raise RuntimeError(f"the network was asked for: {event} {given[1:]}")

    sys.addaudithook(refuse)
    print("no network", "at all" if isolated else "from Python", file=sys.stderr, flush=True)


def main() -> int:
    from llama_jax.cli.main import run_program, run_verb

    # Should a test wait for ever, it is seen where.
    faulthandler.dump_traceback_later(
        float(os.environ.get("LLAMA_JAX_CHILD_SECONDS", "280")), exit=True
    )
    if os.environ.get("LLAMA_JAX_NO_NETWORK"):
        forbid_network()
    faults = [
        Fault(text) for text in re.split(r"[,\s]+", os.environ.get("LLAMA_JAX_FAULT", "")) if text
    ]
    if faults:
        install(faults)
    return run_program(lambda: run_verb(sys.argv[1:]))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    sys.exit(main())
