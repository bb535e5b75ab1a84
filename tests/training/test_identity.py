"""What a run is: whatever changes what is learned is told apart when it goes on."""

import dataclasses

import pytest
from tiny_runs import tiny_config, write_corpus

from llama_jax.errors import InputError
from llama_jax.training.config_sections import AdapterConfig, PreferenceConfig
from llama_jax.training.data import split_corpus
from llama_jax.training.setup import describe_run, require_same_run


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("preference", {"beta": 0.2}, "preference.beta 0.1, 0.2 was asked for"),
        ("adapter", {"alpha": 3.0}, "adapter.alpha 16.0, 3.0 was asked for"),
        ("data", {"seed": 7}, "data.seed 0, 7 was asked for"),
        ("run", {"steps": 99, "profile": "3:5", "sample_prompts": ("a",)}, None),
    ],
)
def test_another_run_is_told_by_its_first_difference(
    tmp_path, tiny_directory, section, changes, words
):
    config = tiny_config(
        tmp_path / "run",
        write_corpus(tmp_path / "text", 3),
        run={"init": "base"},
        data={"tokenizer": str(tiny_directory)},
    )
    config = dataclasses.replace(
        config, adapter=AdapterConfig(rank=2), preference=PreferenceConfig(0.1)
    )
    other = dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **changes)}
    )
    split = split_corpus(config)
    saved, wanted = describe_run(config, split), describe_run(other, split)
    require_same_run(saved, describe_run(config, split), tmp_path)
    if words is None:
        require_same_run(saved, wanted, tmp_path)
        return
    with pytest.raises(InputError, match=words) as error:
        require_same_run(saved, wanted, tmp_path)
    assert "\n" not in str(error.value)
