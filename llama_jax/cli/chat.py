"""A conversation in the terminal: `infer --chat` without prompts.

The model's words go to standard output, everything else to standard error. (Where both are the
terminal, readline draws the prompt there.) Ctrl-C stops an answer, what came of it is kept; Ctrl-D
leaves. A program can hold a conversation too: a line in, an answer out, with `--json` as one JSON
object: `{"text": ...}`, or `{"error": ...}` for a message that is
refused, or `{"command": ..., "note": ...}` for a command.
"""

import argparse
import contextlib
import difflib
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from llama_jax.cli.models import check_bias, check_settings, settings_of
from llama_jax.cli.writing import Meter, as_dict, as_json, note, write_words
from llama_jax.errors import InputError
from llama_jax.storage import atomic_write

if TYPE_CHECKING:
    from llama_jax.generation.text import Conversation

_PROMPT = "> "
_HINT = "Ctrl-D leaves, Ctrl-C stops an answer, /help lists the commands"


def converse(options: argparse.Namespace) -> int:
    """Talks with the user until the input ends; returns the exit status."""
    settings = settings_of(options)
    if settings.pop("samples") != 1:
        raise InputError(
            f"--samples: {options.samples} given; a conversation goes on from 1 answer"
        )
    from llama_jax.cli.models import load_model
    from llama_jax.generation.text import Conversation

    model, generator = load_model(options)
    check_bias(settings, model.config)
    conversation = Conversation(model, generator=generator)
    conversation.system(options.system or "")
    note(_HINT)
    Terminal(conversation, settings, options.json).run()
    return 0


class Interrupt:
    """What Ctrl-C means: during an answer, the first one is a wish to stop, which comes when the
    cache is in order.
    """

    def __init__(self) -> None:
        self._answering = False
        self.asked = False
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._answering or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def of_answer(self) -> Iterator[None]:
        """While an answer is on its way."""
        self._answering, self.asked = True, False
        try:
            yield
        finally:
            self._answering = False


class Terminal:
    """The user's side of a conversation: lines read, commands obeyed, answers written."""

    def __init__(self, conversation: "Conversation", settings: dict[str, Any], json: bool) -> None:
        self._conversation = conversation
        self._settings = settings
        self._json = json
        self._interrupt = Interrupt()
        self._commands: dict[str, tuple[str, Callable[[str], str]]] = {
            "system": ("TEXT: the system message from now on; none without TEXT", self._system),
            "reset": ("forget all messages but the system's", self._reset),
            "temperature": (
                "T: of the draws; 0 takes the most probable token",
                self._number("temperature", float),
            ),
            "top_p": (
                "P: draw from the tokens that reach probability P",
                self._number("top_p", float),
            ),
            "max": ("N: limit of new tokens an answer", self._number("max_new_tokens", int)),
            "save": ("FILE: the messages as JSON", self._save),
            "help": ("this list; a message that begins with / is written with //", self._help),
        }

    def run(self) -> None:
        """Reads and answers until the input ends."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history of `input` from here on)
        while True:
            try:
                self.take(_read_line())
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note(f"\n{_HINT}")
            except InputError as error:
                self._tell(
                    f"error: {' '.join(str(error).split())}",
                    {"error": " ".join(str(error).split())},
                )

    def take(self, line: str) -> None:
        """Obeys a command, or answers a message.

        Raises:
          InputError: for an unknown command, a value that it does not take, and what the model
            cannot answer.
        """
        if line.startswith("/") and not line.startswith("//"):
            told = self._obey(line[1:])
            self._tell(told, {"command": line[1:].split()[0], "note": told})
        elif line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _tell(self, words: str, answer: dict[str, str]) -> None:
        """A note; with `--json` an object as well, so that every line of a program but an empty one
        has an answer.
        """
        note(words)
        if self._json:
            print(as_json(answer), flush=True)

    def _obey(self, line: str) -> str:
        """The line that a command is answered with."""
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1, cutoff=0.6)
            advice = f"the nearest is /{near[0]}" if near else "/help lists them"
            raise InputError(f"command {'/' + name!r:.60} is unknown; {advice}")
        return self._commands[name][1](argument.strip())

    def _system(self, text: str) -> str:
        self._conversation.system(text)
        return "system message set" if text else "no system message"

    def _reset(self, _: str) -> str:
        self._conversation.reset()
        return "a new conversation"

    def _number(self, name: str, kind: type) -> Callable[[str], str]:
        """A command that sets a setting, or tells it."""

        def change(text: str) -> str:
            """Sets it, if it is in range."""
            if text:
                try:
                    settings = {**self._settings, name: kind(text)}
                except ValueError:
                    raise InputError(f"{name}: {text!r:.60} given; a number expected") from None
                check_settings(settings)
                self._settings = settings
            return f"{name} {self._settings[name]}"

        return change

    def _save(self, text: str) -> str:
        if not text:
            raise InputError("/save: no file given; /save FILE expected")
        content = json.dumps({"messages": self._conversation.messages}, ensure_ascii=False) + "\n"
        try:
            path = pathlib.Path(text).expanduser()
            with atomic_write(path) as file:
                file.write(content.encode())
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # a path that cannot be written, has no home, holds a NUL
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"/save: {text!r:.200} cannot be written ({reason}); name another file"
            ) from None
        return f"{len(self._conversation.messages)} messages in {path}"

    def _help(self, _: str) -> str:
        return "\n".join(f"/{name} {meaning}" for name, (meaning, _) in self._commands.items())

    def _answer(self, text: str) -> None:
        """Writes an answer as it comes, and what it took."""
        conversation, meter = self._conversation, Meter()
        with self._interrupt.of_answer():
            pieces = conversation.ask(text, **self._settings)
            with contextlib.closing(pieces):  # type: ignore[type-var]
                completion = self._write(meter, pieces)
        if completion is None and not self._json:
            write_words("\n")
        note(meter.report(conversation.generator.programs.compilations, conversation.reused))

    def _write(self, meter: Meter, pieces: Iterator[Any]) -> Any:
        """Writes pieces until they end or are stopped; the completion if they ended."""
        completion, heard = None, ""
        for piece in pieces:
            meter.count(piece)
            completion, heard = piece.completion, heard + piece.text
            if not self._json:
                write_words(piece.text + ("" if completion is None else "\n"))
            if self._interrupt.asked:
                break
        if self._json:
            answer = (
                {"text": heard, "stop_reason": "interrupted"}
                if completion is None
                else as_dict(completion)
            )
            answer.pop("prompt", None)  # all of the conversation, anew with every answer
            print(as_json(answer), flush=True)
        return completion


def _read_line() -> str:
    """The next line of the user.

    Raises:
      EOFError: at the end of the input.
      InputError: for a line that is not text in the terminal's encoding.
    """
    try:
        if sys.stdout.isatty():
            return input(_PROMPT)
        # `input` would write its prompt to standard output, where somebody else reads.
        print(_PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        raise InputError(
            "the line is not text in the terminal's encoding; nothing was sent"
        ) from None
    if not line:
        raise EOFError
    return line.removesuffix("\n")
