"""`eval`: how well a model predicts a text file."""

import json
import pathlib

from llama_jax.cli.compilation import keep_compiled_programs
from llama_jax.cli.options import OptionParser, add_model_options, resolve_dtype
from llama_jax.cli.writing import note
from llama_jax.errors import InputError


def make_parser(prog: str) -> OptionParser:
    """The options of `eval`."""
    parser = OptionParser(prog, "Loss of a LLaMA on a text file, in nats a token and bits a byte.")
    add_model_options(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a window; the model's context by default")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def read_text(path: pathlib.Path) -> str:
    """The content of a text file.

    Raises:
      InputError: if it cannot be read as UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); --text takes a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; convert it first") from None


def main(arguments: list[str], prog: str = "eval") -> int:
    """Runs `eval` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    text = read_text(pathlib.Path(options.text))
    from llama_jax.training.evaluate import evaluate_text
    from llama_jax.weights.load import load

    keep_compiled_programs()
    dtype = resolve_dtype(options.dtype)
    model = load(options.model, dtype)
    for line in model.report.brief():
        note(line)
    result = evaluate_text(model, text, options.length, dtype=dtype)
    lines = [
        f"{name:15}{value:.6f}" if isinstance(value, float) else f"{name:15}{value}" for name, value in result._asdict().items()
    ]
    print(json.dumps(result._asdict()) if options.json else "\n".join(lines))
    return 0
