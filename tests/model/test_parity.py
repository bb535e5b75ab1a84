"""Logits, hidden states and gradients against transformers and PyTorch, on random tiny LLaMAs of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import VARIANTS, random_parameters, random_tokens, torch_name, transformers_model

from llama_jax.model.llama import hidden_states, logits
from llama_jax.weights.forms import unstack

torch = pytest.importorskip("torch", reason="parity with PyTorch runs on Python 3.11")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request):
    """(config, parameters, transformers model) of one variant."""
    config = VARIANTS[request.param]
    params = random_parameters(config)
    return config, params, transformers_model(config, params)


def test_logits_equal_transformers(pair):
    config, params, model = pair
    tokens = random_tokens(config, (2, 100))
    with torch.no_grad():
        expected = model(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
    for backend in ("reference", "chunked"):
        got = np.asarray(logits(params, tokens, config, attention=backend))
        assert np.abs(expected).max() > 1  # the comparison is of numbers that matter
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_hidden_states_and_embeddings_equal_transformers(pair):
    config, params, model = pair
    tokens = random_tokens(config, (1, 20))
    embedded = jnp.take(params["embedding"], tokens, axis=0) + 0.1
    with torch.no_grad():
        out = model(inputs_embeds=torch.from_numpy(np.array(embedded)), output_hidden_states=True)
    got = np.asarray(hidden_states(unstack(params), embedded, config))
    for layer in range(config.layers):  # transformers norms its last entry, ours is the plain stream
        np.testing.assert_allclose(got[layer], out.hidden_states[layer].numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.asarray(logits(params, embedded, config)), out.logits.numpy(), atol=1e-4, rtol=0)


def _mean_loss(params, tokens, config, **options):
    log_probabilities = jax.nn.log_softmax(logits(params, tokens[:, :-1], config, **options))
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("options", [{"attention": "reference"}, {"attention": "chunked", "remat": "full"}], ids=str)
def test_gradients_equal_pytorch(pair, options):
    config, params, model = pair
    tokens = random_tokens(config, (2, 40), seed=1)
    model.zero_grad()
    ids = torch.from_numpy(np.array(tokens, np.int64))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    value, gradient = jax.value_and_grad(_mean_loss)(params, tokens, config, **options)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    theirs = dict(model.named_parameters())
    for path, leaf in jax.tree_util.tree_flatten_with_path(unstack(gradient))[0]:
        names = tuple(part.key for part in path)
        expected = theirs[torch_name(names)].grad.numpy()
        got = np.asarray(leaf).T if leaf.ndim == 2 and names[0] != "embedding" else np.asarray(leaf)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 1e-3, (names, error)
