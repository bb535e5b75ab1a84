"""Every optimizer against its formula in float64, whatever the form of the tree; AdamW against
optax and PyTorch besides.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_formulas import any_batch, given_recipe, matrices, names_of, trained_by_formula

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.errors import InputError
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.optimizer import decayed, learning_rate_schedule, make_optimizer
from llama_jax.training.step import fresh_state, train_step
from llama_jax.weights.assemble import unstack

NAMES = ("adamw", "adafactor", "lion", "muon")
STEPS = 5
WHOLE = {
    "embedding": (160, 144),
    "final_norm": {"scale": (144,)},
    "head": (144, 160),
    "layers": {
        "attention_norm": {"scale": (2, 144)},
        "attention": {"wq": (2, 144, 132), "wk": (2, 144, 24)},
        "feed_forward": {"down": (2, 136, 144)},
    },
}
# More layers than Adafactor's smallest side: stacked norms look like a matrix here.
DEEP = {
    "embedding": (8, 130),
    "layers": {"attention_norm": {"scale": (130, 130)}, "attention": {"wo": (130, 6, 8)}},
}
ADAPTERS = {
    "layers": {
        "attention": {"wq": {"a": (2, 144, 130), "b": (2, 130, 132)}},
        "feed_forward": {"up": {"a": (2, 144, 4), "b": (2, 4, 136)}},
    }
}
TREES = {"whole": WHOLE, "deep": DEEP, "adapters": ADAPTERS}


def is_shape(x) -> bool:
    return isinstance(x, tuple)


def drawn(tree, seed=0, lead=(), zero_b=True):
    """Normal numbers of the shapes of a tree, with leading dimensions; the second factors of
    adapters begin at zero.
    """
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        scale = 0.0 if not lead and zero_b and path[-1].key == "b" else 0.1
        return rng.normal(0, scale, (*lead, *shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree, is_leaf=is_shape)


def config_of(name: str, **changes) -> OptimizerConfig:
    values = {
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "clip_norm": 1e9,
        "eps": 1e-6,
        "weight_decay": 0.3,
    }
    return OptimizerConfig(name=name, **{**values, **changes})


@functools.cache
def programs(config: OptimizerConfig, steps: int):
    """A fresh state of some parameters, and the training step with a gradient that is given."""
    recipe = given_recipe(config, steps, None)
    return jax.jit(functools.partial(fresh_state, recipe)), jax.jit(
        functools.partial(train_step, recipe)
    )


def of_step(gradients, count: int):
    """One step's of the gradients of several."""
    return jax.tree.map(lambda g: g[count], gradients)


def train(config: OptimizerConfig, params, gradients, steps=STEPS):
    """What the training step makes of given gradients."""
    fresh, step = programs(config, steps)
    state = fresh(params)
    for count in range(steps):
        state, _ = step(state, any_batch(), of_step(gradients, count))
    return state


def close(got, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), got, expected)


# What each number is moved by alone is indifferent to the form of a tree; matrices are not.
@pytest.mark.parametrize(
    ("name", "tree"),
    [
        pytest.param(
            name,
            tree,
            marks=pytest.mark.slow if tree != "whole" and name in ("adamw", "lion") else [],
        )
        for name in NAMES
        for tree in TREES
    ],
)
def test_updates_equal_the_formula_in_either_form(name, tree):
    config, params, gradients = config_of(name), drawn(TREES[tree]), drawn(TREES[tree], 1, (STEPS,))
    expected = trained_by_formula(config, STEPS, params, gradients)
    got = train(config, params, gradients).params
    # Five steps of 1e-2 or less; a sign or an orthogonal matrix is as sure as what it is made of.
    close(got, expected, atol=2e-6)
    if tree == "deep":  # 130 layers one by one compile for a minute
        return
    layers = [unstack(of_step(gradients, k)) for k in range(STEPS)]
    unrolled = train(config, unstack(params), jax.tree.map(lambda *g: np.stack(g), *layers)).params
    close(jax.device_get(unrolled), unstack(jax.device_get(got)), atol=1e-6)


def test_muon_makes_the_matrices_of_layers_orthogonal():
    """By the singular value decomposition of what the first update must be along, and nothing of
    the kind elsewhere.
    """
    config, params, gradients = (
        config_of("muon", weight_decay=0.0),
        drawn(WHOLE),
        drawn(WHOLE, 1, (1,)),
    )
    after = train(config, params, gradients, steps=1).params
    rate = 0.5e-2  # half of the warm-up
    found = 0
    for (path, before), now, gradient in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(after),
        jax.tree.leaves(gradients),
    ):
        names = names_of(path)
        for p, q, g in zip(
            matrices(names, before), matrices(names, np.asarray(now)), matrices(names, gradient[0])
        ):
            update = (p - q) / rate
            if names[0] != "layers" or "scale" in names:
                np.testing.assert_allclose(
                    update, g / (np.abs(g) + config.eps), atol=1e-4
                )  # AdamW's first
                continue
            left, _, right = np.linalg.svd(g, full_matrices=False)
            inside = left.T @ update @ right.T / (0.2 * max(g.shape) ** 0.5)
            values = np.diag(inside)
            assert np.all((values > 0.3) & (values < 1.3)), values
            np.testing.assert_allclose(inside - np.diag(values), 0, atol=1e-3)
            np.testing.assert_allclose(
                np.sqrt(np.mean(update**2)), 0.2, rtol=0.2
            )  # AdamW's, as published
            found += 1
    assert found == 6


def test_adamw_is_that_of_optax_with_a_schedule():
    """The learning rate has only moved to behind the optimizer. One operation after the other, as
    no compiler fuses them.
    """
    tree = {"embedding": (9, 6), "final_norm": {"scale": (6,)}}
    config, params, gradients = (
        config_of("adamw", clip_norm=0.3),
        drawn(tree),
        drawn(tree, 1, (STEPS,)),
    )
    assert (
        min(np.linalg.norm(gradients["embedding"][count]) for count in range(STEPS)) > 0.3
    )  # so all are cut
    recipe = given_recipe(config, STEPS, None)
    adamw = optax.adamw(
        recipe.schedule, config.beta1, config.beta2, config.eps, weight_decay=0.3, mask=decayed
    )
    theirs = optax.chain(optax.clip_by_global_norm(0.3), adamw)
    expected, state = jax.tree.map(jnp.asarray, params), theirs.init(params)
    got = fresh_state(recipe, expected)
    for count in range(STEPS):
        gradient = of_step(gradients, count)
        updates, state = theirs.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
        got, _ = train_step(recipe, got, any_batch(), gradient)
    close(got.params, expected, rtol=3e-7, atol=1e-9)


@pytest.mark.parity
def test_adamw_is_that_of_pytorch_over_a_schedule():
    torch = pytest.importorskip("torch")
    steps = 8
    config, params, gradients = config_of("adamw"), drawn(WHOLE), drawn(WHOLE, 1, (steps,))
    rates = np.asarray(learning_rate_schedule(config, steps)(np.arange(steps)))
    pairs = jax.tree_util.tree_leaves_with_path(params)
    tensors = [torch.tensor(leaf, requires_grad=True) for _, leaf in pairs]
    groups = [
        {"params": [x], "weight_decay": 0.0 if path[-1].key == "scale" else 0.3}
        for x, (path, _) in zip(tensors, pairs)
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps)
    for count in range(steps):
        for group in theirs.param_groups:
            group["lr"] = float(rates[count])
        for x, g in zip(tensors, jax.tree.leaves(gradients)):
            x.grad = torch.tensor(g[count])
        theirs.step()
    got = train(config, params, gradients, steps).params
    for ours, x in zip(jax.tree.leaves(got), tensors):
        np.testing.assert_allclose(ours, x.detach().numpy(), atol=2e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_depends_on_the_step_alone(name):
    """Whatever the optimizer has counted: also after steps that it has not seen."""
    config, params, gradients = (
        config_of(name, warmup_steps=10),
        drawn(WHOLE),
        drawn(WHOLE, 1, (1,)),
    )
    init, step = programs(config, 100)
    fresh, moves = init(params), []
    for count in (0, 6):
        after, metrics = step(
            fresh._replace(step=jnp.int32(count)), any_batch(), of_step(gradients, 0)
        )
        assert int(after.step) == count + 1
        np.testing.assert_allclose(metrics.learning_rate, 1e-2 * (count + 1) / 10, rtol=1e-6)
        moves.append(
            jax.tree.map(lambda before, now: np.asarray(now) - before, params, after.params)
        )
    # Decay included: everything that moves a parameter is seven times as much.
    close(moves[1], jax.tree.map(lambda move: 7 * move, moves[0]), atol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_bfloat16_moments(name):
    """The mean of the gradient alone is rounded; the path stays near that of float32."""
    params, gradients = drawn(WHOLE), drawn(WHOLE, 1, (STEPS,))
    narrow, wide = (
        train(config_of(name, moments_dtype=dtype), params, gradients)
        for dtype in ("bfloat16", "float32")
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    in_layers = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key in LAYER_MATRICES
    )
    squares = {"adamw": count, "lion": 0, "muon": count - in_layers}[
        name
    ]  # float32, whatever is asked for
    arrays = [leaf for leaf in jax.tree.leaves(narrow.optimizer) if leaf.size > 3]
    assert sum(leaf.size for leaf in arrays if leaf.dtype == jnp.bfloat16) == count
    assert sum(leaf.size for leaf in arrays if leaf.dtype == jnp.float32) == squares
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.params))
    moved = jax.tree.map(
        lambda before, after: float(np.abs(np.asarray(after) - before).mean()), params, wide.params
    )
    apart = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).mean()), narrow.params, wide.params
    )
    worst = max(jax.tree.leaves(jax.tree.map(lambda a, m: a / m, apart, moved)))
    print(f"{name}: {worst:.2%} of the way apart after {STEPS} steps")
    assert 0 < worst < 0.02


def test_adafactor_keeps_sums_and_has_no_moment_to_round():
    state = jax.jit(make_optimizer(config_of("adafactor")).init)(drawn(WHOLE))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    shapes = {
        "embedding": 160 + 144,
        "head": 144 + 160,
        "wq": 2 * (144 + 132),
        "down": 2 * (136 + 144),
    }
    whole = 2 * 144 * 24 + 2 * 144 + 144  # too small to be factored: wk and the norms
    assert (
        sum(shapes.values()) + whole <= kept <= sum(shapes.values()) + whole + 100
    )  # counts and empty places
    with pytest.raises(
        InputError,
        match=r"^optimizer\.moments_dtype: 'bfloat16' given, float32 \(adafactor keeps no mean",
    ):
        config_of("adafactor", moments_dtype="bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_a_long_gradient_is_cut_to_the_norm(name):
    params, gradients = drawn(WHOLE), drawn(WHOLE, 1, (1,))
    config = config_of(name, clip_norm=0.5, eps=1.0)
    length = sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients)) ** 0.5
    assert length > 1
    by_hand = train(
        dataclasses.replace(config, clip_norm=1e9),
        params,
        jax.tree.map(lambda g: g * np.float32(0.5 / length), gradients),
        1,
    )
    close(train(config, params, gradients, 1).params, by_hand.params, atol=1e-7)
