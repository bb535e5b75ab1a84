"""A beginning that many prompts share is run once, and changes no text; prompts are decoded in
batches.
"""

import io
import json
import random

import pytest

from llama_jax.cli import infer, models
from llama_jax.cli.main import run_program
from llama_jax.generation import generate as beginning
from llama_jax.generation import session
from llama_jax.generation.generate import common_prefix, saved

SYSTEM = "You are the keeper of a lighthouse, and answer briefly and truly."
WORDS = ["The cat", "你好 🎉", "a", "dog " * 5, "The cat sat"]


@pytest.fixture
def prefilled(monkeypatch) -> list[tuple[int, int]]:
    """Rows and widths of what is prefilled from here on."""
    sizes: list[tuple[int, int]] = []
    run = session.padded_prompts

    def counted(prompts, rows, width):
        sizes.append((rows, width))
        return run(prompts, rows, width)

    monkeypatch.setattr(session, "padded_prompts", counted)
    return sizes


def answers(capsys, *arguments) -> tuple[list[dict], str]:
    assert (
        run_program(lambda: infer.main([str(argument) for argument in arguments], "infer.py")) == 0
    )
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def without_measures(rows: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "request_sha256"} for row in rows
    ]


def test_the_longest_beginning():
    draw = random.Random(0)
    for _ in range(200):
        prompts = [
            [draw.randrange(2) for _ in range(draw.randrange(6))]
            for _ in range(draw.randrange(2, 4))
        ]
        longest = max(
            n
            for n in range(7)
            if len({tuple(prompt[:n]) for prompt in prompts}) == 1
            and all(len(prompt) >= n for prompt in prompts)
        )
        assert common_prefix(prompts) == prompts[0][:longest]
    assert common_prefix([]) == []
    assert saved(None, [3, 4]) == 0


DRAWN = ("--temperature", 1, "--seed", 3, "--samples", 2)


@pytest.mark.parametrize(
    ("many", "flags"),
    [
        pytest.param(False, (), id="prompts-greedy"),
        pytest.param(True, DRAWN, id="input-drawn"),
        pytest.param(False, DRAWN, id="prompts-drawn", marks=pytest.mark.slow),
        pytest.param(True, (), id="input-greedy", marks=pytest.mark.slow),
    ],
)
def test_a_shared_system_message_is_run_once(
    tiny_directory, tmp_path, capsys, monkeypatch, prefilled, many, flags
):
    if many:
        (tmp_path / "in.jsonl").write_text(
            "".join(json.dumps({"prompt": word}) + "\n" for word in WORDS)
        )
        asked = ["--input", tmp_path / "in.jsonl"]
    else:
        asked = ["--json", *(word for prompt in WORDS for word in ("--prompt", prompt))]
    common = [
        "--model",
        tiny_directory,
        "--chat",
        "--system",
        SYSTEM,
        "--max-new-tokens",
        6,
        "--batch-size",
        2,
    ]
    arguments = [*common, *flags, *asked]
    rows, told = answers(capsys, *arguments)
    with_prefix = sum(rows * width for rows, width in prefilled)
    prefilled.clear()
    monkeypatch.setattr(beginning, "_WORTH_IT", 1 << 30)
    plain, plainly = answers(capsys, *arguments)
    assert without_measures(rows) == without_measures(plain)
    assert with_prefix < sum(rows * width for rows, width in prefilled) / 2
    assert " from the cache)" in told
    assert " from the cache)" not in plainly


def test_lines_are_decoded_in_batches(tiny_directory, capsys, monkeypatch, prefilled):
    """No more than --batch-size at a time; texts and seeds are those of one batch."""
    found_by_size = []
    for size in (2, 8):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(WORDS).encode())))
        found, _ = answers(
            capsys,
            "--model",
            tiny_directory,
            "--json",
            "--max-new-tokens",
            5,
            "--temperature",
            1,
            "--seed",
            7,
            "--batch-size",
            size,
        )
        found_by_size.append(found)
        assert max(rows for rows, _ in prefilled) == size
        prefilled.clear()
    assert found_by_size[0] == found_by_size[1]
    assert [row["prompt"] for row in found_by_size[0]] == WORDS


def test_a_draft_of_another_vocabulary_is_refused_before_anything_is_written(
    tiny_directory, tmp_path, capsys, monkeypatch
):
    draft = tmp_path / "draft"
    draft.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (draft / name).write_bytes((tiny_directory / name).read_bytes())
    values = json.loads((draft / "config.json").read_text())
    monkeypatch.setattr(models, "_speculation", None)  # so far it does not come
    from safetensors.numpy import load_file, save_file

    tensors = load_file(draft / "model.safetensors")
    vocab = values["vocab_size"]
    save_file(
        {k: v[:-4].copy() if v.shape[0] == vocab else v for k, v in tensors.items()},
        draft / "model.safetensors",
    )
    (draft / "config.json").write_text(json.dumps(values | {"vocab_size": vocab - 4}))
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    asked = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    flags = ["--model", tiny_directory, "--speculate", 3, "--draft", draft, *asked]
    assert run_program(lambda: infer.main([str(flag) for flag in flags], "infer.py")) == 2
    assert (
        f"has {vocab - 4} tokens and the model {vocab}; the same vocabulary expected"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_a_system_message_without_a_conversation_is_refused(tiny_directory, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}]}\n{"prompt": "a"}\n'
    )
    flags = ["--model", tiny_directory, "--input", tmp_path / "in.jsonl", "--system", "Brief."]
    assert run_program(lambda: infer.main([str(flag) for flag in flags], "infer.py")) == 2
    assert "line 2: a plain prompt given with --system; " in capsys.readouterr().err
