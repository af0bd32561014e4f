from __future__ import annotations

import itertools
import math
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from sae_ext import corpora, training
from sae_ext.activations.reader import Activations
from sae_ext.config import CorpusConfig, SAEConfig, TrainConfig, with_changes
from sae_ext.errors import CorruptArtefact, UserError
from sae_ext.metrics import evaluate
from sae_ext.training import (
    HISTORY_COLUMNS,
    Trained,
    data_statistics,
    l1_weight,
    learning_rate,
    train,
)

SMALL = SAEConfig(d_sae=64)
SHORT = TrainConfig(
    steps=40, batch_rows=64, lr=3e-3, lr_warmup_steps=5, l1=1.0, l1_warmup_steps=10,
    checkpoint_every=10, log_every=5,
)  # fmt: skip
CORPUS = CorpusConfig(source="made-up.jsonl")


@pytest.fixture
def fit(planted, run_to_end, one_thread):
    def fit(
        sae: SAEConfig = SMALL, config: TrainConfig = SHORT, source: Activations = planted, **hooks
    ) -> Trained:
        return run_to_end(train(source, sae, config, **hooks))[1]

    return fit


@pytest.fixture(scope="module")
def whole(planted, run_to_end, one_thread) -> tuple[list[bytes], Trained]:
    """An uninterrupted run and the checkpoints it made on its way."""
    saved: list[bytes] = []
    _, trained = run_to_end(train(planted, SMALL, SHORT, save_checkpoint=saved.append))
    return saved, trained


def same(one: Trained, two: Trained) -> bool:
    weights = zip(
        one.sae.parameters.tensors().values(), two.sae.parameters.tensors().values(), strict=True
    )
    return (
        all(torch.equal(a, b) for a, b in weights)
        and one.history.equals(two.history)
        and one.validation == two.validation
        and torch.equal(one.density, two.density)
    )


def texts_in(low: int, high: int) -> list[str]:
    """Five texts whose buckets lie in a range."""
    found = (t for t in map(str, itertools.count()) if low <= corpora.bucket(t) < high)
    return list(itertools.islice(found, 5))


# -- learning ------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_planted_structure_is_found(fit, planted):
    config = TrainConfig(
        steps=400, batch_rows=128, lr=5e-3, lr_warmup_steps=20, l1=1.0, l1_warmup_steps=40,
        checkpoint_every=200, log_every=20,
    )  # fmt: skip
    trained = fit(config=config)
    fvu = trained.history["fvu"].to_numpy()
    assert fvu[-1] < 0.5 * fvu[0]
    assert trained.validation["fvu"] < 0.2
    assert trained.validation["l0"] < 24
    assert trained.validation["n_rows"] == len(planted.rows("validation"))


def test_validation_is_that_of_the_returned_sae_on_the_whole_split(whole, planted):
    _, trained = whole
    rows = planted.rows("validation")
    seen = evaluate(trained.sae, [planted.gather(rows)])
    assert trained.validation["fvu"] == pytest.approx(seen.metrics()["fvu"], rel=1e-6)
    assert trained.validation["l0"] == pytest.approx(seen.metrics()["l0"], rel=1e-3)
    np.testing.assert_allclose(trained.density.numpy(), seen.fired / len(rows), atol=2e-3)
    assert trained.density.shape == (64,)


def test_the_same_run_gives_the_same_bytes(whole, fit):
    assert same(whole[1], fit())


def test_the_scale_is_folded_in_and_decoder_rows_had_length_one(whole, planted):
    _, trained = whole
    x = planted.gather(planted.rows("train")).double()
    assert trained.scale == pytest.approx(math.sqrt(16) / float(x.norm(dim=1).mean()), rel=1e-9)
    lengths = trained.sae.parameters.W_dec.norm(dim=1) * trained.scale
    torch.testing.assert_close(lengths, torch.ones(64))


def test_the_decoders_bias_starts_at_the_mean_of_the_training_rows(fit, planted):
    trained = fit(config=with_changes(SHORT, {"steps": 1, "lr": 1e-30}))
    mean = planted.gather(planted.rows("train")).double().mean(dim=0)
    torch.testing.assert_close(trained.sae.parameters.b_dec.double(), mean, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_given_rows_alone(planted):
    rows = planted.rows("test")
    x = planted.gather(rows).double().numpy()
    found = data_statistics(planted, rows)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-10)
    assert found.mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-10)
    assert found.variance == pytest.approx(x.var(axis=0).sum(), rel=1e-8)


# -- every option --------------------------------------------------------------------------------

CHANGES = {
    "steps": 35,
    "batch_rows": 48,
    "lr": 2e-3,
    "lr_warmup_steps": 9,
    "lr_decay_fraction": 0.5,
    "l1": 3.0,
    "l1_warmup_steps": 0,
    "beta1": 0.5,
    "beta2": 0.9,
    "seed": 1,
    "checkpoint_every": 20,
    "log_every": 10,
}


def test_every_field_of_the_training_is_tried():
    assert set(CHANGES) == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_of_the_training_changes_something(whole, fit, name):
    _, before = whole
    after = fit(config=with_changes(SHORT, {name: CHANGES[name]}))
    assert not same(before, after)
    weights = [t.sae.parameters.W_dec for t in (before, after)]
    only_told = name in ("checkpoint_every", "log_every")
    assert torch.equal(*weights) == only_told
    if only_told:
        assert not before.history.equals(after.history)


@pytest.mark.parametrize("changes", [{"d_sae": 32}, {"clip": 0.5}])
def test_the_shape_of_the_sae_changes_the_result(whole, fit, changes):
    after = fit(sae=SAEConfig(**{"d_sae": 64, **changes}))
    assert after.validation != whole[1].validation
    if "clip" in changes:
        assert after.validation["clip_rate"] > 0
        assert whole[1].validation["clip_rate"] == 0
        assert max(after.history["clip_rate"].to_pylist()) > 0


def test_a_width_that_is_right_may_be_given(whole, fit):
    weights = fit(sae=SAEConfig(d_sae=64, d_in=16)).sae.parameters
    assert torch.equal(weights.W_dec, whole[1].sae.parameters.W_dec)


# -- schedules -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_stays_and_decays():
    config = TrainConfig(steps=100, lr=1.0, lr_warmup_steps=10, lr_decay_fraction=0.2)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def test_without_warm_up_or_decay_the_learning_rate_is_constant():
    config = TrainConfig(steps=9, lr=0.3, lr_warmup_steps=0, lr_decay_fraction=0.0)
    assert {learning_rate(config, step) for step in range(9)} == {0.3}


@given(
    st.integers(1, 50), st.integers(0, 80), st.floats(0, 1, allow_subnormal=False),
    st.integers(0, 80),
)  # fmt: skip
def test_schedules_stay_between_nothing_and_the_peak(steps, warmup, decay, l1_warmup):
    config = TrainConfig(
        steps=steps, lr=2.0, l1=3.0, lr_warmup_steps=warmup, lr_decay_fraction=decay,
        l1_warmup_steps=l1_warmup,
    )  # fmt: skip
    assert all(0 < learning_rate(config, step) <= 2.0 for step in range(steps))
    weights = [l1_weight(config, step) for step in range(steps)]
    assert weights == sorted(weights)
    assert all(0 <= weight <= 3.0 for weight in weights)


def test_lambda_rises_from_zero_and_stays():
    config = TrainConfig(l1=8.0, l1_warmup_steps=4)
    assert [l1_weight(config, step) for step in range(7)] == [0, 2, 4, 6, 8, 8, 8]
    assert l1_weight(TrainConfig(l1=8.0, l1_warmup_steps=0), 0) == 8


# -- history and progress ------------------------------------------------------------------------


def test_the_history_has_a_line_per_interval_and_validation_at_checkpoints(whole):
    history = whole[1].history
    assert tuple(history.column_names) == HISTORY_COLUMNS
    assert history.schema.field("step").type == pa.int64()
    assert history["step"].to_pylist() == list(range(5, 41, 5))
    validated = [value is not None for value in history["validation_fvu"].to_pylist()]
    assert validated == [step % 10 == 0 for step in range(5, 41, 5)]
    assert history["validation_l0"].is_valid().to_pylist() == validated
    others = [name for name in HISTORY_COLUMNS if not name.startswith("validation")]
    assert all(history[name].null_count == 0 for name in others)


def test_a_line_of_the_history_adds_up(whole, planted):
    trained = whole[1]
    variance = data_statistics(planted, planted.rows("train")).variance * trained.scale**2
    for line in trained.history.to_pylist():
        assert line["fvu"] == pytest.approx(line["mse"] / variance, rel=1e-9)
        assert line["loss"] >= line["mse"]
        assert 0 < line["l0"] <= 64
        assert line["l1"] == l1_weight(SHORT, line["step"] - 1)
        assert line["lr"] == learning_rate(SHORT, line["step"] - 1)


def test_a_feature_counts_as_dead_once_it_was_silent_for_the_whole_window(fit, monkeypatch):
    config = with_changes(SHORT, {"steps": 80, "l1": 400.0, "lr": 0.05, "log_every": 1})
    history = fit(config=config).history
    assert history["dead_fraction"].to_pylist() == [0.0] * 80
    fires = history["l0"].to_numpy() > 0

    window = 10
    monkeypatch.setattr(training, "DEAD_WINDOW_ROWS", window * config.batch_rows)
    dead = fit(config=config).history["dead_fraction"].to_numpy()
    assert (dead[: window - 1] == 0).all()
    all_silent = [not fires[i - window + 1 : i + 1].any() for i in range(window - 1, 80)]
    assert 0 < sum(all_silent) < len(all_silent)
    assert ((dead[window - 1 :] == 1) == all_silent).all()


def test_the_last_step_is_logged_and_saved_whatever_the_intervals(fit):
    saved: list[bytes] = []
    config = with_changes(SHORT, {"steps": 7, "log_every": 5, "checkpoint_every": 100})
    trained = fit(config=config, save_checkpoint=saved.append)
    assert trained.history["step"].to_pylist() == [5, 7]
    assert len(saved) == 1


def test_progress_tells_every_line(planted, run_to_end):
    progress, trained = run_to_end(train(planted, SMALL, SHORT))
    assert [p.step for p in progress] == trained.history["step"].to_pylist()
    assert {p.steps for p in progress} == {40}
    assert [p.fvu for p in progress] == trained.history["fvu"].to_pylist()
    assert all(p.rows_per_second > 0 for p in progress)


# -- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_a_run_resumed_from_any_checkpoint_ends_bit_for_bit_the_same(whole, fit, index):
    saved, trained = whole
    assert len(saved) == 4
    again: list[bytes] = []
    resumed = fit(load_checkpoint=lambda: saved[index], save_checkpoint=again.append)
    assert same(trained, resumed)
    assert again == saved[index + 1 :]


@pytest.mark.parametrize("lines", [1, 3, 4])
def test_a_run_abandoned_anywhere_goes_on_from_its_last_checkpoint(whole, planted, fit, lines):
    kept: list[bytes] = []
    abandoned = train(planted, SMALL, SHORT, save_checkpoint=kept.append)
    for _ in range(lines):
        next(abandoned)
    abandoned.close()
    assert len(kept) == lines // 2
    resumed = fit(load_checkpoint=lambda: kept[-1] if kept else None)
    assert same(whole[1], resumed)


def test_resuming_goes_on_where_the_rows_were_left(whole, planted, run_to_end):
    progress, _ = run_to_end(train(planted, SMALL, SHORT, load_checkpoint=lambda: whole[0][1]))
    assert [p.step for p in progress] == [25, 30, 35, 40]


@pytest.mark.parametrize(
    ("sae", "config"),
    [
        (SMALL, with_changes(SHORT, {"l1": 2.0})),
        (SMALL, with_changes(SHORT, {"steps": 50})),
        (SAEConfig(d_sae=32), SHORT),
        (SAEConfig(d_sae=64, clip=9.0), SHORT),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(whole, fit, sae, config):
    with pytest.raises(UserError, match="another configuration: delete checkpoint/"):
        fit(sae, config, load_checkpoint=lambda: whole[0][0])


def test_a_checkpoint_of_other_activations_is_refused(whole, fit, tmp_path, put_activations):
    x = np.random.default_rng(0).standard_normal((800, 16)).astype(np.float32)
    other = put_activations(tmp_path, x, [4] * 200)
    with pytest.raises(UserError, match="another configuration"):
        fit(source=other, load_checkpoint=lambda: whole[0][0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no checkpoint",
        lambda data: b"\xff" * 64,
        lambda data: data[:-10],
        lambda data: data[: len(data) // 2],
        lambda data: save({"x": torch.zeros(3)}),
        lambda data: save({"x": torch.zeros(3)}, {"state": "{}"}),
        lambda data: save({"x": torch.zeros(3)}, {"state": "[]"}),
    ],
    ids=["empty", "text", "noise", "cut", "halved", "no state", "no tensors", "no facts"],
)
def test_a_damaged_checkpoint_is_corrupt_and_the_message_says_what_to_do(whole, fit, damage):
    with pytest.raises(CorruptArtefact, match=r"checkpoint cannot be read .*delete checkpoint/"):
        fit(load_checkpoint=lambda: damage(whole[0][0]))


# -- what cannot be trained on -------------------------------------------------------------------


def test_a_width_that_is_wrong_is_a_user_error(fit):
    with pytest.raises(UserError, match=r"sae\.d_in is 17, but the activations have width 16"):
        fit(sae=SAEConfig(d_sae=64, d_in=17))


@pytest.mark.parametrize(("missing", "present"), [("train", (0, 20)), ("validation", (20, 100))])
def test_an_empty_split_is_a_user_error(fit, tmp_path, put_activations, missing, present):
    x = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    activations = put_activations(tmp_path, x, [4] * 5, texts=texts_in(*present), corpus=CORPUS)
    with pytest.raises(UserError, match=f"the {missing} split has no rows"):
        fit(source=activations)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_activations_that_are_all_alike_are_a_user_error(fit, tmp_path, put_activations, value):
    x = np.full((40, 16), value, np.float32)
    texts = [*texts_in(20, 100), *texts_in(10, 20)]
    activations = put_activations(tmp_path, x, [4] * 10, texts=texts, corpus=CORPUS)
    with pytest.raises(UserError, match="the train split's rows are all alike"):
        fit(source=activations)


def test_a_single_validation_row_gives_no_fvu_and_no_failure(fit, tmp_path, put_activations):
    x = np.random.default_rng(0).standard_normal((41, 16)).astype(np.float32)
    texts = [*texts_in(20, 100), texts_in(10, 20)[0]]
    activations = put_activations(
        tmp_path, x, [8, 8, 8, 8, 8, 1], texts=texts, corpus=CORPUS
    )  # fmt: skip
    trained = fit(source=activations)
    assert trained.validation["n_rows"] == 1
    assert trained.validation["fvu"] is None
    assert trained.history["validation_fvu"].null_count == 8
    assert trained.history["validation_l0"].null_count == 4


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(fit):
    saved: list[bytes] = []
    config = with_changes(SHORT, {"lr": 1e25, "lr_warmup_steps": 0, "checkpoint_every": 1})
    with pytest.raises(UserError, match=r"not finite at step \d+: lower train\.lr \(now 1e\+25\)"):
        fit(config=config, save_checkpoint=saved.append)
    assert 0 < len(saved) < 40
