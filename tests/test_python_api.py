"""The public names, used as a researcher would on a real model: load, look inside, change, differentiate, generate."""

import contextlib
import inspect
import math
import pathlib
import re

import jax
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
    assert sorted(llama_jax.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)) == llama_jax.__all__
    with pytest.raises(AttributeError, match="module 'llama_jax' has no attribute 'lod'"):
        llama_jax.lod  # noqa: B018


@pytest.fixture(scope="module")
def session(smollm2_gguf):
    """What the README's example computes, by name: its very lines are run, beside the real weights."""
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.splitlines()) <= 10
    names: dict = {}
    with contextlib.chdir(smollm2_gguf.parent):
        exec(example, names)
    return names


@pytest.mark.smollm2
def test_logits_predict_the_text(session):
    tokens, scores = session["tokens"], session["scores"]
    assert scores.shape == (*tokens.shape, session["config"].vocab_size)
    assert session["tokenizer"].decode([int(scores[0, 4].argmax())]) == " Paris"


@pytest.mark.smollm2
def test_hidden_states_lead_to_the_logits(session):
    """The last of them through the final norm and the head, in float64, are the logits; the first are the embeddings."""
    config, params, stream = session["config"], session["params"], session["stream"]
    np.testing.assert_array_equal(stream[0], session["embedded"])
    assert stream.shape[0] == config.layers + 1
    last = np.asarray(stream[-1], np.float64)
    normed = (
        last / np.sqrt((last**2).mean(axis=-1, keepdims=True) + config.norm_eps) * np.asarray(params["final_norm"]["scale"])
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
    """The loss is that of the logits; along its own gradient it rises as steeply as that is long."""
    tokens, scores, params, config = (session[name] for name in ("tokens", "scores", "params", "config"))
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
