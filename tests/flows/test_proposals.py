from __future__ import annotations

import math

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from flows.ledger import DONE, FAILED, Ledger, Trial
from flows.recipe import Recipe
from flows.tuning import _next_round, propose
from sae_ext.config import TuneConfig

CONFIG = TuneConfig(trials=20, initial_trials=4, lr=(1e-4, 1e-2), l1=(0.5, 8.0))
BEST = (1e-3, 2.0)


def objective(lr: float, l1: float) -> float:
    """A bowl in log space with its bottom at `BEST`."""
    return 0.2 + math.log10(lr / BEST[0]) ** 2 + math.log2(l1 / BEST[1]) ** 2 / 4


def trial(number: int, point: tuple[float, float], value: float | None) -> Trial:
    state = FAILED if value is None else DONE
    error = "lost" if value is None else None
    return Trial(number, state, *point, None, value, 30.0, value, error)


def finished(config: TuneConfig, n: int, value=objective) -> list[Trial]:
    """The first trials of a search, asked for one at a time."""
    rows: list[Trial] = []
    while len(rows) < n:
        (point,) = propose(config, rows, 1)
        rows.append(trial(len(rows), point, value(*point)))
    return rows


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices of a dozen rows gain nothing from threads and lose much where cores are busy."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def searched(one_thread) -> list[Trial]:
    return finished(CONFIG, 12)


def unit(points: list[tuple[float, float]]) -> np.ndarray:
    """Where points lie in the searched rectangle, each side of it 0 to 1 in log space."""
    low, high = np.log([[CONFIG.lr[0], CONFIG.l1[0]], [CONFIG.lr[1], CONFIG.l1[1]]])
    return (np.log(points) - low) / (high - low)


def inside(points: list[tuple[float, float]], config: TuneConfig = CONFIG) -> bool:
    return all(
        config.lr[0] <= lr <= config.lr[1] and config.l1[0] <= l1 <= config.l1[1]
        for lr, l1 in points
    )


# -- the first trials ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 4, 7])
def test_the_first_trials_fill_the_space(n):
    config = TuneConfig(trials=20, initial_trials=n, lr=CONFIG.lr, l1=CONFIG.l1)
    points = unit(propose(config, [], n))
    for axis in points.T:
        assert sorted(np.floor(axis * n).astype(int)) == list(range(n))


def test_the_first_trials_are_the_same_however_they_are_asked_for(searched):
    together = propose(CONFIG, [], 4)
    assert [(t.lr, t.l1) for t in searched[:4]] == together
    assert propose(CONFIG, searched[:1], 2) == together[1:3]


def test_the_first_trials_do_not_depend_on_how_the_others_went(searched):
    failed = [trial(t.trial, (t.lr, t.l1), None) for t in searched[:2]]
    assert propose(CONFIG, failed, 2) == propose(CONFIG, searched[:2], 2)


# -- guided trials -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "count"), [(0, 2), (2, 1), (4, 2), (9, 1)])
def test_a_proposal_is_a_function_of_its_arguments(searched, n, count):
    first = propose(CONFIG, searched[:n], count)
    assert propose(CONFIG, list(searched[:n]), count) == first
    assert len(first) == count
    assert inside(first)
    assert all(type(value) is float for point in first for value in point)


@pytest.mark.parametrize("n", [0, 6])
def test_another_seed_proposes_other_points(searched, n):
    other = TuneConfig(trials=20, initial_trials=4, lr=CONFIG.lr, l1=CONFIG.l1, seed=1)
    assert propose(other, searched[:n], 2) != propose(CONFIG, searched[:n], 2)


def test_a_guided_proposal_depends_on_the_results(searched):
    points = [(t.lr, t.l1) for t in searched[:8]]
    turned = [trial(i, p, 5 - objective(*p)) for i, p in enumerate(points)]
    towards = unit(propose(CONFIG, searched[:8], 1))
    away = unit(propose(CONFIG, turned, 1))
    assert np.abs(towards - away).max() > 0.05


def test_the_search_comes_closer_to_the_best_point_than_chance(searched):
    where = unit([(t.lr, t.l1) for t in searched])
    distance = np.linalg.norm(where - unit([BEST]), axis=1)
    chance = np.linalg.norm(np.random.default_rng(0).random((10_000, 2)) - unit([BEST]), axis=1)
    assert np.median(distance[-4:]) < 0.75 * np.median(chance)
    assert distance[4:].min() < np.quantile(chance, 0.05)


def test_points_proposed_together_are_not_the_same(searched):
    points = unit(propose(CONFIG, searched[:8], 3))
    for i in range(3):
        for j in range(i):
            assert np.linalg.norm(points[i] - points[j]) > 0.01


@pytest.mark.parametrize("failures", [[0], [1, 4, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_failed_trials_do_not_poison_the_search(searched, failures):
    rows = [
        trial(t.trial, (t.lr, t.l1), None if t.trial in failures else t.objective)
        for t in searched[:8]
    ]
    points = propose(CONFIG, rows, 2)
    assert inside(points)
    assert points[0] != points[1]


def test_a_search_of_which_all_trials_failed_goes_on(searched):
    rows = [trial(t.trial, (t.lr, t.l1), None) for t in searched[:5]]
    points = propose(CONFIG, rows, 2)
    assert inside(points)
    assert points[0] != points[1]


def test_the_search_keeps_away_from_where_trials_fail():
    def half_fails(lr: float, l1: float) -> float | None:
        return None if lr > 1e-3 else objective(lr, l1)

    rows = finished(CONFIG, 8, half_fails)
    guided = rows[4:]
    assert sum(t.state == FAILED for t in guided) < len(guided) / 2


def test_a_trial_on_the_edge_of_the_range_is_accepted(searched):
    edge = trial(4, (CONFIG.lr[1] * (1 + 1e-12), CONFIG.l1[0] * (1 - 1e-12)), 0.9)
    assert inside(propose(CONFIG, [*searched[:4], edge], 1))


# -- rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "sizes"),
    [(1, [1, 1, 1, 1, 1, 1, 1, 1]), (3, [3, 1, 3, 1]), (20, [4, 4])],
    ids=["one at a time", "the last of the first trials and of all are alone", "as many as fit"],
)
def test_a_round_asks_for_as_many_trials_as_run_at_once_and_never_more_than_are_left(
    tmp_path, parallel, sizes
):
    """Eight trials, of which the first four fill the space: no round goes beyond either number."""
    config = TuneConfig(trials=8, initial_trials=4, parallel=parallel, lr=CONFIG.lr, l1=CONFIG.l1)
    recipe = Recipe(name="rounds", tune=config)
    book = Ledger(tmp_path, "search")
    rounds: list[int] = []
    while asked := _next_round(book, recipe):
        assert _next_round(book, recipe) == asked, "a round that has not ended is not added to"
        rounds.append(len(asked))
        for t in asked:
            value = objective(t.lr, t.l1)
            book.done(t.trial, sae=f"sae-{t.trial}", fvu=value, l0=30.0, objective=value)
    book.close()
    assert rounds == sizes
