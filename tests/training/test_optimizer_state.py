"""The state of every optimizer on a mesh and on disk: where it lives, that it changes nothing, that it comes back."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from optimizer_formulas import batch_number, given_recipe
from support import TINY
from test_optimizers import ADAPTERS, NAMES, STEPS, WHOLE, close, config_of, drawn

from llama_jax.model.llama import Llama
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training.step import sharded_init, sharded_step, state_shapes
from llama_jax.weights.checkpoint import Checkpoints

TREES = {"whole": WHOLE, "adapters": ADAPTERS}
SIZES = (2, 2, 2)


def recipe_of(name: str, tree: str, dtype: str = "float32"):
    params, gradients = drawn(TREES[tree]), drawn(TREES[tree], 1, (STEPS,))
    recipe = given_recipe(config_of(name, moments_dtype=dtype), STEPS, params, gradients)
    return recipe._replace(model=Llama(TINY))  # for its sharding rules


def train(recipe, sizes, counts, state=None):
    """The state after some steps on a mesh, and that mesh."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        state = sharded_init(recipe, mesh)(jax.random.key(0)) if state is None else state
        step = sharded_step(recipe, mesh)
        for count in counts:
            state, _ = step(state, batch_number(count))
    return state


@pytest.mark.parametrize(("name", "tree"), [*[(name, "whole") for name in NAMES], ("muon", "adapters")])
def test_a_mesh_equals_one_device_and_the_state_stays_on_its_shards(name, tree):
    recipe = recipe_of(name, tree)
    alone, shared = train(recipe, (1, 1, 1), range(3)), train(recipe, SIZES, range(3))
    # Adafactor divides by means of means, and is as far apart as a mesh and a device may be at all.
    close(jax.device_get(shared), jax.device_get(alone), atol=1e-5 if name == "adafactor" else 2e-6)
    mesh = make_mesh(*SIZES)
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(shared), jax.tree.leaves(state_shapes(recipe, mesh))):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), path


@pytest.mark.parametrize("name", NAMES)
def test_moments_live_where_their_parameters_do(name):
    shapes = state_shapes(recipe_of(name, "whole"), make_mesh(*SIZES))
    wanted = {jax.tree_util.keystr(path): (leaf.shape, leaf.sharding.spec)
              for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params)}  # fmt: skip
    assert wanted["['layers']['attention']['wq']"][1] == PartitionSpec(None, None, ("tensor", "fsdp", "context"))
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
    # Which of the two is called a row depends on the longer side; what counts is that each dimension goes where it went.
    fsdp, tensor, both = ("fsdp", "context"), "tensor", ("tensor", "fsdp", "context")
    assert found == {
        "v_row['embedding']": ((144,), PartitionSpec(None)), "v_col['embedding']": ((160,), PartitionSpec(both)),
        "v_row['head']": ((144,), PartitionSpec(fsdp)), "v_col['head']": ((160,), PartitionSpec(tensor)),
        "v_row['layers']['attention']['wq']": ((3, 132), PartitionSpec(None, both)),
        "v_col['layers']['attention']['wq']": ((3, 144), PartitionSpec(None, None)),
        "v_row['layers']['feed_forward']['down']": ((3, 136), PartitionSpec(None, both)),
        "v_col['layers']['feed_forward']['down']": ((3, 144), PartitionSpec(None, None)),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "tree", "dtype"), [
    ("lion", "whole", "float32"), ("adafactor", "whole", "float32"), ("adamw", "whole", "bfloat16"),
    ("muon", "whole", "bfloat16"), ("muon", "adapters", "float32"),
])  # fmt: skip
def test_what_a_checkpoint_brings_back_goes_on_bit_for_bit(name, tree, dtype, tmp_path):
    recipe = recipe_of(name, tree, dtype)
    mesh = make_mesh(*SIZES)
    straight = train(recipe, SIZES, range(STEPS))
    half = train(recipe, SIZES, range(2))
    with jax.set_mesh(mesh), Checkpoints.open(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(2, half, {})
        checkpoints.wait()
        restored = checkpoints.restore(2, state_shapes(recipe, mesh))
    resumed = train(recipe, SIZES, range(2, STEPS), restored)
    for a, b in zip(jax.tree.leaves(jax.device_get(resumed)), jax.tree.leaves(jax.device_get(straight)), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
