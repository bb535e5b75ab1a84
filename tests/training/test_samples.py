"""Texts of the model in training: the most probable tokens by hand, one compilation, meshes,
adapters, what is kept.
"""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_parameters
from test_loop import Recorder, _one_device, changed, config, corpus, forget  # noqa: F401 (fixtures)
from tiny_runs import MODEL, read_state

from llama_jax.errors import InputError
from llama_jax.generation.programs import programs_of
from llama_jax.model.llama import Llama, logits
from llama_jax.model.lora import combine, init_adapters, merge
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, tree_shardings
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.config import RunConfig
from llama_jax.training.evaluate import Samples, shown
from llama_jax.training.loop import prepare
from llama_jax.weights.load import load

PROMPTS = ("alpha beta", "<7> gamma")


whole_logits = jax.jit(logits, static_argnums=2)


def continued(params, prompt: list[int], count: int, stop: int, model=MODEL) -> list[int]:
    """The most probable tokens, each from the logits of the whole text before it; no token sees the
    zeros behind it.
    """
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] != stop:
        padded = np.asarray([ids + [0] * (64 - len(ids))], np.int32)
        ids.append(int(np.argmax(np.asarray(whole_logits(params, padded, model))[0, len(ids) - 1])))
    return ids[len(prompt) :]


def kept(directory) -> list[dict]:
    return [
        json.loads(line)
        for line in (pathlib.Path(directory) / "samples.jsonl").read_text().splitlines()
    ]


def test_each_evaluation_has_the_texts_of_its_parameters(config):  # noqa: F811
    programs_of.cache_clear()
    display = Recorder()
    sampled = changed(
        config, run={"sample_prompts": PROMPTS, "sample_tokens": 6, "checkpoint_every": 5}
    )
    run = prepare(sampled, display)
    run.train()
    lines = kept(config.run.dir)
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, text) for step in (5, 10, 12) for text in PROMPTS
    ]
    tokenizer = load_tokenizer(run.data.tokenizer_path)
    for step in (5, 12):
        params = read_state(config, step).params
        for line in lines:
            if line["step"] == step:
                ids = continued(
                    params,
                    [tokenizer.begin_id, *tokenizer.encode(line["prompt"])],
                    6,
                    tokenizer.end_id,
                )
                assert line["text"] == tokenizer.decode(ids)
    assert [event for event in display.events if event.startswith("sample ")] == [
        f"sample    {line['prompt']!r} {line['text']!r}" for line in lines
    ]
    options = ModelOptions(scan=True, dtype="float32", rules=TRAINING)
    assert programs_of(MODEL, options, run.mesh).compilations == {
        "cache": 1,
        "prefill": 1,
        "begin": 1,
        "decode": 1,
    }


def test_what_an_interrupted_run_left_is_not_there_twice(config, tmp_path):  # noqa: F811
    sampled = changed(config, run={"sample_prompts": PROMPTS, "sample_tokens": 3, "eval_every": 3})
    prepare(changed(sampled, run={"dir": str(tmp_path / "reference")}), Recorder()).train()
    shutil.copytree(tmp_path / "reference", config.run.dir)
    forget(config, 12)  # it goes on from step 8, with the texts of steps 9 and 12 there already
    with (pathlib.Path(config.run.dir) / "samples.jsonl").open("a") as file:
        file.write('{"step": 9, "prompt": "alpha beta", "text": "of a crash"}\n{"step": 12, "pro')
    prepare(sampled, Recorder()).train()
    assert kept(config.run.dir) == kept(tmp_path / "reference")
    prepare(changed(config, run={"overwrite": True, "steps": 1}), Recorder()).train()
    assert not (pathlib.Path(config.run.dir) / "samples.jsonl").exists()


@pytest.fixture
def taken(tiny_directory, tmp_path):
    """A function that gives the texts of parameters, with adapters or without, on a mesh of 1 or 8
    devices.
    """
    config = load(tiny_directory).config  # noqa: F811

    def take(sizes, params, adapters=None, **options):
        mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        run = RunConfig(
            dir=str(tmp_path), sample_prompts=("The cat", "A", "你好 🎉"), sample_tokens=12
        )
        model = Llama(config, ModelOptions(scan="layers" in params, **options))
        with jax.set_mesh(mesh):
            place = lambda tree: jax.device_put(
                tree, tree_shardings(tree, mesh, model.options.rules)
            )
            placed = (
                place(params) if adapters is None else combine(place(params), place(adapters), 2.0)
            )
            Samples(run, model, mesh, tiny_directory, lambda line: None).take(3, placed)
        texts = [line["text"] for line in kept(tmp_path)]
        (tmp_path / "samples.jsonl").unlink()
        return texts

    return take


def test_adapters_and_meshes_change_nothing(tiny_directory, taken):
    model = load(tiny_directory, form="stacked")
    fresh = jax.eval_shape(lambda: init_adapters(jax.random.key(1), model.config, 4, ("wq", "up")))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), fresh)
    expected = taken((1, 1, 1), jax.jit(merge, static_argnums=2)(model.params, adapters, 2.0))
    assert expected != taken((1, 1, 1), model.params)
    assert taken((2, 2, 2), model.params, adapters, remat="full") == expected


def test_prompts_that_the_model_cannot_take(taken, tiny_directory, monkeypatch):
    make = functools.partial(
        Samples,
        model=Llama(MODEL, ModelOptions()),
        mesh=make_mesh(devices=jax.devices()[:1]),
        tokenizer_path=tiny_directory,
        say=print,
    )
    with pytest.raises(
        InputError,
        match=r"^run\.sample_prompts: prompt 2 has \d+ tokens; 1 to 64 \(the model's context\)",
    ):
        make(RunConfig(sample_prompts=("a", "b " * 100)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"^run\.sample_prompts: given on 2 hosts, one expected"):
        make(RunConfig(sample_prompts=("a",)))
    make(RunConfig())


def test_a_text_is_one_harmless_line():
    line = shown("a\x1b[31m\n", "é\u2028\x9b\u202e" + "x" * 1000)
    assert line.isprintable()
    assert line.startswith(r"sample    'a\x1b[31m\n' 'é\u2028\x9b\u202ex")
    assert len(line) < 170


def test_random_parameters_without_samples_leave_no_file(tmp_path):
    samples = Samples(
        RunConfig(dir=str(tmp_path)),
        Llama(MODEL, ModelOptions()),
        make_mesh(devices=jax.devices()[:1]),
        tmp_path / "none",
        print,
    )
    samples.begin(0)
    samples.take(1, random_parameters(MODEL))
    assert list(tmp_path.iterdir()) == []
