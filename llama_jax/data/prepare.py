"""From documents to token files, once: the result is kept under the hash of everything that it
depends on.
"""

import functools
import hashlib
import heapq
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from llama_jax.data.held_out import Part, Progress, Split, ignore_progress, measure
from llama_jax.data.records import Document
from llama_jax.data.token_file import VERSION, TokenFile, write_tokens
from llama_jax.data.workers import encode_text
from llama_jax.errors import CorruptError, InputError
from llama_jax.storage import atomic_write, sync_directory
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

# --- vocabulary ---
#
# Training a vocabulary: SentencePiece BPE with LLaMA's conventions, keeping the white space of
# code.


_CHUNK = 4096  # characters shown to the trainer at once
_SAMPLE = 32 << 20  # characters that are enough for the statistics of any vocabulary we train


def train_vocabulary(documents: Iterable[Document], vocab_size: int, path: Path, seed: int) -> None:
    """Trains a vocabulary and writes it to `path`; the same documents, size and seed give the same
    pieces.

    The ids are those of LLaMA 1 and 2: `<unk>` 0, `<s>` 1, `</s>` 2, then 256 bytes for characters
    in no piece. Digits stand alone. Unlike LLaMA's, the text is not given a leading space, and runs
    of spaces are pieces, so code comes back exactly and its indentation is cheap. One character
    does not come
      back: U+2581, which SentencePiece
    itself uses to write a space.

    Args:
      documents: read once; of more than 32 million characters a sample is used.
      vocab_size: pieces in all.
      path: file to write, replaced whole.
      seed: chooses the sample.

    Raises:
      InputError: no text, or a size that the text cannot fill or that its characters exceed.
    """
    sample = _sample((chunk for document in documents for chunk in _cut(document.text)), seed)
    if not sample:
        raise InputError("no text to train a vocabulary on; give documents that are not empty")
    model = _train(sample, vocab_size)
    with atomic_write(path) as file:
        file.write(model)


def _train(chunks: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _CHUNK,
            # Its own sampling and threads are left out: they would make the result vary from run to
            # run.
            num_threads=1,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].split(". Increase", 1)[0].strip()
        raise InputError(
            f"vocab_size: {vocab_size} given, but on this text SentencePiece says: {reason}"
        ) from None
    return model.getvalue()


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most `_CHUNK` characters, cut after a line where there is one."""
    start = 0
    while start < len(text):
        end = start + _CHUNK
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _sample(chunks: Iterable[str], seed: int) -> list[str]:
    """The chunks with the lowest hashes that fit into `_SAMPLE` characters, in their old order: no
    more are ever held.
    """
    kept: list[tuple[int, int, str]] = []
    size = 0
    for number, chunk in enumerate(chunks):
        heapq.heappush(kept, (-_priority(seed, number), number, chunk))
        size += len(chunk)
        while size > _SAMPLE:
            size -= len(heapq.heappop(kept)[2])
    return [chunk for _, _, chunk in sorted(kept, key=lambda item: item[1])]


def _priority(seed: int, number: int) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big"
    )


# --- prepare ---


_TOKENIZER = "tokenizer.model"
_TRAIN = "train.tokens"
_HELD_OUT = "held_out.tokens"
_DOCUMENTS = "begun as prompts are"  # how: once with every begin token that a tokenizer has
_BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)  # begin, end, more tokens


class PreparedData(NamedTuple):
    """Data ready for training: two token files and the tokenizer that made them; no second file
    where nothing is held out.
    """

    train: TokenFile
    held_out: TokenFile | None
    tokenizer_path: Path


class _Recipe(NamedTuple):
    """All that a build needs to know."""

    split: Split
    vocab_size: int
    seed: int
    tokenizer_path: Path | None

    def key(self) -> str:
        """A name for the result: the hash of everything that it depends on."""
        tokenizer: list[str | int] = [self.vocab_size, self.seed]
        if self.tokenizer_path:
            tokenizer = [hash_tokenizer(self.tokenizer_path), _DOCUMENTS]
        ingredients = [VERSION, *[part.sha256 for part in self.split], tokenizer]
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]


def prepare(
    directory: Path,
    split: Split,
    *,
    vocab_size: int,
    seed: int,
    tokenizer_path: Path | None = None,
    on_progress: Progress = ignore_progress,
) -> PreparedData:
    """Encodes and stores the two sides of a split, or opens and verifies what an earlier call with
    the same input stored.

    A document is stored as begin token (where prompts have one), text, end token (where there is
    one).

    Args:
      directory: keeps the results, each in a folder of its own that appears only when it is whole.
      split: from `split_documents`.
      vocab_size: pieces of the vocabulary to train; not looked at where there is a
        `tokenizer_path`.
      seed: of the vocabulary's sample.
      tokenizer_path: file or folder of a tokenizer to use; none has one trained on the training
        part.
      on_progress: called with a stage (`vocabulary`, `encode`), the work done and the whole of it.

    Raises:
      InputError: an input is wrong, or the text changed since it was split.
      CorruptError: the stored result is damaged.
    """
    recipe = _Recipe(split, vocab_size, seed, tokenizer_path)
    entry = directory / recipe.key()
    if not entry.is_dir():
        _publish(entry, functools.partial(_build, recipe, on_progress))
    try:
        return _open(entry, split, tokenizer_path)
    except InputError as error:
        raise CorruptError(f"{error} (after removing {entry})") from None


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each document, begun as prompts of the model are, and ended where the tokenizer
    has an end token.
    """
    return (encode_text(tokenizer, document.text) for document in documents)


def hash_tokenizer(path: Path) -> str:
    """SHA-256 of the files that define a tokenizer: its own, and those beside it that name its
    begin and end.

    Args:
      path: as `load_tokenizer` takes it, file or folder.

    Raises:
      InputError: there is no such tokenizer.
    """
    main = _find_tokenizer(path)
    digest = hashlib.sha256()
    for file in (main, *[main.parent / name for name in _BESIDE_TOKENIZER]):
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def copy_tokenizer(path: Path, target: Path) -> None:
    """Copies the files that define a tokenizer, each whole or not at all.

    Args:
      path: as `load_tokenizer` takes it, file or folder.
      target: name of the copy of the tokenizer's own file; those beside it keep their names.

    Raises:
      InputError: there is no such tokenizer.
    """
    main = _find_tokenizer(path)
    pairs = [
        (main, target),
        *[(main.parent / name, target.parent / name) for name in _BESIDE_TOKENIZER],
    ]
    for source, copy in pairs:
        if source.is_file():
            with atomic_write(copy) as file:
                file.write(source.read_bytes())
        else:
            copy.unlink(missing_ok=True)


def read_tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files that define a tokenizer and its chat template, by name.

    Args:
      path: as `load_tokenizer` takes it, file or folder; an own file of another name is given a
        usual one.

    Raises:
      InputError: there is no such tokenizer.
    """
    main = _find_tokenizer(path)
    content = main.read_bytes()
    name = "tokenizer.json" if content.lstrip().startswith(b"{") else "tokenizer.model"
    beside = (main.parent / other for other in (*_BESIDE_TOKENIZER, "chat_template.jinja"))
    return {name: content, **{file.name: file.read_bytes() for file in beside if file.is_file()}}


def _find_tokenizer(path: Path) -> Path:
    """The tokenizer's own file."""
    mains = (
        [path / name for name in ("tokenizer.json", "tokenizer.model")] if path.is_dir() else [path]
    )
    main = next((file for file in mains if file.is_file()), None)
    if main is None:
        raise InputError(
            f"{path}: no tokenizer here; a tokenizer.json, a tokenizer.model or a folder "
            "with one expected"
        )
    return main


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
    tokenizer_path = recipe.tokenizer_path or _train_tokenizer(
        recipe, on_progress, folder / _TOKENIZER
    )
    tokenizer, digest = load_tokenizer(tokenizer_path), hash_tokenizer(tokenizer_path)
    total, done = sum(part.bytes_of_text for part in recipe.split), 0
    for name, part in _named(recipe.split):
        reported = _report(part.documents(), done, total, on_progress)
        write_tokens(
            folder / name,
            encode_documents(reported, tokenizer),
            vocab_size=tokenizer.vocab_size,
            bytes_of_text=part.bytes_of_text,
            tokenizer_sha256=digest,
            sources_sha256=part.sha256,
        )
        done += part.bytes_of_text
        if measure(part.documents).sha256 != part.sha256:
            raise InputError(
                "the text changed while it was being prepared; try again when nothing writes to it"
            )


def _named(split: Split) -> list[tuple[str, Part]]:
    """The sides of a split that have text, by the names of their files."""
    return [(name, part) for name, part in zip((_TRAIN, _HELD_OUT), split) if part.bytes_of_text]


def _train_tokenizer(recipe: _Recipe, on_progress: Progress, path: Path) -> Path:
    on_progress("vocabulary", 0, 1)
    train_vocabulary(recipe.split.train.documents(), recipe.vocab_size, path, recipe.seed)
    on_progress("vocabulary", 1, 1)
    return path


def _report(
    documents: Iterable[Document], done: int, total: int, on_progress: Progress
) -> Iterator[Document]:
    """Passes documents on and reports how many bytes of text have passed."""
    for document in documents:
        yield document
        done += len(document.text.encode())
        on_progress("encode", done, total)


def _open(entry: Path, split: Split, tokenizer_path: Path | None) -> PreparedData:
    tokenizer_path = tokenizer_path or entry / _TOKENIZER
    files = [TokenFile.open(entry / name) for name, _ in _named(split)]
    digest = hash_tokenizer(tokenizer_path)
    for file in files:
        file.verify()
        if file.header.tokenizer_sha256 != digest:
            raise CorruptError(
                f"{file.path}: made with another tokenizer than {tokenizer_path}; "
                "prepare the data again"
            )
        file.keep_counts()
    return PreparedData(files[0], files[1] if len(files) > 1 else None, tokenizer_path)
