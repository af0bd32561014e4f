from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sae_ext.activations import statistics
from sae_ext.activations.dataset import InMemory
from sae_ext.activations.statistics import data_statistics, geometric_median
from sae_ext.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(limit: int):
    """A tick that raises when called more than `limit` times."""
    calls = []

    def tick() -> None:
        calls.append(1)
        if len(calls) > limit:
            raise InterruptedError

    return tick


# -- mean, norm, variance ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1, 7, 64, 4096])
def test_statistics_are_those_of_the_given_rows_however_they_are_batched(monkeypatch, batch_rows):
    monkeypatch.setattr(statistics, "_BATCH_ROWS", batch_rows)
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32) + 2
    rows = np.arange(3, 47)
    found, part = data_statistics(InMemory(x), rows), x[rows].astype(np.float64)
    np.testing.assert_allclose(found.mean, part.mean(axis=0), rtol=1e-14)
    assert found.mean_norm == pytest.approx(np.linalg.norm(part, axis=1).mean(), rel=1e-14)
    assert found.variance == pytest.approx(part.var(axis=0).sum(), rel=1e-14)


def test_a_small_spread_around_a_large_mean_is_not_lost(monkeypatch):
    monkeypatch.setattr(statistics, "_BATCH_ROWS", 16)
    # 2^23 + {0, 1}: exact in float32; E‖x‖² - ‖mean‖² would be off by about one part in ten
    x = 2.0**23 + np.random.default_rng(0).integers(0, 2, (1000, 2))
    found = data_statistics(InMemory(x), np.arange(1000))
    assert found.variance == pytest.approx((x - 2.0**23).var(axis=0).sum(), rel=1e-9)


@pytest.mark.parametrize("n", [1, 5])
def test_rows_that_are_all_alike_have_no_variance(n):
    found = data_statistics(InMemory(np.full((n, 3), 1.1)), np.arange(n))
    assert found.variance == pytest.approx(0, abs=1e-28)


@pytest.fixture
def damaged(tmp_path, put_activations):
    """30 rows in shards of 15, of which rows 17, 20 and 29 are not finite."""
    x = np.ones((30, 4), np.float16)
    x[17, 2], x[20], x[29, 0] = np.nan, np.inf, -np.inf
    return put_activations(tmp_path, x, [5] * 6, documents_per_shard=3)


@pytest.mark.parametrize("batch_rows", [4, 4096])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_that_are_not_finite_are_refused_with_place_and_count(
    damaged, monkeypatch, batch_rows
):
    monkeypatch.setattr(statistics, "_BATCH_ROWS", batch_rows)
    rows = np.arange(1, 30)
    told = r"shard-00001\.safetensors, row 2: not finite, as are 3 of 29 rows"
    with pytest.raises(UserError, match=told):
        data_statistics(damaged, rows)
    with pytest.raises(UserError, match=told):
        geometric_median(damaged, rows, seed=0)
    assert data_statistics(damaged, rows[:16]).mean.tolist() == [1] * 4


@pytest.mark.parametrize("what", [data_statistics, lambda *a: geometric_median(*a, seed=0)])
def test_no_rows_have_no_statistics(what):
    with pytest.raises(UserError, match="no rows to take statistics of"):
        what(InMemory(np.ones((2, 2))), np.arange(0))


def test_a_pass_ends_with_what_the_tick_raises(monkeypatch):
    monkeypatch.setattr(statistics, "_BATCH_ROWS", 10)
    data, rows = InMemory(np.random.default_rng(0).standard_normal((35, 2))), np.arange(35)
    data_statistics(data, rows, counted(4))
    with pytest.raises(InterruptedError):
        data_statistics(data, rows, counted(3))
    with pytest.raises(InterruptedError):
        geometric_median(data, rows, seed=0, tick=counted(3))
    with pytest.raises(InterruptedError):
        geometric_median(data, rows, seed=0, tick=counted(6))


# -- geometric median ----------------------------------------------------------------------------


def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y, axis=1).mean())


def median(x: np.ndarray, **arguments) -> np.ndarray:
    return geometric_median(InMemory(x), np.arange(len(x)), seed=0, **arguments)


@pytest.mark.parametrize(("n", "d_in"), [(200, 2), (201, 3), (400, 5)])
def test_no_point_is_nearer_to_the_rows_than_the_median(n, d_in, monkeypatch):
    monkeypatch.setattr(statistics, "_BATCH_ROWS", 64)
    x = np.random.default_rng(n).standard_normal((n, d_in))
    x[: n // 4] += 20
    x = x.astype(np.float32).astype(np.float64)
    found = median(x)
    best = minimize(lambda y: mean_distance(x, y), x.mean(axis=0), method="BFGS", tol=1e-9)
    assert mean_distance(x, found) <= best.fun + 1e-9
    assert mean_distance(x, x.mean(axis=0)) > best.fun + 0.5


def test_in_one_dimension_it_is_the_median():
    x = np.array([[3.0], [-1], [10], [4], [1000]])
    assert median(x) == pytest.approx([4], abs=1e-6)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        # the start, the mean, is a row: one that is the median, one that is not
        ([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]], [0, 0]),
        ([[0, 0], [1, 0], [2, 0], [-10, 0], [7, 0]], [1, 0]),
        # a row that is there several times holds the median
        ([[0, 0], [0, 0], [0, 0], [1, 1], [5, 2]], [0, 0]),
        ([[2, 3]], [2, 3]),
        ([[7, 7], [7, 7], [7, 7]], [7, 7]),
    ],
)
def test_an_iterate_may_meet_a_row(x, expected):
    assert median(np.array(x, dtype=np.float32)) == pytest.approx(expected, abs=1e-5)


def test_where_it_ends_the_gradient_is_within_the_tolerance():
    x = np.random.default_rng(1).standard_normal((500, 4))
    x[:100] *= 30
    lengths = []
    for tolerance in (1e-2, 1e-5):
        away = np.asarray(x, np.float32) - median(x, tolerance=tolerance)
        lengths.append(
            float(np.linalg.norm((away / np.linalg.norm(away, axis=1)[:, None]).mean(axis=0)))
        )
        assert lengths[-1] <= tolerance
    assert lengths[1] < lengths[0]


def test_iterations_are_bounded_and_each_comes_nearer():
    x = np.random.default_rng(1).standard_normal((500, 4))
    x[:100] += 30
    distances = [mean_distance(x, median(x, iterations=i, tolerance=1e-12)) for i in range(8)]
    assert distances[0] == pytest.approx(mean_distance(x, x.mean(axis=0)))
    assert all(later < earlier for earlier, later in pairwise(distances))


def test_the_step_from_a_row_comes_nearer_too():
    # the mean is the first row, which pulls a little less than the others: a whole step goes too far
    x = np.array([[0.0, 0], [-12, 0], *[[1, 5], [1, -5]] * 6])
    assert mean_distance(x, median(x, iterations=1)) < mean_distance(x, np.zeros(2))


def test_of_many_rows_a_seeded_sample_is_looked_at():
    data, rows = InMemory(np.random.default_rng(0).standard_normal((400, 3))), np.arange(400)
    whole = geometric_median(data, rows, seed=0)
    first, again, other = (
        geometric_median(data, rows, seed=seed, sample=100).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first != whole.tolist()
    assert np.linalg.norm(first - whole) < 0.5
    assert geometric_median(data, rows, seed=1, sample=400).tolist() == whole.tolist()


def test_far_rows_pull_the_median_less_than_the_mean():
    x = np.random.default_rng(0).standard_normal((300, 8))
    x[:30] = 1e4
    assert np.linalg.norm(median(x)) < 2
    assert float(torch.from_numpy(x).mean(dim=0).norm()) > 1000
