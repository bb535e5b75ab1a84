"""Values of a run that cannot be meant are refused by name."""

import dataclasses

import jaxtyping
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.training.config import ComputeConfig, MeshConfig, RunConfig, TrainConfig
from llama_jax.training.config_sections import DataConfig, GuardConfig, OptimizerConfig

MODEL = LlamaConfig(
    vocab_size=4096,
    dim=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn_dim=128,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    context_length=256,
    tied_head=True,
)
SECTIONS = {
    "run": RunConfig,
    "compute": ComputeConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "guard": GuardConfig,
}


@pytest.fixture(autouse=True)
def _without_type_checks(monkeypatch):
    """Leaves wrong types to the code under test; otherwise the checks of the test runner come
    first.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.steps", 0),
        ("run.steps", 1.5),
        ("run.steps", True),
        ("run.seed", -1),
        ("run.dir", ""),
        ("run.eval_every", -1),
        ("run.log_every", 0),
        ("run.checkpoint_every", 0),
        ("run.keep_checkpoints", 0),
        ("run.overwrite", 1),
        ("compute.dtype", "float16"),
        ("compute.remat", ""),
        ("compute.remat", "2*none+full"),
        ("compute.remat", "some"),
        ("compute.remat", "auto+q"),
        ("compute.loss_chunk", 0),
        ("compute.scan_layers", "no"),
        ("compute.attention", None),
        ("compute.context_attention", "spiral"),
        ("data.length", 0),
        ("data.batch_size", 0),
        ("data.accumulation", 3),
        ("data.paths", "text"),
        ("data.paths", ("",)),
        ("data.paths", (3,)),
        ("data.tokenizer", ""),
        ("data.tokenizer", 3),
        ("data.held_out_fraction", 0.9),
        ("data.vocab_size", 0),
        ("data.seed", 2**32),
        ("optimizer.learning_rate", -1e-4),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.learning_rate", None),
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", 1),
        ("optimizer.final_fraction", 1.1),
        ("optimizer.eps", float("inf")),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.clip_norm", 0),
        ("optimizer.warmup_steps", -1),
        ("optimizer.name", "adam"),
        ("optimizer.schedule", "cos"),
        ("optimizer.z_loss", -1.0),
        ("optimizer.moments_dtype", "float16"),
        ("optimizer.param_dtype", "int8"),
        ("optimizer.decay_fraction", 1.5),
        ("optimizer.schedule_steps", -1),
        ("run.profile", "15:10"),
        ("run.profile", "0:3"),
        ("run.profile", "10"),
        ("run.profile", 615),
        ("run.profile", ""),
        ("run.profile", "1:2:3"),
        ("run.profile", "5:1001"),
        ("run.profile", "-5:3"),
        ("run.profile", True),
        ("run.sample_prompts", "def "),
        ("run.sample_prompts", ("",)),
        ("run.sample_prompts", (3,)),
        ("run.sample_tokens", 0),
        ("guard.spike_skip", 1),
        ("guard.spike_sigma", 0),
        ("guard.patience", 0),
        ("guard.patience", 201),
        ("guard.rewinds", -1),
        ("guard.check_replicas", 0.5),
        ("mesh.data", 0),
        ("mesh.fsdp", -2),
        ("mesh.context", 0),
        ("mesh.tensor", 1.0),
        ("mesh.tensor", -1),
        ("mesh.data", True),
    ],
)
def test_a_wrong_value_is_refused_by_name(key, value):
    section, name = key.split(".")
    with pytest.raises(InputError, match=f"^{key}: ") as caught:
        SECTIONS[section](**{name: value})
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("data.length", {"data": DataConfig(length=257)}),
        ("data.vocab_size", {"data": DataConfig(vocab_size=4097)}),
        ("compute.remat", {"compute": ComputeConfig(remat="99*all+full")}),
    ],
)
def test_sections_that_contradict_each_other(key, other):
    with pytest.raises(InputError, match=f"^{key}: "):
        TrainConfig(model=MODEL, **other)


def test_the_size_of_an_existing_tokenizer_is_not_ours_to_choose():
    TrainConfig(model=MODEL, data=DataConfig(vocab_size=9999, tokenizer="tokenizer.model"))


def test_whole_numbers_serve_as_numbers():
    assert OptimizerConfig(learning_rate=0, weight_decay=1).weight_decay == 1


def test_is_frozen_and_small():
    config = TrainConfig(model=MODEL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3
    values = dataclasses.asdict(config)
    assert sum(len(section) for section in values.values()) < 100
