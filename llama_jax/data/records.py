"""What `prepare`, `train.py` and `eval` read: text, JSON, tables and Parquet, record by record.

Reading is two steps: `read_rows` takes a file apart without looking into its lines, `parse_row`
makes the record of one.
"""

import csv
import hashlib
import io
import json
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.data.conversations import (
    Messages,
    Tools,
    kind_name,
    read_alpaca,
    read_messages,
    read_pair,
    read_text,
    read_tools,
    read_turns,
    with_system,
)
from llama_jax.data.sources import (
    Digest,
    Fields,
    Opened,
    SourceFile,
    compression_of,
    feed_digest,
    kind_of,
    list_files,
    open_source,
    sorted_files,
)
from llama_jax.data.token_file import Kind
from llama_jax.errors import InputError

__all__ = [
    "Messages",
    "Record",
    "Row",
    "SourceFile",
    "list_files",
    "parse_row",
    "read_records",
    "read_rows",
]

FIELDS = (
    "text; messages; conversations; prompt and completion; instruction and output; or chosen "
    "and rejected"
)
# Names that `--field` may map, and the columns that are read from Parquet.
FIELD_NAMES = (
    "text",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "functions",
)
_ROWS_AT_ONCE = 1024  # of a Parquet file
_READ_AT_ONCE = 1 << 20  # bytes of a JSON array
_NEAR_THE_END = (
    16  # characters; JSON that is cut off is wrong there, or in a text that does not end
)
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_LARGEST_CELL = 2**31 - 1


class Record(NamedTuple):
    """One text, one conversation, or two answers to one prompt.

    Attributes:
      name: file and line (or row), for messages.
      key: what decides whether the record is held out; equal for what must stay on one side.
      kind: `text`, `chat` or `pairs`.
      body: the text; the conversation; or two, with the chosen and the rejected answer.
      nbytes: its share of the bytes of its file.
      tools: functions that the conversations may call; `None` without any.
    """

    name: str
    key: str
    kind: Kind
    body: str | list[Messages]
    nbytes: int
    tools: Tools | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it: no text, or nothing that the assistant says
        and that counts.
        """
        if isinstance(self.body, str):
            return not self.body
        return not all(
            any(message["role"] == "assistant" and message.get("weight", 1) for message in messages)
            for messages in self.body
        )


class Row(NamedTuple):
    """A part of a file that is one record, not yet looked into.

    Attributes:
      place: file and line, for messages.
      value: a line of JSON; the values of a row or of an object in an array; a whole text; or
        the error of a row that cannot be read, while those after it can.
      nbytes: its share of the bytes of its file.
    """

    place: str
    value: bytes | Mapping[str, Any] | str | list | float | InputError | None
    nbytes: int


def read_records(files: Sequence[SourceFile]) -> Iterator[Record]:
    """The records of files, all of one kind.

    Raises:
      InputError: naming file and line of a record that cannot be read, or is of another kind than
        the first record.
    """
    kind: Kind | None = None
    for file in files:
        for row in read_rows(file):
            record = parse_row(row, file)
            kind = kind or record.kind
            if record.kind != kind:
                raise InputError(
                    f"{record.name}: {record.kind} given, but the first record was "
                    f"{kind}; prepare them apart"
                )
            yield record


def read_rows(file: SourceFile, digest: Digest | None = None) -> Iterator[Row]:
    """The rows of a file, read in the way of its kind.

    Args:
      file: to read.
      digest: fed with the bytes of the file as they are read (Parquet apart, which is read in any
        order: by a second reading).

    Raises:
      InputError: naming the file, and the line if there is one, that cannot be read.
    """
    kind = kind_of(file.path)
    if kind == "parquet":
        yield from _read_parquet(file)
        if digest is not None:
            feed_digest(file.path, digest)
        return
    with open_source(file.path, digest) as opened:
        if kind == "json":
            yield from _read_json(file.path, opened)
        elif kind == "table":
            yield from _read_table(file, opened)
        else:
            yield Row(str(file.path), opened.content.read(), file.path.stat().st_size)


def parse_row(row: Row, file: SourceFile) -> Record:
    """The record of a row.

    Raises:
      InputError: naming the place.
    """
    if isinstance(row.value, InputError):
        raise row.value
    if kind_of(file.path) == "text" and isinstance(row.value, bytes):
        return Record(file.name, file.name, "text", _plain_text(row), row.nbytes)
    value = _parse(row.place, row.value) if isinstance(row.value, bytes) else row.value
    try:
        return make_record(row.place, value, row.nbytes, file.fields)
    except RecursionError:
        raise InputError(f"{row.place}: nested too deep; mend the record") from None


def _plain_text(row: Row) -> str:
    """A text file's content; JSON lines that are named as text are refused."""
    assert isinstance(row.value, bytes)
    try:
        text = row.value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{row.place}: not UTF-8 (byte {error.start}); convert the file or leave it out"
        ) from None
    if text.startswith("{"):
        try:
            first = json.loads(text.partition("\n")[0])
        except (ValueError, RecursionError):
            return text
        if isinstance(first, dict) and any(name in first for name in FIELD_NAMES):
            raise InputError(
                f"{row.place}: JSON lines in a file of text; name it .jsonl, and they "
                "are read as records"
            )
    return text


def _parse(place: str, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 (byte {error.start} of the line); convert the file"
        ) from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{place}: not JSON; one JSON object a line, or an array of them, expected"
        ) from None


class _Shares:
    """What of a file's bytes belongs to a row: for a compressed one, as much as was read since the
    row before.
    """

    def __init__(self, path: Path, opened: Opened) -> None:
        self._position = opened.position if compression_of(path) else None
        self._last = 0

    def of(self, size: int) -> int:
        if self._position is None:
            return size
        before, self._last = self._last, self._position()
        return self._last - before


def _read_json(path: Path, opened: Opened) -> Iterator[Row]:
    """JSON lines; or an array, or in `.json` one value or several, over as many lines as they
    take.
    """
    shares, content = _Shares(path, opened), opened.content
    line, number = content.readline(), 1
    while line.isspace():
        line, number = content.readline(), number + 1
    in_lines = (
        (path.stem if compression_of(path) else path.name).lower().endswith((".jsonl", ".ndjson"))
    )
    if line.lstrip().startswith(b"[") or (line and not in_lines and not _is_json(line)):
        yield from _read_values(path, line, content, shares)
        return
    while line:
        if not line.isspace():
            yield Row(f"{path}:{number}", line, shares.of(len(line)))
        line, number = content.readline(), number + 1


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_values(path: Path, begin: bytes, content: Any, shares: _Shares) -> Iterator[Row]:
    """The values of an array, or values one after another; few are held at a time."""
    decode, text, number, ended = (
        json.JSONDecoder().raw_decode,
        io.TextIOWrapper(content, "utf-8"),
        1,
        False,
    )
    try:
        buffer = begin.decode("utf-8").lstrip()
        in_array = buffer.startswith("[")
        at = int(in_array)
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
            if in_array and buffer.startswith("]", at):
                if (buffer[at + 1 :] + text.read()).strip():
                    raise InputError(
                        f"{path}: more behind the end of the array; one array expected"
                    )
                return
            try:
                value, end = decode(buffer, at) if at < len(buffer) else (None, at)
            except (ValueError, RecursionError) as error:
                if ended or not _is_cut(error, len(buffer)):
                    raise InputError(
                        f"{path}: record {number} is not JSON; an array of objects, or "
                        "one object a line, expected"
                    ) from None
                end = at
            if end > at:
                yield Row(
                    f"{path}: record {number}",
                    value,
                    shares.of(len(buffer[at:end].encode("utf-8", "replace"))),
                )
                at, number = end, number + 1
            elif ended:
                if in_array:
                    raise InputError(
                        f"{path}: cut off behind record {number - 1}; an array that ends expected"
                    )
                return
            else:
                more = text.read(max(_READ_AT_ONCE, len(buffer) - at))
                buffer, at, ended = buffer[at:] + more, 0, not more
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 ({error.reason}, behind record {number - 1}); convert the file"
        ) from None
    finally:
        text.detach()


def _is_cut(error: Exception, size: int) -> bool:
    """Whether JSON is wrong only because the rest of it was not read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= size - _NEAR_THE_END


def _read_table(file: SourceFile, opened: Opened) -> Iterator[Row]:
    """Rows of CSV or TSV, whose first line names the columns."""
    path, shares = file.path, _Shares(file.path, opened)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    csv.field_size_limit(_LARGEST_CELL)
    text = io.TextIOWrapper(opened.content, "utf-8", newline="")
    rows = csv.reader(text, delimiter="\t" if ".tsv" in suffixes[-2:] else ",", strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise InputError(
                f"{path}:1: two columns have one name; a first line that names each column expected"
            )
        for values in rows:
            if values:
                place = f"{path}:{rows.line_num}"
                share = shares.of(sum(map(len, values)) + len(values))
                if len(values) == len(header):
                    yield Row(place, dict(zip(header, values)), share)
                    continue
                text_of_error = (
                    f"{place}: cells: {len(values)} given, {len(header)} expected, "
                    "as in the first line"
                )
                yield Row(place, InputError(text_of_error), share)
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not CSV ({error}); write it again") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not UTF-8 (behind line {rows.line_num}); convert the file"
        ) from None
    finally:
        text.detach()


def _read_parquet(file: SourceFile) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{file.path}: Parquet is read by pyarrow; pip install 'llama-jax[data]'"
        ) from None
    try:
        table = parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        known = {file.fields.get(name, name) for name in FIELD_NAMES}
        columns = [name for name in names if name in known]
        if not columns:
            raise InputError(
                f"{file.path}: columns {', '.join(names):.200} given, {FIELDS} expected; "
                f"{_HOW_TO_MAP}"
            )
        share = file.path.stat().st_size // max(1, table.metadata.num_rows)
        number = 0
        for rows in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
            for values in rows.to_pylist():
                number += 1
                yield Row(f"{file.path}:{number}", values, share)
    except arrow.ArrowException as error:
        raise InputError(
            f"{file.path}: not Parquet, or damaged ({str(error).splitlines()[0]:.80}); "
            "write it again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{file.path}: cannot be read ({error.strerror or error}); a readable file expected"
        ) from None


_HOW_TO_MAP = "name yours with --field, as in --field text=body"


def make_record(place: str, values: object, nbytes: int, fields: Fields | None = None) -> Record:
    """The record that the fields of a line say; unknown fields are left alone.

    Args:
      place: file and line.
      values: of the line.
      nbytes: its share of the file.
      fields: for fields of a record, their names in `values`. A field that is named decides the
        form.

    Raises:
      InputError: naming the place, for anything but the known fields with values of their kinds.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f"{place}: JSON {kind_name(values)} given, an object with {FIELDS} expected"
        )
    if fields:
        missing = next((own for own in fields.values() if own not in values), None)
        if missing is not None:
            raise InputError(
                f"{place}: fields {_shown(values)} given, {missing!r:.60} expected, as --field says"
            )
        taken = {name: values[own] for name, own in fields.items()}
        values = {
            name: value for name, value in values.items() if name not in fields.values()
        } | taken
    form = _form({name for name, value in values.items() if value is not None}, fields) or _form(
        set(values), fields
    )
    if form is None:
        raise InputError(
            f"{place}: fields {_shown(values)} given, {FIELDS} expected; {_HOW_TO_MAP}"
        )
    if form == ("text",):
        text = "" if values["text"] is None else read_text(place, "text", values["text"])
        return Record(place, text, "text", text, nbytes)
    tools = read_tools(place, values)
    if form == ("chosen", "rejected"):
        prompt, answers = read_pair(place, values)
        prompt = with_system(place, values, prompt)
        return Record(
            place, _key(prompt), "pairs", [prompt + answer for answer in answers], nbytes, tools
        )
    messages = with_system(place, values, _conversation(place, form, values))
    return Record(place, _key(messages), "chat", [messages], nbytes, tools)


def _form(names: set[str], fields: Fields | None) -> tuple[str, ...] | None:
    """The fields that make a record of these, those first that were asked for by name."""
    whole = [form for form in _FORMS if names.issuperset(form)]
    return next(
        (form for form in whole if fields and any(name in fields for name in form)),
        next(iter(whole), None),
    )


_FORMS: tuple[tuple[str, ...], ...] = (
    ("chosen", "rejected"),
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)


def _conversation(place: str, form: tuple[str, ...], values: Mapping[str, Any]) -> Messages:
    if form == ("prompt", "completion"):
        asked, answered = (
            read_turns(place, name, values[name], role)
            for name, role in zip(form, ("user", "assistant"))
        )
        return asked + answered
    return (
        read_alpaca(place, values)
        if form == ("instruction", "output")
        else read_messages(place, form[0], values[form[0]])
    )


def _shown(values: Mapping[str, Any]) -> str:
    return f"{', '.join(map(str, values)) or '(none)':.200}"


def _key(messages: Messages) -> str:
    return json.dumps(messages, ensure_ascii=False)


# --- corpus ---
#
# Documents of a corpus: files and folders of the user, or the sources of Python's standard library.


# Tests and bundled copies of other projects; `encodings` and files named for the platform are
# tables made by programs.
_NOT_LIBRARY = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_NOT_LIBRARY_PREFIXES = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    """A text with a name that is the same on every machine: the file's path relative to the folder
    that was given.
    """

    name: str
    text: str


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name belongs to the held-out part, about `fraction` of all
    names.

    A function of the name alone, so a document never changes sides when others come or go.
    """
    draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return draw < fraction * 2**64


def read_corpus(paths: Sequence[str | Path]) -> Iterator[Document]:
    """The texts of files and folders, in the order given, as `prepare` reads them: see
    `data.sources`.

    A text file is one document, named by its path; a record of JSON, a table or Parquet is one,
    named by its text.

    Raises:
      InputError: naming a file that cannot be read or is no text: conversations are for `prepare`.
    """
    for record in read_records(list_files(paths)):
        if not isinstance(record.body, str):
            raise InputError(
                f"{record.name}: a conversation, text expected; turn it into tokens "
                "(python -m llama_jax prepare --input ...) "
                "and name the folder in data.sources, or in eval --data"
            )
        yield Document(record.key, record.body)


def standard_library() -> Iterator[Document]:
    """The sources of the running interpreter's standard library without its tests, sorted by name:
    about 10 MB.

    The same documents on every machine with the same version of Python.

    Raises:
      InputError: if this interpreter came without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in sorted_files(root, (".py",), _NOT_LIBRARY)
        if _is_library(path.relative_to(root))
    ]
    if not paths:
        raise InputError(
            f"{root}: no sources of the standard library here; name files or folders of "
            "text instead"
        )
    for path in paths:
        with tokenize.open(path) as file:  # minds the encoding that a source declares
            yield Document(path.relative_to(root).as_posix(), file.read())


def _is_library(relative: Path) -> bool:
    return not relative.parts[0].startswith(_NOT_LIBRARY_PREFIXES)
