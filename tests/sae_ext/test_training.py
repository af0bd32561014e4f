"""Trainings from end to end: what is learned, what every option does, what is told, what is refused.

Going on after a kill is in test_training_resume.py, several in one pass in test_training_many.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_up_training import (
    D_IN,
    D_SAE,
    RELU,
    SHORT,
    WARM,
    directions,
    events,
    fit,
    planted,
    same,
    same_weights,
    variant,
    weights,
)
from safetensors.torch import load
from torch import Tensor

from sae_ext.activations.batches import EpochRows
from sae_ext.activations.dataset import InMemory
from sae_ext.activations.statistics import data_statistics, geometric_median
from sae_ext.architectures import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae_ext.architectures.base import initial_weights
from sae_ext.config import SAEConfig, TrainConfig, with_changes
from sae_ext.errors import Diverged, UserError
from sae_ext.metrics import evaluate
from sae_ext.model import SAE
from sae_ext.schedules import Schedule
from sae_ext.training import checkpoint
from sae_ext.training.checks import check_together
from sae_ext.training.config import BufferConfig, EarlyStoppingConfig, RevivalConfig
from sae_ext.training.history import COLUMNS
from sae_ext.training.job import Trained
from sae_ext.training.learner import Learner
from sae_ext.training.reward import Reward
from sae_ext.training.run import VALIDATION_ROWS, train
from sae_ext.training.terms import L0, L1, MSE, AuxK, ObjectiveConfig, Usage

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """With some fields replaced, one after the other, so that later ones may lie in earlier ones."""
    for name, value in changes.items():
        config = with_changes(config, {name: value})
    return config


def few_rows() -> InMemory:
    """So few rows to train on that validation soon no longer improves."""
    x = planted().gather(np.arange(400)).numpy()
    return InMemory(x, split={"train": range(40), "validation": range(40, 400)})


STOPPED = changed(
    SHORT,
    {
        "steps": 100,
        "lr": 3e-2,
        "objective.l1.weight": 0.1,
        "early_stopping": EarlyStoppingConfig(patience=1, metric="fvu"),
    },
)
UNIT = with_changes(RELU, {"decoder": "unit"})
"""Trained so on `few_rows`, it ends before its last step."""


@pytest.fixture(scope="module")
def whole(one_thread) -> tuple[list[bytes], Trained]:
    """A plain run and the checkpoints it made on its way."""
    saved: list[bytes] = []
    return saved, fit(RELU, SHORT, save_checkpoint=saved.append)


# -- learning ------------------------------------------------------------------------------------


def found_directions(W_dec: Tensor) -> float:
    """Mean over the planted directions of the largest cosine with a decoder row."""
    rows = torch.nn.functional.normalize(W_dec.double(), dim=1).numpy()
    return float((directions() @ rows.T).max(axis=1).mean())


def test_the_loss_falls_and_the_planted_structure_is_found():
    config = TrainConfig(
        steps=300, batch_rows=64, lr=1e-2,
        lr_schedule=Schedule(kind="linear", warmup_steps=20, last=0.2),
        objective=ObjectiveConfig(l1=L1(weight=2.0, schedule=Schedule(warmup_steps=40))),
        checkpoint_every=150, log_every=20,
    )  # fmt: skip
    trained = fit(SAEConfig(d_sae=64), config)
    fvu = trained.history["fvu"].to_numpy()
    assert fvu[-1] < 0.6 * fvu[0]
    assert trained.validation["fvu"] < 0.25
    assert trained.validation["l0"] < 6
    assert trained.validation["n_rows"] == len(planted().rows("validation"))
    begun = initial_weights(D_IN, 64, torch.zeros(D_IN), 0)["W_dec"]
    assert found_directions(begun) < 0.7
    assert found_directions(trained.sae.parameters.W_dec) > 0.95


def test_validation_is_that_of_the_returned_sae_on_the_whole_split(whole):
    _, trained = whole
    rows = planted().rows("validation")
    seen = evaluate(trained.sae, [planted().gather(rows)])
    assert trained.validation == seen.metrics()
    np.testing.assert_array_equal(trained.density.numpy(), seen.fired / len(rows))


def test_the_same_run_gives_the_same_bytes(whole):
    assert same(whole[1], fit(RELU, SHORT))


@pytest.mark.parametrize("b_dec", ["mean", "geometric_median", "zero"])
def test_the_scale_is_folded_in_and_all_begins_where_it_should(b_dec):
    sae, config = with_changes(RELU, {"b_dec": b_dec}), changed(SHORT, {"lr": 1e-30, "steps": 10})
    trained = fit(sae, config)
    rows = planted().rows("train")
    x = planted().gather(rows).double()
    assert trained.scale == pytest.approx(math.sqrt(D_IN) / float(x.norm(dim=1).mean()), rel=1e-9)
    centre = {
        "mean": x.mean(dim=0),
        "geometric_median": torch.from_numpy(geometric_median(planted(), rows, seed=0)),
        "zero": torch.zeros(D_IN, dtype=torch.float64),
    }[b_dec]
    begun = initial_weights(D_IN, D_SAE, torch.zeros(D_IN), 0)
    found = trained.sae.parameters
    torch.testing.assert_close(found.b_dec.double(), centre, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.W_dec * trained.scale, begun["W_dec"])
    torch.testing.assert_close(found.W_enc_rows / trained.scale, begun["W_enc_rows"])


def test_unit_decoder_rows_have_length_one_and_free_ones_do_not(whole):
    unit = fit(*variant("relu", "unit"))
    lengths = [t.sae.parameters.W_dec.norm(dim=1) * t.scale for t in (unit, whole[1])]
    torch.testing.assert_close(lengths[0], torch.ones(D_SAE))
    assert (lengths[1] - 1).abs().max() > 0.01


def test_rows_of_a_store_and_the_same_in_memory_are_trained_on_alike(request):
    stored = request.getfixturevalue("planted")
    everything = np.sort(np.concatenate([stored.rows(s) for s in ("train", "validation", "test")]))
    split = {s: stored.rows(s) for s in ("train", "validation", "test")}
    held = InMemory(stored.gather(everything).numpy(), split=split)
    assert same(fit(RELU, SHORT, stored), fit(RELU, SHORT, held))


# -- every option --------------------------------------------------------------------------------

_CLASS_WEIGHTS = {"apple": 0.2, "banana": 1.0, "cherry": 3.0}
BASES = {
    "plain": (RELU, SHORT),
    **{f"{a}-{v}": variant(a, v) for a, v in (
        ("relu", "revival"), ("topk", "revival"), ("relu", "usage"), ("topk", "auxk"),
        ("relu", "buffer"), ("topk", "plain"), ("batchtopk", "plain"), ("jumprelu", "plain"),
    )},
    "revival-at": (
        RELU,
        with_changes(
            variant("relu", "revival")[1], {"revival": RevivalConfig(at=(24,), rewarm_steps=4)}
        ),
    ),
    # So short that many do not fire again.
    "revived-faint": (
        variant("topk", "revival")[0],
        with_changes(variant("topk", "revival")[1], {"revival.encoder_scale": 0.2}),
    ),
    "stopped": (UNIT, STOPPED),
    "classes": (
        RELU,
        changed(
            SHORT,
            {f"objective.{n}.class_weights": _CLASS_WEIGHTS for n in ("mse", "l1")},
        ),
    ),
}  # fmt: skip
CHANGES: dict[str, tuple[str, str, Any]] = {
    "SAEConfig.d_sae": ("plain", "sae.d_sae", 31),
    "SAEConfig.architecture": ("plain", "sae.architecture", JumpReLU(threshold=0.1)),
    "SAEConfig.decoder": ("plain", "sae.decoder", "unit"),
    "SAEConfig.output": ("plain", "sae.output", "tanh"),
    "SAEConfig.b_dec": ("plain", "sae.b_dec", "zero"),
    "ReLU.clip": ("plain", "sae.architecture.clip", 0.5),
    "TopK.k": ("topk-plain", "sae.architecture.k", 4),
    "BatchTopK.k": ("batchtopk-plain", "sae.architecture.k", 4),
    "JumpReLU.bandwidth": ("jumprelu-plain", "sae.architecture.bandwidth", 0.2),
    "JumpReLU.threshold": ("jumprelu-plain", "sae.architecture.threshold", 0.2),
    "TrainConfig.steps": ("plain", "steps", 35),
    "TrainConfig.batch_rows": ("plain", "batch_rows", 24),
    "TrainConfig.objective": ("plain", "objective", ObjectiveConfig(l1=None)),
    "TrainConfig.lr": ("plain", "lr", 2e-3),
    "TrainConfig.lr_schedule": ("plain", "lr_schedule", Schedule(warmup_steps=5)),
    "TrainConfig.beta1": ("plain", "beta1", 0.5),
    "TrainConfig.beta2": ("plain", "beta2", 0.9),
    "TrainConfig.weight_decay": ("plain", "weight_decay", 0.1),
    "TrainConfig.max_grad_norm": ("plain", "max_grad_norm", 0.5),
    "TrainConfig.scale": ("plain", "scale", "none"),
    "TrainConfig.revival": ("relu-revival", "revival", None),
    "TrainConfig.dead_rows": ("relu-revival", "dead_rows", 96),
    "TrainConfig.early_stopping": ("stopped", "early_stopping", None),
    "TrainConfig.buffer": ("relu-buffer", "buffer", None),
    "TrainConfig.seed": ("plain", "seed", 1),
    "TrainConfig.order_seed": ("plain", "order_seed", 1),
    "TrainConfig.checkpoint_every": ("plain", "checkpoint_every", 20),
    "TrainConfig.keep_checkpoints": ("plain", "keep_checkpoints", True),
    "TrainConfig.log_every": ("plain", "log_every", 4),
    "RevivalConfig.every": ("relu-revival", "revival.every", 10),
    "RevivalConfig.at": ("revival-at", "revival.at", (30,)),
    "RevivalConfig.until": ("relu-revival", "revival.until", 0.5),
    "RevivalConfig.candidates": ("relu-revival", "revival.candidates", 100),
    "RevivalConfig.encoder_scale": ("relu-revival", "revival.encoder_scale", 0.5),
    "RevivalConfig.rewarm_steps": ("relu-revival", "revival.rewarm_steps", 0),
    "RevivalConfig.verify_after": ("revived-faint", "revival.verify_after", 10),
    "EarlyStoppingConfig.patience": ("stopped", "early_stopping.patience", 2),
    "EarlyStoppingConfig.metric": ("stopped", "early_stopping.metric", "loss"),
    "EarlyStoppingConfig.min_change": ("stopped", "early_stopping.min_change", 0.15),
    "BufferConfig.rows": ("relu-buffer", "buffer.rows", 200),
    "BufferConfig.min_rows": ("relu-buffer", "buffer.min_rows", 200),
    "BufferConfig.fresh": ("relu-buffer", "buffer.fresh", 1.0),
    "BufferConfig.dtype": ("relu-buffer", "buffer.dtype", "bfloat16"),
    **{
        f"{term.__name__}.{name}": ("plain", f"objective.{term.__name__.lower()}.{name}", value)
        for term in (MSE, L1)
        for name, value in {
            "weight": 0.7,
            "schedule": Schedule(warmup_steps=20, initial=0.5),
            "reduction": "mean",
            "row_weight": "importance",
            "class_weights": _CLASS_WEIGHTS,
        }.items()
    },
    "MSE.label": ("classes", "objective.mse.label", "other"),
    "L1.label": ("classes", "objective.l1.label", "other"),
    "L1.target_l0": ("plain", "objective.l1.target_l0", 3.0),
    "L0.weight": ("jumprelu-plain", "objective.l0.weight", 0.5),
    "L0.schedule": ("jumprelu-plain", "objective.l0.schedule", Schedule()),
    "L0.target_l0": ("jumprelu-plain", "objective.l0.target_l0", 3.0),
    "Usage.weight": ("relu-usage", "objective.usage.weight", 2.0),
    "Usage.schedule": ("relu-usage", "objective.usage.schedule", WARM),
    "Usage.target": ("relu-usage", "objective.usage.target", 0.2),
    "Usage.memory": ("relu-usage", "objective.usage.memory", 0.5),
    "Usage.temperature": ("relu-usage", "objective.usage.temperature", 0.5),
    "AuxK.weight": ("topk-auxk", "objective.auxk.weight", 0.5),
    "AuxK.schedule": ("topk-auxk", "objective.auxk.schedule", Schedule(warmup_steps=30)),
    "AuxK.k": ("topk-auxk", "objective.auxk.k", 1),
}
"""For every field the run to compare with, the path of the field there, and another value."""
LEAVE_WEIGHTS = ("checkpoint_every", "keep_checkpoints", "log_every", "early_stopping.patience")
WITHOUT_EFFECT = ("SAEConfig.d_in", "TrainConfig.precision")
"""Only a check; and only on a GPU, so that it is refused here."""


def test_every_field_is_tried():
    classes = (
        SAEConfig, ReLU, TopK, BatchTopK, JumpReLU, TrainConfig, RevivalConfig, EarlyStoppingConfig,
        BufferConfig, MSE, L1, L0, Usage, AuxK,
    )  # fmt: skip
    names = {f"{c.__name__}.{f.name}" for c in classes for f in fields(c) if f.name != "kind"}
    assert names == {*CHANGES, *WITHOUT_EFFECT}


def run(sae: SAEConfig, config: TrainConfig) -> tuple[Trained, list[int]]:
    """A run, and the steps of which SAEs were kept."""
    kept: list[int] = []
    data = few_rows() if config.steps == STOPPED.steps else planted()
    return fit(sae, config, data, keep=lambda step, *_: kept.append(step)), kept


@pytest.fixture(scope="module")
def base(one_thread):
    """The runs to compare with, each made once."""
    done: dict[str, tuple[Trained, list[int]]] = {}

    def base(name: str) -> tuple[Trained, list[int]]:
        if name not in done:
            done[name] = run(*BASES[name])
        return done[name]

    return base


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_something(base, field):
    name, path, value = CHANGES[field]
    sae, config = BASES[name]
    before, kept_before = base(name)
    if path.startswith("sae."):
        sae = with_changes(sae, {path.removeprefix("sae."): value})
        if path == "sae.output":
            config = with_changes(config, {"scale": "none"})
            before, _ = run(BASES[name][0], config)
    else:
        config = with_changes(config, {path: value})
    after, kept = run(sae, config)
    assert not same(before, after) or kept_before != kept
    assert same_weights(before, after) == (path in LEAVE_WEIGHTS)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("relu", "revival"), ("topk", "auxk"), ("relu", "target_l0"), ("jumprelu", "usage")],
)
def test_when_results_are_told_and_saved_leaves_all_weights_as_they_are(architecture, name):
    sae, config = variant(architecture, name)
    often = {"log_every": 1, "checkpoint_every": 7, "keep_checkpoints": True}
    assert same_weights(fit(sae, config), fit(sae, with_changes(config, often)))


def test_a_width_that_is_right_may_be_given(whole):
    assert same(whole[1], fit(with_changes(RELU, {"d_in": D_IN}), SHORT))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_row_weights_of_one_are_no_weights(reduction):
    x = planted().gather(np.arange(2400)).numpy()
    data = InMemory(x, {"one": np.ones(2400), "label": ["a"] * 2400})
    config = changed(SHORT, {f"objective.{n}.reduction": reduction for n in ("mse", "l1")})
    more: dict[str, Any] = {}
    for n in ("mse", "l1"):
        more |= {f"objective.{n}.row_weight": "one", f"objective.{n}.class_weights": {"a": 1.0}}
    assert same(fit(RELU, config, data), fit(RELU, changed(config, more), data))


@pytest.mark.parametrize("term", ["mse", "l1"])
def test_rows_weigh_as_their_class_does(term):
    label = planted().column("label", np.arange(2400))
    weight = np.array([_CLASS_WEIGHTS[name] for name in label])
    x = planted().gather(np.arange(2400)).numpy()
    data = InMemory(x, {"label": label.astype(object), "weight": weight})
    by_class = changed(SHORT, {f"objective.{term}.class_weights": _CLASS_WEIGHTS})
    by_row = changed(SHORT, {f"objective.{term}.row_weight": "weight"})
    assert same(fit(RELU, by_class, data), fit(RELU, by_row, data))


# -- what is told --------------------------------------------------------------------------------


def test_the_history_has_a_line_per_interval_and_validation_at_checkpoints(whole):
    history = whole[1].history
    assert tuple(history.column_names) == COLUMNS
    assert history.schema.field("step").type == pa.int64()
    assert history["step"].to_pylist() == list(range(5, 41, 5))
    validated = [value is not None for value in history["validation_fvu"].to_pylist()]
    assert validated == [step % 10 == 0 for step in range(5, 41, 5)]
    assert history["validation_l0"].is_valid().to_pylist() == validated
    others = [name for name in COLUMNS if not name.startswith("validation")]
    assert all(history[name].null_count == 0 for name in others)


@pytest.mark.parametrize("architecture", [ReLU(), ReLU(clip=0.1), JumpReLU(threshold=0.05)])
def test_the_first_line_is_that_of_the_initial_weights_written_out(architecture):
    given = {"weight": 0.5, "schedule": Schedule()}
    jumps = isinstance(architecture, JumpReLU)
    sparsity = {"l0": L0(**given), "l1": None} if jumps else {"l1": L1(**given)}
    objective = ObjectiveConfig(mse=MSE(weight=0.7, reduction="mean"), **sparsity)
    config = changed(SHORT, {"log_every": 1, "objective": objective})
    trained = fit(SAEConfig(d_sae=D_SAE, architecture=architecture), config)

    rows = planted().rows("train")
    statistics = data_statistics(planted(), rows)
    with EpochRows(planted(), rows, config.batch_rows, config.order_seed) as source:
        x = source.next().x.double() * trained.scale
    begun = initial_weights(D_IN, D_SAE, torch.zeros(D_IN), config.seed)
    W, W_dec = begun["W_enc_rows"].double(), begun["W_dec"].double()
    b_dec = torch.from_numpy(statistics.mean) * trained.scale
    pre = (x - b_dec) @ W.T
    threshold = getattr(architecture, "threshold", 0.0)
    z = torch.where(pre > threshold, pre, 0).clamp(max=architecture.clip or math.inf)
    mse = float((z @ W_dec + b_dec - x).square().sum(dim=1).mean())
    l1, l0 = float(z.sum(dim=1).mean()), float((z > 0).sum(dim=1).double().mean())
    line = trained.history.to_pylist()[0]
    loss = 0.7 * mse / D_IN + 0.5 * (l0 if jumps else l1)
    assert line["mse"] == pytest.approx(mse, rel=1e-5)
    assert line["fvu"] == pytest.approx(mse / (statistics.variance * trained.scale**2), rel=1e-5)
    assert line["l0"] == l0
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["l1"] == 0.5
    clipped = float((pre > architecture.clip).sum()) / len(x) / l0 if architecture.clip else 0
    assert line["clip_rate"] == pytest.approx(clipped, abs=1e-9)


@pytest.mark.parametrize(("architecture", "name"), [("relu", "usage"), ("topk", "auxk")])
def test_a_line_tells_the_means_since_the_line_before(architecture, name):
    sae, config = variant(architecture, name)
    if name == "usage":
        config = with_changes(config, {"objective.usage.schedule": Schedule(start_step=14)})
    config = with_changes(config, {"checkpoint_every": 40})
    each, sixth = (
        fit(sae, with_changes(config, {"log_every": n})).history.to_pylist() for n in (1, 6)
    )
    seen = set()
    for i, line in enumerate(sixth):
        part = each[6 * i : 6 * i + 6]
        for column in ("mse", "fvu", "l0"):
            mean = np.mean([one[column] for one in part])
            assert line[column] == pytest.approx(mean, rel=1e-9)
        computed = [one[name] for one in part if one[name] is not None]
        expected = pytest.approx(np.mean(computed), rel=1e-9) if computed else None
        assert line[name] == expected
        seen.add((bool(computed), len(computed) == len(part)))
        for column in ("lr", "l1", "dead_fraction", "step"):
            assert line[column] == part[-1][column]
    assert seen == {(False, False), (True, False), (True, True)}  # in no, some and all steps


@pytest.mark.parametrize(
    ("architecture", "name", "weight"), [("relu", "usage", 5.0), ("topk", "auxk", 1 / 32)]
)
def test_the_loss_told_counts_every_term_with_its_weight(architecture, name, weight):
    sae, config = variant(architecture, name)
    config = changed(config, {"log_every": 1, "objective.l1": None})
    seen = 0
    for line in fit(sae, config).history.to_pylist():
        value = line[name] or 0.0
        assert line["loss"] == pytest.approx(line["mse"] + weight * value, rel=1e-9)
        seen += value > 0
    assert seen > 10


def test_the_rates_told_are_those_of_the_step_also_where_features_are_revived():
    sae, config = variant("relu", "revival")
    trained = fit(sae, with_changes(config, {"log_every": 1}))
    revived = [event["step"] for event in events(trained, "revived")]
    assert revived
    for line in trained.history.to_pylist():
        step = line["step"] - 1
        rate = config.lr * config.lr_schedule.factor(step, config.steps, offset=1)
        since = [step - r + 1 for r in revived if r <= step]
        rewarm = min(1.0, since[-1] / config.revival.rewarm_steps) if since else 1.0
        assert line["lr"] == pytest.approx(rate * rewarm, rel=1e-12)
        assert line["lr"] > 0
        assert line["l1"] == 12.0 * min(1.0, step / 8)


def test_a_feature_counts_as_dead_once_it_was_silent_for_the_whole_window():
    config = changed(
        SHORT,
        {"steps": 80, "objective.l1.weight": 400.0, "lr": 0.2, "log_every": 1, "dead_rows": 10**6},
    )
    history = fit(RELU, config).history
    assert history["dead_fraction"].to_pylist() == [0.0] * 80
    fires = history["l0"].to_numpy() > 0

    window = 10
    dead = fit(RELU, with_changes(config, {"dead_rows": window * config.batch_rows}))
    told = dead.history["dead_fraction"].to_numpy()
    assert (told[: window - 1] == 0).all()
    all_silent = [not fires[i - window + 1 : i + 1].any() for i in range(window - 1, 80)]
    assert 0 < sum(all_silent) < len(all_silent)
    assert ((told[window - 1 :] == 1) == all_silent).all()


def test_the_last_step_is_logged_and_saved_whatever_the_intervals():
    saved: list[bytes] = []
    config = with_changes(SHORT, {"steps": 9, "log_every": 5, "checkpoint_every": 100})
    trained = fit(RELU, config, save_checkpoint=saved.append)
    assert trained.history["step"].to_pylist() == [5, 9]
    assert len(saved) == 1


def test_progress_tells_every_line(run_to_end):
    lines: list[dict[str, float]] = []
    progress, trained = run_to_end(train(planted(), RELU, SHORT, on_line=lines.append))
    assert [p.step for p in progress] == trained.history["step"].to_pylist()
    assert {p.steps for p in progress} == {40}
    for name in ("loss", "fvu", "l0", "dead_fraction"):
        told = trained.history[name].to_pylist()
        assert [getattr(p, name) for p in progress] == told == [line[name] for line in lines]
    assert all(p.rows_per_second > 0 for p in progress)


def test_validation_beside_checkpoints_looks_at_some_rows_only(monkeypatch):
    monkeypatch.setattr("sae_ext.training.run.VALIDATION_ROWS", 50)
    assert len(planted().rows("validation")) > 50
    assert VALIDATION_ROWS > 50
    seen: list[int] = []
    config = with_changes(SHORT, {"keep_checkpoints": True})
    trained = fit(RELU, config, keep=lambda step, sae, found: seen.append(found["n_rows"]))
    assert seen == [50] * 4
    assert trained.validation["n_rows"] == 240


def test_a_single_validation_row_gives_no_fvu_and_no_failure():
    x = planted().gather(np.arange(200)).numpy()
    stopping = {"early_stopping": EarlyStoppingConfig(metric="fvu")}
    data = InMemory(x, split={"train": range(199), "validation": [199]})
    trained = fit(RELU, with_changes(SHORT, stopping), data)
    assert trained.validation["n_rows"] == 1
    assert trained.validation["fvu"] is None
    assert trained.history["validation_fvu"].null_count == 8
    assert trained.history["validation_l0"].null_count == 4
    assert trained.events.num_rows == 0


# -- early stopping, and earlier steps -----------------------------------------------------------


@pytest.mark.parametrize("metric", ["fvu", "loss"])
@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_returns_the_best_and_says_so(metric, patience):
    stopping = EarlyStoppingConfig(patience=patience, metric=metric)
    config = changed(STOPPED, {"early_stopping": stopping, "keep_checkpoints": True, "steps": 300})
    kept: dict[int, tuple[SAE, dict[str, Any]]] = {}
    trained = fit(
        UNIT, config, few_rows(),
        keep=lambda step, sae, seen: kept.__setitem__(step, (sae, seen)),
    )  # fmt: skip
    value = {
        step: seen["fvu"]
        if metric == "fvu"
        else seen["mse"] * trained.scale**2 + 0.1 * seen["l1_weighted"] * trained.scale
        for step, (_, seen) in kept.items()
    }
    best = min(value, key=lambda step: value[step])
    assert trained.steps == best + 10 * patience < 300
    bests = events(trained, "best")
    assert [e["step"] for e in bests] == list(range(10, best + 1, 10))
    assert bests[-1]["detail"] == f"validation {metric} {value[best]:.6g}"
    (end,) = events(trained, "early_stop")
    assert end["step"] == trained.steps
    assert f"since step {best}, which is kept" in end["detail"]
    assert trained.history["step"].to_pylist()[-1] == trained.steps
    for name, tensor in kept[best][0].parameters.tensors().items():
        assert torch.equal(tensor, weights(trained)[name])
    assert trained.validation["fvu"] == kept[best][1]["fvu"]


def test_early_stopping_counts_active_features_where_the_objective_does():
    sae, config = variant("jumprelu", "plain")
    stopping = EarlyStoppingConfig(patience=9, metric="loss")
    kept: list[dict[str, Any]] = []
    trained = fit(
        sae, changed(config, {"early_stopping": stopping, "keep_checkpoints": True}),
        keep=lambda step, sae, seen: kept.append(seen),
    )  # fmt: skip
    told = [float(e["detail"].rpartition(" ")[2]) for e in events(trained, "best")]
    values = [seen["mse"] * trained.scale**2 + 0.3 * seen["l0"] for seen in kept]
    assert told[0] == pytest.approx(next(v for v in values if v >= told[0] * 0.999), rel=1e-5)
    assert told[-1] == pytest.approx(min(values), rel=1e-5)


def test_early_stopping_waits_for_warm_ups():
    config = changed(
        SHORT,
        {
            "objective.l1.schedule": Schedule(warmup_steps=20),
            "early_stopping": EarlyStoppingConfig(patience=1),
        },
    )
    # The loss with the full weight, whatever that of the step.
    assert events(fit(RELU, config), "best")[0]["step"] == 30


@pytest.mark.parametrize("architecture", ["relu", "batchtopk", "jumprelu"])
def test_the_sae_of_a_checkpoint_that_is_kept_is_folded_and_right(architecture):
    sae, config = variant(architecture, "plain")
    config = with_changes(config, {"keep_checkpoints": True})
    kept: dict[int, tuple[SAE, dict[str, Any]]] = {}
    saved: list[bytes] = []
    trained = fit(
        sae, config, save_checkpoint=saved.append,
        keep=lambda step, sae, seen: kept.__setitem__(step, (sae, seen)),
    )  # fmt: skip
    assert list(kept) == [10, 20, 30, 40]
    x = planted().gather(planted().rows("validation"))
    lines = {line["step"]: line for line in trained.history.to_pylist()}
    for data, (step, (made, seen)) in zip(saved, kept.items(), strict=True):
        tensors, _ = checkpoint.from_bytes(data, identity(data))
        p = made.parameters
        torch.testing.assert_close(p.W_enc_rows, tensors["w.W_enc_rows"] * trained.scale)
        torch.testing.assert_close(p.b_enc, tensors["w.b_enc"])
        torch.testing.assert_close(p.W_dec, tensors["w.W_dec"] / trained.scale)
        torch.testing.assert_close(p.b_dec, tensors["w.b_dec"] / trained.scale)
        found = evaluate(made, [x]).metrics()
        assert found["fvu"] == seen["fvu"] == lines[step]["validation_fvu"]
        assert found["l0"] == seen["l0"] == lines[step]["validation_l0"]
    last, _ = kept[40]
    for name, tensor in (last.parameters.tensors() | last.more).items():
        assert torch.equal(tensor, weights(trained)[name])


def identity(data: bytes) -> dict[str, Any]:
    """What a checkpoint says it belongs to."""
    found: dict[str, Any] = json.loads(load(data)["state"].numpy().tobytes())["identity"]
    return found


# -- numbers that are not finite -----------------------------------------------------------------


def blow_up(monkeypatch: pytest.MonkeyPatch, term: str, at: int) -> None:
    """Let a term be infinite in the step with that number, counted from 1."""
    if term in ("mse", "l1"):
        forward = JumpReLU.forward

        def broken(self, x, weights, now, *, price):
            out = forward(self, x, weights, now, price=price)
            factor = math.inf if now.step == at - 1 else 1.0
            if term == "l1":
                return out._replace(l1=out.l1 * factor)
            return out._replace(x_hat=out.x_hat * factor)

        monkeypatch.setattr(JumpReLU, "forward", broken)
        return
    kind = {"usage": Usage, "auxk": AuxK, "l0": L0}[term]
    value = kind.value

    def broken_value(self, seen):
        return value(self, seen) * (math.inf if seen.now.step == at - 1 else 1.0)

    monkeypatch.setattr(kind, "value", broken_value)


@pytest.mark.parametrize(
    ("term", "architecture", "name"),
    [
        ("mse", "jumprelu", "plain"),
        ("l1", "jumprelu", "plain"),
        ("l0", "jumprelu", "plain"),
        ("usage", "relu", "usage"),
        ("auxk", "topk", "auxk"),
    ],
)
@pytest.mark.parametrize("step", [24, 30])
def test_a_term_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    monkeypatch, term, architecture, name, step
):
    sae, config = variant(architecture, name)
    if term == "l1":
        config = with_changes(config, {"objective": ObjectiveConfig(l1=L1(schedule=WARM))})
    whole = fit(sae, config)
    assert term != "auxk" or whole.history["auxk"].to_pylist()[step // 5] is not None
    saved: list[bytes] = []
    with monkeypatch.context() as patch:
        blow_up(patch, term, step)
        with pytest.raises(Diverged, match=rf"the term {term} is not finite at step {step}: lower"):
            fit(sae, config, save_checkpoint=saved.append)
    assert len(saved) == 2
    assert same(whole, fit(sae, config, load_checkpoint=lambda: saved[-1]))


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_a_learning_rate_that_is_far_too_large_is_named(architecture):
    sae, config = variant(architecture, "plain")
    saved: list[bytes] = []
    with pytest.raises(
        Diverged,
        match=r"not finite at step \d+: lower train\.lr \(now 1e\+25\).*checkpoint is kept",
    ):
        fit(sae, with_changes(config, {"lr": 1e25}), save_checkpoint=saved.append)
    assert len(saved) < 2


def test_weights_that_the_last_step_has_made_infinite_are_neither_saved_nor_returned():
    config = with_changes(SHORT, {"steps": 10, "lr": 1e36, "lr_schedule": Schedule(start_step=9)})
    saved: list[bytes] = []
    kept: list[int] = []
    config = with_changes(config, {"keep_checkpoints": True, "weight_decay": 1e4})
    with pytest.raises(Diverged, match=r"not finite after step 10: lower train\.lr"):
        fit(RELU, config, save_checkpoint=saved.append, keep=lambda step, *_: kept.append(step))
    assert saved == kept == []


# -- what cannot be trained on -------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch):
    """Asserts that a training is refused with a message before any step, and nothing is saved."""
    monkeypatch.setattr(Learner, "step", None)

    def refused(
        message: str, sae: SAEConfig = RELU, changes: dict[str, Any] | None = None,
        data: InMemory | None = None,
    ) -> None:  # fmt: skip
        saved: list[bytes] = []
        with pytest.raises(UserError, match=message) as raised:
            fit(sae, changed(SHORT, changes or {}), data, save_checkpoint=saved.append)
        assert "\n" not in str(raised.value)
        assert saved == []

    return refused


def rows(n: int = 60, **columns: Any) -> InMemory:
    return InMemory(
        planted().gather(np.arange(n)).numpy(), columns,
        {"train": range(0, n - 10), "validation": range(n - 10, n)},
    )  # fmt: skip


class WithNaN(InMemory):
    """Three rows of it hold a NaN."""

    def gather(self, rows):
        x = super().gather(rows)
        x[np.isin(rows, [17, 20, 33]), 5] = math.nan
        return x


def test_rows_that_are_not_finite_are_named(refused):
    data = WithNaN(
        planted().gather(np.arange(400)).numpy(),
        split={"train": range(300), "validation": range(300, 400)},
    )
    refused("row 17 of x: not finite, as are 3 of 300 rows", data=data)


def test_a_width_that_is_wrong_is_refused(refused):
    refused(r"sae\.d_in is 17, but the activations have width 16", with_changes(RELU, {"d_in": 17}))


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_an_empty_split_is_refused(refused, missing):
    split = {"train": range(30), "validation": range(30, 60)}
    split[missing] = range(0)
    data = InMemory(planted().gather(np.arange(60)).numpy(), split=split)
    refused(f"the {missing} split has no rows", data=data)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_rows_that_are_all_alike_are_refused(refused, value):
    refused("the train split's rows are all alike", data=InMemory(np.full((60, 16), value)))


WEIGHTS = {"objective.l1.class_weights": {"a": 1.0, "b": 2.0}}


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        (WEIGHTS, {"topic": ["a"] * 60}, "there is no column 'label': choose from topic"),
        (WEIGHTS, {"label": ["a", "", "b"] * 20}, "'label' has no value for row 1 and 1"),
        (WEIGHTS, {"label": ["a", "c", "b"] * 20}, "class_weights lacks 'c': give every value"),
        ({"objective.mse.row_weight": "w"}, {}, "there is no column 'w': there are none"),
        ({"objective.mse.row_weight": "w"}, {"w": ["a"] * 60}, "'w' holds texts, but weights"),
        (
            {"objective.l1.row_weight": "w"},
            {"w": [1.0] * 41 + [-0.5] + [1.0] * 18},
            "column 'w' holds -0.5 for row 41 of x: weights must be finite and 0 or more",
        ),
        ({"objective.l1.row_weight": "w"}, {"w": [1e300] * 60}, r"'w' holds 1e\+300 for row 0"),
        ({"objective.l1.row_weight": "w"}, {"w": [1.0, math.nan] * 30}, "'w' has no value for"),
    ],
)  # fmt: skip
def test_columns_that_do_not_serve_are_refused(refused, changes, columns, message):
    refused(message, changes=changes, data=rows(**columns))


def test_weights_are_asked_of_the_rows_trained_on_alone():
    columns = {"label": ["a"] * 50 + ["c"] * 10, "w": [1.0] * 50 + [-1.0] * 10}
    config = changed(SHORT, {**WEIGHTS, "objective.l1.row_weight": "w"})
    assert fit(RELU, config, rows(**columns)).steps == 40


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_class_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(UserError, match=r"class_weights(\.a)? must be (0 or more|finite)"):
        MSE(class_weights={"a": weight})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, r"lr_schedule: start_step \+ warmup_steps is 5, but the run has 5 steps"),
        ({"steps": 8}, r"objective\.l1\.schedule: .* is 8, but the run has 8 steps: shorten it"),
        ({"revival": RevivalConfig(at=(3, 40))}, r"revival\.at names step 40, but the run has 40"),
    ],
)
def test_what_does_not_fit_into_the_run_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        changed(SHORT, changes)


@pytest.mark.parametrize("architecture", [TopK(k=33), BatchTopK(k=33)])
def test_more_active_features_than_there_are_are_refused(architecture):
    with pytest.raises(UserError, match="k is 33, but d_sae is only 32: lower"):
        SAEConfig(d_sae=32, architecture=architecture)


TARGET = L1(target_l0=4.0, schedule=WARM)


@pytest.mark.parametrize(
    ("sae", "changes", "message"),
    [
        (
            with_changes(RELU, {"output": "sigmoid"}),
            {},
            r"sae\.output 'sigmoid' cannot be scaled back: set train\.scale to none",
        ),
        (
            RELU,
            {"objective": ObjectiveConfig(l1=None, l0=L0(schedule=WARM))},
            r"objective\.l0 needs 'l0', which the architecture ReLU",
        ),
        (
            SAEConfig(d_sae=D_SAE, architecture=JumpReLU()),
            {"objective.l0": L0(schedule=WARM)},
            r"train\.objective has both l0 and l1.* set l1 to null",
        ),
        *(
            (
                SAEConfig(d_sae=D_SAE, architecture=architecture),
                {},
                rf"objective\.l1 .* {kind} .*null",
            )
            for kind, architecture in (("TopK", TopK(k=3)), ("BatchTopK", BatchTopK(k=3)))
        ),
        (
            RELU,
            {"objective.l1": with_changes(TARGET, {"target_l0": 16.5})},
            r"objective\.l1\.target_l0 is 16\.5, more than half of the 32 features: lower it",
        ),
        (
            RELU,
            {"objective.l1": TARGET, "early_stopping": EarlyStoppingConfig()},
            r"early_stopping cannot judge while train\.objective\.l1\.target_l0 is searched for",
        ),
        *(
            (
                SAEConfig(d_sae=D_SAE, architecture=architecture),
                {"objective": ObjectiveConfig(l1=None, auxk=AuxK())},
                r"objective\.auxk reaches features .* set train\.revival, or choose topk",
            )
            for architecture in (ReLU(), JumpReLU())
        ),
        (
            SAEConfig(d_sae=D_SAE, architecture=Gated()),
            {"objective": ObjectiveConfig(l1=None)},
            r"the gates of a Gated learn from train\.objective\.reward alone: give it",
        ),
        (
            SAEConfig(d_sae=D_SAE, architecture=Gated()),
            {
                "objective": ObjectiveConfig(l1=None, reward=Reward()),
                "early_stopping": EarlyStoppingConfig(),
            },
            r"early_stopping\.metric must be fvu: rewards are not computed on validation rows",
        ),
        (
            RELU,
            {"revival": RevivalConfig(every=5, rewarm_steps=6), "dead_rows": 64},
            r"revival\.rewarm_steps is longer than every, .*: lower it",
        ),
        (
            SAEConfig(d_sae=D_SAE, architecture=TopK(k=3)),
            {"objective": ObjectiveConfig(l1=None, auxk=AuxK()), "dead_rows": 40 * 32},
            r"dead_rows is 1280, but the run sees 1280 rows.*leave objective\.auxk out",
        ),
        (
            RELU,
            {"revival": RevivalConfig(every=5, rewarm_steps=5), "dead_rows": 40 * 32},
            r"dead_rows is 1280, .*leave revival out",
        ),
        (RELU, {"revival": RevivalConfig(every=29)}, r"revival\.every is longer .*\(until\)"),
        (RELU, {"precision": "bfloat16"}, r"train\.precision 'bfloat16' needs a GPU"),
        (
            RELU,
            {"buffer": BufferConfig(rows=100, min_rows=20)},
            r"train\.buffer\.min_rows is 20, but a batch has 32 rows: raise it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(refused, sae, changes, message):
    refused(message, sae, changes)


@pytest.mark.parametrize(
    ("sae", "changes"),
    [
        (SAEConfig(d_sae=D_SAE, architecture=JumpReLU()), {}),
        (with_changes(RELU, {"output": "tanh"}), {"scale": "none"}),
        (RELU, {"objective.usage": Usage()}),
    ],
)
def test_a_precision_is_for_the_fused_step_alone(sae, changes):
    config = changed(SHORT, {"precision": "bfloat16", **changes})
    with pytest.raises(UserError, match=r"train\.precision 'bfloat16' is for the fused step alone"):
        check_together(sae, config, on_gpu=True)
    check_together(sae, with_changes(config, {"precision": "float32"}), on_gpu=True)
    check_together(RELU, with_changes(SHORT, {"precision": "bfloat16"}), on_gpu=True)


def test_a_batch_has_a_row_for_each_worker():
    config = with_changes(SHORT, {"batch_rows": 3})
    check_together(RELU, config, workers=3)
    with pytest.raises(UserError, match=r"train\.batch_rows is 3, fewer than the 4 workers"):
        check_together(RELU, config, workers=4)


@pytest.mark.parametrize("columns", [("label", "label"), ("importance", "importance")])
def test_a_column_is_either_numbers_or_classes(refused, columns):
    changes = {
        "objective.mse.row_weight": columns[0],
        "objective.l1.class_weights": {"a": 1.0},
        "objective.l1.label": columns[1],
    }
    refused("is asked for as numbers and as classes", changes=changes)
