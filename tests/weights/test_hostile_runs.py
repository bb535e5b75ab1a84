"""Checkpoints of ours that somebody has changed and sealed anew: one line for what does not fit,
and no model of it.
"""

import copy
import dataclasses
import json
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jaxtyping import TypeCheckError
from matrix import rounds
from support import TINY, random_parameters, unrolled_parameters

from llama_jax.accounting import parameter_shapes
from llama_jax.config import config_from_dict
from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.inspect import contents
from llama_jax.weights.integrity import _digest
from llama_jax.weights.peft import require_fit
from llama_jax.weights.run import RunSource

CONFIG = dataclasses.replace(TINY, vocab_size=280)
STRANGE = [
    None,
    True,
    -1,
    0,
    1.5,
    10**6,
    10**30,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    ["x"],
    "object",
    "float99",
    "int32",
    "f4",
    "\ud800",
    float("nan"),
    [-1, 48],
    [10**12, 48],
    [True, 48],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run with one checkpoint, scanned layers."""
    return saved(tmp_path_factory.mktemp("run"), random_parameters(CONFIG))


def saved(directory: pathlib.Path, params) -> pathlib.Path:
    with Checkpoints.open(directory / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(
            1, {"params": params, "step": jnp.int32(1)}, {"model": dataclasses.asdict(CONFIG)}
        )
    return directory


def manifest_of(directory: pathlib.Path) -> tuple[pathlib.Path, dict]:
    path = directory / "checkpoints" / "1" / "meta" / "metadata"
    return path, json.loads(path.read_text())


@pytest.fixture
def changed(run):
    """A call that changes the content of the manifest and seals it; all is as before when the test
    has ended.
    """
    path, good = manifest_of(run)

    def change(how) -> pathlib.Path:
        values = copy.deepcopy(good)
        how(values["content"])
        path.write_text(json.dumps({**values, "sha256": _digest(values["content"])}))
        return run

    yield change
    path.write_text(json.dumps(good))


EMBEDDING = "params/embedding"
REFUSED = [
    (
        lambda content: content["arrays"].pop("params/final_norm/scale"),
        InputError,
        "1 missing: 'final_norm/scale'",
    ),
    (
        lambda content: content["arrays"].update({"params/foo": content["arrays"][EMBEDDING]}),
        InputError,
        "1 unexpected: 'foo'",
    ),
    (
        lambda content: content["metadata"]["model"].update(vocab_size=10**6),
        InputError,
        "(280, 48) where (1000000, 48)",
    ),
    (lambda content: content["metadata"]["model"].update(layers=2), InputError, "misshapen"),
    (
        lambda content: content["arrays"][EMBEDDING].update(dtype="int32"),
        InputError,
        "'embedding' has type int32",
    ),
    (
        lambda content: content["arrays"][EMBEDDING].update(dtype="foo"),
        CorruptError,
        "all checkpoints are damaged",
    ),
    (
        lambda content: content["arrays"][EMBEDDING].update(shape=["x"]),
        CorruptError,
        "all checkpoints are damaged",
    ),
    (
        lambda content: content["arrays"][EMBEDDING].update(shape=[-1, 48]),
        CorruptError,
        "all checkpoints are damaged",
    ),
    (lambda content: content.update(metadata=[1]), CorruptError, "all checkpoints are damaged"),
    (
        lambda content: content["metadata"]["model"].update(rope_scaling=[1]),
        InputError,
        "rope_scaling: [1] given",
    ),
    (
        lambda content: content["metadata"]["model"].update(rope_scaling={"a": 1}),
        InputError,
        "rope_scaling: field a is",
    ),
]


@pytest.mark.parametrize(("how", "error", "words"), REFUSED)
def test_what_does_not_fit_is_named(changed, how, error, words):
    with pytest.raises(error) as refused:
        RunSource.open(changed(how))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def places(node, path=()):
    """The paths of all values below a node."""
    children = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate(content, draw: random.Random) -> None:
    """Replaces, removes or doubles a value anywhere."""
    *above, key = draw.choice(list(places(content)))
    node = content
    for name in above:
        node = node[name]
    kind = draw.choice(["replace", "replace", "remove", "double"])
    if kind == "replace" or isinstance(node, list):
        node[key] = draw.choice(STRANGE)
    elif kind == "remove":
        del node[key]
    else:
        node[f"{key}x"] = node[key]


def test_mutated_manifests_are_refused_in_one_line_or_whole(changed):
    """What opens has exactly the arrays of the architecture that it declares."""
    count, opened = rounds(200, 600), 0
    for seed in range(count):
        draw = random.Random(seed)
        try:
            source = RunSource.open(changed(lambda content, draw=draw: mutate(content, draw)))
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 2000  # noqa: PT017
            continue
        except (
            TypeCheckError
        ):  # of the tests alone, where a field of the architecture has another type
            continue
        contents(source)
        shapes = flatten_dict(parameter_shapes(source.config), sep="/")
        arrays = source.manifest.arrays
        assert {path: arrays[f"params/{path}"].shape for path in shapes} == shapes
        assert sum(path.startswith("params/") for path in arrays) == len(shapes)
        opened += 1
    assert count / 60 < opened < count / 2


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '{"schema": "x"}', '{"schema": 1, "content": [], "sha256": ""}']
)
def test_other_json_is_damage(run, text):
    path, good = manifest_of(run)
    path.write_text(text)
    with pytest.raises(CorruptError, match="all checkpoints are damaged"):
        RunSource.open(run)
    path.write_text(json.dumps(good))


def test_unrolled_layers_are_compared_too(tmp_path):
    params = unrolled_parameters(CONFIG)
    assert not RunSource.open(saved(tmp_path / "whole", params)).stacked
    del params["layers_1"]["attention"]["wk"]
    with pytest.raises(InputError, match="1 missing: 'layers_1/attention/wk'"):
        RunSource.open(saved(tmp_path / "missing", params))


def test_adapters_of_a_run_have_to_fit():
    """Stacked and unrolled; a factor alone, another width, a matrix that there is not."""
    layers, dim, ffn = CONFIG.layers, CONFIG.dim, CONFIG.ffn_dim
    up = {"a": np.zeros((layers, dim, 2)), "b": np.zeros((layers, 2, ffn))}
    tree = {"layers": {"feed_forward": {"up": up}}}
    require_fit(tree, CONFIG)
    require_fit(
        {f"layers_{i}": jax.tree.map(lambda x: x[0], tree["layers"]) for i in range(layers)}, CONFIG
    )
    for wrong in (
        {"a": up["a"]},
        {**up, "b": np.zeros((layers, 2, ffn + 1))},
        {**up, "c": up["a"]},
    ):
        with pytest.raises(InputError, match="tensors do not fit the architecture"):
            require_fit({"layers": {"feed_forward": {"up": wrong}}}, CONFIG)
    with pytest.raises(InputError, match="unexpected"):
        require_fit({"layers": {"feed_forward": {"sideways": up}}}, CONFIG)


def test_a_bad_scaling_is_refused_by_name():
    values = dataclasses.asdict(CONFIG) | {"rope_scaling": "linear"}
    with pytest.raises(
        InputError, match="rope_scaling: 'linear' given, nothing or its fields expected"
    ):
        config_from_dict(values)
