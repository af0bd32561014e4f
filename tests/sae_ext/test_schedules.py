from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ext.errors import UserError
from sae_ext.schedules import Schedule

STEPS = 100


def curve(schedule: Schedule, steps: int = STEPS, **options: int) -> list[float]:
    return [schedule.factor(step, steps, **options) for step in range(steps)]


# -- the four parts ------------------------------------------------------------------------------


def test_a_plain_schedule_is_1_throughout():
    assert curve(Schedule()) == [1.0] * STEPS


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_warm_up_rises_linearly_to_1_whatever_comes_after(kind):
    found = curve(Schedule(kind=kind, warmup_steps=10, initial=0.2))
    assert found[:10] == pytest.approx([0.2 + 0.08 * step for step in range(10)])
    assert found[10] == 1.0


def test_a_warm_up_may_begin_one_step_on_so_that_the_first_step_counts():
    found = curve(Schedule(warmup_steps=4), offset=1)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert curve(Schedule(kind="linear"), offset=1) == curve(Schedule(kind="linear"))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 5, "initial": 0.5}])
def test_before_its_first_step_a_schedule_is_0_and_then_runs_as_if_that_were_the_beginning(
    warmup, offset
):
    found = curve(Schedule(start_step=30, **warmup), offset=offset)
    assert found[:30] == [0.0] * 30
    assert found[30:] == curve(Schedule(**warmup), STEPS, offset=offset)[: STEPS - 30]


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_a_linear_schedule_falls_in_equal_steps_over_the_last_part_of_the_run(final):
    found = curve(Schedule(kind="linear", final=final, last=0.4))
    assert found[:61] == [1.0] * 61
    falls = [high - low for high, low in pairwise(found[60:])]
    assert falls == pytest.approx([(1 - final) / 40] * 39)
    # One step after the last it would be there.
    assert found[-1] - falls[-1] == pytest.approx(final)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_a_cosine_schedule_falls_along_half_a_cosine_over_the_last_part_of_the_run(final):
    found = curve(Schedule(kind="cosine", final=final, last=0.4))
    assert found[:61] == [1.0] * 61
    expected = [final + (1 - final) * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    assert found[60:] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_what_falls_over_the_whole_run_begins_where_the_warm_up_ends(kind):
    schedule = Schedule(kind=kind, start_step=10, warmup_steps=10)
    found = curve(schedule)
    assert found[20:] == pytest.approx(curve(Schedule(kind=kind), 80))
    assert found[19] < found[20] > found[21]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("before", [{"warmup_steps": 30}, {"start_step": 30}, {"start_step": 59}])
def test_the_last_part_is_one_of_the_whole_run_whatever_comes_before_it(kind, before):
    falling = Schedule(kind=kind, last=0.4)
    assert curve(Schedule(kind=kind, last=0.4, **before))[60:] == curve(falling)[60:]


def test_a_cosine_schedule_with_a_period_falls_and_comes_back_without_end():
    found = curve(Schedule(kind="cosine", warmup_steps=10, final=0.2, period=20))
    assert [found[10 + i] for i in (0, 20, 40, 60)] == pytest.approx([1.0] * 4)
    assert [found[20 + i] for i in (0, 20, 40, 60)] == pytest.approx([0.2] * 4)
    assert found[10:30] == pytest.approx(found[30:50])
    assert min(found[10:]) == pytest.approx(0.2)


# -- what others have and this can say -----------------------------------------------------------


def test_the_usage_schedule_of_the_gear_model_can_be_expressed():
    base, floor, warmup, period = 1.5, 0.05, 6000, 60_000

    def theirs(step: int) -> float:
        if step < warmup:
            return floor + (base - floor) * step / warmup
        phase = (step - warmup) % period / period
        return floor + (base - floor) * 0.5 * (1 + math.cos(2 * math.pi * phase))

    ours = Schedule(
        kind="cosine", warmup_steps=warmup, initial=floor / base, final=floor / base, period=period
    )
    ours.check_fits(200_000, "usage")
    for step in [*range(0, 200_000, 997), 5999, 6000, 36_000, 65_999, 66_000]:
        assert base * ours.factor(step, 200_000) == pytest.approx(theirs(step), rel=1e-12)


def test_a_penalty_that_rises_over_6000_steps_and_stays_can_be_expressed():
    ours = Schedule(warmup_steps=6000)
    for step in (0, 1, 3000, 5999, 6000, 100_000):
        assert ours.factor(step, 200_000) == pytest.approx(min(1, step / 6000), rel=1e-12)


def test_a_learning_rate_on_half_a_cosine_to_a_tenth_can_be_expressed():
    lr, steps = 1e-4, 700

    def theirs(step: int) -> float:
        return 0.1 * lr + 0.9 * lr * (1 + math.cos(math.pi * step / steps)) / 2

    ours = Schedule(kind="cosine", final=0.1)
    found = [lr * factor for factor in curve(ours, steps, offset=1)]
    assert found == pytest.approx([theirs(step) for step in range(steps)], rel=1e-12)


# -- every field ---------------------------------------------------------------------------------

CHANGES = [
    ({}, {"kind": "linear"}),
    ({}, {"kind": "cosine"}),
    ({"kind": "linear"}, {"kind": "cosine"}),
    ({}, {"start_step": 1}),
    ({"kind": "linear"}, {"start_step": 1}),
    ({}, {"warmup_steps": 2}),
    ({"warmup_steps": 9}, {"warmup_steps": 8}),
    ({"warmup_steps": 9}, {"initial": 0.1}),
    ({"kind": "linear"}, {"final": 0.1}),
    ({"kind": "cosine"}, {"final": 0.1}),
    ({"kind": "cosine", "period": 10}, {"final": 0.1}),
    ({"kind": "linear"}, {"last": 0.9}),
    ({"kind": "cosine"}, {"last": 0.9}),
    ({"kind": "cosine"}, {"period": 50}),
    ({"kind": "cosine", "period": 50}, {"period": 49}),
]


@pytest.mark.parametrize(("before", "change"), CHANGES)
def test_every_field_changes_the_factor(before, change):
    assert curve(Schedule(**before)) != curve(Schedule(**{**before, **change}))


def test_no_field_is_left_out_above():
    assert {name for _, change in CHANGES for name in change} == {f.name for f in fields(Schedule)}


# -- always --------------------------------------------------------------------------------------

shares = st.floats(0, 1)


@st.composite
def schedules(draw: Callable) -> Schedule:
    kind = draw(st.sampled_from(["constant", "linear", "cosine"]))
    values: dict[str, object] = {"kind": kind, "start_step": draw(st.integers(0, 50))}
    if warmup := draw(st.integers(0, 50)):
        values |= {"warmup_steps": warmup, "initial": draw(shares)}
    if kind != "constant":
        values["final"] = draw(shares)
        if kind == "cosine" and draw(st.booleans()):
            values["period"] = draw(st.integers(2, 400))
        else:
            values["last"] = draw(st.floats(0, 1, exclude_min=True))
    return Schedule(**values)


@given(schedules(), st.integers(1, 10**7), st.floats(0, 1), st.sampled_from([0, 1]))
def test_a_factor_is_always_between_0_and_1(schedule, steps, where, offset):
    for step in (0, int(where * (steps - 1)), steps - 1):
        assert 0 <= schedule.factor(step, steps, offset=offset) <= 1


@given(schedules(), st.integers(110, 500))
def test_a_factor_never_falls_in_the_warm_up_and_rises_after_it_only_with_a_period(schedule, steps):
    found = curve(schedule, steps)
    end = schedule.start_step + schedule.warmup_steps
    assert all(low <= high + 1e-12 for low, high in pairwise(found[: end + 1]))
    if schedule.period is None:
        assert all(high >= low - 1e-12 for high, low in pairwise(found[end:]))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start_step": -1}, "start_step must be 0 or more, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"warmup_steps": 5, "initial": -0.1}, r"initial must lie in \[0, 1\], got -0.1"),
        ({"warmup_steps": 5, "initial": 1.1}, r"initial must lie in \[0, 1\], got 1.1"),
        ({"kind": "linear", "final": 1.1}, r"final must lie in \[0, 1\], got 1.1"),
        ({"kind": "linear", "final": -0.1}, r"final must lie in \[0, 1\], got -0.1"),
        ({"kind": "linear", "final": math.nan}, "final must be finite"),
        ({"kind": "linear", "last": math.inf}, "last must be finite"),
        ({"kind": "linear", "last": 0.0}, r"last must lie in \(0, 1\], got 0.0"),
        ({"kind": "linear", "last": 1.5}, r"last must lie in \(0, 1\], got 1.5"),
        ({"kind": "cosine", "period": 1}, "period must be at least 2, got 1"),
        ({"period": 10}, "period is for the kind 'cosine'"),
        ({"kind": "linear", "period": 10}, "period is for the kind 'cosine'"),
        ({"kind": "cosine", "period": 10, "last": 0.5}, "period .* not together with last"),
        ({"final": 0.5}, "final and last are for the kinds 'linear' and 'cosine'"),
        ({"last": 0.5}, "final and last are for the kinds 'linear' and 'cosine'"),
        ({"initial": 0.5}, "initial is where a warm-up begins: give warmup_steps too"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_in_one_line_that_names_the_field(
    values, message
):
    with pytest.raises(UserError, match=f"^{message}") as error:
        Schedule(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "least"),
    [
        ({}, 1),
        ({"warmup_steps": 20}, 21),
        ({"start_step": 20}, 21),
        ({"start_step": 5, "warmup_steps": 20}, 26),
        ({"kind": "linear", "warmup_steps": 20, "last": 0.1}, 21),
        ({"kind": "cosine", "period": 40}, 20),
        ({"kind": "cosine", "warmup_steps": 10, "period": 41}, 30),
    ],
)
def test_a_schedule_that_would_not_reach_its_end_in_the_run_is_refused(values, least):
    schedule = Schedule(**values)
    schedule.check_fits(least, "lr_schedule")
    if least > 1:
        with pytest.raises(UserError, match=rf"^lr_schedule: .* the run has {least - 1} steps: "):
            schedule.check_fits(least - 1, "lr_schedule")
