"""A permutation without memory: it is one, of any size, and looks like chance."""

from collections import Counter
from itertools import permutations
from math import factorial, sqrt

import numpy as np
import pytest

from vqvae.data.permutation import Permutation

SIZES = (*range(1, 34), 97, 100, 127, 128, 129, 1000, 1009, 4096, 9973, 65_536, 65_537, 300_007)


@pytest.mark.parametrize("num", SIZES)
def test_each_thing_comes_once(num: int):
    order = Permutation(num, (0, 0))(np.arange(num))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num))


@pytest.mark.parametrize("num", [10**9, 10**9 + 7, 2**40, 1 << 62])
def test_huge_sets_take_no_memory(num: int):
    shuffle = Permutation(num, (3, 1))
    places = np.concatenate([np.arange(50_000), num - 1 - np.arange(50_000)])
    found = shuffle(places)
    assert len(np.unique(found)) == 100_000
    assert found.min() >= 0
    assert found.max() < num
    assert not even(np.bincount((found // (num // 20 + 1)), minlength=20)[::-1], shift=1000)
    assert np.array_equal(shuffle(places[77:99]), found[77:99])


def even(counts: np.ndarray, shift: int = 0) -> bool:
    """Whether counts (with a shift: of two of them spoiled by so much) are too far from even to be chance."""
    counts = counts.astype(np.float64)
    if shift:
        assert not even(counts)
        spoiled = counts.copy()
        spoiled[0] += shift
        assert even(spoiled)
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float(((counts - expected) ** 2 / expected).sum()) > freedom + 6 * sqrt(2 * freedom)


@pytest.mark.parametrize("num", [3, *(pytest.param(num, marks=pytest.mark.slow) for num in (2, 4, 5, 6))])
def test_orders_of_a_few_come_equally_often(num: int):
    orders = Counter(tuple(Permutation(num, (seed, 0))(np.arange(num)).tolist()) for seed in range(6000))
    counts = np.array([orders.get(each, 0) for each in permutations(range(num))])
    assert len(counts) == factorial(num)
    assert not even(counts)


@pytest.mark.parametrize("num", [10, *(pytest.param(num, marks=pytest.mark.slow) for num in (7, 23, 64))])
def test_places_and_neighbours_are_even_over_seeds(num: int):
    lands = np.zeros((num, num))
    steps = np.zeros(num)
    for seed in range(3000):
        order = Permutation(num, (1, seed))(np.arange(num))
        lands[np.arange(num), order] += 1
        steps += np.bincount((np.diff(order)) % num, minlength=num)
    assert not even(lands.reshape(-1))
    assert steps[0] == 0
    assert not even(steps[1:])


def test_one_long_order_looks_like_chance():
    order = Permutation(100_003, (0, 0))(np.arange(100_003))
    grid = np.histogram2d(np.arange(100_003), order, bins=20)[0]
    assert not even(grid.reshape(-1))
    neighbours = np.histogram2d(order[:-1], order[1:], bins=20)[0]
    assert not even(neighbours.reshape(-1))
    fixed = int((order == np.arange(100_003)).sum())
    assert fixed < 10  # one is expected


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(Permutation(50, seed)(np.arange(50)).tolist()) for seed in ((0, 0), (0, 1), (1, 0), (2**40, 3))}
    assert len(orders) == 4
    again = Permutation(50, (0, 1))(np.arange(50))
    assert tuple(again.tolist()) in orders
