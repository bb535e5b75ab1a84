"""Records to tokens, here or in processes of their own, always in the order of the records."""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.processes import WorkerDied, Workers
from llama_jax.data.records import Messages, Record
from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, encode_dialogue
from llama_jax.text.tokenizer import Tokenizer, encode_prompt, load_tokenizer

_CHUNK_BYTES, _CHUNK_RECORDS = 1 << 18, 1024  # of the sources: what a worker is given at once


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

    Text begins as prompts of the model do, and ends with the tokenizer's end token, where it has one; a conversation is
    what the template makes of it. Of a conversation all turns of the assistant are learned from (but those of weight 0), of
    a pair the last turn only.

    Raises:
      InputError: naming the record.
    """
    if isinstance(record.body, str):
        ids = np.array(encode_text(tokenizer, record.body), np.uint32)
        return [Document(ids, None, len(record.body.encode()))]
    if template is None:
        raise InputError(
            f"{record.name}: a conversation, but the tokenizer comes without a chat template; name one (--template)"
        )
    try:
        return [_encode_chat(messages, tokenizer, template, record) for messages in record.body]
    except InputError as error:
        raise InputError(f"{record.name}: {error}") from None
    except RecursionError:
        raise InputError(f"{record.name}: nested too deep; mend the record") from None


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a whole text: begun as prompts are, and ended where the tokenizer has an end token."""
    return encode_prompt(tokenizer, text) + ([] if tokenizer.end_id is None else [tokenizer.end_id])


def _encode_chat(messages: Messages, tokenizer: Tokenizer, template: ChatTemplate, record: Record) -> Document:
    dialogue = encode_dialogue(template, tokenizer, messages, record.tools)
    mask = np.array(dialogue.mask, bool)
    said = [_said_bytes(message) for message in messages if message["role"] == "assistant" and message.get("weight", 1)]
    if record.kind == "pairs":
        last_said = messages[-1]["role"] == "assistant" and (messages[-1]["content"].strip() or "tool_calls" in messages[-1])
        if not last_said or not messages[-1].get("weight", 1) or not mask.any():
            raise InputError("an answer that is empty, or not the assistant's; text expected")
        last = int(np.flatnonzero(mask)[-1])
        others = np.flatnonzero(~mask[:last])
        mask[: others[-1] + 1 if others.size else 0] = False
        said = said[-1:]
    return Document(np.array(dialogue.token_ids, np.uint32), mask, sum(said))


def _said_bytes(message: Mapping[str, Any]) -> int:
    """UTF-8 bytes of what a message says, calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return sum(len(text.encode()) for text in (message["content"], *calls))


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
    with Workers(functools.partial(_make_encode, encoder), workers) as processes:
        last = None
        try:
            for last, documents in processes.results(chunks):
                yield from zip(last, documents, strict=True)
        except WorkerDied:
            raise _died(last) from None


def _died(last: list[Record] | None) -> InputError:
    where = f"{last[-1].name}: behind this record" if last else "at the beginning"
    return InputError(
        f"{where} a process that encodes ended without a word (out of memory?); the same command goes on with what is missing, "
        "--workers 1 needs the least memory"
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


def _make_encode(encoder: Encoder) -> Callable[[list[Record]], list[list[Document]]]:
    """What a process does with each chunk."""
    tokenizer = load_tokenizer(encoder.tokenizer_path)
    return lambda chunk: [encode_record(record, tokenizer, encoder.template) for record in chunk]
