"""Which tokens of a rendered conversation the assistant says: the part of a dialogue that is
trained on.
"""

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llama_jax.errors import InputError
from llama_jax.text.tokenizer import Tokenizer

_SPACE = "\u2581"  # how SentencePiece spells a space


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text."""

    start: int
    end: int


class AssistantText(NamedTuple):
    """A content in three parts.

    Attributes:
      lead: white space in front, which a template may trim.
      core: the words; white space stands only inside.
      trail: white space behind, which a template may trim.
    """

    lead: str
    core: str
    trail: str

    def kept(self) -> Iterator["AssistantText"]:
        """What a template may leave of it, the whole first."""
        for lead, trail in ((self.lead, self.trail), ("", ""), (self.lead, ""), ("", self.trail)):
            yield AssistantText(lead, self.core, trail)


def assistant_spans(
    rendered: str, probe: str, said: Sequence[AssistantText], opening: str, closing: str
) -> list[Span]:
    """Where in a rendering the contents stand, one span each, in order.

    A second rendering of the same conversation, the probe, tells the template's words from the
    contents: in it each content is its core between two marks, so that filters such as `trim`
      change neither. The rendering must then be
    the template's words and the contents in turn, with or without the white space around each.

    Args:
      rendered: the conversation as the template writes it.
      probe: the same with `opening + core + closing` for each content.
      said: the contents.
      opening: one character that only marks.
      closing: another one.

    Raises:
      InputError: if the template drops, moves, repeats or changes a content, or looks into it.
    """
    parts = re.split(f"{opening}(.*?){closing}", probe, flags=re.DOTALL)
    words, cores = parts[::2], parts[1::2]
    if cores != [content.core for content in said] or not rendered.startswith(words[0]):
        raise _unmaskable()
    spans: list[Span] = []
    position = len(words[0])
    for content, following in zip(said, words[1:]):
        spans.append(_span(rendered, position, content, following))
        position = spans[-1].end + len(following)
    if position != len(rendered):
        raise _unmaskable()
    return spans


def _span(rendered: str, position: int, content: AssistantText, following: str) -> Span:
    """Where a content stands that begins at `position` and is followed by some words of the
    template.
    """
    for left in content.kept():
        text = "".join(left)
        if rendered.startswith(text + following, position):
            return Span(position, position + len(text))
    raise _unmaskable()


def _unmaskable() -> InputError:
    return InputError(
        "chat template: it drops, moves, repeats or changes what the assistant says, so "
        "its tokens cannot be told from "
        "the others (no loss mask); give a template that writes each content once, as it is"
    )


def cut_at(text: str, start: int, spans: Sequence[Span]) -> list[str]:
    """A text cut at the edges of spans: parts outside and inside in turn, the first and the last
    outside.

    Args:
      text: to cut.
      start: where it begins, counted as the spans are.
      spans: disjoint, in ascending order; only those with a character in the text count.
    """
    first = bisect.bisect_right(spans, start, key=lambda span: span.end)
    last = bisect.bisect_left(spans, start + len(text), key=lambda span: span.start)
    edges = [
        max(edge - start, 0) for span in spans[first:last] if span.start < span.end for edge in span
    ]
    return [text[left:right] for left, right in itertools.pairwise([0, *edges, len(text)])]


def tokens_inside(tokenizer: Tokenizer, parts: Sequence[str], ids: Sequence[int]) -> list[bool]:
    """Whether each token of a text has a character, or a piece of one, in a part that is inside
    (see `cut_at`).

    A token on the border is therefore inside. A token without characters (the mark of a first word)
    is inside if it stands where an inside token could begin.

    Args:
      tokenizer: the one that made the ids.
      parts: of a text without special tokens, outside and inside in turn.
      ids: of the whole text.

    Raises:
      InputError: if the tokenizer changes the text, so that its tokens cannot be laid beside it.
    """
    flags = [False] * len(ids)
    if len(parts) == 1:
        return flags
    spelled, pieces = _laid_out(tokenizer, parts, ids)
    starts = list(itertools.accumulate(map(len, pieces), initial=0))
    ends = [max(end, start + 1) for start, end in itertools.pairwise(starts)]
    edges = list(itertools.accumulate(len(part.encode()) for part in spelled))
    for left, right in zip(edges[::2], edges[1::2]):
        first, last = (
            bisect.bisect_right(ends, left),
            bisect.bisect_left(starts, right, hi=len(ids)),
        )
        flags[first:last] = [True] * (last - first)
    return flags


def _laid_out(
    tokenizer: Tokenizer, parts: Sequence[str], ids: Sequence[int]
) -> tuple[Sequence[str], list[bytes]]:
    """A text as the tokenizer reads it, character for character, and the bytes of each token."""
    token_bytes = tokenizer.token_bytes
    layouts = (
        list(token_bytes.walk(ids)),
        [token_bytes.pieces[token] for token in ids],
    )  # as the beginning, inside a text
    for spelled, pieces in itertools.product(
        (parts, [part.replace(_SPACE, " ") for part in parts]), layouts
    ):
        if b"".join(pieces) == "".join(spelled).encode():
            return spelled, pieces
    raise InputError(
        f"text {''.join(parts)!r:.60}: the tokenizer changes it (it may normalise or not "
        "know a character), so no loss mask "
        "can be made; give text in the form that the tokenizer keeps"
    )
