"""Which text is trained on, and which is held out to see what was learned."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from llama_jax.data.corpus import Document, is_held_out
from llama_jax.errors import InputError

Documents = Callable[[], Iterable[Document]]  # asked for several times, so that a corpus need not fit into memory
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


def split_documents(documents: Documents, fraction: float, on_progress: Progress = ignore_progress) -> Split:
    """Reads all documents and decides what is held out: whole documents, each by its name alone.

    Where that leaves a side without text, as it does with a single file, the end of the last document is held out in
    place of whole ones: about `fraction` of its text, from a line end on.

    Args:
      documents: gives the documents anew at each call, such as `standard_library`.
      fraction: share of the text kept for evaluation, below 1; 0 for none.
      on_progress: called with `read`, the readings done and the number of them.

    Raises:
      InputError: for a senseless fraction, and where there is too little text to divide.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"held_out_fraction: {fraction} given, a number from 0 to below 1 expected")
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
    return (document for document in documents() if is_held_out(document.name, fraction) == held_out)


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
    """The line end next before the last `fraction`; the exact place if that would take more than twice as much."""
    border = int(len(text) * (1 - fraction))
    return text.rfind("\n", max(0, 2 * border - len(text)), border) + 1 or border
