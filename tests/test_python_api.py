"""The public names, used as a researcher would on a real model: load, look inside, change,
differentiate, generate.
"""

import contextlib
import inspect
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax


@pytest.mark.parametrize("name", llama_jax.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(llama_jax, name)
    assert name in dir(llama_jax)
    if inspect.isclass(value) or inspect.isroutine(value):
        assert len(inspect.getdoc(value) or "") > 20
        assert value.__module__.startswith("llama_jax.")


def test_names_are_in_order_and_no_other_is_there():
    assert (
        sorted(llama_jax.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
        == llama_jax.__all__
    )
    with pytest.raises(AttributeError, match="module 'llama_jax' has no attribute 'lod'"):
        llama_jax.lod  # noqa: B018


README_EXAMPLES = re.findall(
    r"```python\n(.*?)```",
    (pathlib.Path(__file__).parent.parent / "README.md").read_text(),
    re.DOTALL,
)


@pytest.fixture(scope="module")
def session(smollm2_gguf, tmp_path_factory):
    """What the README's examples compute, by name: their very lines are run, beside the real
    weights.
    """
    first, second, _ = README_EXAMPLES
    assert len(first.splitlines()) <= 10
    names: dict = {}
    folder = tmp_path_factory.mktemp("example")
    (folder / smollm2_gguf.name).symlink_to(smollm2_gguf)
    with contextlib.chdir(folder):
        exec(first + second, names)
        names["exported"] = llama_jax.load("exported")
    return names


@pytest.mark.smollm2
def test_logits_predict_the_text(session):
    tokens, scores = session["tokens"], session["scores"]
    assert scores.shape == (*tokens.shape, session["config"].vocab_size)
    assert session["tokenizer"].decode([int(scores[0, 4].argmax())]) == " Paris"


@pytest.mark.smollm2
def test_hidden_states_lead_to_the_logits(session):
    """The last of them through the final norm and the head, in float64, are the logits; the first
    are the embeddings.
    """
    config, params, stream = session["config"], session["params"], session["stream"]
    np.testing.assert_array_equal(stream[0], session["embedded"])
    assert stream.shape[0] == config.layers + 1
    last = np.asarray(stream[-1], np.float64)
    normed = (
        last
        / np.sqrt((last**2).mean(axis=-1, keepdims=True) + config.norm_eps)
        * np.asarray(params["final_norm"]["scale"])
    )
    expected = normed @ np.asarray(params["embedding"], np.float64).T
    np.testing.assert_allclose(session["scores"], expected, atol=2e-3)


@pytest.mark.smollm2
def test_embeddings_in_place_of_tokens(session):
    unchanged = llama_jax.logits(session["params"], session["embedded"], session["config"])
    np.testing.assert_allclose(unchanged, session["scores"], atol=1e-4)
    assert np.abs(session["louder"] - session["scores"]).max() > 0.1


@pytest.mark.smollm2
def test_the_gradient_of_the_loss(session):
    """The loss is that of the logits; along its own gradient it rises as steeply as that is
    long.
    """
    tokens, scores, params, config = (
        session[name] for name in ("tokens", "scores", "params", "config")
    )
    log_probabilities = np.asarray(jax.nn.log_softmax(scores[0, :-1]), np.float64)
    expected = -log_probabilities[np.arange(tokens.shape[1] - 1), tokens[0, 1:]].mean()
    assert session["loss"] == pytest.approx(expected, abs=1e-4)
    gradient = session["gradient"]
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    length = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    step = 0.02 / length**2

    def loss_at(distance: float) -> float:
        moved = jax.tree.map(lambda leaf, slope: leaf + distance * slope, params, gradient)
        return float(llama_jax.mean_loss(moved, tokens, config))

    assert loss_at(step) - loss_at(-step) == pytest.approx(2 * step * length**2, rel=0.05)


@pytest.mark.smollm2
def test_the_answer(session):
    assert session["answer"] == "The capital of France is Paris."


@pytest.mark.smollm2
def test_conversation_scores_and_export(session):
    talk, likely, small, exported = (
        session[name] for name in ("talk", "likely", "small", "exported")
    )
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.reused > 0
    assert likely.greedy
    assert llama_jax.parameter_bytes(small) < 0.3 * llama_jax.parameter_bytes(session["params"])
    stacked = llama_jax.stack(exported.params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), stacked, session["params"]))
    assert exported.stop_ids == session["model"].stop_ids


def test_no_example_leaves_the_begin_token_out():
    """`encode` gives words without the token that a model expects before them; `encode_prompt` is
    for prompts.
    """
    root = pathlib.Path(__file__).parent.parent
    shown = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "examples").glob("*.py")]
    assert [str(path) for path in shown if "tokenizer.encode(" in path.read_text("utf8")] == []
    assert "llama_jax.encode_prompt(tokenizer, " in shown[0].read_text("utf8")


def test_rollouts_and_meshes(tiny_directory):
    """The README's last example, on a tiny model: samples of a prompt lie side by side, and a mesh
    is one more argument.
    """
    tiny = llama_jax.load(tiny_directory, form="stacked")
    ids = [tiny.tokenizer.encode(text) for text in ("The cat", "The dog sat")]
    lengths = jnp.asarray(np.asarray([len(row) for row in ids], np.int32))
    prompts = jnp.asarray(
        np.asarray([row + [0] * (max(map(len, ids)) - len(row)) for row in ids], np.int32)
    )
    names = {
        "jax": jax,
        "llama_jax": llama_jax,
        "config": tiny.config,
        "params": tiny.params,
        "prompts": prompts,
        "lengths": lengths,
        "step": 3,
        "stop_ids": jnp.asarray([2]),
        "path": tiny_directory,
    }
    example = README_EXAMPLES[2].replace("256, 4", "6, 4").replace("tensor=4", "tensor=1, fsdp=-1")
    exec(example.replace("temperature=0.7", "max_new_tokens=6"), names)
    assert names["rollout"].tokens.shape == names["rollout"].logprobs.shape == (8, 6)
    assert [row.prompt for row in names["texts"]] == ["The cat", "The dog"]
    assert all(row.new_tokens == 6 or row.stop_reason == "stop" for row in names["texts"])
