"""The order of windows: a bijection, different for each epoch and seed, the same for ever."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.batches import permute


def order(count, seed=0, epoch=0):
    return permute(np.arange(count), count, seed, epoch)


@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_is_a_bijection(count, seed, epoch):
    assert sorted(order(count, seed, epoch).tolist()) == list(range(count))


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 2**55), seed=st.integers(0, 2**40), data=st.data())
def test_large_counts_stay_in_range_and_do_not_collide(count, seed, data):
    indices = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1, max_size=50))
    images = permute(np.array(indices), count, seed, 0)
    assert len(set(images.tolist())) == len(indices)
    assert 0 <= images.min() <= images.max() < count


def test_each_image_is_a_function_of_its_index_alone():
    whole = order(1000, seed=3)
    shuffled = np.array([999, 0, 500, 0])
    np.testing.assert_array_equal(permute(shuffled, 1000, 3, 0), whole[shuffled])


def test_epochs_and_seeds_give_different_orders():
    orders = [order(50, seed, epoch).tolist() for seed in range(5) for epoch in range(5)]
    assert len({tuple(one) for one in orders}) == 25


def test_order_looks_random():
    images = order(10_000, seed=1)
    correlation = np.corrcoef(np.arange(10_000), images)[0, 1]
    fixed_points = int((images == np.arange(10_000)).sum())
    neighbours = int((np.abs(np.diff(images)) == 1).sum())
    assert abs(correlation) < 0.05  # 5 standard deviations
    assert fixed_points < 8  # one expected
    assert neighbours < 12  # two expected


def test_first_images_are_uniform_over_seeds():
    images = np.array([permute(np.array([0]), 10, seed, 0)[0] for seed in range(2000)])
    counts = np.bincount(images, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # chi-squared, 9 degrees of freedom, p = 1e-4


def test_order_is_part_of_the_format():
    # Golden values, from plain Python integers: whoever changes them changes what every resumed
    # training reads.
    assert order(13, seed=0).tolist() == GOLDEN_13
    assert permute(np.arange(5), 10**12, seed=1234, epoch=7).tolist() == GOLDEN_LARGE


GOLDEN_13 = [7, 6, 9, 12, 10, 11, 1, 2, 5, 0, 8, 3, 4]
GOLDEN_LARGE = [141817688805, 490035234829, 923296056639, 972794532930, 201392633850]
