"""The learning rate: against closed forms, for any peak, warm-up and length."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.optimizer import learning_rate_schedule

SHAPES = {
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
    "wsd": lambda share: 1 - math.sqrt(share),
    "constant": lambda share: 1.0,
}


def expected(
    name: str, update: int, steps: int, warmup: int, peak: float, final: float, fraction: float
) -> float:
    """The learning rate of an update, counted from 1."""
    if update <= warmup:
        return peak * update / warmup
    begin = warmup if name != "wsd" else max(warmup, steps - round(fraction * steps))
    if update <= begin:
        return peak
    if update >= steps:
        return peak if name == "constant" else peak * final
    return peak * (final + (1 - final) * SHAPES[name]((update - begin) / (steps - begin)))


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_update_has_the_rate_of_the_closed_form(name, data):
    steps = data.draw(st.integers(1, 2_000_000), "steps")
    warmup = data.draw(st.integers(0, steps - 1), "warm-up")
    peak = data.draw(st.floats(1e-6, 1.0), "peak")
    final, fraction = data.draw(st.floats(0, 1), "final"), data.draw(st.floats(0, 1), "fraction")
    config = OptimizerConfig(
        learning_rate=peak,
        schedule=name,
        warmup_steps=warmup,
        final_fraction=final,
        decay_fraction=fraction,
    )
    updates = [
        1,
        max(1, warmup),
        warmup + 1,
        steps,
        steps + 1,
        data.draw(st.integers(1, steps), "update"),
    ]
    got = learning_rate_schedule(config, steps)(np.array(updates) - 1)
    wanted = [expected(name, update, steps, warmup, peak, final, fraction) for update in updates]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * peak)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("cosine", [2e-4, 1e-3, 2e-3, 1.1e-3, 2e-4, 2e-4]),
        ("linear", [2e-4, 1e-3, 2e-3, 1.1e-3, 2e-4, 2e-4]),
        ("constant", [2e-4, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3]),
        ("wsd", [2e-4, 1e-3, 2e-3, 2e-3, 2e-4, 2e-4]),
    ],
)
def test_corners(name, rates):
    config = OptimizerConfig(
        learning_rate=2e-3, warmup_steps=10, final_fraction=0.1, schedule=name, decay_fraction=0.4
    )
    schedule = learning_rate_schedule(config, steps=110)
    np.testing.assert_allclose(
        [schedule(count) for count in (0, 4, 9, 59, 109, 500)], rates, rtol=1e-5
    )


def test_wsd_decays_by_one_minus_the_root():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, final_fraction=0.0, schedule="wsd", decay_fraction=0.2
    )
    schedule = learning_rate_schedule(
        config, steps=500
    )  # stable to update 400, a quarter of the decay at 425
    np.testing.assert_allclose(
        [schedule(count) for count in (399, 424, 499)], [1, 0.5, 0], atol=1e-6
    )


def test_is_laid_out_for_its_own_length():
    """A run that is shorter or longer than the schedule has the same learning rates at the same
    steps.
    """
    config = OptimizerConfig(warmup_steps=20, schedule_steps=300)
    counts = np.arange(400)
    long = learning_rate_schedule(OptimizerConfig(warmup_steps=20), 300)(counts)
    for steps in (50, 300, 900):
        np.testing.assert_array_equal(learning_rate_schedule(config, steps)(counts), long)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_finished_run_decays_anew_from_where_it_is(name):
    """From the rate that 100 steps ended with down to a tenth of it, over steps 101 to 200, in the
    usual shape.
    """
    first = OptimizerConfig(learning_rate=1e-2, warmup_steps=10, schedule=name)
    end = float(learning_rate_schedule(first, 100)(99))
    again = learning_rate_schedule(
        dataclasses.replace(first, learning_rate=end, decay_from=100), 200
    )
    half = {"cosine": 0.5, "linear": 0.5, "wsd": 1 - 0.5**0.5}[name]
    expected = [end * (0.1 + 0.9 * left) for left in (1, half, 0)]
    np.testing.assert_allclose(
        [float(again(count)) for count in (99, 149, 199)], expected, rtol=1e-5
    )
