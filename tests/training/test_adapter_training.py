"""Training adapters: one step against PyTorch, across meshes and forms, what it costs, and what it
leaves alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from support import TINY, random_parameters, transformers_model
from test_step import parameters, random_batch

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama
from llama_jax.model.lora import merge
from llama_jax.model.options import ModelOptions
from llama_jax.model.quantize import parameter_bytes, quantize
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.config import RunConfig, TrainConfig
from llama_jax.training.config_sections import (
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    PreferenceConfig,
)
from llama_jax.training.loss import batch_loss
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama_jax.training.setup import adapter_recipe, dropout_at, frozen_parameters
from llama_jax.training.step import (
    Recipe,
    TrainState,
    batch_sharding,
    init_state,
    micro_batches,
    sharded_step,
    state_shapes,
    train_step,
)
from llama_jax.weights.assemble import stack, unstack

# Divisible by a 2 x 2 x 2 mesh and by groups of 32.
CONFIG = dataclasses.replace(TINY, vocab_size=96, dim=64, layers=2, heads=4, head_dim=16)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=0, final_fraction=1.0, clip_norm=1e9, weight_decay=0.5
)


def train_config(model: LlamaConfig = CONFIG, beta: float = 0.0, **adapter) -> TrainConfig:
    adapter = AdapterConfig(**{"rank": 4, "alpha": 8.0, **adapter})
    return TrainConfig(
        run=RunConfig(init="base"),
        model=model,
        data=DataConfig(length=24, tokenizer="base"),
        adapter=adapter,
        preference=PreferenceConfig(beta),
    )


def make(config: TrainConfig, optimizer=OPTIMIZER, **options) -> Recipe:
    schedule = learning_rate_schedule(optimizer, 10)
    whole = Recipe(
        Llama(config.model, ModelOptions(**options)), make_optimizer(optimizer), schedule, 64
    )
    return adapter_recipe(whole, config)


def warm_state(recipe: Recipe) -> TrainState:
    """A state whose second factors are not zero, so that every gradient is something; the same in
    both forms.
    """
    state = fresh_state(recipe)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32),
        jax.eval_shape(stack, state.params),
    )
    return state._replace(
        params=jax.tree.map(jnp.asarray, drawn if "layers" in state.params else unstack(drawn))
    )


def fresh_state(recipe: Recipe) -> TrainState:
    return jax.jit(functools.partial(init_state, recipe))(jax.random.key(0))


def run(recipe: Recipe, frozen, batch, sizes=(1, 1, 1), accumulation=1, steps=1):
    """Adapters and figures after some steps on a mesh."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        shapes = state_shapes(recipe, mesh)
        state = jax.tree.map(
            lambda x, like: jax.device_put(np.array(x), like.sharding), warm_state(recipe), shapes
        )
        placed = jax.device_put(
            micro_batches(jax.device_get(batch), accumulation), batch_sharding(recipe, mesh)
        )
        frozen = frozen_parameters(frozen, AdapterConfig(rank=4), recipe.model, mesh)
        step = sharded_step(recipe, mesh, frozen)
        for _ in range(steps):
            state, metrics = step(state, placed, frozen)
    return jax.device_get(state.params), jax.device_get(metrics)


def close(got, expected, atol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), got, expected)


def test_fresh_adapters_have_the_loss_of_the_base():
    recipe, params, batch = make(train_config()), parameters(CONFIG), random_batch(CONFIG)

    @jax.jit
    def losses(params, batch):
        _, metrics = train_step(
            recipe, init_state(recipe, jax.random.key(0)), micro_batches(batch, 1), params
        )
        return metrics.loss, batch_loss(recipe.model, params, batch, 64) / jnp.sum(batch.weights)

    np.testing.assert_allclose(*losses(params, batch), rtol=1e-6)


def test_mesh_accumulation_and_form_change_nothing():
    config, params, batch = train_config(), parameters(CONFIG), random_batch(CONFIG)
    sgd = lambda **options: make(config, **options)._replace(
        optimizer=optax.sgd(1.0), schedule=optax.constant_schedule(1.0)
    )
    expected, figures = run(sgd(), params, batch)
    got, split = run(sgd(remat="full"), params, batch, (2, 2, 2))
    close(got, expected)
    np.testing.assert_allclose(jax.tree.leaves(split), jax.tree.leaves(figures), rtol=1e-5)
    close(run(sgd(), params, batch, accumulation=4)[0], expected)
    unrolled = jax.tree.map(jnp.asarray, unstack(jax.device_get(params)))
    close(run(sgd(scan=False), unrolled, batch)[0], unstack(expected))


def test_adapters_and_moments_are_sharded_and_the_rank_is_not():
    mesh, recipe = make_mesh(2, 2, 2), make(train_config())
    shapes = state_shapes(recipe, mesh)
    moments = shapes.optimizer[1].mu
    for tree in (shapes.params, moments):
        attention, feed_forward = tree["layers"]["attention"], tree["layers"]["feed_forward"]
        assert attention["wq"]["a"].sharding.spec == PartitionSpec(None, ("fsdp", "context"), None)
        assert attention["wq"]["b"].sharding.spec == PartitionSpec(None, None, ("tensor",))
        assert feed_forward["down"]["a"].sharding.spec == PartitionSpec(None, ("tensor",), None)
        assert feed_forward["down"]["b"].sharding.spec == PartitionSpec(
            None, None, ("fsdp", "context")
        )


@pytest.mark.parametrize("base", ["int8", "int4"])
def test_narrow_base_trains_and_stays_as_it_is(base):
    config = train_config(base=base, dropout=0.1)
    recipe = make(config, dataclasses.replace(OPTIMIZER, weight_decay=0.0))
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        frozen = frozen_parameters(parameters(CONFIG), config.adapter, recipe.model, mesh)
        before = jax.tree.map(np.array, frozen)
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(frozen)}
        assert base in kinds or (base == "int4" and "uint8" in kinds)
        batch = micro_batches(jax.device_get(random_batch(CONFIG)), 2 if base == "int8" else 1)
        batch = jax.device_put(batch, batch_sharding(recipe, mesh))
        step, state, losses = sharded_step(recipe, mesh, frozen), fresh_state(recipe), []
        for _ in range(8):
            state, metrics = step(state, batch, frozen)
            losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_dropout_is_a_function_of_seed_step_and_micro_batch_and_off_outside_of_training():
    config = AdapterConfig(rank=4, dropout=0.5)
    draws = [
        dropout_at(config, seed, (jnp.int32(step), jnp.int32(micro)))
        for seed, step, micro in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    assert len({tuple(np.asarray(jax.random.key_data(draw.key)).tolist()) for draw in draws}) == 4
    assert dropout_at(config, 0, None) is None
    batch, (wet, dry) = (
        random_batch(CONFIG),
        (make(train_config(dropout=rate)) for rate in (0.5, 0.0)),
    )
    loss = jax.jit(lambda params, batch: batch_loss(dry.model, params, batch, 64))
    adapters, first = warm_state(dry).params, (jnp.int32(0), jnp.int32(0))
    outside, plain, undropped, dropped = (
        float(loss(recipe.parameters(adapters, parameters(CONFIG), draw), batch))
        for recipe, draw in ((wet, None), (dry, None), (dry, first), (wet, first))
    )
    assert outside == plain == undropped != dropped


def base_layer(model):
    """Bytes of the matrices of one layer in float32."""
    return (
        4
        * model.dim
        * (
            2 * model.heads * model.head_dim
            + 2 * model.kv_heads * model.head_dim
            + 3 * model.ffn_dim
        )
    )


def test_frozen_part_costs_neither_gradients_nor_optimizer_state():
    model = dataclasses.replace(
        CONFIG, vocab_size=512, dim=256, layers=8, heads=4, kv_heads=2, head_dim=64, ffn_dim=1024
    )
    sequences, length = 1, 32
    batch = micro_batches(jax.device_get(random_batch(model, sequences, length)), 1)
    config, mesh = train_config(model), make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        recipe = make(config, remat="full")
        frozen = jax.eval_shape(lambda: random_parameters(model))
        state = state_shapes(recipe, mesh)
        figures = (
            sharded_step(recipe, mesh, frozen)
            .lower(state, batch, frozen)
            .compile()
            .memory_analysis()
        )
        narrow = jax.eval_shape(lambda: quantize(random_parameters(model), 8))
        narrow_figures = (
            sharded_step(recipe, mesh, narrow)
            .lower(state, batch, narrow)
            .compile()
            .memory_analysis()
        )
    base, trained = parameter_bytes(frozen), parameter_bytes(state.params)
    assert trained < base / 20
    inputs, guard = parameter_bytes(batch), parameter_bytes(state.guard)
    # In: the base once, adapters and two moments, the guard. Out: adapters, moments and guard again
    #   (in the same memory), and
    # a few figures.
    assert (
        base + 3 * trained
        <= figures.argument_size_in_bytes
        <= base + 3 * trained + inputs + guard + 1024
    )
    assert 3 * trained <= figures.output_size_in_bytes <= 3 * trained + guard + 1024
    assert figures.alias_size_in_bytes >= 3 * trained
    # Between: gradients of the adapters, one layer's activations and weights (widened, turned), the
    #   stream before each layer,
    # and a chunk of logits; far from the gradients of the base, another `base` bytes.
    layer = base_layer(model) + sequences * length * (4 * model.dim + 8 * model.ffn_dim) * 4
    stream, logits = (
        (model.layers + 4) * sequences * length * model.dim * 4,
        3 * sequences * length * model.vocab_size * 4,
    )
    bound = 2 * trained + layer + stream + logits
    print(
        f"base {base / 2**20:.1f} MiB, trained {trained / 2**20:.1f}, temporaries "
        f"{figures.temp_size_in_bytes / 2**20:.1f}, "
        f"with an int8 base {narrow_figures.temp_size_in_bytes / 2**20:.1f}, bound "
        f"{bound / 2**20:.1f}"
    )
    assert bound < base / 3
    assert figures.temp_size_in_bytes <= bound
    assert narrow_figures.temp_size_in_bytes <= bound


def test_what_cannot_be_is_refused_in_one_line():
    for change, words in (
        (
            {"rank": 33},
            "adapter.rank: 33 given, at most the smaller side of the targets' matrices "
            ".32. expected",
        ),
        ({"rank": -1}, "adapter.rank: -1 given, a whole number"),
        ({"alpha": 0.0}, "adapter.alpha: 0.0 given"),
        ({"dropout": 1.0}, "adapter.dropout: 1.0 given"),
        ({"rank": True}, "adapter.rank: True given"),
        ({"targets": ("q_proj",)}, "adapter.targets: .'q_proj',. given"),
        ({"targets": ()}, "adapter.targets"),
        ({"targets": ("wq", "wq")}, "adapter.targets"),
        ({"rank": 0, "beta": 0.1}, "adapter.rank: 0 given, 1 or more"),
    ):
        with pytest.raises(InputError, match=words) as error:
            train_config(**{"model": dataclasses.replace(CONFIG, head_dim=16), **change})
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"run\.init: None given, a model"):
        dataclasses.replace(train_config(), run=RunConfig())


@pytest.mark.parity
def test_one_step_equals_pytorch_autograd_and_adamw():
    torch = pytest.importorskip("torch")
    config, params, batch = (
        train_config(targets=("wq", "wo", "up", "down")),
        parameters(CONFIG),
        jax.device_get(random_batch(CONFIG)),
    )
    batch = batch._replace(documents=np.ones_like(batch.documents))
    recipe = make(config)
    state = warm_state(recipe)
    after, metrics = jax.jit(functools.partial(train_step, recipe))(
        state, micro_batches(batch, 1), params
    )

    model = transformers_model(CONFIG, params)
    names = {
        "wq": "self_attn.q_proj",
        "wo": "self_attn.o_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    factors = {}

    def hook(a, b):
        return lambda module, given, out: out + given[0] @ a @ b * 2.0

    for i, layer in enumerate(model.model.layers):
        for part in ("attention", "feed_forward"):
            for name, pair in state.params["layers"][part].items():
                a, b = (
                    torch.tensor(np.array(pair[factor])[i], requires_grad=True)
                    for factor in ("a", "b")
                )
                factors[i, part, name] = (a, b)
                layer.get_submodule(names[name]).register_forward_hook(hook(a, b))
    every = [x for pair in factors.values() for x in pair]
    optimizer = torch.optim.AdamW(every, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    out = model(torch.from_numpy(np.array(batch.tokens)).long()).logits
    targets = torch.from_numpy(np.array(batch.targets)).long().flatten()
    each = torch.nn.functional.cross_entropy(out.flatten(0, 1), targets, reduction="none")
    weights = torch.from_numpy(np.array(batch.weights)).flatten()
    loss = (each * weights).sum() / weights.sum()
    loss.backward()
    np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-5)
    norm = sum(float((x.grad**2).sum()) for x in every) ** 0.5
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    optimizer.step()
    for (i, part, name), pair in factors.items():
        for factor, wanted in zip(("a", "b"), pair):
            sure = (
                wanted.grad.numpy().__abs__() > 1e-5
            )  # the sign of a gradient that is all rounding is not defined
            got = np.asarray(after.params["layers"][part][name][factor])[i]
            np.testing.assert_allclose(got[sure], wanted.detach().numpy()[sure], atol=1e-5)
    merged = jax.eval_shape(lambda adapters: merge(params, adapters, 2.0), after.params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
