"""The parts of a run, built from its config and checked against each other."""

import dataclasses
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.axes import Parameters
from llama_jax.data.atomic import atomic_write
from llama_jax.data.token_set import TokenSet
from llama_jax.errors import InputError
from llama_jax.model.attention import choose_backend
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, check_divisible, tree_shardings
from llama_jax.text.export import hugging_face_files
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.adapters import adapter_recipe, base_dtype, frozen_parameters, held
from llama_jax.training.config import ComputeConfig, TrainConfig
from llama_jax.training.config_data import micro_rows
from llama_jax.training.corpora import require_same_tokenizer
from llama_jax.training.identity import WEIGHTS
from llama_jax.training.loss import next_token
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.schedule import learning_rate_schedule
from llama_jax.training.step import Recipe, fresh_parameters
from llama_jax.weights.digest import weights_digest
from llama_jax.weights.load import Form, load
from llama_jax.weights.open import open_model
from llama_jax.weights.report import report

RUN_TEXT = "tokenizer"  # in a run's directory: the tokenizer files of the model that the run began with


def make_directory(directory: Path) -> None:
    """Makes the directory of a run.

    Raises:
      InputError: if it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir: {directory} cannot be made ({error.strerror}); name a writable directory") from None
    if not os.access(directory, os.W_OK):
        raise InputError(f"run.dir: {directory} cannot be written; name a writable directory")


def require_vocabulary(config: TrainConfig) -> None:
    """Refuses a given tokenizer with tokens that the model does not have.

    Raises:
      InputError: with both sizes; or if there is no such tokenizer.
    """
    if config.data.tokenizer is None:
        return
    vocabulary = load_tokenizer(Path(config.data.tokenizer)).vocab_size
    if vocabulary > config.model.vocab_size:
        raise InputError(f"model.vocab_size: {config.model.vocab_size} given, at least {vocabulary} (the tokenizer's) expected")


def run_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a run, checked against its model and its batch."""
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, context=sizes.context)
    check_divisible(config.model, mesh, TRAINING)
    require_divisible_length(config, mesh.shape["context"])
    rows, ways = micro_rows(config.data), mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise InputError(
            f"data.batch_rows: micro-batches of {rows} rows given; a multiple of mesh.data * mesh.fsdp ({ways}) expected"
        )
    return mesh


def require_divisible_length(config: TrainConfig, parts: int) -> None:
    """Refuses rows that so many devices cannot share with equal work, in two chunks each.

    Raises:
      InputError: naming the key, its value and what it should be a multiple of.
    """
    if parts > 1 and config.data.length % (2 * parts):
        raise InputError(
            f"data.length: {config.data.length} given, a multiple of 2 * mesh.context ({2 * parts}) expected; "
            "choose another length or a smaller mesh.context"
        )


def compute_dtype(compute: ComputeConfig, platform: str | None = None) -> str:
    """The dtype that `compute.dtype` stands for on the devices at hand, or on those of a platform."""
    on_cpu = (platform or jax.devices()[0].platform) == "cpu"
    return compute.dtype if compute.dtype != "auto" else "float32" if on_cpu else "bfloat16"


def make_recipe(config: TrainConfig, platform: str | None = None) -> Recipe:
    """Model, optimizer and schedule of a run, for the devices at hand or for those of a platform: `cpu`, `gpu`, `tpu`."""
    compute = config.compute
    platform = platform or jax.devices()[0].platform
    dtype, length = compute_dtype(compute, platform), config.data.length
    head_dim, parts = config.model.head_dim, config.mesh.context
    attention = choose_backend(compute.attention, length, length, platform, head_dim, parts, dtype)
    options = ModelOptions(
        dtype=dtype, scan=compute.scan_layers, remat=compute.remat, attention=attention,
        context_attention=compute.context_attention,
    )  # fmt: skip
    schedule = learning_rate_schedule(config.optimizer, config.run.steps)
    optimizer, objective = make_optimizer(config.optimizer), next_token(config.optimizer.z_loss)
    sigma = config.guard.spike_sigma if config.guard.spike_skip else None
    recipe = Recipe(Llama(config.model, options), optimizer, schedule, compute.loss_chunk, objective,
                    param_dtype=config.optimizer.param_dtype, spike_sigma=sigma)  # fmt: skip
    return adapter_recipe(recipe, config) if config.adapter.rank else recipe


def require_fitting_objective(config: TrainConfig, unit: int) -> None:
    """Refuses preferences without pairs of answers, and pairs without preferences.

    Args:
      config: of the run.
      unit: neighbouring rows of a batch that belong together: 2 for pairs.

    Raises:
      InputError: naming the key.
    """
    beta = config.preference.beta
    if (beta > 0) != (unit == 2):
        given = "pairs of a chosen and a rejected answer" if unit == 2 else "texts"
        raise InputError(f"preference.beta: {beta} given with data of {given}; a number above 0 with pairs, 0 with all else")


def frozen_base(config: TrainConfig, recipe: Recipe, mesh: Mesh) -> tuple[Parameters, ...]:
    """The model under the adapters of a run, on its shards; nothing for a run that trains the model itself."""
    if not config.adapter.rank or config.run.init is None:
        return ()
    form: Form = "stacked" if recipe.model.options.scan else "unrolled"
    base = load(config.run.init, base_dtype(config.adapter, recipe.model), form, mesh)
    return (frozen_parameters(base.params, config.adapter, recipe.model, mesh),)


def frozen_shapes(config: TrainConfig, recipe: Recipe, mesh: Mesh) -> tuple[Parameters, ...]:
    """Shapes and shardings of what `frozen_base` gives; nothing is read."""
    if not config.adapter.rank or config.run.init is None:
        return ()
    base = jax.eval_shape(lambda: held(fresh_parameters(recipe.model, jax.random.key(0)), config.adapter, recipe.model))
    places = tree_shardings(base, mesh, recipe.model.options.rules)
    return (jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), base, places),)


def adopt(config: TrainConfig, writing: bool = True) -> tuple[TrainConfig, dict | None]:
    """The config of a run that begins with a model on disk, completed by what that model brings.

    Its tokenizer and chat template are copied into the run's directory, unless the config names another tokenizer or the
    data are prepared: then the chat template is theirs.

    Args:
      config: of the run.
      writing: false where another process copies the files.

    Returns:
      The config with `data.tokenizer` set, and the report on the model; or as it is and `None` without `run.init`.

    Raises:
      InputError: for a model that cannot be opened, of another architecture, without a tokenizer where none is named, or
        with another tokenizer than that of prepared data.
    """
    prepared = TokenSet.open(Path(config.data.sources[0].path)) if config.data.sources else None
    if prepared is not None and writing:
        _copy_template(prepared.tokenizer_path, Path(config.run.dir))
    if config.run.init is None:
        return config, None
    opened = open_model(config.run.init)
    if opened.source.config != config.model:
        raise InputError(f"model: another architecture than that of run.init ({config.run.init}) given; leave out its numbers")
    facts = report(opened).to_dict() | {"path": config.run.init}  # as it was named: a name on the Hub stays one
    if config.adapter.rank:  # which fit this model only
        facts[WEIGHTS] = weights_digest(Path(config.run.init))[:16]
    if prepared is not None:
        require_same_tokenizer(prepared, opened.tokenizer, f"run.init ({config.run.init})")
    if config.data.tokenizer is not None or prepared is not None:
        return config, facts
    if opened.tokenizer is None:
        raise InputError(f"data.tokenizer: none given and none beside the weights of {config.run.init}; name one")
    directory = Path(config.run.dir)
    folder = directory / RUN_TEXT
    template = None if opened.template is None else opened.template.source
    files = hugging_face_files(opened.tokenizer, template) if writing else {}
    for name, content in files.items():
        folder.mkdir(exist_ok=True)
        with atomic_write((directory if name == "chat_template.jinja" else folder) / name) as file:
            file.write(content)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(folder))), facts


def _copy_template(tokenizer: Path, directory: Path) -> None:
    """Takes the chat template of prepared data into a run's directory."""
    source = tokenizer / "chat_template.jinja"
    if source.is_file():
        with atomic_write(directory / source.name) as file:
            file.write(source.read_bytes())
