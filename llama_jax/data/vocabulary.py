"""Training a vocabulary: SentencePiece BPE with LLaMA's conventions, keeping the white space of code."""

import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from llama_jax.data.atomic import atomic_write
from llama_jax.data.corpus import Document
from llama_jax.errors import InputError

_CHUNK = 4096  # characters shown to the trainer at once
_SAMPLE = 32 << 20  # characters that are enough for the statistics of any vocabulary we train


def train_vocabulary(documents: Iterable[Document], vocab_size: int, path: Path, seed: int) -> None:
    """Trains a vocabulary and writes it to `path`; the same documents, size and seed give the same pieces.

    The ids are those of LLaMA 1 and 2: `<unk>` 0, `<s>` 1, `</s>` 2, then 256 bytes for what is in no piece. Digits
    stand alone. Unlike LLaMA's, the text is not given a leading space, and runs of spaces are pieces, so code comes
    back exactly and its indentation is cheap. One character does not come back: U+2581, which SentencePiece
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
            sentence_iterator=iter(chunks), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, max_sentence_length=4 * _CHUNK,
            # Its own sampling and threads are left out: they would make the result vary from run to run.
            num_threads=1, input_sentence_size=0, shuffle_input_sentence=False, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].split(". Increase", 1)[0].strip()
        raise InputError(f"vocab_size: {vocab_size} given, but on this text SentencePiece says: {reason}") from None
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
    """The chunks with the lowest hashes that fit into `_SAMPLE` characters, in their old order: no more are ever held."""
    kept: list[tuple[int, int, str]] = []
    size = 0
    for number, chunk in enumerate(chunks):
        heapq.heappush(kept, (-_priority(seed, number), number, chunk))
        size += len(chunk)
        while size > _SAMPLE:
            size -= len(heapq.heappop(kept)[2])
    return [chunk for _, _, chunk in sorted(kept, key=lambda item: item[1])]


def _priority(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big")
