"""Which features are revived, when, as what, and how it is seen whether that helped."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from made_up_training import D_IN, D_SAE, SHORT, events, fit, planted, variant
from scipy.stats import chisquare
from torch import Tensor

from sae_ext.architectures import Architecture, BatchTopK, JumpReLU, ReLU, TopK
from sae_ext.config import SAEConfig, with_changes
from sae_ext.errors import UserError
from sae_ext.schedules import Schedule
from sae_ext.training.config import RevivalConfig
from sae_ext.training.history import Event
from sae_ext.training.learner import Learner
from sae_ext.training.revival import Revival
from sae_ext.training.terms import L1

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = RevivalConfig(every=10, candidates=50, rewarm_steps=4, verify_after=6)
ROWS = planted().gather(np.arange(200))


def learner(
    architecture: Architecture = ReLU(), *, decoder: str = "unit", d_sae: int = D_SAE,
    revival: RevivalConfig = CONFIG,
) -> Learner:  # fmt: skip
    """One that has taken a few steps; `dead_rows` is 64, two batches."""
    sae = SAEConfig(d_sae=d_sae, architecture=architecture, decoder=decoder)
    config = with_changes(SHORT, {"revival": revival})
    made = Learner(sae, config, {}, device=torch.device("cpu"), group=None)
    made.begin(D_IN, torch.full((D_IN,), 0.5))
    for i in range(3):
        made.step(ROWS[32 * i : 32 * i + 32], {})
    made.settle()
    return made


def candidates(count: int, seed: int) -> Tensor:
    """The last of the rows."""
    return ROWS[-count:]


def silenced(made: Learner, features: list[int], rows: int = 64) -> Learner:
    """As if some features had not fired in so many last rows, and all others had."""
    made.silent_rows[:] = 0
    made.silent_rows[features] = rows
    return made


def state(made: Learner) -> dict[str, Tensor]:
    """All that a revival may change, by name."""
    groups = {"w": made.weights, "m": made.m, "v": made.v}
    return {f"{g}.{n}": t.clone() for g, group in groups.items() for n, t in group.items()}


# -- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (RevivalConfig(every=8), [8, 16, 24]),
        (RevivalConfig(every=8, until=0.4), [8, 16]),
        (RevivalConfig(every=7, until=0.7), [7, 14, 21, 28]),
        (RevivalConfig(every=10, until=1.0), [10, 20, 30]),  # none after the last step
        (RevivalConfig(at=(3, 11, 39)), [3, 11, 39]),
    ],
)
def test_dead_features_are_looked_for_after_the_steps_that_are_asked_for(config, steps):
    revival = Revival(config, learner(revival=config))
    assert [step for step in range(1, 41) if revival.due(step)] == steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "every or at"),
        ({"every": 3, "at": (2,)}, "every or at"),
        ({"at": (3, 2)}, "ascending order"),
        ({"at": (2, 2)}, "ascending order"),
        ({"at": (0, 2)}, "from 1 on"),
        ({"every": 3, "until": 0.0}, "until must lie in"),
        ({"every": 3, "until": 1.5}, "until must lie in"),
        ({"every": 0}, "every must be positive"),
        ({"every": 3, "candidates": 0}, "candidates must be positive"),
        ({"every": 3, "encoder_scale": 0.0}, "encoder_scale must be positive"),
        ({"every": 3, "rewarm_steps": -1}, "rewarm_steps must be 0 or more"),
        ({"every": 3, "verify_after": 0}, "verify_after must be positive"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        RevivalConfig(**given)


# -- which ---------------------------------------------------------------------------------------


def test_only_features_silent_for_the_whole_window_are_revived():
    made = learner()
    made.silent_rows[:] = torch.arange(D_SAE) + 50  # the first 14 lack a row or more of 64
    before = state(made)
    revived = Revival(CONFIG, made).revive(candidates)
    assert revived == [Event(3, "revived", D_SAE - 14, "from the worst of 50 rows")]
    for name, tensor in state(made).items():
        if "b_dec" in name:
            assert torch.equal(tensor, before[name]), name
            continue
        differs = (tensor != before[name]).reshape(D_SAE, -1).any(dim=1)
        assert not differs[:14].any(), name
        assert differs[14:].all(), name


def test_the_window_is_counted_in_rows_of_training():
    made = learner()
    dumb = [3, 17]
    made.weights["b_enc"][dumb] = -1000.0
    made.silent_rows[:] = 0
    revival = Revival(CONFIG, made)
    for done in (1, 2):
        assert revival.revive(candidates) == []
        made.step(ROWS[: 32 if done == 1 else 31], {})
        made.settle()
    assert made.silent_rows[dumb].tolist() == [63, 63]
    assert revival.revive(candidates) == []
    made.step(ROWS[:1], {})
    made.settle()
    assert [e.features for e in revival.revive(candidates)] == [int((made.silent_rows >= 64).sum())]
    assert (revival.revived_at[dumb] == made.step_number).all()


def test_where_nothing_is_dead_nothing_happens():
    made = silenced(learner(), [])
    before = state(made)
    assert Revival(CONFIG, made).revive(candidates) == []
    assert all(torch.equal(t, before[name]) for name, t in state(made).items())
    assert made.rewarm_from is None


# -- from which rows -----------------------------------------------------------------------------


def drawn(errors: list[float], dead: int, times: int) -> list[tuple[int, ...]]:
    """The rows drawn for so many dead features, time and again; row i has this squared error.

    Nothing is reconstructed: decoder and b_dec are 0, so the squared error is ‖x‖².
    """
    made = learner()
    for t in made.weights.values():
        t.zero_()
    rows = torch.diag(torch.tensor([math.sqrt(e) for e in errors]))
    rows = torch.nn.functional.pad(rows, (0, D_IN - len(errors)))
    found = []
    for step in range(times):
        made.step_number = step
        silenced(made, list(range(dead)))
        Revival(CONFIG, made).revive(lambda count, seed: rows)
        found.append(tuple(made.weights["W_dec"][:dead].argmax(dim=1).tolist()))
        for name in ("W_dec", "W_enc_rows"):
            made.weights[name].zero_()
    return found


ERRORS = [1.0, 2.0, 0.5, 3.0, 0.0]


def test_a_row_is_drawn_with_probability_proportional_to_its_squared_error_squared():
    found = np.bincount([row for (row,) in drawn(ERRORS, 1, 1500)], minlength=5)
    share = np.square(ERRORS) / np.square(ERRORS).sum()
    assert found[4] == 0
    assert chisquare(found[:4], 1500 * share[:4]).pvalue > 0.01
    # And not to the squared error.
    other = np.array(ERRORS[:4]) / sum(ERRORS)
    assert chisquare(found[:4], 1500 * other).pvalue < 1e-6


def test_rows_are_drawn_without_replacement():
    pairs = [frozenset(pair) for pair in drawn(ERRORS, 2, 1500)]
    assert all(len(pair) == 2 for pair in pairs)
    p = np.square(ERRORS) / np.square(ERRORS).sum()
    every = [frozenset(pair) for pair in itertools.combinations(range(4), 2)]
    expected = [
        1500 * p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i, j in map(sorted, every)
    ]
    assert chisquare([pairs.count(pair) for pair in every], expected).pvalue > 0.01


def test_the_same_step_draws_the_same_rows_and_another_step_others():
    ends = []
    for step in (3, 3, 4):
        made = silenced(learner(), [1, 5])
        made.step_number = step
        Revival(CONFIG, made).revive(candidates)
        ends.append(made.weights["W_dec"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_more_dead_features_than_rows_with_an_error_leave_some_for_later():
    made = silenced(learner(), list(range(10)))
    rows = torch.cat([made.weights["b_dec"].expand(2, -1), ROWS[:3]])
    revival = Revival(CONFIG, made)
    for t in (made.weights["W_dec"], made.weights["W_enc_rows"]):
        t.zero_()  # so that rows equal to b_dec are reconstructed without error
    (event,) = revival.revive(lambda count, seed: rows)
    assert event.features == 3
    assert (revival.revived_at >= 0).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert len(made.weights["W_dec"][:3].unique(dim=0)) == 3
    made.step_number += 1
    (event,) = revival.revive(candidates)
    assert event.features == 7


def test_where_every_row_is_reconstructed_exactly_nothing_is_revived():
    made = silenced(learner(), [1, 2])
    for t in (made.weights["W_dec"], made.weights["W_enc_rows"]):
        t.zero_()
    revival = Revival(CONFIG, made)
    assert revival.revive(lambda count, seed: made.weights["b_dec"].expand(9, -1)) == []
    assert made.rewarm_from is None
    assert (revival.revived_at == -1).all()


def test_candidates_are_scaled_rows_of_the_training_split(monkeypatch):
    seen = []
    give = Revival._give

    def spy(self: Revival, which: Tensor, rows: Tensor) -> None:
        seen.append(rows.clone())
        give(self, which, rows)

    monkeypatch.setattr(Revival, "_give", spy)
    trained = fit(*variant("relu", "revival"))
    train = planted().gather(planted().rows("train")) * trained.scale
    assert seen
    for row in torch.cat(seen):
        assert (train == row).all(dim=1).any()


# -- as what -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "share"),
    [(ReLU(), 0.2), (JumpReLU(), 0.2), (TopK(k=3), 1), (BatchTopK(k=3), 1)],
)
def test_a_feature_that_must_be_among_the_largest_is_as_long_as_the_living(architecture, share):
    config = with_changes(CONFIG, {"encoder_scale": None})
    made = silenced(learner(architecture, revival=config), [2])
    length = float(made.weights["W_enc_rows"][made.silent_rows == 0].norm(dim=1).mean())
    Revival(config, made).revive(candidates)
    assert float(made.weights["W_enc_rows"][2].norm()) == pytest.approx(share * length)


@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("scale", [0.2, 0.7])
@pytest.mark.parametrize(
    "architecture", [ReLU(), JumpReLU(threshold=0.3), TopK(k=3), BatchTopK(k=3)]
)
def test_a_revived_feature_points_to_its_row_with_the_lengths_that_are_asked_for(
    architecture, scale, decoder
):
    config = with_changes(CONFIG, {"encoder_scale": scale})
    made = silenced(learner(architecture, decoder=decoder, revival=config), [2, 9])
    if decoder == "free":
        made.weights["W_dec"] *= torch.linspace(0.5, 2, D_SAE)[:, None]
    if isinstance(architecture, JumpReLU):
        made.weights["threshold"] += torch.linspace(0.1, 0.5, D_SAE)
    alive = made.silent_rows == 0
    lengths = {n: float(made.weights[n][alive].norm(dim=1).mean()) for n in ("W_enc_rows", "W_dec")}
    before = state(made)
    Revival(config, made).revive(candidates)
    away = ROWS[-50:] - made.weights["b_dec"]
    away /= away.norm(dim=1, keepdim=True)
    for feature in (2, 9):
        new = {name: t[feature] for name, t in made.weights.items() if name != "b_dec"}
        direction = new["W_dec"] / new["W_dec"].norm()
        assert (away @ direction).max() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(new["W_enc_rows"] / new["W_enc_rows"].norm(), direction)
        assert float(new["W_enc_rows"].norm()) == pytest.approx(scale * lengths["W_enc_rows"])
        expected = 1.0 if decoder == "unit" else lengths["W_dec"]
        assert float(new["W_dec"].norm()) == pytest.approx(expected)
        assert new["b_enc"] == 0
        if isinstance(architecture, JumpReLU):
            assert float(new["threshold"]) == pytest.approx(0.3)
    for name, tensor in state(made).items():
        if not name.endswith("b_dec"):
            assert torch.equal(tensor[alive], before[name][alive]), name


@pytest.mark.parametrize("d_sae", [D_SAE, D_IN])  # also where b_dec is as long as b_enc
@pytest.mark.parametrize("architecture", [ReLU(), JumpReLU(threshold=0.05, bandwidth=0.2)])
def test_adam_forgets_exactly_what_it_knew_of_them(architecture, d_sae):
    made = silenced(learner(architecture, d_sae=d_sae), [2, 9])
    before = state(made)
    assert all(t.abs().max() > 0 for name, t in before.items() if name[0] in "mv")
    Revival(CONFIG, made).revive(candidates)
    revived = made.silent_rows > 0
    for name, tensor in state(made).items():
        if name[0] not in "mv":
            continue
        if name.endswith("b_dec"):
            assert torch.equal(tensor, before[name])
            continue
        assert (tensor[revived] == 0).all(), name
        assert torch.equal(tensor[~revived], before[name][~revived]), name


def test_where_all_are_dead_lengths_are_those_of_all():
    made = silenced(learner(), list(range(D_SAE)))
    made.weights["W_enc_rows"] *= 3.0
    before = float(made.weights["W_enc_rows"].norm(dim=1).mean())
    Revival(CONFIG, made).revive(candidates)
    found = made.weights["W_enc_rows"].norm(dim=1)
    torch.testing.assert_close(found, torch.full((D_SAE,), 0.2 * before))


def test_a_look_at_errors_teaches_batchtopk_nothing():
    made = silenced(learner(BatchTopK(k=3)), [2, 9])
    before = {name: t.clone() for name, t in made.counters.items()}
    Revival(CONFIG, made).revive(candidates)
    assert all(torch.equal(t, before[name]) for name, t in made.counters.items())


# -- afterwards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_learning_rate_comes_back_over_the_steps_after_a_revival(steps):
    config = with_changes(CONFIG, {"rewarm_steps": steps})
    made = silenced(learner(revival=config), [2])
    plain = [made.learning_rate(step) for step in range(40)]
    Revival(config, made).revive(candidates)
    share = [made.learning_rate(step) / plain[step] for step in range(3, 40)]
    rising = [(i + 1) / steps for i in range(steps)]
    assert share == pytest.approx(rising + [1.0] * (37 - steps))


def test_a_revived_feature_counts_as_dead_and_is_left_alone_until_it_is_verified():
    made = silenced(learner(), [2, 9])
    revival = Revival(CONFIG, made)
    assert [e.features for e in revival.revive(candidates)] == [2]
    assert made.silent_rows[[2, 9]].tolist() == [64, 64]
    for _ in range(3):
        assert revival.revive(candidates) == []
        assert not revival.verifies(made.step_number)
        made.step_number += 1
    silenced(made, [2, 9, 11])
    assert [e.features for e in revival.revive(candidates)] == [1]


def test_those_that_fired_and_those_that_did_not_are_told_and_the_latter_revived_again():
    made = silenced(learner(), [2, 9, 11])
    revival = Revival(CONFIG, made)
    revival.revive(candidates)
    # In the sixth step after it 9 fires; the others never did.
    made.step_number = 3 + CONFIG.verify_after
    since = CONFIG.verify_after * SHORT.batch_rows
    made.silent_rows[[2, 11]] = 64 + since
    made.silent_rows[9] = since - 1
    assert not revival.verifies(made.step_number - 1)
    assert revival.verify(made.step_number - 1) == []
    assert revival.verifies(made.step_number)
    assert revival.verify(made.step_number) == [
        Event(9, "fired_again", 1, "of 3 revived after step 3"),
        Event(9, "still_silent", 2, "of 3 revived after step 3"),
    ]
    assert not revival.verifies(made.step_number)
    again = revival.revive(candidates)
    # 9 has been silent for longer than the window since it fired, so it is dead once more.
    assert [(e.event, e.features) for e in again] == [("revived", 3)]


def test_each_revival_is_verified_by_itself():
    made = silenced(learner(), [2])
    revival = Revival(CONFIG, made)
    revival.revive(candidates)
    made.step_number = 5
    silenced(made, [2, 7])
    revival.revive(candidates)
    silenced(made, [2, 7], rows=10_000)
    assert [e.detail for e in revival.verify(9)] == ["of 1 revived after step 3"]
    assert [e.detail for e in revival.verify(11)] == ["of 1 revived after step 5"]


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu"])
def test_events_of_a_run_add_up(architecture):
    sae, config = variant(architecture, "revival")
    trained = fit(sae, with_changes(config, {"log_every": 1}))
    dead = [round(share * D_SAE) for share in trained.history["dead_fraction"].to_pylist()]
    revived = {e["step"]: e["features"] for e in events(trained, "revived")}
    assert revived
    assert set(revived) <= {8, 16, 24}
    for step, count in revived.items():
        # Still dead as of that step, for it has not fired since.
        assert count <= dead[step - 1]
        seen = [
            e["features"] for name in ("fired_again", "still_silent")
            for e in events(trained, name) if e["step"] == step + 6
        ]  # fmt: skip
        assert sum(seen) == count
    first = min(revived)
    assert revived[first] == dead[first - 1]


def test_revived_features_come_to_life():
    # A penalty that is strong at first, and silences features for good.
    falling = L1(weight=12.0, schedule=Schedule(kind="linear"))
    config = SHORT
    for name, value in {
        "steps": 200,
        "lr": 2e-2,
        "objective.l1": falling,
        "dead_rows": 320,
    }.items():
        config = with_changes(config, {name: value})
    revival = RevivalConfig(every=50, verify_after=25, rewarm_steps=5)
    sae = SAEConfig(d_sae=D_SAE)
    without, revived = (fit(sae, with_changes(config, {"revival": r})) for r in (None, revival))
    counts = {n: sum(e["features"] for e in events(revived, n)) for n in ("revived", "fired_again")}
    assert counts["fired_again"] == counts["revived"] >= 10
    assert revived.validation["dead_fraction"] < without.validation["dead_fraction"]
    assert revived.validation["fvu"] < 0.8 * without.validation["fvu"]
