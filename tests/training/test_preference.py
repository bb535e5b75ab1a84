"""Preferences: loss, gradient and figures against the formula of the paper in float64, pairs in
micro-batches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_adapter_training import CONFIG, close, fresh_state, make, train_config, warm_state
from test_step import parameters, random_batch

from llama_jax.data.packing import Batch
from llama_jax.model.llama import logits
from llama_jax.model.lora import merge
from llama_jax.training.evaluate import pair_evaluation, pair_evaluator
from llama_jax.training.step import micro_batches, sequence_numbers, train_step

BETA = 0.3


def sequence_log_probabilities(params, batch):
    """Log p of each sequence's targets, from whole logits."""
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch.tokens, CONFIG, batch.documents), batch.targets
    )
    return -jnp.sum(each * batch.weights, axis=1)


def by_hand(policy, reference):
    """The paper's equation 7 in float64, and its figures."""
    rewards = BETA * (np.asarray(policy, np.float64) - np.asarray(reference, np.float64))
    margin = rewards[0::2] - rewards[1::2]
    return np.mean(np.log1p(np.exp(-margin))), margin, rewards


@functools.cache
def compiled():
    """A recipe of plain descent with rate 1, and its step."""
    recipe = make(train_config(beta=BETA))._replace(
        optimizer=optax.sgd(1.0), schedule=optax.constant_schedule(1.0)
    )
    return recipe, jax.jit(functools.partial(train_step, recipe))


def test_loss_figures_and_gradient_equal_the_formula():
    (recipe, step), params, batch = (
        compiled(),
        parameters(CONFIG),
        jax.device_get(random_batch(CONFIG)),
    )
    state = warm_state(recipe)
    policy = lambda adapters, params, batch: sequence_log_probabilities(
        merge(params, adapters, 2.0), batch
    )

    @jax.jit
    def of_sequences(adapters, params, batch, slopes):
        """Log-probabilities of sequences by adapted and bare parameters; the gradient of the
        former, summed with slopes.
        """
        gradient = jax.grad(lambda adapters: policy(adapters, params, batch) @ slopes)(adapters)
        return policy(adapters, params, batch), sequence_log_probabilities(params, batch), gradient

    ours, reference, _ = of_sequences(state.params, params, batch, np.zeros(8, np.float32))
    _, margin, rewards = by_hand(ours, reference)
    for real in (8, 6):  # the last pair as it is, then as padding
        weights = np.where(np.arange(8)[:, None] < real, batch.weights, 0)
        after, metrics = step(state, micro_batches(batch._replace(weights=weights), 1), params)
        given = margin[: real // 2]
        np.testing.assert_allclose(metrics.loss, np.mean(np.log1p(np.exp(-given))), rtol=1e-4)
        means = {
            "accuracy": given > 0,
            "margin": given,
            "chosen": rewards[0:real:2],
            "rejected": rewards[1:real:2],
        }
        assert metrics.more.keys() == means.keys()
        for name, values in means.items():
            np.testing.assert_allclose(metrics.more[name], np.mean(values), rtol=1e-3, atol=1e-4)
        assert metrics.targets == real / 2
        # The chain rule with slopes in float64: -beta sigmoid(-margin) for chosen sequences, the
        # opposite for rejected ones.
        slope = BETA / (1 + np.exp(given)) / len(given)
        slopes = np.zeros(8, np.float32)
        slopes[:real] = np.stack([-slope, slope], axis=1).reshape(-1)
        expected = of_sequences(state.params, params, batch, slopes)[2]
        close(
            jax.tree.map(np.subtract, *jax.device_get((state.params, after.params))),
            expected,
            atol=1e-4,
        )


def test_held_out_pairs_have_the_loss_of_the_objective_accuracy_and_margin():
    """Over two data sets, the second of which ends in padding; beside it the old mean over chosen
    and rejected tokens.
    """
    (recipe, _), params = compiled(), parameters(CONFIG)
    batch, adapters = jax.device_get(random_batch(CONFIG)), warm_state(recipe).params
    adapted = recipe.parameters(adapters, params, None)
    run = pair_evaluator(recipe.model, recipe.loss_chunk, recipe.objective)
    padded = batch._replace(weights=np.where(np.arange(8)[:, None] < 4, batch.weights, 0))
    found = pair_evaluation([jax.tree.map(float, run(adapted, part)) for part in (batch, padded)])
    policy, reference = (
        jax.jit(sequence_log_probabilities)(p, batch)
        for p in (merge(params, adapters, 2.0), params)
    )
    _, margin, rewards = by_hand(policy, reference)
    twice = lambda values: np.concatenate([values, values[:2]])
    assert found.pairs == 6
    np.testing.assert_allclose(found.loss, np.mean(np.log1p(np.exp(-twice(margin)))), rtol=1e-4)
    means = {
        "accuracy": twice(margin > 0),
        "margin": twice(margin),
        "chosen": twice(rewards[0::2]),
        "rejected": twice(rewards[1::2]),
    }
    for name, values in means.items():
        np.testing.assert_allclose(
            found.metrics()[f"held_out/{name}"], np.mean(values), rtol=1e-3, atol=1e-4
        )
    assert set(found.metrics()) == {
        "held_out/loss",
        "held_out/pairs",
        *(f"held_out/{name}" for name in means),
    }
    assert found.line() == (
        f"loss {found.loss:.4f}, accuracy {np.mean(twice(margin > 0)):.1%}, "
        f"margin {found.more['margin']:.4f} (6 pairs)"
    )


def test_fresh_adapters_are_indifferent():
    (recipe, step), params, batch = (
        compiled(),
        parameters(CONFIG),
        jax.device_get(random_batch(CONFIG)),
    )
    _, metrics = step(fresh_state(recipe), micro_batches(batch, 1), params)
    np.testing.assert_allclose(metrics.loss, np.log(2), rtol=1e-5)
    assert metrics.more["accuracy"] == 0 == metrics.more["margin"]


def test_pairs_stay_together_in_micro_batches():
    batch = jax.device_get(random_batch(CONFIG))
    dealt = sequence_numbers(sequences=8, micro_batch_size=4, unit=2)
    assert dealt.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    (recipe, step), params = compiled(), parameters(CONFIG)
    whole, figures = step(warm_state(recipe), micro_batches(batch, 1), params)
    split, split_figures = step(
        warm_state(recipe), Batch(*[field[dealt] for field in batch]), params
    )
    close(split.params, whole.params)
    np.testing.assert_allclose(
        jax.tree.leaves(split_figures), jax.tree.leaves(figures), rtol=1e-4, atol=1e-5
    )
