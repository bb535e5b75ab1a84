"""Logits, hidden states and gradients against transformers and PyTorch, on random tiny LLaMAs of
every kind.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    VARIANTS,
    random_parameters,
    random_tokens,
    torch_name,
    transformers_model,
    unrolled_parameters,
)

from llama_jax.model.llama import hidden_states, logits
from llama_jax.weights.assemble import unstack

torch = pytest.importorskip("torch", reason="parity with PyTorch runs on Python 3.11")
pytestmark = pytest.mark.parity

WAYS = {
    "reference": {"attention": "reference"},
    "blockwise": {"attention": "blockwise", "remat": "full"},
}


# Ways by turns. What differs from these in numbers alone is compared forward (below), and here in
# `make test-all`.
QUICK = {
    "gqa-untied": "reference",
    "mha-untied": "blockwise",
    "mqa-tied": "reference",
    "gqa-tied-theta5e5": "blockwise",
    "llama3-factor32-tied": "reference",
}
CASES = [
    pytest.param(
        variant,
        way,
        id=f"{variant}-{way}",
        marks=[] if QUICK.get(variant) == way else [pytest.mark.slow],
    )
    for variant in sorted(VARIANTS)
    for way in WAYS
]


def small(variant: str):
    """(config, parameters, transformers model) of a variant with two layers."""
    config = dataclasses.replace(VARIANTS[variant], layers=2)
    params = random_parameters(config)
    return config, params, transformers_model(config, params)


@pytest.mark.parametrize(("variant", "way"), CASES)
def test_logits_and_gradients_equal_pytorch(variant, way):
    """Of the scanned form."""
    config, params, model = small(variant)
    tokens = np.asarray(random_tokens(config, (2, 41), seed=1))

    def mean_loss(params, inputs, targets):
        """And the logits."""
        scores = logits(params, inputs, config, **WAYS[way])
        return -jnp.take_along_axis(
            jax.nn.log_softmax(scores), targets[..., None], axis=-1
        ).mean(), scores

    run = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (value, got), gradient = run(params, tokens[:, :-1], tokens[:, 1:])
    ids = torch.from_numpy(tokens.astype(np.int64))
    expected = model(ids[:, :-1]).logits
    assert np.abs(expected.detach().numpy()).max() > 1  # the comparison is of numbers that matter
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    theirs = dict(model.named_parameters())
    for path, leaf in jax.tree_util.tree_flatten_with_path(
        unstack(jax.tree.map(np.asarray, gradient))
    )[0]:
        names = tuple(part.key for part in path)
        wanted = theirs[torch_name(names)].grad.numpy()
        found = leaf.T if leaf.ndim == 2 and names[0] != "embedding" else leaf
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < 1e-3, (names, error)


@pytest.mark.parametrize(
    ("variant", "scan"),
    [
        pytest.param(
            variant,
            scan,
            id=f"{variant}-{'scanned' if scan else 'unrolled'}",
            marks=[] if (number % 2 == 0) == scan else [pytest.mark.slow],
        )
        for number, variant in enumerate(sorted(VARIANTS))
        for scan in (True, False)
    ],
)
def test_hidden_states_and_embeddings_equal_transformers(variant, scan):
    config, params, model = small(variant)
    params = params if scan else unrolled_parameters(config)
    tokens = np.asarray(random_tokens(config, (1, 100)))
    embedded = np.asarray(params["embedding"])[tokens] + np.float32(0.1)
    with torch.no_grad():
        out = model(inputs_embeds=torch.from_numpy(embedded), output_hidden_states=True)
    run = jax.jit(lambda params, x: (hidden_states(params, x, config), logits(params, x, config)))
    states, got = run(params, embedded)
    for layer in range(
        config.layers
    ):  # transformers norms its last entry, ours is the plain stream
        np.testing.assert_allclose(
            states[layer], out.hidden_states[layer].numpy(), atol=1e-4, rtol=0
        )
    np.testing.assert_allclose(got, out.logits.numpy(), atol=1e-4, rtol=0)
