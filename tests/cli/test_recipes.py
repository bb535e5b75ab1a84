"""The recipes as `train.py` reads them: tokens/step, tokens in all and learning rates, against the
published numbers.
"""

import pathlib

import pytest
import yaml

from llama_jax.cli.arguments import parse_train
from llama_jax.data.batches import Steps
from llama_jax.presets import preset
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_sections import DataConfig, OptimizerConfig
from llama_jax.training.optimizer import learning_rate_schedule

RECIPES = pathlib.Path(__file__).parent.parent.parent / "configs" / "recipes"
M, T = 10**6, 10**12

# Tokens in all, length, tokens/step, peak, warm-up, share of the peak at the end, eps where it is
# published. What a file says was chosen (the batches of Llama 3 below 405B and all but the tokens
# of 3.2) stands here as it was chosen. LLaMA 1: arXiv:2302.13971, sections 2.1 to 2.3 and table 2.
# Llama 2: arXiv:2307.09288, section 2.2 and table 1. Llama 3: arXiv:2407.21783, section 3.4.1 and
#   table 3. Llama 3.2: the tokens of its model card.
PUBLISHED = {
    "llama-7b": (1.0 * T, 2048, 4 * M, 3e-4, 2000, 0.1, None),
    "llama-13b": (1.0 * T, 2048, 4 * M, 3e-4, 2000, 0.1, None),
    "llama-33b": (1.4 * T, 2048, 4 * M, 1.5e-4, 2000, 0.1, None),
    "llama-65b": (1.4 * T, 2048, 4 * M, 1.5e-4, 2000, 0.1, None),
    "llama2-7b": (2.0 * T, 4096, 4 * M, 3e-4, 2000, 0.1, 1e-5),
    "llama2-13b": (2.0 * T, 4096, 4 * M, 3e-4, 2000, 0.1, 1e-5),
    "llama2-70b": (2.0 * T, 4096, 4 * M, 1.5e-4, 2000, 0.1, 1e-5),
    "llama3-8b": (15 * T, 8192, 8 * M, 3e-4, 8000, 0.01, None),
    "llama3-70b": (15 * T, 8192, 8 * M, 1.5e-4, 8000, 0.01, None),
    "llama3.1-8b": (15 * T, 8192, 8 * M, 3e-4, 8000, 0.01, None),
    "llama3.1-70b": (15 * T, 8192, 8 * M, 1.5e-4, 8000, 0.01, None),
    "llama3.1-405b": (15.6 * T, 8192, 4 * M, 8e-5, 8000, 0.01, None),
    "llama3.2-1b": (9 * T, 8192, 4 * M, 3e-4, 8000, 0.01, None),
    "llama3.2-3b": (9 * T, 8192, 4 * M, 3e-4, 8000, 0.01, None),
}


def read(name: str, *overrides: str) -> TrainConfig:
    """A recipe as the program reads it, in the way that its first comment says."""
    arguments = [
        "--config",
        str(RECIPES / f"{name}.yaml"),
        "--data.paths",
        "[text]",
        "--data.tokenizer",
        "tokenizer.model",
    ]
    return parse_train([*arguments, *overrides], pathlib.Path("none.yaml"))


def steps_of(data: DataConfig) -> Steps:
    return Steps(data.batch_size, data.batch_ramp, data.skip_steps)


def test_every_size_has_one():
    assert {path.stem for path in RECIPES.iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name):
    tokens, length, batch, peak, warmup, final, eps = PUBLISHED[name]
    config = read(name)
    data, optimizer, steps = config.data, config.optimizer, config.run.steps
    assert config.model == preset(name)
    assert data.length == length
    # 4M is 2^22 tokens: 5 % more than 4,000,000, in every multiple.
    assert data.batch_size * length / batch == pytest.approx(2**20 / 10**6, rel=1e-12)
    total = steps_of(data).used_before(steps) * length
    last = steps_of(data).sequences_at(steps - 1) * length
    assert tokens <= total < tokens + last  # the last step is the one that passes the mark
    assert (optimizer.name, optimizer.schedule, optimizer.beta1, optimizer.beta2) == (
        "adamw",
        "cosine",
        0.9,
        0.95,
    )
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.z_loss) == (0.1, 1.0, 0.0)
    assert optimizer.eps == (eps or 1e-8)
    schedule = learning_rate_schedule(optimizer, steps)
    end = 1_200_000 if name == "llama3.1-405b" else steps
    middle = (warmup + end) // 2 - 1
    for count, rate in (
        (0, peak / warmup),
        (warmup // 2 - 1, peak / 2),
        (warmup - 1, peak),
        (middle, peak * (1 + final) / 2),
        (end - 1, peak * final),
    ):
        assert float(schedule(count)) == pytest.approx(rate, rel=1e-3), count


def test_the_batch_of_405b_grows_as_published():
    data = read("llama3.1-405b").data
    before = [steps_of(data).used_before(step) * data.length for step, _ in data.batch_ramp]
    # Half a step is as near as a step can come to the mark.
    assert before[0] == pytest.approx(252 * M, abs=2 * M)
    assert before[1] == pytest.approx(2.87 * T, abs=4.2 * M)
    assert [sequences * data.length / (M * 2**20 / 10**6) for _, sequences in data.batch_ramp] == [
        8,
        16,
    ]


def test_the_rate_of_405b_ends_at_8e_7_after_1_2_million_steps():
    config = read("llama3.1-405b")
    schedule = learning_rate_schedule(config.optimizer, config.run.steps)
    assert float(schedule(1_200_000 - 1)) == pytest.approx(8e-7, rel=1e-4)
    assert float(schedule(config.run.steps - 1)) > 8e-7  # the tokens are used up before


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_inherited_unsaid(name):
    """What makes the model what it becomes stands in the file: a default that changes changes no
    recipe.
    """
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    config = read(name)
    assert given["model"] == name
    assert set(vars(config.optimizer)) - set(given["optimizer"]) == {
        "decay_fraction",
        "decay_from",
    }  # of `wsd`, of resumes
    assert set(vars(config.data)) - set(given["data"]) == {
        "paths",
        "sources",
        "tokenizer",
        "skip_steps",
        "too_long",
    }  # the last of whole documents alone: not of text that is cut
    assert set(given["mesh"]) == set(vars(config.mesh))
    about_the_program = {
        "trackers",
        "profile",
        "sample_prompts",
        "sample_tokens",
        "hang_seconds",
        "max_time",
        "eval_tokens",
    }
    assert set(vars(config.run)) - set(given["run"]) == {"init", "overwrite", *about_the_program}


@pytest.mark.parametrize("name", PUBLISHED)
def test_comments_say_where_the_numbers_come_from(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    heading = " ".join(
        line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")
    )
    assert "Published: " in heading
    assert "Chosen here: " in heading
    assert "arXiv:" in heading or "model card" in heading
    assert f"python train.py --config configs/recipes/{name}.yaml" in heading


def test_a_recipe_takes_overrides():
    config = read(
        "llama3-8b", "--data.accumulation", "64", "--optimizer.name", "muon", "--run.steps", "10"
    )
    assert (config.data.accumulation, config.optimizer.name, config.run.steps) == (64, "muon", 10)
    assert isinstance(config.optimizer, OptimizerConfig)
