"""`adapters`: those of a run written apart, or merged into their model. The result is one line on standard output."""

import pathlib
import shlex
import time
from typing import TYPE_CHECKING

from llama_jax.cli.options import OptionParser
from llama_jax.config import LlamaConfig, config_from_dict
from llama_jax.errors import InputError
from llama_jax.weights.source import blamed_on

if TYPE_CHECKING:
    from llama_jax.weights.peft import Adapters

_ACTIONS = ("merge", "export")
_USAGE = "llama-jax adapters merge BASE ADAPTERS DST | llama-jax adapters export RUN DST"


def make_parser(prog: str, action: str) -> OptionParser:
    """The options of one action."""
    if action == "merge":
        parser = OptionParser(f"{prog} merge", "Write a model with adapters merged into it as a Hugging Face directory.")
        parser.add_argument("base", metavar="BASE", help="the model that the adapters were trained on: anything that loads")
        parser.add_argument("adapters", metavar="ADAPTERS", help="directory of PEFT's, or the run that trained them")
        kinds: tuple[str, ...] = ("keep", "float32", "bfloat16", "float16")
        parser.add_argument("--dtype", default="keep", choices=kinds, help="of the weights; keep: as in BASE")
    else:
        parser = OptionParser(f"{prog} export", "Write the adapters of a run's newest checkpoint as a directory of PEFT's.")
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
    print(f"{options.target}: {nbytes / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s; {use}")
    return 0


def _merge(base: str, adapters: str, target: str, dtype: str) -> int:
    """Writes the merged model; returns its bytes."""
    from llama_jax.weights.hugging_face_export import export_hugging_face
    from llama_jax.weights.open import merged, open_model
    from llama_jax.weights.peft import read_adapters
    from llama_jax.weights.run import RUN_CHECKPOINTS

    opened = open_model(base)
    directory = pathlib.Path(adapters)
    read = _of_run if (directory / RUN_CHECKPOINTS).is_dir() else read_adapters
    found = read(directory, opened.source.config)
    return export_hugging_face(merged(opened, found, directory), target, dtype).nbytes  # type: ignore[arg-type]


def _export(run: str, target: str, dtype: str) -> int:
    """Writes the adapters of a run; returns their bytes."""
    from llama_jax.weights.peft import save_adapters

    adapters = _of_run(pathlib.Path(run), None)
    save_adapters(adapters, target, dtype)
    return sum(path.stat().st_size for path in pathlib.Path(target).iterdir())


def _of_run(directory: pathlib.Path, model: LlamaConfig | None) -> "Adapters":
    """The adapters of a run's newest whole checkpoint.

    Args:
      directory: of the run.
      model: the architecture that they are for; `None` for the one that they were trained on.

    Raises:
      InputError: for a run that trained no adapters, and one without checkpoints; for adapters that do not fit the model.
    """
    from llama_jax.cli.arguments import parse_train
    from llama_jax.weights.peft import Adapters, require_fit
    from llama_jax.weights.restore import restore_parameters
    from llama_jax.weights.run import RUN_CHECKPOINTS

    path = directory / "config.yaml"
    config = parse_train(["--config", str(path)], path)
    if config.adapter.rank == 0:
        raise InputError(f"{directory}: a run without adapters (adapter.rank is 0) given; convert writes its model")
    restored = restore_parameters(directory / RUN_CHECKPOINTS)
    with blamed_on(f"{directory / RUN_CHECKPOINTS}: step {restored.step}"):
        require_fit(restored.state, model or config_from_dict(restored.metadata["model"]))
    return Adapters(restored.state, config.adapter.alpha / config.adapter.rank, config.run.init)
