"""A conversation in the terminal: in a real one with real signals, and its commands inside this
process.
"""

import json
import subprocess

import pytest
from processes import Terminal, infer

from llama_jax.cli import chat
from llama_jax.cli.infer import make_parser
from llama_jax.cli.models import settings_of
from llama_jax.errors import InputError
from llama_jax.generation.text import Conversation, generate
from llama_jax.weights.load import load


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return load(tiny_directory)


@pytest.fixture
def terminal(tiny, monkeypatch):
    """The user's side, without a terminal: `take` is given the lines."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    settings = settings_of(make_parser("infer").parse(["--model", "x", "--max-new-tokens", "6"]))
    settings.pop("samples")
    return chat.Terminal(Conversation(tiny), settings, json=False)


def user(text):
    return {"role": "user", "content": text}


def alone(model, messages, **settings) -> str:
    return generate(model, [messages], **settings)[0].text


def test_in_a_terminal(tiny, tiny_directory, tmp_path):
    """Two turns, an answer that is stopped, Ctrl-C at the prompt, a wrong command, the messages
    saved, Ctrl-D.
    """
    saved = tmp_path / "chat.json"
    # A letter for an answer: what is seen on the screen can be told from the prompts.
    letter = tiny.tokenizer.encode("x")[0]
    window = Terminal(
        "--model", tiny_directory, "--chat", "--max-new-tokens", 5, "--logit-bias", f"{letter}=1000"
    )
    window.read_until("/help lists the commands\n")
    window.read_until("> ")
    window.type("The cat\n")
    assert window.read_until("programs compiled").count("xxxxx\n") == 1
    window.read_until("> ")
    window.type("/max 60000\n")
    window.read_until("max_new_tokens 60000\n")
    window.read_until("> ")
    window.type("Go on\n")
    window.read_until("x" * 100)
    window.type("\x03")
    stopped = window.read_until("programs compiled")
    assert "ended by interruption" in stopped
    assert "from the cache" in stopped
    window.read_until("> ")
    window.type("half a line")
    window.read_until("half a line")
    window.press_until("\x03", "Ctrl-D leaves")
    window.read_until("> ")
    window.type("/sav x\n")
    window.read_until("error: command '/sav' is unknown; the nearest is /save\n")
    window.read_until("> ")
    window.type(f"/save {saved}\n")
    window.read_until("4 messages in ")
    window.read_until("> ")
    window.type("\x04")
    assert window.close() == 0
    first, answer, second, half = json.loads(saved.read_text())["messages"]
    assert (first, answer, second) == (
        user("The cat"),
        {"role": "assistant", "content": "xxxxx"},
        user("Go on"),
    )
    assert half["role"] == "assistant"
    assert set(half["content"]) == {"x"}
    assert 100 <= len(half["content"]) < 60000


def test_words_alone_go_into_a_pipe(tiny, tiny_directory):
    """Prompts, hints and measurements are for the eyes of the user."""
    window = Terminal(
        "--model", tiny_directory, "--chat", "--max-new-tokens", 6, stdout=subprocess.PIPE
    )
    window.read_until("> ")
    window.type("The cat\n")
    window.read_until("programs compiled")
    window.read_until("> ")
    window.type("\x04")
    assert window.close() == 0
    assert (
        window.process.stdout.read().decode()
        == alone(tiny, [user("The cat")], max_new_tokens=6) + "\n"
    )


def test_a_program_holds_a_conversation(tiny, tiny_directory):
    """Lines in, objects out: a turn knows those before it, until /reset; every line has an answer,
    mistakes as well.
    """
    lines = ["The cat", "Go on", "/reset", "/nope", "the " * 70000, "/max", "The cat"]
    stdin = "\n".join(lines).encode()
    done = infer("--model", tiny_directory, "--chat", "--json", "--max-new-tokens", 6, stdin=stdin)
    assert done.returncode == 0, done.stderr
    first, second, command, unknown, long, told, again = map(
        json.loads, done.stdout.decode().splitlines()
    )
    assert unknown == {"error": "command '/nope' is unknown; /help lists them"}
    assert "the model's context) expected" in long["error"]
    assert told == {"command": "max", "note": "max_new_tokens 6"}
    assert command == {"command": "reset", "note": "a new conversation"}
    answer = alone(tiny, [user("The cat")], max_new_tokens=6)
    turns = [user("The cat"), {"role": "assistant", "content": answer}, user("Go on")]
    assert first["text"] == again["text"] == answer
    assert second["text"] == alone(tiny, turns, max_new_tokens=6)


def test_commands_change_what_is_asked(tiny, terminal, capsys):
    for line in ("/system Be brief.", "/temperature 0.7", "/top_p 0.9", "/max 9", "//help me"):
        terminal.take(line)
    messages = [{"role": "system", "content": "Be brief."}, user("/help me")]
    out, err = capsys.readouterr()
    assert out == alone(tiny, messages, max_new_tokens=9, temperature=0.7, top_p=0.9) + "\n"
    assert err.splitlines()[:4] == [
        "system message set",
        "temperature 0.7",
        "top_p 0.9",
        "max_new_tokens 9",
    ]
    for line in ("/temperature", "/reset", "/system", "/help", "  "):
        terminal.take(line)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("temperature 0.7\na new conversation\nno system message\n/system TEXT")
    assert terminal._conversation.messages == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/xyz", "command '/xyz' is unknown; /help lists them"),
        ("/", "command '/' is unknown"),
        ("/temperature hot", "temperature: 'hot' given; a number expected"),
        ("/temperature -1", "temperature: -1.0 given"),
        ("/max 1.5", "max_new_tokens: '1.5' given; a number expected"),
        ("/max -1", "max_new_tokens: -1 given; 0 or more expected"),
        ("/save", "/save: no file given"),
        (
            "/save /nowhere/chat.json",
            "/save: '/nowhere/chat.json' cannot be written (No such file or directory)",
        ),
        ("/save a\0b", "cannot be written"),
        ("the " * 70000, "the conversation has 70"),
    ],
)
def test_what_cannot_be_done_changes_nothing(terminal, line, words):
    before = dict(terminal._settings)
    with pytest.raises(InputError) as raised:
        terminal.take(line)
    assert words in str(raised.value)
    assert terminal._settings == before
    assert terminal._conversation.messages == []


def test_json_is_one_object_an_answer(tiny, terminal, capsys):
    terminal._json = True
    terminal.take("The cat")
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == alone(tiny, [user("The cat")], max_new_tokens=6)
    assert answer["stop_reason"] == "length"
    assert "prompt" not in answer


def test_save_replaces_a_file_whole(terminal, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("before")
    terminal.take("The cat")
    terminal.take(f"/save {path}")
    assert json.loads(path.read_text()) == {"messages": terminal._conversation.messages}
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_interrupt_does_not_wait(monkeypatch):
    """The first one asks; where nothing comes of it, in a long compilation say, the second one
    interrupts.
    """
    handlers = []
    monkeypatch.setattr("signal.signal", lambda _, handler: handlers.append(handler))
    interrupt = chat.Interrupt()
    (press,) = handlers
    with pytest.raises(KeyboardInterrupt):
        press(2, None)
    with interrupt.of_answer():
        press(2, None)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            press(2, None)
    with pytest.raises(KeyboardInterrupt):
        press(2, None)
