"""A permutation without memory: it is one, of any size, and looks like chance."""

from collections import Counter
from itertools import permutations
from math import sqrt

import numpy as np
import pytest

from vqvae.data.permutation import Permutation


def order_of(num: int, *seed: int) -> np.ndarray:
    return Permutation(num, seed)(np.arange(num))


def uneven(counts: np.ndarray) -> bool:
    """Whether counts are too far from even to be chance, by a χ² test."""
    counts = counts.reshape(-1).astype(np.float64)
    expected, freedom = counts.mean(), counts.size - 1
    return float(((counts - expected) ** 2 / expected).sum()) > freedom + 6 * sqrt(2 * freedom)


def test_each_thing_comes_once():
    for num in (*range(1, 34), 97, 100, 127, 128, 129, 1000, 1009, 4096, 9973, 65_536, 65_537):
        order = order_of(num, 0, 0)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(num))


@pytest.mark.parametrize("num", [10**9 + 7, 1 << 62])
def test_huge_sets_take_no_memory(num: int):
    shuffle = Permutation(num, (3, 1))
    places = np.concatenate([np.arange(50_000), num - 1 - np.arange(50_000)])
    found = shuffle(places)
    assert len(np.unique(found)) == 100_000
    assert found.min() >= 0
    assert found.max() < num
    assert not uneven(np.bincount(found // (num // 20 + 1), minlength=20))
    assert np.array_equal(shuffle(places[77:99]), found[77:99])


@pytest.mark.parametrize(
    ("num", "seeds"), [(3, 1500), *(pytest.param(n, 6000, marks=pytest.mark.slow) for n in (4, 6))]
)
def test_orders_of_a_few_come_equally_often(num: int, seeds: int):
    orders = Counter(tuple(order_of(num, seed, 0).tolist()) for seed in range(seeds))
    assert not uneven(np.array([orders[each] for each in permutations(range(num))]))


@pytest.mark.parametrize(("num", "seeds"), [(10, 1500), pytest.param(23, 3000, marks=pytest.mark.slow)])
def test_places_and_neighbours_are_even_over_seeds(num: int, seeds: int):
    lands, steps = np.zeros((num, num)), np.zeros(num)
    for seed in range(seeds):
        order = order_of(num, 1, seed)
        lands[np.arange(num), order] += 1
        steps += np.bincount(np.diff(order) % num, minlength=num)
    assert not uneven(lands)
    assert not uneven(steps[1:])


def test_one_long_order_looks_like_chance():
    num = 100_003
    order = order_of(num, 0, 0)
    assert not uneven(np.histogram2d(np.arange(num), order, bins=20)[0])
    assert not uneven(np.histogram2d(order[:-1], order[1:], bins=20)[0])
    assert (order == np.arange(num)).sum() < 10  # one is expected


def test_seeds_and_epochs_give_other_orders_and_always_the_same():
    seeds = ((0, 0), (0, 1), (1, 0), (2**40, 3))
    orders = [tuple(order_of(50, *seed).tolist()) for seed in seeds]
    assert len(set(orders)) == 4
    assert orders == [tuple(order_of(50, *seed).tolist()) for seed in seeds]
