"""Every preset against a table written out number by number, and at full size against the model
that it describes.
"""

import dataclasses
import importlib.util
import math
import types

import jax
import jax.numpy as jnp
import pytest

import llama_jax.config as config_module
from llama_jax.accounting import matmul_parameters, parameter_count, parameter_shapes
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama
from llama_jax.presets import PRESETS, name_of, preset

# Sources: arXiv:2302.13971, 2307.09288, 2407.21783; the `params.json` and `config.json` of the
#   releases.
# Columns as in the papers; `scaling` is (factor, low, high, original context) of the type llama3.
COLUMNS = (
    "dim",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "ffn_dim",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "scaling",
    "context_length",
    "tied_head",
    "parameters",
)
BY_8 = (8.0, 1.0, 4.0, 8192)
BY_32 = (32.0, 1.0, 4.0, 8192)
TABLE = {
    # name             D      L    N   K   H    F      V       eps   theta     scaling context tied
    # parameters
    "llama-7b": (
        4096,
        32,
        32,
        32,
        128,
        11008,
        32000,
        1e-6,
        10000.0,
        None,
        2048,
        False,
        6_738_415_616,
    ),
    "llama-13b": (
        5120,
        40,
        40,
        40,
        128,
        13824,
        32000,
        1e-6,
        10000.0,
        None,
        2048,
        False,
        13_015_864_320,
    ),
    "llama-33b": (
        6656,
        60,
        52,
        52,
        128,
        17920,
        32000,
        1e-6,
        10000.0,
        None,
        2048,
        False,
        32_528_943_616,
    ),
    "llama-65b": (
        8192,
        80,
        64,
        64,
        128,
        22016,
        32000,
        1e-5,
        10000.0,
        None,
        2048,
        False,
        65_285_660_672,
    ),
    "llama2-7b": (
        4096,
        32,
        32,
        32,
        128,
        11008,
        32000,
        1e-5,
        10000.0,
        None,
        4096,
        False,
        6_738_415_616,
    ),
    "llama2-13b": (
        5120,
        40,
        40,
        40,
        128,
        13824,
        32000,
        1e-5,
        10000.0,
        None,
        4096,
        False,
        13_015_864_320,
    ),
    "llama2-70b": (
        8192,
        80,
        64,
        8,
        128,
        28672,
        32000,
        1e-5,
        10000.0,
        None,
        4096,
        False,
        68_976_648_192,
    ),
    "llama3-8b": (
        4096,
        32,
        32,
        8,
        128,
        14336,
        128256,
        1e-5,
        500000.0,
        None,
        8192,
        False,
        8_030_261_248,
    ),
    "llama3-70b": (
        8192,
        80,
        64,
        8,
        128,
        28672,
        128256,
        1e-5,
        500000.0,
        None,
        8192,
        False,
        70_553_706_496,
    ),
    "llama3.1-8b": (
        4096,
        32,
        32,
        8,
        128,
        14336,
        128256,
        1e-5,
        500000.0,
        BY_8,
        131072,
        False,
        8_030_261_248,
    ),
    "llama3.1-70b": (
        8192,
        80,
        64,
        8,
        128,
        28672,
        128256,
        1e-5,
        500000.0,
        BY_8,
        131072,
        False,
        70_553_706_496,
    ),
    "llama3.1-405b": (
        16384,
        126,
        128,
        8,
        128,
        53248,
        128256,
        1e-5,
        500000.0,
        BY_8,
        131072,
        False,
        405_853_388_800,
    ),
    "llama3.2-1b": (
        2048,
        16,
        32,
        8,
        64,
        8192,
        128256,
        1e-5,
        500000.0,
        BY_32,
        131072,
        True,
        1_235_814_400,
    ),
    "llama3.2-3b": (
        3072,
        28,
        24,
        8,
        128,
        8192,
        128256,
        1e-5,
        500000.0,
        BY_32,
        131072,
        True,
        3_212_749_824,
    ),
    "llama3.3-70b": (
        8192,
        80,
        64,
        8,
        128,
        28672,
        128256,
        1e-5,
        500000.0,
        BY_8,
        131072,
        False,
        70_553_706_496,
    ),
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, 1e-5, 100000.0, None, 8192, True, 134_515_008),
    "tinyllama-1.1b": (
        2048,
        22,
        32,
        4,
        64,
        5632,
        32000,
        1e-5,
        10000.0,
        None,
        2048,
        False,
        1_100_048_384,
    ),
}

FIELDS = {
    "vocab_size": 100,
    "dim": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 64,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "context_length": 64,
    "tied_head": False,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context": 8192,
}


def row(name: str) -> dict:
    return dict(zip(COLUMNS, TABLE[name], strict=True))


def test_table_covers_every_preset():
    assert set(PRESETS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_numbers(name):
    expected, config = row(name), preset(name)
    for field in set(COLUMNS) - {"scaling", "parameters"}:
        assert getattr(config, field) == expected[field], field
    scaling = config.rope_scaling
    found = scaling and (
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_context,
    )
    assert found == expected["scaling"]
    assert scaling is None or scaling.rope_type == "llama3"


@pytest.mark.parametrize("name", TABLE)
def test_parameter_count(name):
    assert parameter_count(preset(name)) == row(name)["parameters"]


# One of each family and kind of attention and head; the counts of all are compared above.
TRACED = ("llama-7b", "llama2-70b", "llama3-8b", "llama3.1-405b", "llama3.2-1b", "smollm2-135m")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in TRACED)) for n in TABLE]
)
def test_model_at_full_size(name):
    """The model's own initialisation, traced without allocating: the shapes of accounting, the
    count of the table.
    """
    config = preset(name)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    parameters = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, parameters) == parameter_shapes(config)
    assert (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
        == row(name)["parameters"]
    )


@pytest.mark.parametrize("name", TABLE)
def test_matmul_parameters(name):
    """All parameters but norms, and one matrix of the vocabulary where there are two."""
    r = row(name)
    norms = (2 * r["layers"] + 1) * r["dim"]
    look_up = 0 if r["tied_head"] else r["vocab_size"] * r["dim"]
    assert matmul_parameters(preset(name)) == r["parameters"] - norms - look_up


# Mistakes that public implementations have made; each line names one.
def test_epsilon_of_65b_is_not_that_of_7b():
    assert [preset(f"llama-{size}").norm_eps for size in ("7b", "13b", "33b", "65b")] == [
        1e-6,
        1e-6,
        1e-6,
        1e-5,
    ]


def test_epsilon_since_llama2():
    later = [name for name in PRESETS if name.startswith(("llama2", "llama3"))]
    assert {preset(name).norm_eps for name in later} == {1e-5}
    assert len(later) == 11


def test_theta_of_llama3_is_half_a_million():
    assert {config.rope_theta for name, config in PRESETS.items() if name.startswith("llama3")} == {
        500_000.0
    }
    assert {
        config.rope_theta
        for name, config in PRESETS.items()
        if name.startswith(("llama-", "llama2"))
    } == {10_000.0}


def test_rope_factor_of_3_2_is_32():
    factors = {
        name: config.rope_scaling.factor for name, config in PRESETS.items() if config.rope_scaling
    }
    assert {name for name, factor in factors.items() if factor == 32} == {
        "llama3.2-1b",
        "llama3.2-3b",
    }
    assert {name for name, factor in factors.items() if factor == 8} == set(factors) - {
        "llama3.2-1b",
        "llama3.2-3b",
    }


def test_plain_llama3_is_not_scaled():
    assert preset("llama3-8b").rope_scaling is None
    assert preset("llama3-70b").rope_scaling is None


def test_head_is_tied_in_3_2_only():
    tied = {name for name, config in PRESETS.items() if config.tied_head}
    assert tied == {"llama3.2-1b", "llama3.2-3b", "smollm2-135m"}
    assert "head" not in parameter_shapes(preset("llama3.2-1b"))
    assert parameter_shapes(preset("llama3.1-8b"))["head"] == (4096, 128256)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match=r"'llama3\.1-8B' is unknown.*llama3\.1-8b"):
        preset("llama3.1-8B")
    with pytest.raises(InputError, match="llama-7b"):
        preset("@@@")


def test_name_of():
    assert {name_of(config) for config in PRESETS.values()} == set(PRESETS) - {"llama3.3-70b"}
    assert (
        name_of(preset("llama3.3-70b")) == "llama3.1-70b"
    )  # the same architecture; the weights differ
    assert name_of(LlamaConfig(**FIELDS)) is None


# --- validation ---


def as_users_run_it() -> types.ModuleType:
    """`llama_jax.config` without the type checks that the test runner adds: they would see a wrong
    type before it does.
    """
    spec = importlib.util.spec_from_file_location("plain_config", config_module.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = as_users_run_it()

COUNTS = (
    "vocab_size",
    "dim",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "ffn_dim",
    "context_length",
)
BAD_COUNTS = (0, -1, 2.0, 1.5, "8", None, True, math.nan, 10**12)
BAD_NUMBERS = (0, -1e-5, math.nan, math.inf, "1e-5", None, True)


@pytest.mark.parametrize("value", BAD_COUNTS, ids=repr)
@pytest.mark.parametrize("field", COUNTS)
def test_bad_count_is_named(field, value):
    with pytest.raises(InputError, match=rf"^{field}: .* given, .* expected$"):
        plain.LlamaConfig(**FIELDS | {field: value})


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("field", ["norm_eps", "rope_theta"])
def test_bad_number_is_named(field, value):
    with pytest.raises(InputError, match=rf"^{field}: .* given, a positive number expected$"):
        plain.LlamaConfig(**FIELDS | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_heads", 3),
        ("kv_heads", 8),
        ("head_dim", 7),
        ("tied_head", 1),
        ("tied_head", None),
        ("rope_scaling", {"factor": 8}),
    ],
)
def test_contradiction_is_named(field, value):
    with pytest.raises(InputError, match=rf"^{field}: "):
        plain.LlamaConfig(**FIELDS | {field: value})


@pytest.mark.parametrize(
    "rope_type", ["dynamic", "yarn", "longrope", "su", "mrope", "ntk", "Llama3", "", None]
)
def test_unsupported_rope_type_is_named(rope_type):
    with pytest.raises(
        InputError,
        match=rf"^rope_scaling\.rope_type: {rope_type!r} given, default, linear or llama3 expected$",
    ):
        plain.RopeScaling(**SCALING | {"rope_type": rope_type})


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    "field", ["factor", "low_freq_factor", "high_freq_factor", "original_context"]
)
def test_bad_scaling_is_named(field, value):
    with pytest.raises(InputError, match=rf"^rope_scaling\.{field}: "):
        plain.RopeScaling(**SCALING | {field: value})


@pytest.mark.parametrize("low", [4.0, 5.0])
def test_scaling_bounds_must_be_in_order(low):
    with pytest.raises(
        InputError, match=r"^rope_scaling\.low_freq_factor: .* below high_freq_factor"
    ):
        plain.RopeScaling(**SCALING | {"low_freq_factor": low})


@pytest.mark.parametrize("field", ["low_freq_factor", "high_freq_factor", "original_context"])
def test_linear_scaling_has_a_factor_only(field):
    assert plain.RopeScaling("linear", 2.0).factor == 2.0
    with pytest.raises(
        InputError, match=rf"^rope_scaling\.{field}: .* nothing with rope_type linear"
    ):
        plain.RopeScaling(**{"rope_type": "linear", "factor": 2.0, field: SCALING[field]})


@pytest.mark.parametrize("name", TABLE)
def test_messages_are_one_line(name):
    for field in COUNTS:
        with pytest.raises(InputError) as caught:
            dataclasses.replace(preset(name), **{field: 0})
        assert "\n" not in str(caught.value)


def test_config_is_frozen_and_hashable():
    config = plain.LlamaConfig(**FIELDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.RopeScaling(**SCALING).factor = 4.0
    assert len({config, plain.LlamaConfig(**FIELDS)}) == 1


def test_no_number_has_a_default():
    assert [
        f.name
        for f in dataclasses.fields(plain.LlamaConfig)
        if f.default is not dataclasses.MISSING
    ] == []
    assert {f.name for f in dataclasses.fields(plain.LlamaConfig)} == set(FIELDS)
    numbers = [
        f
        for f in dataclasses.fields(plain.RopeScaling)
        if f.default not in (dataclasses.MISSING, None)
    ]
    assert numbers == []


@pytest.mark.parametrize("field", FIELDS)
def test_forgotten_field_is_an_error(field):
    with pytest.raises(TypeError, match=field):
        plain.LlamaConfig(**{name: value for name, value in FIELDS.items() if name != field})


def test_group_is_query_heads_per_kv_head():
    assert {
        name: preset(name).group
        for name in ("llama-65b", "llama2-70b", "llama3-8b", "llama3.2-3b", "smollm2-135m")
    } == {"llama-65b": 1, "llama2-70b": 8, "llama3-8b": 4, "llama3.2-3b": 3, "smollm2-135m": 3}
