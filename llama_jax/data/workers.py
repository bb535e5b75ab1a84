"""Records to tokens, here or in processes of their own, always in the order of the records."""

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from llama_jax.data.records import Messages, Record
from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, encode_dialogue
from llama_jax.text.tokenizer import Tokenizer, encode_prompt

# --- processes ---
#
# Work done by several processes, its results in the order of the work; one that dies is noticed,
# whatever it was doing.
#
# Each process has a pipe of its own, which is closed when it dies. (The pool of the standard
# library shares one pipe: a process that is killed while it hands over a result leaves the others
# waiting for ever.)


Item = TypeVar("Item")
Result = TypeVar("Result")

Report = Callable[[int], None]

_WAIT_SECONDS = 0.5  # between two looks at the amount of work done
_AHEAD = 3  # items a process may be ahead of the one that is waited for


class WorkerDied(RuntimeError):
    """A process that ended without an error."""


class Workers(Generic[Item, Result]):
    """Processes that all do the same; a context manager.

    Args:
      make: called once in each process; gives the function that is called with each item and a
        function that takes amounts of work as they are done. It can be pickled.
      count: of the processes.
    """

    def __init__(self, make: Callable[[], Callable[[Item, Report], Result]], count: int) -> None:
        context = multiprocessing.get_context("spawn")  # forked threads of the libraries would hang
        self._amounts = context.Array("Q", count, lock=False)  # each has its own
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            given = (make, theirs, self._amounts, number)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()  # so that the pipe is closed when the process has gone
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Workers[Item, Result]":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def results(
        self, items: Iterable[Item], on_amount: Callable[[int], None] = lambda amount: None
    ) -> Iterator[tuple[Item, Result]]:
        """Each item with what comes of it, in order; few are held at a time.

        Args:
          items: any number.
          on_amount: called now and then with the amount of work done so far.

        Raises:
          WorkerDied: if a process ended without an error.
          Exception: the error of the work, at its turn.
        """
        source = iter(items)
        held: collections.deque[Item] = collections.deque()  # given out, and not yet handed back
        done: dict[int, tuple[Result, Exception | None]] = {}
        working: dict[Connection, int] = {}  # number of the item
        free, given = list(self._pipes), 0
        while True:
            room = min(len(free), _AHEAD * len(self._pipes) - len(held))
            for item in itertools.islice(source, room):
                pipe = (
                    free.pop()
                )  # of one that waits: two that send to each other would wait for ever
                _send(pipe, item)
                working[pipe], given = given, given + 1
                held.append(item)
            if not held:
                return
            first = given - len(held)
            if first in done:
                result, error = done.pop(first)
                if error is not None:
                    raise error
                yield held.popleft(), result
                continue
            ready = wait(list(working), _WAIT_SECONDS)
            on_amount(sum(self._amounts))
            for pipe in [pipe for pipe in working if pipe in ready]:
                done[working.pop(pipe)] = _receive(pipe)
                free.append(pipe)


def _send(pipe: Connection, item: object) -> None:
    try:
        pipe.send(item)
    except OSError:
        raise WorkerDied from None


def _receive(pipe: Connection) -> tuple:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise WorkerDied from None


def _serve(make: Callable[[], Callable], pipe: Connection, amounts: Any, number: int) -> None:
    """The life of a process: an item in, its result or the error out, until the other end is
    closed.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = make()

    def report(amount: int) -> None:
        """Adds to the amount of work that this process has done."""
        amounts[number] += amount

    with contextlib.suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            pipe.send(_outcome(work, item, report))


def _outcome(work: Callable, item: object, report: Report) -> tuple[object, Exception | None]:
    """What comes of an item, and the error if it was one."""
    try:
        return work(item, report), None
    except Exception as error:
        return None, error


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: after a kill -9 nobody else does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# --- encoding ---


class Encoder(NamedTuple):
    """What makes tokens of a record; small enough to be sent to a process.

    Attributes:
      tokenizer_path: as `load_tokenizer` takes it.
      template: how a conversation is written; `None` where there are none.
    """

    tokenizer_path: Path
    template: ChatTemplate | None


class Document(NamedTuple):
    """A document as it is stored.

    Attributes:
      ids: its tokens.
      mask: which of them are learned from; `None` for all.
      bytes_of_text: UTF-8 bytes of the targets.
    """

    ids: np.ndarray
    mask: np.ndarray | None
    bytes_of_text: int


def encode_record(
    record: Record, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[Document]:
    """The documents of a record: one, or two for a pair of answers.

    Text begins as prompts of the model do, and ends with the tokenizer's end token, where it has
    one; a conversation is rendered by the template. Of a conversation all turns of the
    assistant are learned from (but those of weight 0), of a pair the last turn only.

    Raises:
      InputError: naming the record.
    """
    if isinstance(record.body, str):
        ids = np.array(encode_text(tokenizer, record.body), np.uint32)
        return [Document(ids, None, len(record.body.encode()))]
    if template is None:
        raise InputError(
            f"{record.name}: a conversation, but the tokenizer comes without a chat "
            "template; name one (--template)"
        )
    try:
        return [_encode_chat(messages, tokenizer, template, record) for messages in record.body]
    except InputError as error:
        raise InputError(f"{record.name}: {error}") from None
    except RecursionError:
        raise InputError(f"{record.name}: nested too deep; mend the record") from None


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a whole text: begun as prompts are, and ended where the tokenizer has an end
    token.
    """
    return encode_prompt(tokenizer, text) + ([] if tokenizer.end_id is None else [tokenizer.end_id])


def _encode_chat(
    messages: Messages, tokenizer: Tokenizer, template: ChatTemplate, record: Record
) -> Document:
    dialogue = encode_dialogue(template, tokenizer, messages, record.tools)
    mask = np.array(dialogue.mask, bool)
    if not mask[1:].any():
        raise InputError(
            "nothing of it is learned from (an answer that is empty, and that the "
            "template does not end)"
        )
    said = [
        _said_bytes(message)
        for message in messages
        if message["role"] == "assistant" and message.get("weight", 1)
    ]
    if record.kind == "pairs":
        last_said = messages[-1]["role"] == "assistant" and (
            messages[-1]["content"].strip() or "tool_calls" in messages[-1]
        )
        if not last_said or not messages[-1].get("weight", 1) or not mask.any():
            raise InputError("an answer that is empty, or not the assistant's; text expected")
        last = int(np.flatnonzero(mask)[-1])
        others = np.flatnonzero(~mask[:last])
        mask[: others[-1] + 1 if others.size else 0] = False
        said = said[-1:]
    return Document(np.array(dialogue.token_ids, np.uint32), mask, sum(said))


def _said_bytes(message: Mapping[str, Any]) -> int:
    """UTF-8 bytes of a message's content, calls as JSON."""
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())
    ]
    return sum(len(text.encode()) for text in (message["content"], *calls))
