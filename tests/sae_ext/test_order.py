"""Rows as ranges, and random orders that take no memory."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sae_ext.activations.order import Rows, Shuffled

LARGE = 200_003
"""More than what is kept as an array."""


# -- rows ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), unique=True).map(sorted))
def test_rows_read_like_the_array_of_their_numbers(numbers):
    rows, array = Rows.of(numbers), np.array(numbers, dtype=np.int64)
    assert len(rows) == len(array)
    assert rows[:].tolist() == numbers
    assert np.asarray(rows).tolist() == numbers
    assert rows[2:7].tolist() == array[2:7].tolist()
    places = np.arange(len(array))[::-1]
    assert rows[places].tolist() == array[places].tolist()
    for place in range(len(array)):
        assert rows[place] == array[place]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=20))
def test_ranges_are_joined_where_they_touch(steps):
    starts, lengths, numbers, at = [], [], [], 0
    for gap, length in steps:
        at += gap
        starts.append(at)
        lengths.append(length)
        numbers += range(at, at + length)
        at += length
    rows = Rows(starts, lengths)
    assert rows[:].tolist() == numbers
    assert len(rows._starts) == sum(b - a > 1 for a, b in itertools.pairwise([-9, *numbers]))


def test_there_are_no_rows_before_the_first_and_behind_the_last():
    rows = Rows([3], [4])
    for place in (np.array([0, 4]), np.array([-1])):
        with pytest.raises(IndexError, match="there are 4 rows"):
            rows[place]


# -- orders ----------------------------------------------------------------------------------------


def order(n: int, *seed: int) -> np.ndarray:
    return Shuffled(n, seed).at(np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 100, 65_536, 65_537, 131_072, LARGE])
def test_an_order_holds_every_number_once(n):
    assert np.array_equal(np.sort(order(n, 0, 1)), np.arange(n))


@pytest.mark.parametrize("n", [1000, LARGE])
def test_any_part_of_an_order_is_that_of_the_whole(n):
    whole = order(n, 3, 4)
    places = np.random.default_rng(0).integers(0, n, 500)
    assert np.array_equal(Shuffled(n, [3, 4]).at(places), whole[places])


@pytest.mark.parametrize("n", [1000, LARGE])
def test_another_seed_or_epoch_is_another_order(n):
    orders = [order(n, *seed) for seed in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 12
        assert abs(stats.pearsonr(one, other).statistic) < 5 / np.sqrt(n)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_few_rows_come_in_every_order_alike(n):
    counts = dict.fromkeys(itertools.permutations(range(n)), 0)
    for seed in range(100 * len(counts)):
        counts[tuple(order(n, seed).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize("seed", range(6))
def test_an_order_of_many_rows_is_like_one_that_was_drawn(seed):
    """What a uniform order of n gives, with bounds that it would leave once in some ten thousand times."""
    found = order(LARGE, seed)
    places = np.arange(LARGE)
    # Where a row comes says nothing of where it was, in any region.
    grid = np.histogram2d(places, found, bins=40)[0].ravel()
    assert 1e-4 < stats.chisquare(grid).pvalue < 1 - 1e-4
    # Neither does where its neighbours come, near or far.
    for lag in (1, 2, 3, 64, 2048):
        assert abs(stats.pearsonr(found[:-lag], found[lag:]).statistic) < 4.5 / np.sqrt(LARGE)
    # Rows that stood side by side are as far apart as any two.
    where = np.argsort(found)
    apart = np.abs(np.diff(where)) / LARGE
    assert stats.kstest(apart, lambda x: 2 * x - x * x).pvalue > 1e-4
    assert (np.abs(np.diff(found)) == 1).sum() < 14  # 2 on average
    assert (found == places).sum() < 9  # 1 on average
    # A batch is as even a sample of all rows as one that was drawn.
    batches = found[: 2048 * (LARGE // 2048)].reshape(-1, 2048)
    spread = stats.chisquare(
        np.stack([np.histogram(b, bins=32, range=(0, LARGE))[0] for b in batches]), axis=1
    )
    assert stats.kstest(spread.pvalue, "uniform").pvalue > 1e-4
    # Rises and falls: their number is normal with mean (2n - 1) / 3 and variance (16n - 29) / 90.
    rises = np.diff(found) > 0
    runs = 1 + (rises[1:] != rises[:-1]).sum()
    z = (runs - (2 * LARGE - 1) / 3) / np.sqrt((16 * LARGE - 29) / 90)
    assert abs(z) < 4


def test_an_order_of_ten_billion_rows_takes_no_memory():
    tracemalloc.start()
    n = 10**10
    shuffled = Shuffled(n, [0, 0])
    found = np.concatenate([shuffled.at(np.arange(s, s + 2048)) for s in range(0, n, n // 50)][:50])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 << 20
    assert 0 <= found.min() < found.max() < n
    assert len(np.unique(found)) == len(found)
    assert stats.kstest(found / n, "uniform").pvalue > 1e-4
