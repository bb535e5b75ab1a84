"""The parts of a run, built from its config and checked against each other."""

import dataclasses
import hashlib
import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.axes import Array, Key, Parameters
from llama_jax.data.batches import BLOCK, round_shares
from llama_jax.data.held_out import Split
from llama_jax.data.prepare import hash_tokenizer
from llama_jax.data.token_set import TokenSet
from llama_jax.errors import InputError
from llama_jax.model.attention import choose_backend
from llama_jax.model.llama import Llama
from llama_jax.model.lora import Dropout, combine, init_adapters
from llama_jax.model.options import ModelOptions, resolve_dtype
from llama_jax.model.quantize import quantize
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, check_divisible, tree_shardings
from llama_jax.storage import atomic_write
from llama_jax.text.export import hugging_face_files
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_sections import AdapterConfig, micro_batch_size
from llama_jax.training.data import packing_identity, require_same_tokenizer, sources_identity
from llama_jax.training.loss import NEXT_TOKEN_FROZEN_HEAD, next_token, preference_objective
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama_jax.training.step import Draw, Recipe, TrainState, fresh_parameters
from llama_jax.weights.assemble import unstack
from llama_jax.weights.checkpoint import read_metadata
from llama_jax.weights.digest import weights_digest
from llama_jax.weights.inspect import report
from llama_jax.weights.load import Form, load
from llama_jax.weights.open import open_model
from llama_jax.weights.run import RUN_CHECKPOINTS

# --- adapters ---
#
# Fine-tuning by adapters: from a recipe for whole training to one for the adapters of a frozen
# model.


_BITS = {"int8": 8, "int4": 4}


def adapter_recipe(recipe: Recipe, config: TrainConfig) -> Recipe:
    """The recipe with adapters trained instead of the model, by `config.adapter` and
    `config.preference`.

    The trained tree holds adapters, in the form of the model; the frozen parameters come from
    `frozen_parameters`.

    Args:
      recipe: of whole training.
      config: with `adapter.rank` above 0.
    """
    adapter, beta = config.adapter, config.preference.beta

    def init(model: Llama, key: Key[Array, ""]) -> Parameters:
        """Adapters that change nothing yet."""
        fresh = init_adapters(key, model.config, adapter.rank, adapter.targets, adapter.new_tokens)
        return fresh if model.options.scan else unstack(fresh)

    def parameters(adapters: Parameters, frozen: Parameters, draw: Draw | None) -> Parameters:
        """The frozen model with its adapters; with dropout in training."""
        return combine(
            frozen,
            adapters,
            adapter.alpha / adapter.rank,
            dropout_at(adapter, config.run.seed, draw),
        )

    if beta > 0:
        objective = preference_objective(beta)
    else:
        objective = next_token(0.0) if adapter.new_tokens else NEXT_TOKEN_FROZEN_HEAD
    return recipe._replace(objective=objective, init=init, parameters=parameters)


def dropout_at(config: AdapterConfig, seed: int, draw: Draw | None) -> Dropout | None:
    """The dropout of one forward pass: a function of seed, update and micro-batch; none outside of
    training.
    """
    if draw is None or config.dropout == 0:
        return None
    key = jax.random.key(seed)
    for number in draw:
        key = jax.random.fold_in(key, number)
    return Dropout(key, config.dropout)


def base_dtype(config: AdapterConfig, model: Llama) -> str:
    """The float type in which a base is loaded: its type in training, or bfloat16 if it is then
    quantized.
    """
    return {"auto": model.options.dtype, "int8": "bfloat16", "int4": "bfloat16"}.get(
        config.base, config.base
    )


def held(params: Parameters, config: AdapterConfig, model: Llama) -> Parameters:
    """The weights of a base as `config.base` says that they are held in training."""
    bits, dtype = _BITS.get(config.base), base_dtype(config, model)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return quantize(params, bits) if bits else params


def frozen_parameters(
    params: Parameters, config: AdapterConfig, model: Llama, mesh: Mesh
) -> Parameters:
    """The base as it is held in training, on its shards.

    Args:
      params: of the base, in the form of the model; no longer needed afterwards if they are
        quantized.
      config: `base` says how the weights are held.
      model: the module that will run them.
      mesh: the devices.
    """
    frozen = held(params, config, model)
    return jax.device_put(frozen, tree_shardings(frozen, mesh, model.options.rules))


# --- identity ---
#
# What a run is, as its checkpoints say it: resuming with another model, tokenizer or data order is
# refused.


# Keys in the metadata of checkpoints for contents whose place alone a config names.
TEXT = "paths (hash of the text)"
SOURCES = "sources (hash of the manifest x weight)"
TOKENIZER = "data.tokenizer (hash)"
MADE_FROM = "made_from"  # the report of the model that a run began with
WEIGHTS = "weights (hash)"  # in that report, under adapters: see `require_same_base`


def describe_run(config: TrainConfig, split: Split | None) -> dict:
    """What a checkpoint says of its run, but for a tokenizer yet to be trained: resuming with
    another of these is refused.
    """
    data = config.data
    values: dict[str, object] = (
        {}
        if split is None
        else {
            # before the text, whose hash follows it: the first difference is reported
            "held_out_fraction": data.held_out_fraction,
            TEXT: split.train.sha256[:16],
        }
    )
    # Data that are to be left out (`skip_steps`) may change: this is how a run gets past the data
    # that it stumbled over.
    values |= {
        "length": data.length,
        "batch_size": data.batch_size,
        "seed": data.seed,
        **packing_identity(data),
        "batch_ramp": [list(stage) for stage in data.batch_ramp],
    }
    if len(data.sources) > 1 and any(
        share % BLOCK for share in round_shares([source.weight for source in data.sources])
    ):
        values["mixture"] = (
            "exact to 1e-6"  # earlier versions had rounded shares, and so another order
        )
    adapter = dataclasses.asdict(config.adapter) | {"targets": ", ".join(config.adapter.targets)}
    if not config.adapter.new_tokens:
        del adapter["new_tokens"]  # as before there were any
    preference = dataclasses.asdict(config.preference)
    optimizer = {
        "name": config.optimizer.name,
        "moments_dtype": config.optimizer.moments_dtype,
    }  # what its state is
    if config.optimizer.param_dtype != "float32":
        optimizer |= {"param_dtype": config.optimizer.param_dtype}
    trained = {
        "model": dataclasses.asdict(config.model),
        "adapter": adapter,
        "preference": preference,
        "optimizer": optimizer,
    }
    if split is None:
        return {**trained, "data": values | {SOURCES: sources_identity(data)}}
    if data.tokenizer is None:
        return {**trained, "data": values | {"vocab_size": data.vocab_size}}
    return {**trained, TOKENIZER: hash_tokenizer(Path(data.tokenizer))[:16], "data": values}


def require_same_run(saved: dict | None, wanted: dict, directory: Path) -> None:
    """Refuses to resume with another model, tokenizer or data order than the checkpoint's.

    Args:
      saved: metadata of the checkpoint, if there is one.
      wanted: the same of this run; a section that it does not have yet is not looked at.
      directory: of the run.

    Raises:
      InputError: naming the first difference.
    """
    if saved is None:
        return
    before, now = _leaves({section: saved.get(section) for section in wanted}), _leaves(wanted)
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            raise InputError(
                f"{directory} holds a run with {key} {before.get(key)!r}, "
                f"{now.get(key)!r} was asked for; "
                "take another --run.dir, or --run.overwrite true to start anew"
            )


def require_same_base(saved: dict | None, made_from: dict | None, directory: Path) -> None:
    """Refuses to resume adapters over another model than the one that they were trained over so
    far.

    The model may have moved: its weights are compared. Checkpoints of earlier versions name only
    its place.

    Args:
      saved: metadata of the checkpoint, if there is one.
      made_from: the report of the model that was asked for, with `WEIGHTS` under adapters; `None`
        without `run.init`.
      directory: of the run.

    Raises:
      InputError: naming both models.
    """
    before = None if saved is None else saved.get(MADE_FROM)
    if before is None or made_from is None or WEIGHTS not in made_from:
        return
    key = WEIGHTS if WEIGHTS in before else "path"
    if before.get(key) != made_from[key]:
        raise InputError(
            f"{directory} holds adapters over {_named(before)}, but run.init is "
            f"{_named(made_from)}: adapters fit only the "
            "model that they were trained over; give that as --run.init, or take another --run.dir"
        )


def _named(made_from: dict) -> str:
    digest = f", weights {made_from[WEIGHTS]}" if WEIGHTS in made_from else ""
    return f"{made_from.get('path')} ({made_from.get('origin')}{digest})"


def _leaves(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        flat |= (
            _leaves(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def require_same_model(config: TrainConfig) -> None:
    """Refuses a config with another model than the checkpoints of its directory, without looking at
    the text.

    Raises:
      InputError: naming the first difference.
    """
    directory = Path(config.run.dir)
    require_same_run(
        read_metadata(directory / RUN_CHECKPOINTS),
        {"model": dataclasses.asdict(config.model)},
        directory,
    )


def fingerprint(state: TrainState) -> str:
    """SHA-256 of every bit of a state, for telling whether two runs are the same."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


# --- setup ---


RUN_TEXT = (
    "tokenizer"  # in a run's directory: the tokenizer files of the model that the run began with
)


def make_directory(directory: Path) -> None:
    """Makes the directory of a run.

    Raises:
      InputError: if it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"run.dir: {directory} cannot be made ({error.strerror}); name a writable directory"
        ) from None
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
        raise InputError(
            f"model.vocab_size: {config.model.vocab_size} given, at least {vocabulary} "
            "(the tokenizer's) expected"
        )


def run_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a run, checked against its model and its batch."""
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, context=sizes.context)
    check_divisible(config.model, mesh, TRAINING)
    require_divisible_length(config, mesh.shape["context"])
    sequences, ways = micro_batch_size(config.data), mesh.shape["data"] * mesh.shape["fsdp"]
    if sequences % ways:
        raise InputError(
            f"data.batch_size: micro-batches of {sequences} sequences given; a multiple "
            f"of mesh.data * mesh.fsdp ({ways}) expected"
        )
    return mesh


def require_divisible_length(config: TrainConfig, parts: int) -> None:
    """Refuses sequences that this many devices cannot share with equal work, in two chunks each.

    Raises:
      InputError: naming the key, its value and the expected divisor.
    """
    if parts > 1 and config.data.length % (2 * parts):
        raise InputError(
            f"data.length: {config.data.length} given, a multiple of 2 * mesh.context "
            f"({2 * parts}) expected; "
            "choose another length or a smaller mesh.context"
        )


def require_attention(config: TrainConfig, platform: str | None = None) -> str:
    """The attention backend that `compute.attention` stands for; checked by `choose_backend`."""
    platform = platform or jax.devices()[0].platform
    return choose_backend(
        config.compute.attention,
        config.data.length,
        config.data.length,
        platform,
        config.model.head_dim,
        config.mesh.context,
        resolve_dtype(config.compute.dtype, platform),
    )


def make_recipe(config: TrainConfig, platform: str | None = None) -> Recipe:
    """Model, optimizer and schedule of a run, for the devices at hand or for those of a platform:
    `cpu`, `gpu`, `tpu`.
    """
    compute = config.compute
    platform = platform or jax.devices()[0].platform
    options = ModelOptions(
        dtype=resolve_dtype(compute.dtype, platform),
        scan=compute.scan_layers,
        remat=compute.remat,
        attention=require_attention(config, platform),
        context_attention=compute.context_attention,
    )
    schedule = learning_rate_schedule(config.optimizer, config.run.steps)
    optimizer, objective = make_optimizer(config.optimizer), next_token(config.optimizer.z_loss)
    sigma = config.guard.spike_sigma if config.guard.spike_skip else None
    recipe = Recipe(
        Llama(config.model, options),
        optimizer,
        schedule,
        compute.loss_chunk,
        objective,
        param_dtype=config.optimizer.param_dtype,
        spike_sigma=sigma,
    )
    return adapter_recipe(recipe, config) if config.adapter.rank else recipe


def require_fitting_objective(config: TrainConfig, unit: int) -> None:
    """Refuses preferences without pairs of answers, and pairs without preferences.

    Args:
      config: of the run.
      unit: neighbouring sequences of a batch that belong together: 2 for pairs.

    Raises:
      InputError: naming the key.
    """
    beta = config.preference.beta
    if (beta > 0) != (unit == 2):
        given = "pairs of a chosen and a rejected answer" if unit == 2 else "texts"
        raise InputError(
            f"preference.beta: {beta} given with data of {given}; a number above 0 with "
            "pairs, 0 with all else"
        )


def frozen_base(config: TrainConfig, recipe: Recipe, mesh: Mesh) -> tuple[Parameters, ...]:
    """The model under the adapters of a run, on its shards; nothing for a run that trains the model
    itself.
    """
    if not config.adapter.rank or config.run.init is None:
        return ()
    form: Form = "stacked" if recipe.model.options.scan else "unrolled"
    base = load(config.run.init, base_dtype(config.adapter, recipe.model), form, mesh)
    return (frozen_parameters(base.params, config.adapter, recipe.model, mesh),)


def frozen_shapes(config: TrainConfig, recipe: Recipe, mesh: Mesh) -> tuple[Parameters, ...]:
    """Shapes and shardings of what `frozen_base` gives; nothing is read."""
    if not config.adapter.rank or config.run.init is None:
        return ()
    base = jax.eval_shape(
        lambda: held(
            fresh_parameters(recipe.model, jax.random.key(0)), config.adapter, recipe.model
        )
    )
    places = tree_shardings(base, mesh, recipe.model.options.rules)
    return (
        jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), base, places
        ),
    )


def adopt(config: TrainConfig, writing: bool = True) -> tuple[TrainConfig, dict | None]:
    """The config of a run that begins with a model on disk, completed by what that model brings.

    Its tokenizer and chat template are copied into the run's directory, unless the config names
    another tokenizer or the data are prepared: then the chat template is theirs.

    Args:
      config: of the run.
      writing: false where another process copies the files.

    Returns:
      The config with `data.tokenizer` set, and the report on the model; or as it is and `None`
      without `run.init`.

    Raises:
      InputError: for a model that cannot be opened, of another architecture, without a tokenizer
        where none is named, or with another tokenizer than that of prepared data.
    """
    prepared = TokenSet.open(Path(config.data.sources[0].path)) if config.data.sources else None
    if prepared is not None and writing:
        _copy_template(prepared.tokenizer_path, Path(config.run.dir))
    if config.run.init is None:
        return config, None
    opened = open_model(config.run.init)
    if opened.source.config != config.model:
        raise InputError(
            f"model: another architecture than that of run.init ({config.run.init}) "
            "given; leave out its numbers"
        )
    facts = report(opened).to_dict() | {
        "path": config.run.init
    }  # as it was named: a name on the Hub stays one
    if config.adapter.rank:  # which fit this model only
        facts[WEIGHTS] = weights_digest(Path(config.run.init))[:16]
    if prepared is not None:
        require_same_tokenizer(prepared, opened.tokenizer, f"run.init ({config.run.init})")
    if config.data.tokenizer is not None or prepared is not None:
        return config, facts
    if opened.tokenizer is None:
        raise InputError(
            f"data.tokenizer: none given and none beside the weights of {config.run.init}; name one"
        )
    directory = Path(config.run.dir)
    folder = directory / RUN_TEXT
    template = None if opened.template is None else opened.template.source
    files = hugging_face_files(opened.tokenizer, template) if writing else {}
    for name, content in files.items():
        folder.mkdir(exist_ok=True)
        with atomic_write((directory if name == "chat_template.jinja" else folder) / name) as file:
            file.write(content)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer=str(folder))
    ), facts


def _copy_template(tokenizer: Path, directory: Path) -> None:
    """Takes the chat template of prepared data into a run's directory."""
    source = tokenizer / "chat_template.jinja"
    if source.is_file():
        with atomic_write(directory / source.name) as file:
            file.write(source.read_bytes())
