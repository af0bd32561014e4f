"""Going on after a kill as if nothing had happened: whatever is trained, wherever it was interrupted."""

from __future__ import annotations

import multiprocessing
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from made_up_training import (
    ARCHITECTURES,
    RELU,
    SHORT,
    VARIANTS,
    events,
    fit,
    planted,
    same,
    same_weights,
    slow_process,
    variant,
    weights,
    weights_in,
)
from safetensors.torch import load, save

from sae_ext.architectures import ReLU
from sae_ext.config import SAEConfig, with_changes
from sae_ext.errors import CorruptArtefact, Stopped, UserError
from sae_ext.training.job import Place, Trained
from sae_ext.training.learner import Learner
from sae_ext.training.run import train

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [
    (architecture, name)
    for architecture in ARCHITECTURES
    for name in VARIANTS
    if name != "target_l0"
    or architecture in ("relu", "jumprelu")  # others are sparse by themselves
    if name != "auxk" or architecture in ("topk", "batchtopk")
]


class Interruptions:
    """Says to stop at random steps, so many times; then lets a run go on to its end."""

    def __init__(self, seed: int, times: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kept: bytes | None = None
        self.left = times

    def keep(self, data: bytes) -> None:
        self.kept = data

    def run(self, architecture: str, name: str) -> Trained:
        """The end of a run that was interrupted again and again, with ever other readers."""
        sae, config = variant(architecture, name)
        while True:
            calls = int(self.rng.integers(2, 20)) if self.left else 10**6
            self.left = max(0, self.left - 1)
            place = Place(readers=int(self.rng.integers(0, 4)))
            looks = iter(range(calls))
            try:
                return fit(
                    sae, config, place=place, stop=lambda looks=looks: next(looks, None) is None,
                    load_checkpoint=lambda: self.kept, save_checkpoint=self.keep,
                )  # fmt: skip
            except Stopped:
                continue


def happened(architecture: str, name: str, trained: Trained) -> bool:
    """Whether a run was one of what its name says."""
    history = trained.history.to_pylist()
    match name:
        case "plain":
            return True
        case "revival":
            return len(events(trained, "revived")) > 0
        case "auxk" | "usage":
            return any((line[name] or 0) > 0 for line in history)
        case "target_l0":
            return trained.penalty != history[1]["l1"]
        case "early_stopping":
            return trained.steps < SHORT.steps and len(events(trained, "early_stop")) == 1
        case _:
            return not same_weights(trained, fit(*variant(architecture, "plain")))


@pytest.mark.parametrize(("architecture", "name"), ALL)
def test_a_run_resumed_from_any_checkpoint_or_stopped_at_any_step_ends_bit_for_bit_the_same(
    architecture, name
):
    saved: list[bytes] = []
    whole = fit(*variant(architecture, name), save_checkpoint=saved.append)
    assert happened(architecture, name, whole)
    assert len(saved) == whole.steps // SHORT.checkpoint_every
    for index, checkpoint in enumerate(saved[:-1]):
        again: list[bytes] = []
        resumed = fit(
            *variant(architecture, name), load_checkpoint=lambda data=checkpoint: data,
            save_checkpoint=again.append,
        )  # fmt: skip
        assert same(whole, resumed)
        assert again == saved[index + 1 :]
    seed = zlib.crc32(f"{architecture} {name}".encode())
    assert same(whole, Interruptions(seed, times=3).run(architecture, name))


@pytest.mark.parametrize("name", ["plain", "buffer"])
@pytest.mark.parametrize("lines", [1, 3, 7])
def test_a_run_abandoned_anywhere_goes_on_from_its_last_checkpoint(name, lines):
    sae, config = variant("relu", name)
    kept: list[bytes] = []
    abandoned = train(planted(), sae, config, save_checkpoint=kept.append)
    for _ in range(lines):
        next(abandoned)
    abandoned.close()
    assert len(kept) == lines // 2
    resumed = fit(sae, config, load_checkpoint=lambda: kept[-1] if kept else None)
    assert same(fit(sae, config), resumed)


@pytest.mark.parametrize(("architecture", "name"), [("relu", "revival"), ("jumprelu", "buffer")])
def test_a_process_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path, architecture, name):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "sae_ext.training.run"])
    moments, killed = np.random.default_rng().uniform(0.0, 0.35, 3), 0
    for moment in [*moments, None]:
        begun = context.Event()
        process = context.Process(
            target=slow_process, args=(str(tmp_path), begun, architecture, name)
        )
        process.start()
        assert begun.wait(120)
        process.join(moment)  # of a run of 40 steps that take 10 ms or more
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0
            break
    assert killed > 0
    found, whole = weights_in(tmp_path), weights(fit(*variant(architecture, name)))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[n], whole[n]) for n in whole)


def test_resuming_goes_on_where_the_run_was_left():
    saved: list[bytes] = []
    fit(RELU, SHORT, save_checkpoint=saved.append)
    steps = [p.step for p in train(planted(), RELU, SHORT, load_checkpoint=lambda: saved[1])]
    assert steps == [25, 30, 35, 40]


@pytest.mark.parametrize("name", ["plain", "early_stopping"])
def test_a_finished_run_takes_no_further_step(monkeypatch, name):
    saved: list[bytes] = []
    whole = fit(*variant("relu", name), save_checkpoint=saved.append)
    monkeypatch.setattr(Learner, "step", None)
    assert same(whole, fit(*variant("relu", name), load_checkpoint=lambda: saved[-1]))


def test_a_run_that_is_stopped_says_where_and_saves_there():
    saved: list[bytes] = []
    steps = iter(range(100))
    with pytest.raises(Stopped, match="after step 6; a checkpoint is saved"):
        # The first look is at the one batch of the statistics.
        fit(RELU, SHORT, stop=lambda: next(steps) == 7, save_checkpoint=saved.append)
    assert len(saved) == 1


def test_a_run_stopped_before_its_first_step_has_lost_nothing():
    saved: list[bytes] = []
    with pytest.raises(Stopped, match="before the first step"):
        fit(RELU, SHORT, stop=lambda: True, save_checkpoint=saved.append)
    assert saved == []


# -- what cannot be gone on from -----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(one_thread) -> bytes:
    saved: list[bytes] = []
    fit(RELU, with_changes(SHORT, {"steps": 20}), save_checkpoint=saved.append)
    return saved[0]


@pytest.mark.parametrize(
    ("sae", "changes", "named"),
    [
        (
            RELU,
            {"objective.l1.weight": 2.0},
            r"train\.objective\.l1\.weight is 1\.0 there and 2\.0",
        ),
        (RELU, {"steps": 21}, r"train\.steps is 20 there and 21 here"),
        (RELU, {"lr_schedule.last": 0.3}, r"train\.lr_schedule\.last is 0\.2 there and 0\.3"),
        (RELU, {"max_grad_norm": 1.0}, r"train\.max_grad_norm is None there and 1\.0"),
        (SAEConfig(d_sae=31), {}, r"sae\.d_sae is 32 there and 31"),
        (SAEConfig(d_sae=32, architecture=ReLU(clip=9.0)), {}, r"sae\.architecture\.clip is None"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_and_the_field_named(
    checkpoint, sae, changes, named
):
    config = with_changes(SHORT, {"steps": 20})
    for name, value in changes.items():
        config = with_changes(config, {name: value})
    with pytest.raises(UserError, match=rf"another configuration \({named}.*delete checkpoint/"):
        fit(sae, config, load_checkpoint=lambda: checkpoint)


def test_a_checkpoint_of_other_data_is_refused(checkpoint):
    config = with_changes(SHORT, {"steps": 20})
    with pytest.raises(UserError, match=r"another configuration \(data is '[0-9a-f]+' there"):
        fit(RELU, config, planted(seed=8), load_checkpoint=lambda: checkpoint)


def test_a_width_that_is_checked_only_later_is_no_other_configuration(checkpoint):
    sae, config = with_changes(RELU, {"d_in": 16}), with_changes(SHORT, {"steps": 20})
    resumed = fit(sae, config, load_checkpoint=lambda: checkpoint)
    assert same(resumed, fit(RELU, config))


def without(data: bytes, name: str) -> bytes:
    """A checkpoint that lacks a tensor."""
    return save({n: t for n, t in load(data).items() if n != name})


def with_state(text: str) -> bytes:
    """A file with these facts and a tensor."""
    return save(
        {
            "x": torch.zeros(3),
            "state": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
        }
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no checkpoint",
        lambda data: b"\xff" * 64,
        lambda data: data[:-10],
        lambda data: data[: len(data) // 2],
        lambda data: save({"x": torch.zeros(3)}),
        lambda data: with_state("{}"),
        lambda data: with_state("[]"),
        lambda data: with_state('{"facts": '),
        *(
            lambda data, name=name: without(data, name)
            for name in ("w.b_enc", "m.W_dec", "silent_rows", "source.cursor")
        ),
    ],
    ids=[
        "empty", "text", "noise", "cut", "halved", "no state", "no facts", "a list", "no end",
        "no bias", "no moment", "no counter", "no place in the rows",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_corrupt_and_the_message_says_what_to_do(checkpoint, damage):
    config = with_changes(SHORT, {"steps": 20})
    saved: list[Any] = []
    with pytest.raises(CorruptArtefact, match=r"checkpoint cannot be read .*delete checkpoint/"):
        fit(RELU, config, load_checkpoint=lambda: damage(checkpoint), save_checkpoint=saved.append)
    assert saved == []
