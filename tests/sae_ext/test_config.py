from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from sae_ext import config
from sae_ext.config import (
    AnalyseConfig,
    CorpusConfig,
    HarvestConfig,
    HostConfig,
    InterpretConfig,
    SAEConfig,
    TrainConfig,
    TuneConfig,
    to_dict,
    with_changes,
)
from sae_ext.errors import UserError

ALL = [
    CorpusConfig,
    HostConfig,
    HarvestConfig,
    SAEConfig,
    TrainConfig,
    TuneConfig,
    AnalyseConfig,
    InterpretConfig,
]

REFUSED = [
    (CorpusConfig, {"limit": 0}, "limit"),
    (CorpusConfig, {"limit": -3}, "limit"),
    (CorpusConfig, {"validation_percent": 0}, "validation_percent"),
    (CorpusConfig, {"test_percent": 0}, "test_percent"),
    (CorpusConfig, {"validation_percent": -1}, "validation_percent"),
    (CorpusConfig, {"validation_percent": 41, "test_percent": 40}, "20 % to train on"),
    (HostConfig, {"layer": -1}, "layer"),
    (HostConfig, {"max_tokens": 0}, "max_tokens"),
    (HarvestConfig, {"shard_mb": 0.0}, "shard_mb"),
    (HarvestConfig, {"batch_tokens": 0}, "batch_tokens"),
    (SAEConfig, {"d_sae": 0}, "d_sae"),
    (SAEConfig, {"d_in": 0}, "d_in"),
    (SAEConfig, {"clip": 0.0}, "clip"),
    (SAEConfig, {"clip": -1.0}, "clip"),
    (TrainConfig, {"steps": 0}, "steps"),
    (TrainConfig, {"batch_rows": 0}, "batch_rows"),
    (TrainConfig, {"checkpoint_every": 0}, "checkpoint_every"),
    (TrainConfig, {"log_every": 0}, "log_every"),
    (TrainConfig, {"lr": 0.0}, "lr"),
    (TrainConfig, {"lr": math.nan}, "lr"),
    (TrainConfig, {"lr": math.inf}, "lr must be finite"),
    (TrainConfig, {"l1": math.inf}, "l1 must be finite"),
    (SAEConfig, {"clip": math.inf}, "clip must be finite"),
    (HarvestConfig, {"shard_mb": math.inf}, "shard_mb must be finite"),
    (TuneConfig, {"l0_band": (1.0, math.inf)}, "l0_band must be finite"),
    (TrainConfig, {"lr_warmup_steps": -1}, "lr_warmup_steps"),
    (TrainConfig, {"lr_decay_fraction": 1.5}, "lr_decay_fraction"),
    (TrainConfig, {"lr_decay_fraction": -0.1}, "lr_decay_fraction"),
    (TrainConfig, {"l1": -1.0}, "l1"),
    (TrainConfig, {"l1_warmup_steps": -1}, "l1_warmup_steps"),
    (TrainConfig, {"beta1": 1.0}, "beta1"),
    (TrainConfig, {"beta2": -0.1}, "beta2"),
    (TrainConfig, {"seed": -1}, "seed"),
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
        (HostConfig, {"layer": 0, "max_tokens": 1}),
        (TrainConfig, {"lr_warmup_steps": 0, "l1_warmup_steps": 0, "l1": 0.0}),
        (TrainConfig, {"lr_decay_fraction": 0.0, "beta1": 0.0, "beta2": 0.0}),
        (TrainConfig, {"lr_decay_fraction": 1.0}),
        (TuneConfig, {"trials": 5, "initial_trials": 4}),
        (TuneConfig, {"trials": 0, "initial_trials": 4}),
        (InterpretConfig, {"backend": "openai", "base_url": "http://h/v1", "model": "m"}),
    ],
)
def test_the_edges_of_the_allowed_ranges_are_allowed(kind, values):
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize("kind", ALL)
def test_a_config_comes_back_from_json_unchanged(kind):
    content = json.loads(json.dumps(to_dict(kind())))
    restored = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    assert kind(**restored) == kind()
    assert set(content) == {field.name for field in fields(kind)}


@pytest.mark.parametrize("kind", ALL)
def test_a_config_cannot_be_changed_in_place(kind):
    made = kind()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(kind)[0].name, None)


def test_tuples_are_lists_in_plain_data():
    assert to_dict(TuneConfig())["lr"] == [3e-4, 3e-3]


def test_a_changed_copy_differs_in_the_named_fields_alone():
    changed = with_changes(TrainConfig(seed=3), {"lr": 0.5, "steps": 7})
    assert changed == TrainConfig(seed=3, lr=0.5, steps=7)


def test_a_changed_copy_is_checked_like_the_original():
    with pytest.raises(UserError, match="lr must be positive"):
        with_changes(TrainConfig(), {"lr": -1.0})


def test_every_config_is_public_and_every_field_has_its_documentation_below_it():
    source = config.__spec__.loader.get_source(config.__name__)
    lines = [line.strip() for line in source.splitlines()]
    for kind in ALL:
        assert kind.__name__ in config.__all__
        start = lines.index(f"class {kind.__name__}:")
        for field in fields(kind):
            place = next(
                i for i in range(start, len(lines)) if lines[i].startswith(f"{field.name}: ")
            )
            assert lines[place + 1].startswith('"""'), f"{kind.__name__}.{field.name}"
