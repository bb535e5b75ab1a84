"""The state of every optimizer on a mesh and on disk: where it lives, that it changes nothing, that
it comes back.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from optimizer_formulas import any_batch, given_recipe
from support import TINY
from test_optimizers import ADAPTERS, NAMES, STEPS, WHOLE, close, config_of, drawn, of_step
from test_optimizers import train as train_alone

from llama_jax.model.llama import Llama
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.step import Recipe, sharded_init, sharded_step, state_shapes
from llama_jax.weights.checkpoint import Checkpoints

TREES = {"whole": WHOLE, "adapters": ADAPTERS}
SIZES = (2, 2, 2)


@functools.cache
def gradients_of(tree: str):
    return drawn(TREES[tree], 1, (STEPS,))


@functools.cache
def recipe_of(name: str, tree: str, dtype: str = "float32"):
    params = jax.tree.map(jnp.asarray, drawn(TREES[tree]))
    recipe = given_recipe(config_of(name, moments_dtype=dtype), STEPS, params)
    return recipe._replace(model=Llama(TINY))  # for its sharding rules


@functools.cache
def programs(recipe: Recipe, tree: str):
    """The fresh state and the training step on the mesh."""
    mesh = make_mesh(*SIZES)
    return sharded_init(recipe, mesh), sharded_step(
        recipe, mesh, jax.tree.map(jnp.asarray, drawn(TREES[tree]))
    )


def train(recipe: Recipe, tree: str, counts, state=None):
    """The state after some steps on the mesh."""
    init, step = programs(recipe, tree)
    with jax.set_mesh(make_mesh(*SIZES)):
        state = init(jax.random.key(0)) if state is None else state
        for count in counts:
            state, _ = step(state, any_batch(), of_step(gradients_of(tree), count))
    return state


@pytest.mark.parametrize(
    ("name", "tree"), [*[(name, "whole") for name in NAMES], ("muon", "adapters")]
)
def test_a_mesh_equals_one_device_and_the_state_stays_on_its_shards(name, tree):
    recipe = recipe_of(name, tree)
    alone = train_alone(config_of(name), drawn(TREES[tree]), gradients_of(tree))
    shared = train(recipe, tree, range(STEPS))
    # Adafactor divides by means of means, and is as far apart as a mesh and a device may be at all.
    close(jax.device_get(shared), jax.device_get(alone), atol=1e-5 if name == "adafactor" else 2e-6)
    mesh = make_mesh(*SIZES)
    for (path, leaf), like in zip(
        jax.tree_util.tree_leaves_with_path(shared), jax.tree.leaves(state_shapes(recipe, mesh))
    ):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), path


@pytest.mark.parametrize("name", NAMES)
def test_moments_live_where_their_parameters_do(name):
    shapes = state_shapes(recipe_of(name, "whole"), make_mesh(*SIZES))
    wanted = {
        jax.tree_util.keystr(path): (leaf.shape, leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params)
    }
    assert wanted["['layers']['attention']['wq']"][1] == PartitionSpec(
        None, None, ("tensor", "fsdp", "context")
    )
    repeated = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.optimizer):
        owner = next((key for key in wanted if jax.tree_util.keystr(path).endswith(key)), None)
        if owner and leaf.shape == wanted[owner][0]:
            assert leaf.sharding.spec == wanted[owner][1]
            repeated += 1
        elif leaf.size <= 3 * 3:
            assert leaf.sharding.spec == PartitionSpec()
    assert repeated == {"adamw": 14, "lion": 7, "muon": 11, "adafactor": 3}[name]


def test_factored_moments_are_split_as_the_dimension_that_is_left():
    shapes = state_shapes(recipe_of("adafactor", "whole"), make_mesh(*SIZES))
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.optimizer):
        key = jax.tree_util.keystr(path)
        if leaf.ndim and max(leaf.shape) >= 128 and ("v_row" in key or "v_col" in key):
            found[key.rpartition(".")[2]] = (leaf.shape, leaf.sharding.spec)
    # Which of the two is called a sequence depends on the longer side; what counts is that each
    # dimension goes where it went.
    fsdp, tensor, both = ("fsdp", "context"), "tensor", ("tensor", "fsdp", "context")
    assert found == {
        "v_row['embedding']": ((144,), PartitionSpec(None)),
        "v_col['embedding']": ((160,), PartitionSpec(both)),
        "v_row['head']": ((144,), PartitionSpec(fsdp)),
        "v_col['head']": ((160,), PartitionSpec(tensor)),
        "v_row['layers']['attention']['wq']": ((2, 132), PartitionSpec(None, both)),
        "v_col['layers']['attention']['wq']": ((2, 144), PartitionSpec(None, None)),
        "v_row['layers']['feed_forward']['down']": ((2, 136), PartitionSpec(None, both)),
        "v_col['layers']['feed_forward']['down']": ((2, 144), PartitionSpec(None, None)),
    }


@pytest.mark.parametrize(
    ("name", "tree", "dtype"),
    [
        ("lion", "whole", "float32"),
        ("adafactor", "whole", "float32"),
        ("adamw", "whole", "bfloat16"),
        pytest.param("muon", "whole", "bfloat16", marks=pytest.mark.slow),
        ("muon", "adapters", "float32"),
    ],
)
def test_what_a_checkpoint_brings_back_goes_on_bit_for_bit(name, tree, dtype, tmp_path):
    recipe = recipe_of(name, tree, dtype)
    mesh = make_mesh(*SIZES)
    straight, half = train(recipe, tree, range(STEPS)), train(recipe, tree, range(2))
    with jax.set_mesh(mesh), Checkpoints.open(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(2, half, {})
        checkpoints.wait()
        restored = checkpoints.restore(2, state_shapes(recipe, mesh))
    resumed = train(recipe, tree, range(2, STEPS), restored)
    for a, b in zip(
        jax.tree.leaves(jax.device_get(resumed)),
        jax.tree.leaves(jax.device_get(straight)),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
