"""What `prepare` reads: text, JSON lines, Parquet, and folders of them, record by record."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.data.corpus import TEXT_SUFFIXES, sorted_files
from llama_jax.data.token_header import Kind
from llama_jax.errors import InputError

SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")

Messages = list[dict[str, str]]
_FIELDS = "text; messages; prompt and completion; or prompt (or messages), chosen and rejected"
_ROWS_AT_ONCE = 1024  # of a Parquet file


class Record(NamedTuple):
    """One text, one conversation, or two answers to one prompt.

    Attributes:
      name: file and line (or row), for messages.
      key: what decides whether the record is held out; equal for what must stay on one side.
      kind: `text`, `chat` or `pairs`.
      body: the text; the conversation; or two, with the chosen and the rejected answer.
      nbytes: its share of the bytes of its file.
    """

    name: str
    key: str
    kind: Kind
    body: str | list[Messages]
    nbytes: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it: no text, or nothing that the assistant says."""
        if isinstance(self.body, str):
            return not self.body
        return not all(any(message.get("role") == "assistant" for message in messages) for messages in self.body)


class SourceFile(NamedTuple):
    """A file to read, with a name that is the same wherever the folder that was given lies."""

    name: str
    path: Path


def list_files(paths: Sequence[str | Path]) -> list[SourceFile]:
    """The files of some files and folders, in the order given; a folder's by relative path, hidden ones left out.

    Raises:
      InputError: naming the path that does not exist, or is a folder without anything to read.
    """
    found: list[SourceFile] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted_files(path, SUFFIXES)
            if not inside:
                raise InputError(f"{path}: nothing to read in this folder; files ending in {', '.join(SUFFIXES)} expected")
            found += [SourceFile(file.relative_to(path).as_posix(), file) for file in inside]
        elif path.is_file():
            found.append(SourceFile(path.name, path))
        else:
            raise InputError(f"{path}: no such file or folder; --input takes text, .jsonl, .parquet, or a folder of them")
    return found


def read_records(files: Sequence[SourceFile]) -> Iterator[Record]:
    """The records of files, all of one kind; the suffix decides how a file is read, anything unknown is text.

    Raises:
      InputError: naming file and line of what cannot be read, or is of another kind than the first record.
    """
    kind: Kind | None = None
    for file in files:
        reader = _READERS.get(file.path.suffix.lower(), _read_text)
        try:
            for record in reader(file):
                kind = kind or record.kind
                if record.kind != kind:
                    raise InputError(f"{record.name}: {record.kind} given, but the first record was {kind}; prepare them apart")
                yield record
        except OSError as error:
            raise InputError(f"{file.path}: {error.strerror or error}; a readable file expected") from None


def _read_text(file: SourceFile) -> Iterator[Record]:
    content = file.path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file.path}: not UTF-8 (byte {error.start}); convert the file or leave it out") from None
    yield Record(file.name, file.name, "text", text, len(content))


def _read_jsonl(file: SourceFile) -> Iterator[Record]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{file.path}:{number}"
                yield make_record(place, _parse(place, line), len(line))


def _parse(place: str, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 (byte {error.start} of the line); convert the file") from None
    except (ValueError, RecursionError):
        raise InputError(f"{place}: not JSON; one JSON object a line expected") from None


def _read_parquet(file: SourceFile) -> Iterator[Record]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{file.path}: Parquet is read by pyarrow; pip install 'llama-jax[data]'") from None
    try:
        table = parquet.ParquetFile(file.path)
        known = ("text", "messages", "prompt", "completion", "chosen", "rejected")
        columns = [name for name in table.schema_arrow.names if name in known]
        share = file.path.stat().st_size // max(1, table.metadata.num_rows)
        number = 0
        for rows in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
            for values in rows.to_pylist():
                number += 1
                given = {name: value for name, value in values.items() if value is not None}
                yield make_record(f"{file.path}:{number}", given, share)
    except arrow.ArrowException as error:
        raise InputError(f"{file.path}: not Parquet, or damaged ({str(error).splitlines()[0]:.80}); write it again") from None


_READERS: Mapping[str, Callable[[SourceFile], Iterator[Record]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def make_record(place: str, values: object, nbytes: int) -> Record:
    """The record that the fields of a line say; unknown fields are left alone.

    Args:
      place: file and line.
      values: what the line holds.
      nbytes: its share of the file.

    Raises:
      InputError: naming the place, for anything but the known fields with values of their kinds.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{place}: a JSON {type(values).__name__} given, an object with {_FIELDS} expected")
    if {"chosen", "rejected"} <= values.keys():
        prompt = _prompt(place, values)
        answers = [_turns(place, name, values[name], "assistant") for name in ("chosen", "rejected")]
        return Record(place, _key(prompt), "pairs", [prompt + answer for answer in answers], nbytes)
    if "messages" in values:
        messages = _turns(place, "messages", values["messages"], "user")
        return Record(place, _key(messages), "chat", [messages], nbytes)
    if {"prompt", "completion"} <= values.keys():
        messages = _prompt(place, values) + _turns(place, "completion", values["completion"], "assistant")
        return Record(place, _key(messages), "chat", [messages], nbytes)
    if "text" in values:
        text = _text(place, "text", values["text"])
        return Record(place, text, "text", text, nbytes)
    raise InputError(f"{place}: fields {', '.join(map(str, values)) or '(none)':.80} given, {_FIELDS} expected")


def _prompt(place: str, values: Mapping[str, Any]) -> Messages:
    name = "prompt" if "prompt" in values else "messages"
    if name not in values:
        raise InputError(f"{place}: chosen and rejected given without prompt or messages")
    return _turns(place, name, values[name], "user")


def _turns(place: str, name: str, value: object, role: str) -> Messages:
    """Messages given as such, or as the text of one; their roles are the template's matter."""
    if not isinstance(value, list):
        return [{"role": role, "content": _text(place, name, value)}]
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(f"{place}: {name} holds {message!r:.60}, messages with role and content expected")
    return [{part: _text(place, f"{name}.{part}", message[part]) for part in ("role", "content")} for message in value]


def _text(place: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {name} is a {type(value).__name__}, text expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: {name} holds half of a surrogate pair, which no UTF-8 text can; mend the line") from None
    return value


def _key(messages: Messages) -> str:
    return json.dumps(messages, ensure_ascii=False)
