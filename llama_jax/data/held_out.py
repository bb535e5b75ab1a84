"""The split into text to train on and held-out text for evaluation."""

import bisect
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from llama_jax.data.records import Document, is_held_out, read_records
from llama_jax.data.sources import SourceFile
from llama_jax.data.workers import Encoder, encode_record
from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

Documents = Callable[
    [], Iterable[Document]
]  # asked for several times, so that a corpus need not fit into memory
Progress = Callable[[str, int, int], None]


class Part(NamedTuple):
    """One side of a split, summed up.

    Attributes:
      documents: gives its documents anew at each call.
      bytes_of_text: UTF-8 bytes of them all.
      sha256: of their names, texts and order.
    """

    documents: Documents
    bytes_of_text: int
    sha256: str


class Split(NamedTuple):
    """The two sides; no text is on both."""

    train: Part
    held_out: Part


def ignore_progress(stage: str, done: int, total: int) -> None:
    """The progress callback of whoever does not care."""


def split_documents(
    documents: Documents, fraction: float, on_progress: Progress = ignore_progress
) -> Split:
    """Reads all documents and chooses the held-out ones: whole documents, each by its name alone.

    Where that leaves a side without text, as it does with a single file, the end of the last
    document is held out instead of whole ones: about `fraction` of its text, from a line end on.

    Args:
      documents: gives the documents anew at each call, such as `standard_library`.
      fraction: share of the text kept for evaluation, below 1; 0 for none.
      on_progress: called with `read`, the readings done and the number of them.

    Raises:
      InputError: for a senseless fraction, and where there is too little text to divide.
    """
    if not 0 <= fraction < 1:
        raise InputError(
            f"held_out_fraction: {fraction} given, a number from 0 to below 1 expected"
        )
    for choose in (_select, _cut_last):
        on_progress("read", 0, 2)
        train = measure(functools.partial(choose, documents, fraction, False))
        on_progress("read", 1, 2)
        held_out = measure(functools.partial(choose, documents, fraction, True))
        on_progress("read", 2, 2)
        if train.bytes_of_text and (held_out.bytes_of_text or fraction == 0):
            return Split(train, held_out)
    raise InputError(f"too little text to hold out {fraction} of it for evaluation; give more text")


def measure(documents: Documents) -> Part:
    """Reads documents once, for their size and a hash of names and texts."""
    digest, size = hashlib.sha256(), 0
    for name, text in documents():
        encoded = text.encode()
        digest.update(json.dumps([name, len(encoded)]).encode() + encoded)
        size += len(encoded)
    return Part(documents, size, digest.hexdigest())


def _select(documents: Documents, fraction: float, held_out: bool) -> Iterator[Document]:
    """The documents whose names put them on one side."""
    return (
        document for document in documents() if is_held_out(document.name, fraction) == held_out
    )


def _cut_last(documents: Documents, fraction: float, held_out: bool) -> Iterator[Document]:
    """All documents but the end of the last one that has text, or that end."""
    last: Document | None = None
    for document in documents():
        if document.text:
            if last and not held_out:
                yield last
            last = document
    if last:
        border = _find_border(last.text, fraction)
        yield last._replace(text=last.text[border:] if held_out else last.text[:border])


def _find_border(text: str, fraction: float) -> int:
    """The line end next before the last `fraction`; the exact place if that would take more than
    twice as much.
    """
    border = int(len(text) * (1 - fraction))
    return text.rfind("\n", max(0, 2 * border - len(text)), border) + 1 or border


# --- held out ---
#
# How much `prepare` holds out: a share of the records, or a number of tokens that is turned into a
# share.
#
# Whether a record is held out depends on its content and the share alone (`corpus.is_held_out`). A
# limit on the tokens that are already held out would depend on the order of the records and favor
# the first of them; so the share is chosen beforehand, from a sample of the sources. The same
# sources and tokenizer give the same share, whatever the number of workers, in every call that
# resumes an earlier one; a smaller share holds out a part of what a larger one does.


MOST_SHARE, MOST_TOKENS = 0.01, 10_000_000  # by default the smaller of the two
LEAST_TOKENS = 1000  # a smaller number is more likely a share in percent

_PLACES = 64  # of the sources at which files are sampled, evenly by bytes
_SAMPLE_BYTES = 1 << 22  # of the sources in all


EXPECTED = (
    f"a share from 0 to below 1 such as 0.01, or at least {LEAST_TOKENS:,} tokens such as 10M,"
)


def is_held_out_amount(wanted: float) -> bool:
    """Whether a number is a share of the records or a number of tokens."""
    return 0 <= wanted < 1 or (LEAST_TOKENS <= wanted < math.inf and wanted == int(wanted))


def held_out_share(wanted: float | None, files: Sequence[SourceFile], encoder: Encoder) -> float:
    """The share of the records to hold out.

    Args:
      wanted: a share below 1; a number of tokens, which is met about; or `None` for the smaller of
        1 % and 10M tokens.
      files: the sources.
      encoder: what makes tokens of their records.

    Raises:
      InputError: where the sources have fewer tokens than are to be held out.
    """
    if wanted is not None and wanted < 1:
        return wanted
    limit = MOST_TOKENS if wanted is None else wanted
    if (
        wanted is None and sum(_sizes(files)) <= MOST_TOKENS / MOST_SHARE
    ):  # a token has at least a byte, so 1 % is less
        return MOST_SHARE
    tokens = estimate_tokens(files, encoder)
    if wanted is None:
        return MOST_SHARE if tokens == 0 else _rounded(min(MOST_SHARE, limit / tokens))
    if tokens <= limit:
        raise InputError(
            f"--held-out: {limit:,.0f} tokens given, but the sources have about "
            f"{tokens:,.0f}; give fewer, or a share (0.01)"
        )
    return _rounded(limit / tokens)


def estimate_tokens(files: Sequence[SourceFile], encoder: Encoder) -> float:
    """About how many tokens the sources have, from the first records of files that are chosen
    evenly by their bytes.

    What cannot be read or encoded is left out here: whoever reads the sources whole names it.
    """
    ends = list(itertools.accumulate(_sizes(files)))
    places = [ends[-1] * (2 * place + 1) // (2 * _PLACES) for place in range(_PLACES)]
    chosen = [min(bisect.bisect_right(ends, place), len(files) - 1) for place in places]
    budget = _SAMPLE_BYTES // len(set(chosen))
    tokenizer = load_tokenizer(encoder.tokenizer_path)
    density = {
        number: _tokens_per_byte(files[number], encoder, tokenizer, budget)
        for number in set(chosen)
    }
    return ends[-1] * sum(density[number] for number in chosen) / _PLACES


def _tokens_per_byte(
    file: SourceFile, encoder: Encoder, tokenizer: Tokenizer, budget: int
) -> float:
    """Tokens for each byte of a file, from its first `budget` bytes or so."""
    tokens = nbytes = 0.0
    try:
        for record in read_records([file]):
            share, body = 1.0, record.body
            if isinstance(body, str) and len(body) > budget:
                share, record = budget / len(body), record._replace(body=body[:budget])
            nbytes += record.nbytes * share
            if not record.is_empty:
                tokens += sum(
                    len(document.ids)
                    for document in encode_record(record, tokenizer, encoder.template)
                )
            if nbytes >= budget or share < 1:
                break
    except InputError:
        pass
    return tokens / nbytes if nbytes else 0.0


def _sizes(files: Sequence[SourceFile]) -> list[int]:
    return [file.path.stat().st_size for file in files]


def _rounded(share: float) -> float:
    return float(f"{share:.4g}")
