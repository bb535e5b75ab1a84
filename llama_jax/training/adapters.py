"""Fine-tuning by adapters: from a recipe for whole training to one for the adapters of a frozen model."""

import jax
from jax.sharding import Mesh

from llama_jax.axes import Array, Key, Parameters
from llama_jax.model.adapters import Dropout, combine, init_adapters
from llama_jax.model.llama import Llama
from llama_jax.model.quantize import quantize
from llama_jax.parallel.sharding import tree_shardings
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_method import AdapterConfig
from llama_jax.training.loss import NEXT_TOKEN_FROZEN_HEAD
from llama_jax.training.preference import preference_objective
from llama_jax.training.step import Draw, Recipe
from llama_jax.weights.forms import unstack

_BITS = {"int8": 8, "int4": 4}


def adapter_recipe(recipe: Recipe, config: TrainConfig) -> Recipe:
    """The recipe with adapters trained instead of the model, by `config.adapter` and `config.preference`.

    What is trained is a tree of adapters, in the form of the model; what is frozen comes from `frozen_parameters`.

    Args:
      recipe: of whole training.
      config: with `adapter.rank` above 0.
    """
    adapter, beta = config.adapter, config.preference.beta

    def init(model: Llama, key: Key[Array, ""]) -> Parameters:
        """Adapters that change nothing yet."""
        fresh = init_adapters(key, model.config, adapter.rank, adapter.targets)
        return fresh if model.options.scan else unstack(fresh)

    def parameters(adapters: Parameters, frozen: Parameters, draw: Draw | None) -> Parameters:
        """The frozen model with its adapters; with dropout in training."""
        return combine(frozen, adapters, adapter.alpha / adapter.rank, dropout_at(adapter, config.run.seed, draw))

    objective = preference_objective(beta) if beta > 0 else NEXT_TOKEN_FROZEN_HEAD
    return recipe._replace(objective=objective, init=init, parameters=parameters)


def dropout_at(config: AdapterConfig, seed: int, draw: Draw | None) -> Dropout | None:
    """The dropout of one forward pass: a function of seed, update and micro-batch; none outside of training."""
    if draw is None or config.dropout == 0:
        return None
    key = jax.random.key(seed)
    for number in draw:
        key = jax.random.fold_in(key, number)
    return Dropout(key, config.dropout)


def base_dtype(config: AdapterConfig, model: Llama) -> str:
    """The float type in which a base is to be loaded: the one it will have, bfloat16 where it is made narrower still."""
    return {"auto": model.options.dtype, "int8": "bfloat16", "int4": "bfloat16"}.get(config.base, config.base)


def held(params: Parameters, config: AdapterConfig, model: Llama) -> Parameters:
    """The weights of a base as `config.base` says that they are held in training."""
    bits, dtype = _BITS.get(config.base), base_dtype(config, model)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return quantize(params, bits) if bits else params


def frozen_parameters(params: Parameters, config: AdapterConfig, model: Llama, mesh: Mesh) -> Parameters:
    """The base as it is held in training, on its shards.

    Args:
      params: of the base, in the form of the model; no longer needed afterwards where they are made narrower.
      config: `base` says how the weights are held.
      model: the module that will run them.
      mesh: the devices.
    """
    frozen = held(params, config, model)
    return jax.device_put(frozen, tree_shardings(frozen, mesh, model.options.rules))
