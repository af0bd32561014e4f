from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from sae_ext import fields
from sae_ext.architectures import BatchTopK, JumpReLU, TopK
from sae_ext.config import CorpusConfig, HarvestConfig, SAEConfig, TrainConfig, TuneConfig
from sae_ext.errors import UserError
from sae_ext.fields import STRICT, from_dict, to_dict, with_changes
from sae_ext.schedules import Schedule
from sae_ext.training.config import BufferConfig, EarlyStoppingConfig, RevivalConfig
from sae_ext.training.terms import L0, L1, MSE, AuxK, ObjectiveConfig, Usage


@dataclass(frozen=True, kw_only=True)
class Inner:
    __pydantic_config__ = STRICT

    low: float = 1.0
    places: tuple[int, ...] = ()
    named: dict[str, float] | None = None

    def __post_init__(self) -> None:
        fields.require_finite(self)
        fields.require_above(self, 0, "low")


@dataclass(frozen=True, kw_only=True)
class Outer:
    __pydantic_config__ = STRICT

    inner: Inner = Inner()
    other: Inner | None = None
    count: int = 3
    share: float | None = None

    def __post_init__(self) -> None:
        fields.require_above(self, 0, "count")
        fields.require_above(self, 0.5, "share")


EVERYTHING = TrainConfig(
    objective=ObjectiveConfig(
        mse=MSE(row_weight="weight", class_weights={"a": 2.0, "b": 0.5}),
        l1=L1(target_l0=20.0, schedule=Schedule(kind="cosine", warmup_steps=5, period=20)),
        l0=L0(schedule=Schedule(kind="linear", final=0.5, last=0.25)),
        usage=Usage(target=0.01),
        auxk=AuxK(k=8),
    ),
    revival=RevivalConfig(at=(10, 20)),
    early_stopping=EarlyStoppingConfig(metric="fvu"),
    buffer=BufferConfig(dtype="bfloat16"),
    max_grad_norm=1.0,
)
CONFIGS = [
    TrainConfig(),
    EVERYTHING,
    SAEConfig(),
    SAEConfig(architecture=TopK(k=3), decoder="unit", output="tanh"),
    SAEConfig(architecture=BatchTopK(k=3)),
    SAEConfig(architecture=JumpReLU(bandwidth=0.1)),
    CorpusConfig(limit=3),
    HarvestConfig(),
    TuneConfig(trials=9, lr=(1e-4, 1e-3)),
]


# -- plain data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_comes_back_from_json_unchanged(config):
    content = json.loads(json.dumps(to_dict(config)))
    assert content == to_dict(config), "JSON has nothing to change"
    assert from_dict(type(config), content) == config


def test_plain_data_has_every_section_as_a_mapping_and_every_tuple_as_a_list():
    assert to_dict(Outer(inner=Inner(places=(1, 2), named={"a": 1.0}))) == {
        "inner": {"low": 1.0, "places": [1, 2], "named": {"a": 1.0}},
        "other": None,
        "count": 3,
        "share": None,
    }


def test_a_section_that_is_left_out_gets_its_defaults():
    assert from_dict(Outer, {"inner": {"low": 2}}) == Outer(inner=Inner(low=2.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cuont": 4}, r"^Outer: cuont: "),
        ({"inner": {"hihg": 4}}, r"^Outer: inner\.hihg: "),
        ({"inner": {"low": "high"}}, r"^Outer: inner\.low: .*valid number"),
        ({"inner": {"places": [1.5]}}, r"^Outer: inner\.places\.0: .*integer"),
        ({"inner": 3}, r"^Outer: inner: "),
        ({"count": None}, r"^Outer: count: "),
        ({"inner": {"low": -1}}, r"^low must be positive, got -1"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line_with_its_place(content, message):
    with pytest.raises(UserError, match=message) as error:
        from_dict(Outer, content)
    assert "\n" not in str(error.value)


def test_an_architecture_is_told_apart_by_its_kind():
    content = to_dict(SAEConfig(architecture=TopK(k=5)))
    assert content["architecture"] == {"kind": "topk", "k": 5}
    for wrong in ({"k": 5}, {"kind": "thresholds"}, {"kind": "relu", "k": 5}):
        with pytest.raises(UserError, match=r"^SAEConfig: architecture"):
            from_dict(SAEConfig, {**content, "architecture": wrong})


# -- changed copies ------------------------------------------------------------------------------


def test_a_changed_copy_differs_in_the_named_fields_alone_at_any_depth():
    before = TrainConfig(seed=3, objective=ObjectiveConfig(l1=L1(weight=5.0)))
    changed = with_changes(
        before, {"lr": 0.5, "objective.l1.weight": 7.0, "objective.l1.schedule.warmup_steps": 9}
    )
    l1 = L1(weight=7.0, schedule=Schedule(warmup_steps=9))
    assert changed == TrainConfig(seed=3, lr=0.5, objective=ObjectiveConfig(l1=l1))
    assert before == TrainConfig(seed=3, objective=ObjectiveConfig(l1=L1(weight=5.0)))
    assert with_changes(before, {}) == before


def test_a_section_may_be_put_in_or_left_out_as_a_whole():
    changed = with_changes(Outer(), {"other": Inner(low=2.0), "other.low": 3.0})
    assert changed == Outer(other=Inner(low=3.0))
    assert with_changes(changed, {"other": None}) == Outer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be positive, got 0"),
        ({"inner.low": -1.0}, "low must be positive, got -1"),
        ({"other.low": 1.0}, "other.low cannot be set: there is no other"),
    ],
)
def test_a_changed_copy_is_checked_like_the_original(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        with_changes(Outer(), changes)


@pytest.mark.parametrize("name", ["nothing", "inner.nothing"])
def test_a_field_that_does_not_exist_cannot_be_changed(name):
    with pytest.raises(TypeError, match="nothing"):
        with_changes(Outer(), {name: 3})


# -- the checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("field", ["low", "places", "named"])
def test_no_number_may_be_infinite_or_none_wherever_it_stands(field, bad):
    value = {"low": bad, "places": (1, bad), "named": {"a": 1.0, "b": bad}}[field]
    with pytest.raises(UserError, match=f"^{field} must be finite, got {bad}"):
        Inner(**{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be positive, got 0"),
        ({"share": 0.5}, "share must be above 0.5, got 0.5"),
    ],
)
def test_a_number_at_its_lower_bound_is_not_above_it(values, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        Outer(**values)
    assert Outer(count=1, share=0.51).share == 0.51
    assert Outer(share=None).share is None, "what is not set is not compared"


def test_a_number_at_its_bound_is_at_least_that():
    @dataclass(frozen=True)
    class Some:
        a: float | None

    for value in (2, 2.5, None):
        fields.require_at_least(Some(value), 2, "a")
    with pytest.raises(UserError, match=r"^a must be 2 or more, got 1\.9$"):
        fields.require_at_least(Some(1.9), 2, "a")


def test_a_requirement_that_is_met_says_nothing():
    fields.require(True, "never said")
    with pytest.raises(UserError, match=r"^said$"):
        fields.require(False, "said")
