"""`eval`: how well a model predicts text files and held-out data, and answers multiple-choice
questions.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from llama_jax.cli.distributed import keep_compiled_programs
from llama_jax.cli.options import OptionParser, add_model_options
from llama_jax.cli.writing import note
from llama_jax.data.records import read_corpus
from llama_jax.data.sources import left_out
from llama_jax.errors import InputError

Figures = Mapping[str, float]  # by name; one result


def make_parser(prog: str) -> OptionParser:
    """The options of `eval`."""
    parser = OptionParser(
        prog, "Loss of a LLaMA on text, in nats/token and bits/byte; accuracy on questions."
    )
    add_model_options(parser)
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="text, or records with text (.jsonl ...); may be given several times",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that prepare wrote: its held-out part; may be given several times",
    )
    parser.add_argument(
        "--choices",
        action="append",
        default=[],
        metavar="FILE",
        help='JSON lines {"prompt": TEXT, "choices": [TEXT, ...], "answer": index or text}; '
        "may be given several times",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a window or sequence; the model's context by default",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def read_texts(path: str) -> list[str]:
    """The texts of a file, as `prepare` reads it, without those that are empty.

    Raises:
      InputError: if it cannot be read, or holds no text.
    """
    texts = [document.text for document in read_corpus([path]) if document.text]
    if not texts:
        raise InputError(f"{path}: no text in it; --text takes text, or records with text")
    return texts


def lines_of(figures: Figures) -> list[str]:
    """One result, a figure a line."""
    return [f"{name:17}{_shown(value)}" for name, value in figures.items()]


def table(results: Mapping[str, Figures]) -> list[str]:
    """Several results, a file a line."""
    width = max(map(len, results))
    head = "  ".join([" " * width, *[f"{name:>15}" for name in next(iter(results.values()))]])
    return [
        head,
        *[
            "  ".join([f"{file:{width}}", *[f"{_shown(v):>15}" for v in row.values()]])
            for file, row in results.items()
        ],
    ]


def _shown(value: float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def main(arguments: list[str], prog: str = "eval") -> int:
    """Runs `eval` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    if not options.text and not options.data and not options.choices:
        raise InputError(
            "nothing to evaluate on: --text FILE, --data DIR (prepared) or --choices "
            "FILE (questions) expected"
        )
    texts = {name: read_texts(name) for name in options.text}
    missing = left_out(options.text)
    if missing is not None:
        note(f"--text: {missing}")
    from llama_jax.data.token_set import TokenSet
    from llama_jax.generation.generate import Generator
    from llama_jax.generation.score import evaluate_choices, read_questions
    from llama_jax.training.evaluate import evaluate_prepared, evaluate_text, together
    from llama_jax.weights.load import load

    prepared = {name: TokenSet.open(pathlib.Path(name)) for name in options.data}
    questions = {name: read_questions(pathlib.Path(name)) for name in options.choices}
    keep_compiled_programs()
    from llama_jax.model.options import resolve_dtype

    dtype = resolve_dtype(options.dtype)
    model = load(options.model, dtype)
    for line in model.report.brief():
        note(line)
    losses = {
        name: evaluate_text(model, text, options.length, dtype=dtype)
        for name, text in texts.items()
    }
    if len(losses) > 1:
        losses["total"] = together(list(losses.values()))
    losses |= {
        name: evaluate_prepared(model, data, options.length, dtype=dtype)
        for name, data in prepared.items()
    }
    generator = Generator(model.params, model.config, dtype=dtype) if questions else None
    accuracies = {
        name: evaluate_choices(model, asked, generator) for name, asked in questions.items()
    }
    kinds = [
        {name: result._asdict() for name, result in kind.items()} for kind in (losses, accuracies)
    ]
    write([kind for kind in kinds if kind], options.json)
    return 0


def write(kinds: Sequence[Mapping[str, Figures]], as_json: bool) -> None:
    """Results by kind and file; the figures alone where there is one file in all."""
    everything = {name: figures for kind in kinds for name, figures in kind.items()}
    if as_json:
        print(json.dumps(next(iter(everything.values())) if len(everything) == 1 else everything))
        return
    for kind in kinds:
        print("\n".join(lines_of(*kind.values()) if len(kind) == 1 else table(kind)))
