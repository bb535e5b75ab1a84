"""What `infer` writes: texts and JSON on standard output, notes and measurements on standard
error.
"""

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.generation.text import Completion, Piece

# Control characters but tab and line feed: on a terminal they are commands, and a model's words are
# not to give any.
_COMMANDS = {
    code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"
}


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def prepare_output(json: bool) -> None:
    """JSON is UTF-8 wherever it goes; text is in the terminal's encoding, with `?` for characters
    that it lacks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            encoding="utf-8" if json else None, errors="strict" if json else "replace"
        )


def write_words(text: str) -> None:
    """Writes a model's words at once; on a terminal without control characters."""
    print(text.translate(_COMMANDS) if sys.stdout.isatty() else text, end="", flush=True)


def as_dict(completion: "Completion") -> dict[str, Any]:
    """A completion for JSON, without log-probabilities that were not asked for."""
    return {name: value for name, value in completion._asdict().items() if value is not None}


def as_json(values: Mapping[str, Any]) -> str:
    """An object on one line, as every reader of JSON takes it.

    Raises:
      InputError: for numbers that JSON does not have.
    """
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError(
            "the model's log-probabilities are not finite, so its weights hold NaN or infinity; "
            "fetch or convert the model again"
        ) from None


class AnswerWriter:
    """Writes the answers of one batch in their order, each as it comes or is complete.

    Args:
      echoed: text to write before each answer; its length is the number of answers.
      json: whether to write an object for each answer instead of text.
      samples: answers to each prompt; an object then has its number among them.
    """

    def __init__(self, echoed: Sequence[str], json: bool = False, samples: int = 1) -> None:
        self._echoed, self._json, self._samples = echoed, json, samples
        self._held: list[list[Piece]] = [[] for _ in echoed]
        self._current, self._begun = 0, -1

    def take(self, piece: "Piece") -> None:
        """Writes a piece, or holds it back until the answers before it have ended."""
        self._held[piece.sequence].append(piece)
        while self._current < len(self._held) and self._held[self._current]:
            ready, self._held[self._current] = self._held[self._current], []
            for each in ready:
                self._write(each)
            self._current += ready[-1].completion is not None

    def _write(self, piece: "Piece") -> None:
        if self._json:
            if piece.completion is not None:
                sample = {"sample": piece.sequence % self._samples} if self._samples > 1 else {}
                print(as_json({**sample, **as_dict(piece.completion)}), flush=True)
            return
        if piece.sequence > self._begun:
            print(self._echoed[piece.sequence], end="")
        self._begun = piece.sequence
        write_words(piece.text + ("" if piece.completion is None else "\n"))


class Meter:
    """Measures a stream of pieces: the time to the first token, the speed after it, and what was
    written.

    Attributes:
      tokens: new tokens so far.
      finished: sequences that have ended.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._last = self._start
        self.tokens = self.finished = 0
        self._tokens_at_first = self._prompt = 0
        self._reasons: set[str] = set()

    def count(self, piece: "Piece") -> None:
        """Takes note of a piece."""
        self._last = time.perf_counter()
        self.tokens += piece.tokens
        if self._first == self._start:
            self._first, self._tokens_at_first = self._last, self.tokens
        if piece.completion is not None:
            self.finished += 1
            self._prompt += piece.completion.prompt_tokens
            self._reasons.add(piece.completion.stop_reason)

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return time.perf_counter() - self._start

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first ones."""
        later = self.tokens - self._tokens_at_first
        return later / max(self._last - self._first, 1e-9) if later else None

    def report(self, compilations: Mapping[str, int], reused: int = 0) -> str:
        """One line of statistics; times include compilation, which happens once for each size of
        batch and prompt.

        Args:
          compilations: programs compiled, by name.
          reused: tokens of the prompt that were taken from a cache.
        """
        speed = "-" if self.speed is None else f"{self.speed:.1f} tokens/s"
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(compilations.items()))
        cached = f" ({reused} from the cache)" if reused else ""
        return (
            f"prompt {self._prompt} tokens{cached}, first token after "
            f"{self._first - self._start:.2f} s; "
            f"{self.tokens} new tokens, then {speed} (compilation included); "
            f"ended by {', '.join(sorted(self._reasons)) or 'interruption'}; "
            f"{sum(compilations.values())} programs compiled ({kinds})"
        )
