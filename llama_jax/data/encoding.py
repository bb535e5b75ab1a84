"""Records to tokens, here or in processes of their own, always in the order of the records."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.data.records import Messages, Record
from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, encode_dialogue
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

_CHUNK_BYTES, _CHUNK_RECORDS = 1 << 18, 1024  # of the sources: what a worker is given at once
_AHEAD = 3  # chunks a worker is given ahead of those that are written


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
      bytes_of_text: UTF-8 bytes of what is learned from.
    """

    ids: np.ndarray
    mask: np.ndarray | None
    bytes_of_text: int


def encode_record(record: Record, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[Document]:
    """The documents of a record: one, or two for a pair of answers.

    Text stands between the tokenizer's begin and end tokens, where it has them; a conversation as the template has it.
    Of a conversation all turns of the assistant are learned from, of a pair the last turn only.

    Raises:
      InputError: naming the record.
    """
    if isinstance(record.body, str):
        begin, end = ([] if token is None else [token] for token in (tokenizer.begin_id, tokenizer.end_id))
        ids = np.array(begin + tokenizer.encode(record.body) + end, np.uint32)
        return [Document(ids, None, len(record.body.encode()))]
    if template is None:
        raise InputError(
            f"{record.name}: a conversation, but the tokenizer comes without a chat template; name one (--template)"
        )
    try:
        return [_encode_chat(messages, tokenizer, template, record.kind == "pairs") for messages in record.body]
    except InputError as error:
        raise InputError(f"{record.name}: {error}") from None


def _encode_chat(messages: Messages, tokenizer: Tokenizer, template: ChatTemplate, only_last: bool) -> Document:
    dialogue = encode_dialogue(template, tokenizer, messages)
    mask = np.array(dialogue.mask, bool)
    said = [len(message["content"].encode()) for message in messages if message["role"] == "assistant"]
    if only_last:
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise InputError("an answer that is empty, or not the assistant's; text expected")
        last = int(np.flatnonzero(mask)[-1])
        others = np.flatnonzero(~mask[:last])
        mask[: others[-1] + 1 if others.size else 0] = False
        said = said[-1:]
    return Document(np.array(dialogue.token_ids, np.uint32), mask, sum(said))


def encode_all(records: Iterable[Record], encoder: Encoder, workers: int) -> Iterator[tuple[Record, list[Document]]]:
    """Each record with its documents, in order, whatever the number of workers.

    Args:
      records: any number; few are held at a time.
      encoder: what makes tokens of them.
      workers: processes; 1 works in this one.

    Raises:
      InputError: naming the record that cannot be encoded; or where a worker ended without a word.
    """
    chunks = _chunks(records)
    if workers == 1:
        tokenizer = load_tokenizer(encoder.tokenizer_path)
        for record in itertools.chain.from_iterable(chunks):
            yield record, encode_record(record, tokenizer, encoder.template)
        return
    context = multiprocessing.get_context("spawn")  # forked threads of the libraries would hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        pending: collections.deque[tuple[list[Record], Future]] = collections.deque()
        for chunk in chunks:
            pending.append((chunk, _submit(pool, chunk)))
            if len(pending) >= workers * _AHEAD:
                yield from _collect(*pending.popleft())
        while pending:
            yield from _collect(*pending.popleft())


def _submit(pool: ProcessPoolExecutor, chunk: list[Record]) -> Future:
    try:
        return pool.submit(_encode_chunk, chunk)
    except BrokenProcessPool:
        raise _died(chunk) from None


def _collect(chunk: list[Record], future: Future) -> Iterator[tuple[Record, list[Document]]]:
    try:
        return zip(chunk, future.result(), strict=True)
    except BrokenProcessPool:
        raise _died(chunk) from None


def _died(chunk: list[Record]) -> InputError:
    return InputError(
        f"{chunk[0].name}: a process that encodes ended without a word, here or a little before (out of memory?); the same "
        "command goes on with what is missing, --workers 1 needs the least memory"
    )


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.nbytes
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_worker: tuple[Tokenizer, ChatTemplate | None]  # of this process, set where it is a worker


def _start_worker(encoder: Encoder) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = load_tokenizer(encoder.tokenizer_path), encoder.template


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: after a kill -9 nobody else does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_chunk(chunk: list[Record]) -> list[list[Document]]:
    return [encode_record(record, *_worker) for record in chunk]
