"""One call for every kind of model on disk: opened, then its weights read into a parameter tree."""

import pathlib
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from llama_jax.axes import Array, Parameters, PyTree
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import TRAINING, Rules, check_divisible
from llama_jax.text.chat import ChatTemplate
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.assemble import Finish, Form, as_it_is, assemble, check_form, unrolled
from llama_jax.weights.inspect import Report, report
from llama_jax.weights.open import open_model
from llama_jax.weights.restore import restore_parameters, verified_parameters
from llama_jax.weights.run import RUN_CHECKPOINTS, RUN_TOKENIZER, RunSlices, RunSource, origin_of

__all__ = ["RUN_CHECKPOINTS", "RUN_TOKENIZER", "Form", "Pretrained", "load"]


class Pretrained(NamedTuple):
    """A model with all that is needed to use it.

    Attributes:
      config: the architecture.
      params: the parameter tree.
      tokenizer: text to ids and back; `None` for a Hugging Face directory without tokenizer files.
      template: how the model wants a conversation written; `None` if its files say nothing.
      stop_ids: tokens that end a text.
      origin: one line that names the loaded files, damaged checkpoints that were passed over
        included; for people.
      report: findings from the files' headers; `report.to_dict()` is JSON, for what is
        made of this model.
    """

    config: LlamaConfig
    params: Parameters
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    origin: str
    report: Report


def load(
    path: str | pathlib.Path,
    dtype: DTypeLike = "float32",
    form: Form = "unrolled",
    mesh: Mesh | None = None,
    rules: Rules = TRAINING,
    finish: Finish = as_it_is,
) -> Pretrained:
    """Loads a model of any kind that `open_model` opens.

    Args:
      path: where it is.
      dtype: type of the parameters in memory.
      form: `unrolled` (fastest to decode with) or `stacked` (the form of training).
      mesh: devices to lay the parameters out over: no device and no host ever holds more than its
        shards and one tensor of one layer (its shards of all layers, for a run). The default device
        where `None`.
      rules: axis name -> mesh axes, for `mesh`.
      finish: called with the path and the array of each parameter as it comes, before the next is
        read; what it returns takes its place. With `llama_jax.model.quantize.leaf_quantizer(8)` the
        wide model never is in memory.

    Raises:
      InputError: for a path that holds no model, naming whatever is wrong inside, for another form
        or dtype than there are, and for a mesh that does not divide it.
      CorruptError: when every checkpoint of a run is damaged.
    """
    check_form(form, dtype)
    opened = open_model(path)
    source = opened.source
    if isinstance(source, RunSource) and mesh is None:
        params, origin = _by_layers(source, dtype, form, rules, finish)
    elif (
        isinstance(source, RunSource)
        and mesh is not None
        and (source.stacked or form == "unrolled")
    ):
        params, origin = _restored(source, dtype, form, mesh, rules, finish)
    elif isinstance(source, RunSource):  # layer by layer, as with the files of others
        params = assemble(source, form, dtype, mesh, rules, finish)
        origin = origin_of(source.directory, source.verified)
    else:
        params, origin = assemble(source, form, dtype, mesh, rules, finish), opened.origin
    facts = report(opened._replace(origin=origin))
    return Pretrained(
        opened.source.config,
        params,
        opened.tokenizer,
        opened.template,
        opened.stop_ids,
        origin,
        facts,
    )


def _by_layers(
    source: RunSource, dtype: DTypeLike, form: Form, rules: Rules, finish: Finish
) -> tuple[Parameters, str]:
    """The parameters of a run, read and verified a layer at a time, and a line that says where they
    come from.
    """
    restored = verified_parameters(
        source.directory / RUN_CHECKPOINTS,
        lambda checkpoint: assemble(
            RunSlices(source, checkpoint), form, dtype, None, rules, finish
        ),
    )
    if restored is None:
        raise InputError(
            f"{source.directory / RUN_CHECKPOINTS}: no checkpoint there, the checkpoints "
            "of a run expected"
        )
    return restored.state, origin_of(source.directory, restored)


def _restored(
    source: RunSource, dtype: DTypeLike, form: Form, mesh: Mesh, rules: Rules, finish: Finish
) -> tuple[Parameters, str]:
    """The parameters of a run over a mesh, each shard read where it lives, and a line that says
    where they come from.
    """
    check_divisible(source.config, mesh, rules)

    def place(path: str, leaf: Array) -> dict[str, PyTree]:
        """A parameter in the form asked for."""
        arrays = unrolled(path, leaf) if form == "unrolled" else [(path, leaf)]
        return {name: jax.block_until_ready(finish(name, array)) for name, array in arrays}

    restored = restore_parameters(source.directory / RUN_CHECKPOINTS, dtype, mesh, rules, place)
    return restored.state, origin_of(source.directory, restored)
