"""New tokens: what transformers makes of a resized model, and a training of them beside adapters."""

import dataclasses
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import write_yaml

import llama_jax
from llama_jax.cli.main import run_verb
from llama_jax.cli.train import main as train
from llama_jax.errors import InputError
from llama_jax.model.lora import combine, init_adapters
from llama_jax.training.config import RunConfig, TrainConfig
from llama_jax.training.config_sections import (
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    SourceConfig,
)
from llama_jax.weights.open import open_model
from llama_jax.weights.vocabulary import add_tokens

NEW = ("<|tool|>", "<|/tool|>")


@pytest.fixture(scope="module")
def tiny_model(tiny_directory, tmp_path_factory):
    """The directory of a tiny model, with a head of its own or a tied one."""

    def make(tied: bool) -> pathlib.Path:
        model = llama_jax.load(tiny_directory)
        if model.config.tied_head == tied:
            return tiny_directory
        params = dict(model.params)
        if tied:
            del params["head"]
        else:
            params["head"] = jax.random.normal(jax.random.key(1), params["embedding"].T.shape)
        config = dataclasses.replace(model.config, tied_head=tied)
        target = tmp_path_factory.mktemp("made") / "model"
        llama_jax.save_hugging_face(
            params, config, target, model.tokenizer, model.template, model.stop_ids
        )
        return target

    return make


def convert(source: pathlib.Path, target: pathlib.Path, *more: str) -> pathlib.Path:
    words = [word for token in NEW for word in ("--new-token", token)]
    given = ["convert", str(source), str(target), "--format", "hugging_face", *words, *more]
    assert run_verb(given) == 0
    return target


@pytest.mark.parity
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it_and_resizes_as_we_do(tmp_path, tiny_model, tied, capsys):
    """`resize_token_embeddings(mean_resizing=True)` draws from a normal distribution around the mean
    (1e-9 times their covariance); ours is the mean, so logits after a new token differ a
    little.
    """
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source = tiny_model(tied)
    target = convert(source, tmp_path / "new", "--vocab-multiple", "16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    before = theirs.config.vocab_size
    tokenizer.add_special_tokens({"additional_special_tokens": list(NEW)})
    theirs.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=16, mean_resizing=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    fast = transformers.AutoTokenizer.from_pretrained(target)
    assert loaded.config.vocab_size == theirs.config.vocab_size > before
    text = f"hello {NEW[0]} there{NEW[1]}"
    ids = fast.encode(text)
    assert ids == tokenizer.encode(text)
    assert {before, before + 1} <= set(ids)
    assert all(token not in fast.decode(ids, skip_special_tokens=True) for token in NEW)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        ours, wanted = loaded(tokens).logits[0], theirs(tokens).logits[0]
    np.testing.assert_allclose(ours.numpy(), wanted.numpy(), atol=5e-3)
    model = llama_jax.load(target)
    got = llama_jax.logits(model.params, jnp.asarray([ids]), model.config)
    np.testing.assert_allclose(np.asarray(got[0]), ours.numpy(), atol=2e-5)
    assert f"{NEW[0]} {before}" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model(tiny_model):
    """Its own tokens beyond the model's vocabulary get entries too."""
    opened = open_model(tiny_model(False))
    more = dataclasses.replace(opened.source.config, vocab_size=270)  # of 280
    table, head = (opened.source.read(name, None) for name in ("embedding", "head"))
    tables = {"embedding": table[:270], "head": head[:, :270]}
    source = types.SimpleNamespace(config=more, read=lambda name, layer: tables[name])
    changed, added = add_tokens(opened._replace(source=source), NEW)
    assert (added.first, added.size) == (270, 282)
    assert list(added.tokens.values()) == [280, 281]
    assert changed.source.read("embedding", None).shape == (282, 48)
    assert changed.source.read("head", None).shape == (48, 282)
    np.testing.assert_array_equal(changed.source.read("embedding", None)[:270], table[:270])


def test_in_memory_it_is_the_same(tmp_path, tiny_model):
    source = tiny_model(False)
    target = convert(source, tmp_path / "new", "--vocab-multiple", "16")
    model, wanted = llama_jax.load(source), llama_jax.load(target)
    params, config = llama_jax.resize_vocabulary(
        model.params, model.config, wanted.config.vocab_size
    )
    assert config == wanted.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, wanted.params)
    mean = np.asarray(model.params["head"], np.float64).mean(axis=1)
    np.testing.assert_allclose(np.asarray(params["head"])[:, -1], mean, atol=1e-6)
    with pytest.raises(InputError, match="at least"):
        llama_jax.resize_vocabulary(model.params, model.config, 3)


def test_tokens_that_are_there_and_texts_that_are_none(tmp_path, tiny_model, capsys):
    target = convert(tiny_model(False), tmp_path / "once")
    convert(target, tmp_path / "twice")
    assert f"{NEW[0]} is in the vocabulary already" in capsys.readouterr().err
    assert open_model(tmp_path / "twice").source.config == open_model(target).source.config
    for words, message in (
        (["--new-token", " x"], "without space"),
        (["--vocab-multiple", "8"], "with --new-token"),
    ):
        with pytest.raises(InputError, match=message):
            run_verb(
                ["convert", str(target), str(tmp_path / "no"), "--format", "hugging_face", *words]
            )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_trained_beside_adapters_and_nothing_else_moves(tmp_path, tiny_model, tied):
    base = convert(tiny_model(tied), tmp_path / "base")
    model = open_model(base)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}"
        + NEW[0]
        + "{{ m.content }}"
        + NEW[1]
        + "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    lines = [{"prompt": f"call {i}", "completion": f"done {i} times"} for i in range(40)]
    source, prepared = tmp_path / "calls.jsonl", tmp_path / "prepared"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--input", source, "--tokenizer", base, "--template", template, "--output", prepared]
    assert run_verb(["prepare", *map(str, words), "--held-out", "0", "--workers", "1"]) == 0
    config = TrainConfig(
        run=RunConfig(dir=str(tmp_path / "run"), steps=6, init=str(base), eval_every=0),
        model=model.source.config,
        data=DataConfig(
            sources=(SourceConfig(str(prepared)),), length=32, batch_size=8, held_out_fraction=0.0
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        adapter=AdapterConfig(rank=2, targets=("wq",), new_tokens=2),
    )
    path = write_yaml(tmp_path / "config.yaml", config)
    assert train(["--config", str(path)]) == 0
    before, after = llama_jax.load(base).params, llama_jax.load(tmp_path / "run").params
    changes = np.abs(np.asarray(after["embedding"]) - np.asarray(before["embedding"]))
    assert (changes[-2:].max(axis=1) > 1e-3).all()
    assert changes[:-2].max() == 0
    if not tied:
        changes = np.abs(np.asarray(after["head"]) - np.asarray(before["head"]))
        assert (changes[:, -2:].max(axis=0) > 1e-3).all()
        assert changes[:, :-2].max() == 0
    merged = tmp_path / "merged"
    assert run_verb(["adapters", "merge", str(base), str(tmp_path / "run"), str(merged)]) == 0
    again = llama_jax.load(merged).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, after)
    with pytest.raises(InputError, match="merge them"):
        run_verb(["adapters", "export", str(tmp_path / "run"), str(tmp_path / "apart")])


@pytest.mark.parametrize("tied", [False, True])
def test_the_forward_pass_adds_what_was_trained(tiny_model, tied):
    """To the last entries of embedding and head, as NumPy adds it."""
    model = llama_jax.load(tiny_model(tied), form="stacked")
    params, config = model.params, model.config
    adapters = init_adapters(jax.random.key(0), config, 2, ("wq",), 3)
    change = np.random.default_rng(0).normal(size=(3, config.dim)).astype(np.float32)
    adapters["new_tokens"] = {"inputs": jnp.asarray(change)}
    wanted = {**params, "embedding": np.array(params["embedding"])}
    wanted["embedding"][-3:] += change
    if not tied:
        adapters["new_tokens"]["outputs"] = jnp.asarray(2 * change.T)
        wanted["head"] = np.array(params["head"])
        wanted["head"][:, -3:] += 2 * change.T
    tokens = jnp.asarray([[1, config.vocab_size - 1, 5, config.vocab_size - 3]])
    got = llama_jax.logits(combine(params, adapters, 1.0), tokens, config)
    np.testing.assert_allclose(got, llama_jax.logits(wanted, tokens, config), atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"new_tokens": 2}, "adapter.rank"),
        ({"rank": 2, "new_tokens": 2, "base": "int8"}, "adapter.base"),
        ({"rank": 2, "new_tokens": -1}, "adapter.new_tokens"),
    ],
)
def test_what_does_not_go_with_them(adapter, message):
    with pytest.raises(InputError, match=message):
        AdapterConfig(**adapter)
