"""From documents to token files, once: the result is kept under the hash of everything that it depends on."""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_jax.data.atomic import sync_directory
from llama_jax.data.corpus import Document, is_held_out
from llama_jax.data.token_file import TokenFile, write_tokens
from llama_jax.data.token_header import VERSION
from llama_jax.data.vocabulary import train_vocabulary
from llama_jax.errors import CorruptError, InputError
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

Documents = Callable[[], Iterable[Document]]  # asked for several times, so that a corpus need not fit into memory
Progress = Callable[[str, int, int], None]

_TOKENIZER = "tokenizer.model"
_TRAIN = "train.tokens"
_HELD_OUT = "held_out.tokens"


class PreparedData(NamedTuple):
    """Data ready for training: two token files and the tokenizer that made them."""

    train: TokenFile
    held_out: TokenFile
    tokenizer_path: Path


class _Part(NamedTuple):
    """One side of the split: what it holds, summed up."""

    documents: Documents
    bytes_of_text: int
    sha256: str


class _Recipe(NamedTuple):
    """All that a build needs to know."""

    train: _Part
    held_out: _Part
    vocab_size: int
    seed: int
    tokenizer_path: Path | None

    def key(self) -> str:
        """A name for the result: the hash of everything that it depends on."""
        tokenizer = hash_tokenizer(self.tokenizer_path) if self.tokenizer_path else [self.vocab_size, self.seed]
        ingredients = [VERSION, self.train.sha256, self.held_out.sha256, tokenizer]
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]


def _ignore(stage: str, done: int, total: int) -> None:
    """The progress callback of whoever does not care."""


def prepare(
    directory: Path,
    documents: Documents,
    *,
    vocab_size: int,
    held_out_fraction: float,
    seed: int,
    tokenizer_path: Path | None = None,
    on_progress: Progress = _ignore,
) -> PreparedData:
    """Splits, encodes and stores documents, or opens and verifies what an earlier call with the same input stored.

    Whether a document is held out depends on its name alone. A document is stored as begin token, text, end token,
    where the tokenizer has them.

    Args:
      directory: keeps the results, each in a folder of its own that appears only when it is whole.
      documents: gives the documents anew at each call, such as `standard_library`.
      vocab_size: pieces of the vocabulary to train; not looked at where there is a `tokenizer_path`.
      held_out_fraction: share of the documents kept for evaluation, above 0 and below 1.
      seed: of the vocabulary's sample.
      tokenizer_path: file or folder of a tokenizer to use; none has one trained on the training part.
      on_progress: called with a stage (`read`, `vocabulary`, `encode`), the work done and the whole of it.

    Raises:
      InputError: a part of the split is empty, an input is wrong, or the text changed meanwhile.
      CorruptError: the stored result is damaged.
    """
    train, held_out = _split(documents, held_out_fraction, on_progress)
    recipe = _Recipe(train, held_out, vocab_size, seed, tokenizer_path)
    entry = directory / recipe.key()
    if not entry.is_dir():
        _publish(entry, functools.partial(_build, recipe, on_progress))
    try:
        return _open(entry, tokenizer_path)
    except InputError as error:
        raise CorruptError(f"{error} (after removing {entry})") from None


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each document between the tokenizer's begin and end tokens, where it has them."""
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    return (begin + tokenizer.encode(document.text) + end for document in documents)


def hash_tokenizer(path: Path) -> str:
    """SHA-256 of the files that define a tokenizer: its own, and those beside it that name its begin and end.

    Args:
      path: as `load_tokenizer` takes it, file or folder.

    Raises:
      InputError: there is no such tokenizer.
    """
    mains = [path / name for name in ("tokenizer.json", "tokenizer.model")] if path.is_dir() else [path]
    main = next((file for file in mains if file.is_file()), None)
    if main is None:
        raise InputError(f"{path}: no tokenizer here; a tokenizer.json, a tokenizer.model or a folder with one expected")
    digest = hashlib.sha256()
    for file in (main, main.parent / "tokenizer_config.json", main.parent / "special_tokens_map.json"):
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def _split(documents: Documents, fraction: float, on_progress: Progress) -> tuple[_Part, _Part]:
    if not 0 < fraction < 1:
        raise InputError(f"held_out_fraction: {fraction} given, a number above 0 and below 1 expected")
    parts: list[_Part] = []
    for held_out in (False, True):
        on_progress("read", len(parts), 2)
        parts.append(_survey(functools.partial(_select, documents, fraction, held_out)))
    on_progress("read", 2, 2)
    train, held = parts
    if not train.bytes_of_text or not held.bytes_of_text:
        side = "training" if not train.bytes_of_text else "evaluation"
        raise InputError(
            f"no text is left for {side}: whole documents are held out, by name, with held_out_fraction {fraction}; "
            "give more documents (cut a single file into several) or another fraction"
        )
    return train, held


def _select(documents: Documents, fraction: float, held_out: bool) -> Iterator[Document]:
    return (document for document in documents() if is_held_out(document.name, fraction) == held_out)


def _survey(documents: Documents) -> _Part:
    """Reads the documents once, for their size and a hash of names and texts."""
    digest, size = hashlib.sha256(), 0
    for name, text in documents():
        encoded = text.encode()
        digest.update(json.dumps([name, len(encoded)]).encode() + encoded)
        size += len(encoded)
    return _Part(documents, size, digest.hexdigest())


def _publish(entry: Path, build: Callable[[Path], None]) -> None:
    """Builds a folder out of sight and moves it to `entry` when it is whole."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".preparing-") as scratch:
        whole = Path(scratch) / entry.name
        whole.mkdir()
        build(whole)
        try:
            os.rename(whole, entry)
        except OSError:
            if not entry.is_dir():  # else another process was faster, and its result is the same
                raise
        sync_directory(entry.parent)


def _build(recipe: _Recipe, on_progress: Progress, folder: Path) -> None:
    tokenizer_path = recipe.tokenizer_path or _train_tokenizer(recipe, on_progress, folder / _TOKENIZER)
    tokenizer, digest = load_tokenizer(tokenizer_path), hash_tokenizer(tokenizer_path)
    total, done = recipe.train.bytes_of_text + recipe.held_out.bytes_of_text, 0
    for name, part in ((_TRAIN, recipe.train), (_HELD_OUT, recipe.held_out)):
        reported = _report(part.documents(), done, total, on_progress)
        write_tokens(folder / name, encode_documents(reported, tokenizer), vocab_size=tokenizer.vocab_size,
                     bytes_of_text=part.bytes_of_text, tokenizer_sha256=digest, sources_sha256=part.sha256)  # fmt: skip
        done += part.bytes_of_text
        if _survey(part.documents).sha256 != part.sha256:
            raise InputError("the text changed while it was being prepared; try again when nothing writes to it")


def _train_tokenizer(recipe: _Recipe, on_progress: Progress, path: Path) -> Path:
    on_progress("vocabulary", 0, 1)
    train_vocabulary(recipe.train.documents(), recipe.vocab_size, path, recipe.seed)
    on_progress("vocabulary", 1, 1)
    return path


def _report(documents: Iterable[Document], done: int, total: int, on_progress: Progress) -> Iterator[Document]:
    """Passes documents on and tells how many bytes of text have gone by."""
    for document in documents:
        yield document
        done += len(document.text.encode())
        on_progress("encode", done, total)


def _open(entry: Path, tokenizer_path: Path | None) -> PreparedData:
    tokenizer_path = tokenizer_path or entry / _TOKENIZER
    files = [TokenFile.open(entry / name) for name in (_TRAIN, _HELD_OUT)]
    digest = hash_tokenizer(tokenizer_path)
    for file in files:
        file.verify()
        if file.header.tokenizer_sha256 != digest:
            raise CorruptError(f"{file.path}: made with another tokenizer than {tokenizer_path}; prepare the data again")
    return PreparedData(files[0], files[1], tokenizer_path)
