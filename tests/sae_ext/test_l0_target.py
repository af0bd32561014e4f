"""The search for the penalty's weight under which a wanted number of features is active."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_training import D_SAE, SHORT, fit, variant

from sae_ext.architectures import JumpReLU
from sae_ext.config import SAEConfig, with_changes
from sae_ext.errors import UserError
from sae_ext.schedules import Schedule
from sae_ext.training import sparsity
from sae_ext.training.sparsity import L0Target
from sae_ext.training.terms import L0, L1, ObjectiveConfig

pytestmark = pytest.mark.usefixtures("one_thread")
WARM = Schedule(warmup_steps=20)
RELU = SAEConfig(d_sae=D_SAE)
UNIT = SAEConfig(d_sae=D_SAE, decoder="unit")
JUMP = SAEConfig(d_sae=D_SAE, architecture=JumpReLU(bandwidth=0.2, threshold=0.1))


def after(seen: list[float], *, target: float = 10.0, weight: float = 2.0) -> L0Target:
    """A search that has seen these L0s, each of ten steps at full pace."""
    search = L0Target("l1", target, weight)
    for l0 in seen:
        search.see(l0, 10)
    return search


# -- one look ------------------------------------------------------------------------------------


def test_the_search_begins_with_the_weight_that_is_given():
    assert L0Target("l1", 10.0, 2.0).weight == pytest.approx(2.0)


@pytest.mark.parametrize(("l0", "rises"), [(20.0, True), (10.1, True), (9.9, False), (0.0, False)])
def test_too_many_active_features_raise_the_weight_and_too_few_lower_it(l0, rises):
    weights = [after([l0] * n).weight for n in range(5)]
    assert weights == sorted(weights, reverse=not rises)
    assert len(set(weights)) == 5


def test_at_the_target_the_weight_stays():
    assert after([10.0] * 20).weight == pytest.approx(2.0, rel=1e-12)


@given(st.lists(st.floats(0, 1e9), max_size=30))
def test_no_l0_moves_the_weight_further_than_its_bounds_allow(seen):
    weight = after(seen).weight
    assert abs(math.log(weight / 2.0)) <= sparsity._GAIN * 10 * len(seen) + sparsity._LEAD + 1e-9


def test_the_weight_is_that_of_the_equations():
    log_weight, mean = math.log(2.0), 0.0
    seen = [25.0, 14.0, 8.0, 11.0]
    for l0 in seen:
        e = max(-1.0, min(1.0, math.log(l0 / 10.0)))
        log_weight += sparsity._GAIN * 10 * e
        mean = sparsity._MEMORY * mean + (1 - sparsity._MEMORY) * e
    assert after(seen).weight == pytest.approx(
        math.exp(log_weight + sparsity._LEAD * mean), rel=1e-12
    )


def test_where_weights_do_not_move_nothing_is_learned():
    search = after([14.0, 8.0])
    before = search.state()
    search.see(1000.0, 0)
    assert search.state() == before


def test_a_slower_pace_learns_less():
    moved = []
    for pace in (1, 5, 10):
        search = L0Target("l1", 10.0, 2.0)
        search.see(20.0, pace)
        moved.append(search.state()["log_weight"] - math.log(2.0))
    assert moved == pytest.approx([moved[0], 5 * moved[0], 10 * moved[0]])


def test_a_search_goes_on_from_its_state():
    one, two = after([25.0, 14.0]), L0Target("l1", 10.0, 7.0)
    two.restore(one.state())
    for l0 in (8.0, 11.0):
        for search in (one, two):
            search.see(l0, 3)
    assert one.weight == two.weight
    assert one.state() == two.state()


# -- in training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sae", "target", "begins", "steps"),
    [
        (RELU, 3.0, 0.1, 800),
        (RELU, 3.0, 1.0, 800),
        (RELU, 6.0, 0.1, 800),
        (UNIT, 6.0, 0.1, 800),
        (JUMP, 6.0, 0.03, 1500),
    ],
)
def test_training_lands_within_a_tenth_of_the_number_wanted(sae, target, begins, steps):
    term = {"weight": begins, "target_l0": target, "schedule": WARM}
    objective = (
        ObjectiveConfig(l1=None, l0=L0(**term)) if sae is JUMP else ObjectiveConfig(l1=L1(**term))
    )
    changes: dict[str, Any] = {
        "steps": steps, "batch_rows": 64, "lr": 1e-2, "objective": objective, "log_every": 100,
        "lr_schedule": Schedule(kind="linear", warmup_steps=20, last=0.2), "checkpoint_every": 1500,
    }  # fmt: skip
    config = SHORT
    for name, value in changes.items():
        config = with_changes(config, {name: value})
    trained = fit(sae, config)
    assert trained.validation["l0"] == pytest.approx(target, rel=0.1)
    told = trained.history["l1"].to_pylist()
    assert trained.penalty == told[-1]
    assert not 0.9 < trained.penalty / begins < 1.1
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_the_weight_is_left_alone_until_its_warm_up_has_ended(architecture):
    sae, config = variant(architecture, "target_l0")
    name = "l1" if architecture == "relu" else "l0"
    config = with_changes(config, {f"objective.{name}.schedule": Schedule(warmup_steps=25)})
    config = with_changes(config, {"log_every": 5})
    begins = getattr(config.objective, name).weight
    told = {line["step"]: line["l1"] for line in fit(sae, config).history.to_pylist()}
    for step in (5, 10, 20, 25):
        assert told[step] == pytest.approx(begins * (step - 1) / 25)
    assert told[30] > begins  # decided after step 30


def test_the_weight_that_is_found_is_the_one_trained_with():
    """As a run whose weight is that from the beginning, from where the search last moved it."""
    sae, config = variant("relu", "target_l0")
    trained = fit(sae, with_changes(config, {"log_every": 1}))
    lines = trained.history.to_pylist()
    for line in lines[10:]:
        assert line["loss"] - line["mse"] > 0
    found = {line["step"]: line["l1"] for line in lines}
    plain = fit(sae, with_changes(config, {"objective.l1.target_l0": None, "log_every": 1}))
    for before, line in zip(plain.history.to_pylist(), lines, strict=True):
        # The search first moves after step 10, so step 11 is the first one trained with another weight, and
        # its update the first to differ.
        assert (before["mse"] == line["mse"]) == (line["step"] <= 11)
    assert found[9] == 1.0
    assert found[10] > 1.0


def test_two_targets_are_refused():
    with pytest.raises(
        UserError, match=r"target_l0 may stand in one term only, found it in \['l1', 'l0'\]"
    ):
        ObjectiveConfig(l1=L1(target_l0=3.0), l0=L0(target_l0=3.0))


@pytest.mark.parametrize("term", [L1, L0])
def test_a_search_that_cannot_begin_is_refused(term):
    with pytest.raises(UserError, match="weight must be positive where target_l0 is given"):
        term(weight=0.0, target_l0=3.0)
    with pytest.raises(UserError, match="target_l0 must be positive"):
        term(target_l0=0.0)
