"""What a run is, as its checkpoints say it: going on with another model, tokenizer or data order is refused."""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from llama_jax.data.batches import BLOCK, round_shares
from llama_jax.data.prepare import hash_tokenizer
from llama_jax.data.split import Split
from llama_jax.errors import InputError
from llama_jax.training.config import TrainConfig
from llama_jax.training.corpora import packing_identity, sources_identity
from llama_jax.training.step import TrainState
from llama_jax.weights.checkpoint_files import read_metadata
from llama_jax.weights.run import RUN_CHECKPOINTS

# Keys in the metadata of checkpoints that stand for what a config only names the place of.
TEXT = "paths (hash of the text)"
SOURCES = "sources (hash of the manifest x weight)"
TOKENIZER = "data.tokenizer (hash)"
MADE_FROM = "made_from"  # the report of the model that a run began with
WEIGHTS = "weights (hash)"  # in that report, under adapters: see `require_same_base`


def describe_run(config: TrainConfig, split: Split | None) -> dict:
    """What a checkpoint says of its run, but for a tokenizer yet to be trained: resuming with another of these is refused."""
    data = config.data
    values: dict[str, object] = {} if split is None else {
        "held_out_fraction": data.held_out_fraction,  # before the text, whose hash follows it: the first difference is told
        TEXT: split.train.sha256[:16],
    }  # fmt: skip
    # Data that are to be left out (`skip_steps`) may change: that is how a run gets past what it stumbled over.
    values |= {
        "length": data.length,
        "batch_rows": data.batch_rows,
        "seed": data.seed,
        **packing_identity(data),
        "batch_ramp": [list(stage) for stage in data.batch_ramp],
    }
    if len(data.sources) > 1 and any(share % BLOCK for share in round_shares([source.weight for source in data.sources])):
        values["mixture"] = "exact to 1e-6"  # earlier versions had rounded shares, and so another order
    adapter = dataclasses.asdict(config.adapter) | {"targets": ", ".join(config.adapter.targets)}
    preference = dataclasses.asdict(config.preference)
    optimizer = {"name": config.optimizer.name, "moments_dtype": config.optimizer.moments_dtype}  # what its state is
    if config.optimizer.param_dtype != "float32":
        optimizer |= {"param_dtype": config.optimizer.param_dtype}
    trained = {"model": dataclasses.asdict(config.model), "adapter": adapter, "preference": preference, "optimizer": optimizer}
    if split is None:
        return {**trained, "data": values | {SOURCES: sources_identity(data)}}
    if data.tokenizer is None:
        return {**trained, "data": values | {"vocab_size": data.vocab_size}}
    return {**trained, TOKENIZER: hash_tokenizer(Path(data.tokenizer))[:16], "data": values}


def require_same_run(saved: dict | None, wanted: dict, directory: Path) -> None:
    """Refuses to go on with another model, tokenizer or data order than the checkpoint's.

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
                f"{directory} holds a run with {key} {before.get(key)!r}, {now.get(key)!r} was asked for; "
                "take another --run.dir, or --run.overwrite true to start anew"
            )


def require_same_base(saved: dict | None, made_from: dict | None, directory: Path) -> None:
    """Refuses to go on with adapters over another model than the one that they were trained over so far.

    The model may have moved: its weights are compared. Checkpoints of earlier versions name only its place.

    Args:
      saved: metadata of the checkpoint, if there is one.
      made_from: the report of the model that was asked for, with `WEIGHTS` under adapters; `None` without `run.init`.
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
            f"{directory} holds adapters over {_named(before)}, but run.init is {_named(made_from)}: adapters fit only the "
            "model that they were trained over; give that as --run.init, or take another --run.dir"
        )


def _named(made_from: dict) -> str:
    digest = f", weights {made_from[WEIGHTS]}" if WEIGHTS in made_from else ""
    return f"{made_from.get('path')} ({made_from.get('origin')}{digest})"


def _leaves(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def require_same_model(config: TrainConfig) -> None:
    """Refuses a config with another model than the checkpoints of its directory, without looking at the text.

    Raises:
      InputError: naming the first difference.
    """
    directory = Path(config.run.dir)
    require_same_run(read_metadata(directory / RUN_CHECKPOINTS), {"model": dataclasses.asdict(config.model)}, directory)


def fingerprint(state: TrainState) -> str:
    """SHA-256 of every bit of a state, for telling whether two runs are the same."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
