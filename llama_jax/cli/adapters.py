"""`adapters`: those of a run written apart, or merged into their model. The result is one line on
standard output.
"""

import pathlib
import shlex
import time

from llama_jax.cli.options import OptionParser
from llama_jax.errors import InputError
from llama_jax.weights.source import blamed_on

_ACTIONS = ("merge", "export")
_USAGE = "llama-jax adapters merge BASE ADAPTERS DST | llama-jax adapters export RUN DST"


def make_parser(prog: str, action: str) -> OptionParser:
    """The options of one action."""
    if action == "merge":
        parser = OptionParser(
            f"{prog} merge",
            "Write a model with adapters merged into it as a Hugging Face directory.",
        )
        parser.add_argument(
            "base",
            metavar="BASE",
            help="the model that the adapters were trained on: anything that loads",
        )
        parser.add_argument(
            "adapters", metavar="ADAPTERS", help="directory of PEFT's, or the run that trained them"
        )
        kinds: tuple[str, ...] = ("keep", "float32", "bfloat16", "float16")
        parser.add_argument(
            "--dtype", default="keep", choices=kinds, help="of the weights; keep: as in BASE"
        )
    else:
        parser = OptionParser(
            f"{prog} export",
            "Write the adapters of a run's newest checkpoint as a directory of PEFT's.",
        )
        parser.add_argument("run", metavar="RUN", help="directory of the run")
        kinds = ("float32", "bfloat16", "float16")
        parser.add_argument("--dtype", default="float32", choices=kinds, help="of the adapters")
    parser.add_argument("target", metavar="DST", help="directory that does not exist yet")
    return parser


def main(arguments: list[str], prog: str = "adapters") -> int:
    """Runs `adapters` and returns its exit status.

    Raises:
      InputError: for another action than `merge` and `export`.
    """
    action, *rest = arguments or [""]
    if action in ("-h", "--help"):
        print(f"usage: {_USAGE}")
        return 0
    if action not in _ACTIONS:
        raise InputError(f"adapters {action!r} given; merge or export expected: {_USAGE}")
    options = make_parser(prog, action).parse(rest)
    started = time.perf_counter()
    if action == "merge":
        nbytes = _merge(options.base, options.adapters, options.target, options.dtype)
        use = f"python -m llama_jax infer --model {shlex.quote(options.target)} --prompt TEXT"
    else:
        nbytes = _export(options.run, options.target, options.dtype)
        use = f"python -m llama_jax adapters merge BASE {shlex.quote(options.target)} DST"
    print(
        f"{options.target}: {nbytes / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s; {use}"
    )
    return 0


def _merge(base: str, adapters: str, target: str, dtype: str) -> int:
    """Writes the merged model; returns its bytes."""
    from llama_jax.weights.hf_write import export_hugging_face
    from llama_jax.weights.open import merged, open_model
    from llama_jax.weights.peft import read_adapters, require_fit, restore_adapters
    from llama_jax.weights.run import RUN_CHECKPOINTS

    opened = open_model(base)
    directory = pathlib.Path(adapters)
    is_run = (directory / RUN_CHECKPOINTS).is_dir()
    found = (
        restore_adapters(directory)[0] if is_run else read_adapters(directory, opened.source.config)
    )
    if is_run:
        with blamed_on(str(directory)):
            require_fit(found.tree, opened.source.config)
    return export_hugging_face(merged(opened, found, directory), target, dtype).nbytes  # type: ignore[arg-type]


def _export(run: str, target: str, dtype: str) -> int:
    """Writes the adapters of a run; returns their bytes."""
    from llama_jax.weights.peft import restore_adapters, save_adapters

    adapters, _ = restore_adapters(pathlib.Path(run))
    save_adapters(adapters, target, dtype)
    return sum(path.stat().st_size for path in pathlib.Path(target).iterdir())
