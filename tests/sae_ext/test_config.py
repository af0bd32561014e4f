from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, FrozenInstanceError, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

from sae_ext import config, hosts
from sae_ext.architectures import BatchTopK, JumpReLU, Projection, ReLU, TopK
from sae_ext.config import (
    AnalyseConfig,
    CorpusConfig,
    HarvestConfig,
    InterpretConfig,
    SAEConfig,
    TrainConfig,
    TuneConfig,
    from_dict,
    to_dict,
    with_changes,
)
from sae_ext.errors import UserError
from sae_ext.hosts import Embeddings, Module, Planted, Sine, Transformer
from sae_ext.schedules import Schedule
from sae_ext.training.config import BufferConfig, EarlyStoppingConfig, RevivalConfig
from sae_ext.training.terms import L0, L1, MSE, AuxK, ObjectiveConfig, Usage

ALL = [
    CorpusConfig,
    Transformer,
    Module,
    Embeddings,
    Sine,
    Planted,
    HarvestConfig,
    SAEConfig,
    TrainConfig,
    TuneConfig,
    AnalyseConfig,
    InterpretConfig,
]


def inside(hint: Any) -> Iterator[type]:
    """The config classes an annotation names, and those their fields name."""
    if is_dataclass(hint):
        yield hint
        for inner in get_type_hints(hint, include_extras=True).values():
            yield from inside(inner)
    for inner in get_args(hint):
        yield from inside(inner)


EVERY = list(dict.fromkeys(found for kind in ALL for found in inside(kind)))
"""The sections of a recipe and everything in them."""
NEEDED: dict[type, dict[str, Any]] = {
    RevivalConfig: {"every": 10},
    Projection: {"pretrained": "folder"},
    Module: {"build": "a:b", "collate": "a:c", "hook": "d"},
    Embeddings: {"file": "rows.npy"},
}
"""What a config that does nothing by default must be given."""

REFUSED = [
    (CorpusConfig, {"limit": 0}, "limit"),
    (CorpusConfig, {"limit": -3}, "limit"),
    (CorpusConfig, {"validation_percent": 0}, "validation_percent"),
    (CorpusConfig, {"test_percent": 0}, "test_percent"),
    (CorpusConfig, {"validation_percent": -1}, "validation_percent"),
    (CorpusConfig, {"validation_percent": 41, "test_percent": 40}, "20 % to train on"),
    (HarvestConfig, {"unit_kb": 0.0}, "unit_kb"),
    (SAEConfig, {"d_sae": 0}, "d_sae"),
    (SAEConfig, {"d_in": 0}, "d_in"),
    (
        SAEConfig,
        {"d_sae": 31, "architecture": TopK()},
        "architecture.k is 32, but d_sae is only 31",
    ),
    (
        SAEConfig,
        {"d_sae": 7, "architecture": BatchTopK(k=8)},
        "architecture.k is 8, but d_sae is only 7",
    ),
    (ReLU, {"clip": 0.0}, "clip must be positive"),
    (ReLU, {"clip": -1.0}, "clip must be positive"),
    (ReLU, {"clip": math.inf}, "clip must be finite"),
    (TopK, {"k": 0}, "k must be positive"),
    (BatchTopK, {"k": 0}, "k must be positive"),
    (JumpReLU, {"bandwidth": 0.0}, "bandwidth must be positive"),
    (JumpReLU, {"threshold": 0.0}, "threshold must be positive"),
    (JumpReLU, {"bandwidth": math.nan}, "bandwidth must be finite"),
    (TrainConfig, {"steps": 0}, "steps"),
    (TrainConfig, {"batch_rows": 0}, "batch_rows"),
    (TrainConfig, {"checkpoint_every": 0}, "checkpoint_every"),
    (TrainConfig, {"log_every": 0}, "log_every"),
    (TrainConfig, {"lr": 0.0}, "lr"),
    (TrainConfig, {"lr": math.nan}, "lr"),
    (TrainConfig, {"lr": math.inf}, "lr must be finite"),
    (HarvestConfig, {"unit_kb": math.inf}, "unit_kb must be finite"),
    (TuneConfig, {"l0_band": (1.0, math.inf)}, "l0_band must be finite"),
    (TrainConfig, {"beta1": 1.0}, "beta1"),
    (TrainConfig, {"beta2": -0.1}, "beta2"),
    (TrainConfig, {"seed": -1}, "seed"),
    (TrainConfig, {"order_seed": -1}, "order_seed"),
    (TrainConfig, {"weight_decay": -0.1}, "weight_decay"),
    (TrainConfig, {"max_grad_norm": 0.0}, "max_grad_norm"),
    (TrainConfig, {"max_grad_norm": math.inf}, "max_grad_norm must be finite"),
    (TrainConfig, {"dead_rows": 0}, "dead_rows"),
    (TrainConfig, {"steps": 100}, "lr_schedule: start_step + warmup_steps is 100"),
    (TrainConfig, {"steps": 200}, "objective.l1.schedule: start_step + warmup_steps is 200"),
    (
        TrainConfig,
        {
            "steps": 300,
            "objective": ObjectiveConfig(usage=Usage(schedule=Schedule(start_step=300))),
        },
        "objective.usage.schedule: start_step + warmup_steps is 300",
    ),
    (TrainConfig, {"revival": RevivalConfig(at=(2000,))}, "revival.at names step 2000"),
    (MSE, {"weight": -1.0}, "weight must be 0 or more"),
    (MSE, {"class_weights": {"a": 1.0, "b": -1.0}}, "class_weights.b must be 0 or more"),
    (MSE, {"class_weights": {"a": math.inf}}, "class_weights must be finite"),
    (L1, {"weight": -1.0}, "weight must be 0 or more"),
    (L1, {"weight": math.inf}, "weight must be finite"),
    (L1, {"class_weights": {"a": -1.0}}, "class_weights.a must be 0 or more"),
    (L1, {"target_l0": 0.0}, "target_l0 must be positive"),
    (L1, {"target_l0": 20.0, "weight": 0.0}, "weight must be positive where target_l0 is given"),
    (L0, {"weight": -1.0}, "weight must be 0 or more"),
    (L0, {"target_l0": -1.0}, "target_l0 must be positive"),
    (L0, {"target_l0": 20.0, "weight": 0.0}, "weight must be positive where target_l0 is given"),
    (Usage, {"target": 0.0}, "target must lie in (0, 1)"),
    (Usage, {"target": 1.0}, "target must lie in (0, 1)"),
    (Usage, {"memory": 1.0}, "memory must lie in [0, 1)"),
    (Usage, {"memory": -0.1}, "memory must lie in [0, 1)"),
    (Usage, {"temperature": 0.0}, "temperature must be positive"),
    (AuxK, {"k": 0}, "k must be positive"),
    (AuxK, {"weight": math.nan}, "weight must be finite"),
    (
        ObjectiveConfig,
        {"l1": L1(target_l0=20.0), "l0": L0(target_l0=20.0)},
        "target_l0 may stand in one term only",
    ),
    (RevivalConfig, {}, "every or at must be given"),
    (RevivalConfig, {"every": 5, "at": (5,)}, "every or at must be given, and not both"),
    (RevivalConfig, {"every": 0}, "every must be positive"),
    (RevivalConfig, {"at": (0, 5)}, "at must be steps in ascending order"),
    (RevivalConfig, {"at": (5, 5)}, "at must be steps in ascending order"),
    (RevivalConfig, {"at": (9, 5)}, "at must be steps in ascending order"),
    (RevivalConfig, {"every": 5, "until": 0.0}, "until must lie in (0, 1]"),
    (RevivalConfig, {"every": 5, "until": 1.1}, "until must lie in (0, 1]"),
    (RevivalConfig, {"every": 5, "candidates": 0}, "candidates must be positive"),
    (RevivalConfig, {"every": 5, "encoder_scale": 0.0}, "encoder_scale must be positive"),
    (RevivalConfig, {"every": 5, "rewarm_steps": -1}, "rewarm_steps must be 0 or more"),
    (RevivalConfig, {"every": 5, "verify_after": 0}, "verify_after must be positive"),
    (EarlyStoppingConfig, {"patience": 0}, "patience must be positive"),
    (EarlyStoppingConfig, {"min_change": -0.1}, "min_change must lie in [0, 1)"),
    (EarlyStoppingConfig, {"min_change": 1.0}, "min_change must lie in [0, 1)"),
    (BufferConfig, {"rows": 0}, "rows must be positive"),
    (BufferConfig, {"min_rows": 0}, "min_rows must be positive"),
    (BufferConfig, {"fresh": 0.0}, "fresh must be positive"),
    (BufferConfig, {"rows": 10, "min_rows": 11}, "min_rows is 11, but the buffer holds only 10"),
    (TuneConfig, {"trials": -1}, "trials"),
    (TuneConfig, {"parallel": 0}, "parallel"),
    (TuneConfig, {"steps": 0}, "steps"),
    (TuneConfig, {"lr": (0.0, 1.0)}, "lr"),
    (TuneConfig, {"lr": (1e-2, 1e-3)}, "lr"),
    (TuneConfig, {"l1": (1.0, 1.0)}, "l1"),
    (TuneConfig, {"l0_band": (64.0, 16.0)}, "l0_band"),
    (TuneConfig, {"initial_trials": 0}, "initial_trials"),
    (TuneConfig, {"trials": 4, "initial_trials": 4}, "initial_trials"),
    (AnalyseConfig, {"window": 0}, "window"),
    (AnalyseConfig, {"top_k": 0}, "top_k"),
    (AnalyseConfig, {"sample": 0}, "sample"),
    (AnalyseConfig, {"pool": 0}, "pool"),
    (InterpretConfig, {"features": 0}, "features"),
    (InterpretConfig, {"examples": 0}, "examples"),
    (InterpretConfig, {"positives": 0}, "positives"),
    (InterpretConfig, {"negatives": 0}, "negatives"),
    (InterpretConfig, {"backend": "openai", "model": "m"}, "base_url"),
    (InterpretConfig, {"backend": "openai", "base_url": "http://h/v1"}, "model"),
]


@pytest.mark.parametrize(("kind", "values", "named"), REFUSED)
def test_a_value_that_makes_no_sense_is_refused_in_one_line_that_names_it(kind, values, named):
    with pytest.raises(UserError) as error:
        kind(**values)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CorpusConfig, {"validation_percent": 40, "test_percent": 40}),
        (CorpusConfig, {"limit": 1}),
        (Transformer, {"layer": 0, "max_tokens": 1}),
        (SAEConfig, {"d_sae": 32, "architecture": TopK(k=32)}),
        (TrainConfig, {"beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0}),
        (TrainConfig, {"steps": 201}),
        (TrainConfig, {"revival": RevivalConfig(at=(1, 1999))}),
        (ObjectiveConfig, {"l1": None}),
        (L1, {"weight": 0.0}),
        (Usage, {"memory": 0.0}),
        (RevivalConfig, {"every": 1, "until": 1.0, "rewarm_steps": 0, "verify_after": 1}),
        (EarlyStoppingConfig, {"patience": 1, "min_change": 0.0}),
        (BufferConfig, {"rows": 1, "min_rows": 1, "fresh": 0.01}),
        (TuneConfig, {"trials": 5, "initial_trials": 4}),
        (TuneConfig, {"trials": 0, "initial_trials": 4}),
        (InterpretConfig, {"backend": "openai", "base_url": "http://h/v1", "model": "m"}),
    ],
)
def test_the_edges_of_the_allowed_ranges_are_allowed(kind, values):
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize("kind", EVERY)
def test_a_config_comes_back_from_json_unchanged(kind):
    made = kind(**NEEDED.get(kind, {}))
    content = json.loads(json.dumps(to_dict(made)))
    assert from_dict(kind, content) == made
    assert set(content) == {field.name for field in fields(kind)}


@pytest.mark.parametrize("kind", EVERY)
def test_a_config_cannot_be_changed_in_place(kind):
    made = kind(**NEEDED.get(kind, {}))
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(kind)[0].name, None)


@pytest.mark.parametrize("kind", EVERY)
def test_a_config_refuses_a_key_it_does_not_have(kind):
    content = to_dict(kind(**NEEDED.get(kind, {})))
    TypeAdapter(kind).validate_python(content)
    with pytest.raises(ValidationError, match="xyzzy"):
        TypeAdapter(kind).validate_python({**content, "xyzzy": 1})


def test_what_is_looked_at_above_is_all_there_is():
    assert {RevivalConfig, EarlyStoppingConfig, BufferConfig, Schedule, MSE, AuxK} <= set(EVERY)
    assert {ReLU, TopK, BatchTopK, JumpReLU} <= set(EVERY)


def test_tuples_are_lists_in_plain_data():
    assert to_dict(TuneConfig())["lr"] == [3e-4, 3e-3]


def test_a_changed_copy_differs_in_the_named_fields_alone():
    changed = with_changes(TrainConfig(seed=3), {"lr": 0.5, "steps": 700})
    assert changed == TrainConfig(seed=3, lr=0.5, steps=700)


def test_a_changed_copy_is_checked_like_the_original():
    with pytest.raises(UserError, match="lr must be positive"):
        with_changes(TrainConfig(), {"lr": -1.0})


@pytest.mark.parametrize("kind", ALL)
def test_every_section_is_public_and_needs_no_more_than_it_must(kind):
    assert kind.__name__ in (*config.__all__, *hosts.__all__)
    needed = NEEDED.get(kind, {})
    assert {f.name for f in fields(kind) if f.default is f.default_factory is MISSING} == set(
        needed
    )
    assert kind(**needed) == kind(**needed)


@pytest.mark.parametrize("kind", EVERY)
def test_every_field_has_its_documentation_below_it(kind):
    sources = [inspect.getsource(k) for k in kind.__mro__ if is_dataclass(k)]
    lines = [line.strip() for source in sources for line in source.splitlines()]
    for field in fields(kind):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}: "))
        # A kind says what it is by its class.
        if field.name != "kind" or kind is Schedule:
            assert lines[place + 1].startswith('"""'), f"{kind.__name__}.{field.name}"
