from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch import native
from megaswitch.data.philox import KeyedPermutation

FEISTEL_FROM = KeyedPermutation.FEISTEL_FROM


def permute(positions, *, size, seed=1, epoch=0):
    return native.permute(np.asarray(positions, dtype=np.int64), size=size, seed=seed, epoch=epoch)


@pytest.mark.parametrize(
    "size", [1, 2, 5, 1000, FEISTEL_FROM - 1, FEISTEL_FROM, FEISTEL_FROM + 1, 131_073, 300_007]
)
def test_every_element_comes_once(size):
    order = permute(np.arange(size), size=size)
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(FEISTEL_FROM, 1 << 62),
    seed=st.integers(0, (1 << 64) - 1),
    epoch=st.integers(0, (1 << 63) - 1),
    data=st.data(),
)
def test_the_core_equals_the_oracle_on_large_sizes(size, seed, epoch, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    oracle = KeyedPermutation(size, seed=seed, epoch=epoch)
    expected = [oracle[position] for position in positions]
    assert permute(positions, size=size, seed=seed, epoch=epoch).tolist() == expected
    assert all(0 <= element < size for element in expected)
    assert len(set(expected)) == len(set(positions))


@pytest.mark.parametrize("size", [1, 2, 3, 100, 3000])
def test_the_core_equals_the_oracle_on_small_sizes(size):
    oracle = KeyedPermutation(size, seed=9, epoch=4)
    expected = [oracle[position] for position in range(size)]
    assert permute(np.arange(size), size=size, seed=9, epoch=4).tolist() == expected


def test_all_orders_of_four_are_equally_likely():
    runs = 4800
    counts = Counter(
        tuple(permute(np.arange(4), size=4, seed=seed, epoch=seed % 3)) for seed in range(runs)
    )
    assert len(counts) == 24
    assert sum((n - runs / 24) ** 2 / (runs / 24) for n in counts.values()) < 65  # p = 1e-5


def test_neighbours_of_a_large_order_are_unrelated():
    size = FEISTEL_FROM + 12_345
    steps = np.zeros(0, dtype=np.int64)
    fixed = 0
    for seed in range(10):
        order = permute(np.arange(size), size=size, seed=seed)
        steps = np.concatenate([steps, np.diff(order)])
        fixed += int((order == np.arange(size)).sum())
    # A uniform order has one pair (i, i+1) side by side and one fixed point on average.
    assert 0 < (steps == 1).sum() < 30
    assert fixed < 30
    # First elements spread evenly: mean |difference| of two uniform numbers is a third.
    assert abs(np.abs(steps).mean() / size - 1 / 3) < 0.005


def test_where_an_element_lands_is_uniform():
    size = FEISTEL_FROM + 1
    landed = np.array([permute([17], size=size, seed=seed)[0] for seed in range(4000)])
    counts = np.histogram(landed, bins=16, range=(0, size))[0]
    assert ((counts - 250) ** 2 / 250).sum() < 50  # 15 degrees of freedom, p = 1e-5


def test_epochs_and_seeds_differ():
    size = FEISTEL_FROM
    base = permute(np.arange(size), size=size, seed=1, epoch=0)
    for seed, epoch in [(1, 1), (2, 0)]:
        assert (base == permute(np.arange(size), size=size, seed=seed, epoch=epoch)).sum() < 20


def test_positions_outside_are_refused():
    for position in (-1, 10):
        with pytest.raises(IndexError):
            permute([position], size=10)
