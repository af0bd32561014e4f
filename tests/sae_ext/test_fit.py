"""Training into a folder: what is left there, and signals in the middle of it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from made_up_training import RELU, SHORT, events, planted, same, variant, weights
from made_up_training import fit as train_here

from sae_ext.activations.dataset import Dataset
from sae_ext.config import SAEConfig, TrainConfig, from_dict, with_changes
from sae_ext.errors import Stopped, UserError
from sae_ext.model import SAE
from sae_ext.training.fit import fit
from sae_ext.training.job import Place

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKPOINT = "checkpoint/state.safetensors"
LONG = with_changes(SHORT, {"steps": 400, "checkpoint_every": 1000})
"""Nothing but a signal saves it before its end."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# -- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "name"), [("relu", "revival"), ("topk", "auxk"), ("jumprelu", "usage")]
)
def test_the_folder_holds_the_sae_its_history_and_its_events(tmp_path, architecture, name):
    sae, config = variant(architecture, name)
    trained = fit(planted(), sae, config, tmp_path / "made" / "here")
    assert same(trained, train_here(sae, config))
    folder = tmp_path / "made" / "here"
    tables = {"history.parquet", "events.parquet"}
    assert contents(folder).keys() == {*SAE.FILES, *tables, "training.json", CHECKPOINT}
    told = json.loads((folder / "training.json").read_bytes())
    assert (told["scale"], told["penalty"]) == (trained.scale, trained.penalty)
    assert (told["steps"], told["validation"]) == (trained.steps, trained.validation)
    assert from_dict(TrainConfig, told["config"]["train"]) == config
    assert from_dict(SAEConfig, told["config"]["sae"]) == sae
    assert (told["penalty"] is None) is (architecture == "topk")
    loaded = SAE.load(folder)
    assert loaded.architecture == trained.sae.architecture
    kept = loaded.parameters.tensors() | loaded.more
    assert kept.keys() == weights(trained).keys()
    assert all(torch.equal(kept[n], t) for n, t in weights(trained).items())
    history = pq.read_table(folder / "history.parquet")
    assert history.equals(trained.history)
    assert history["step"].to_pylist() == [*range(5, 41, 5)]
    assert pq.read_table(folder / "events.parquet").equals(trained.events)
    assert (len(events(trained, "revived")) > 0) is (name == "revival")
    seen = json.loads((folder / "cfg.json").read_bytes())["metadata"]
    assert (seen["l0"], seen["fvu"]) == (trained.validation["l0"], trained.validation["fvu"])


def test_earlier_steps_are_kept_as_folders_of_their_own_where_that_is_asked_for(tmp_path):
    fit(planted(), RELU, with_changes(SHORT, {"keep_checkpoints": True}), tmp_path)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step-{n:08d}" for n in (10, 20, 30, 40)]
    earlier, last = SAE.load(folders[0]).parameters, SAE.load(folders[-1]).parameters
    assert torch.equal(last.W_dec, SAE.load(tmp_path).parameters.W_dec)
    assert not torch.equal(earlier.W_dec, last.W_dec)


def test_the_same_call_again_leaves_the_same_bytes_and_takes_no_step(tmp_path, monkeypatch):
    first = fit(planted(), RELU, SHORT, str(tmp_path))
    before = contents(tmp_path)
    monkeypatch.setattr("sae_ext.training.learner.Learner.step", None)
    assert same(fit(planted(), RELU, SHORT, str(tmp_path)), first)
    assert contents(tmp_path) == before


def test_a_folder_of_another_configuration_is_left_as_it_is(tmp_path):
    fit(planted(), RELU, SHORT, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"another configuration \(train\.lr is 0\.003 there"):
        fit(planted(), RELU, with_changes(SHORT, {"lr": 0.1}), tmp_path)
    assert contents(tmp_path) == before


# -- signals -------------------------------------------------------------------------------------


class Watched(Dataset):
    """The planted rows; before each read it calls something with how many rows are wanted."""

    def __init__(self, look: Callable[[int], object]) -> None:
        source = planted()
        self.key, self.d_in = source.key, source.d_in
        self.rows, self.column, self.where = source.rows, source.column, source.where
        self.look = look

    def gather(self, rows):
        self.look(len(rows))
        return planted().gather(rows)


BATCH = LONG.batch_rows
TRAIN, VALIDATION = (len(planted().rows(split)) for split in ("train", "validation"))
"""How many rows are read at once: in a step, before the first, and when it is judged."""
ALONE = Place(readers=0)
"""Rows are read where signals arrive."""


def interrupted(wanted: int, time: int = 1) -> Watched:
    """Data in whose reading Ctrl-C is pressed, when so many rows are wanted for the given time."""
    reads = itertools.count(1)

    def look(rows: int) -> None:
        if rows == wanted and next(reads) == time:
            signal.raise_signal(signal.SIGINT)

    return Watched(look)


def fit_and_tell(folder: str, told: Connection) -> None:
    """Train in a process that hears signals as a user's does; tell how it ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    before, batches = handlers(), itertools.count(1)

    def look(rows: int) -> None:
        if rows == BATCH:
            time.sleep(0.02)
            if next(batches) == 20:
                told.send("in the middle")

    try:
        fit(Watched(look), RELU, LONG, folder)
    except Stopped as stop:
        told.send((str(stop), handlers() == before))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> dict[str, bytes]:
    """What a run leaves that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    fit(planted(), RELU, LONG, folder)
    return contents(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on_and_the_same_call_ends_the_same(
    tmp_path, whole, number
):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "sae_ext.training.fit"])
    ours, theirs = context.Pipe()
    process = context.Process(target=fit_and_tell, args=(str(tmp_path), theirs))
    process.start()
    try:
        assert ours.poll(120)
        assert ours.recv() == "in the middle"
        os.kill(process.pid, number)
        assert ours.poll(10), "the signal was not heard"
        said, restored = ours.recv()
    finally:
        process.kill()
        process.join()
    assert restored
    found = re.fullmatch(
        rf"stopped after step (\d+); a checkpoint is saved; the same call goes on from {tmp_path}",
        said,
    )
    assert found, said
    assert contents(tmp_path).keys() == {CHECKPOINT}
    assert 10 < int(found[1]) < LONG.steps

    reads: list[int] = []
    trained = fit(Watched(reads.append), RELU, LONG, tmp_path, place=ALONE)
    assert reads.count(BATCH) == LONG.steps - int(found[1])
    assert trained.steps == LONG.steps
    assert contents(tmp_path) == whole


def test_handlers_are_as_before_after_the_end_and_after_a_stop(tmp_path):
    def mine(number: int, frame: object) -> None:
        raise AssertionError

    outside = handlers()
    signal.signal(signal.SIGTERM, mine)
    try:
        before = handlers()
        fit(planted(), RELU, SHORT, tmp_path / "end")
        assert handlers() == before
        with pytest.raises(Stopped):
            fit(interrupted(BATCH), RELU, LONG, tmp_path / "stop", place=ALONE)
        assert handlers() == before
        with pytest.raises(UserError):
            fit(planted(), with_changes(RELU, {"d_in": 3}), LONG, tmp_path / "wrong")
        assert handlers() == before
    finally:
        signal.signal(signal.SIGTERM, outside[1])


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(tmp_path):
    def twice(rows: int) -> None:
        if rows == BATCH:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(Watched(twice), RELU, LONG, tmp_path, place=ALONE)
    assert contents(tmp_path) == {}


def test_stopped_before_its_first_step_it_says_that_nothing_is_lost(tmp_path):
    with pytest.raises(
        Stopped, match=r"before the first step: nothing is lost; the same call goes"
    ):
        fit(interrupted(TRAIN), RELU, LONG, tmp_path, place=ALONE)
    assert contents(tmp_path) == {}


def test_stopped_after_its_last_step_it_says_so_and_goes_on_there(tmp_path):
    data = interrupted(VALIDATION, time=5)  # at four checkpoints and at the end
    with pytest.raises(Stopped, match=r"^stopped after the last step: nothing is lost; the same"):
        fit(data, RELU, SHORT, tmp_path, place=ALONE)
    assert contents(tmp_path).keys() == {CHECKPOINT}
    assert same(fit(planted(), RELU, SHORT, tmp_path), train_here(RELU, SHORT))


def test_it_trains_beside_the_main_thread_and_leaves_the_handlers_alone(tmp_path):
    outside, seen = handlers(), []
    watched = Watched(lambda rows: seen.append((handlers(), threading.current_thread())))
    with ThreadPoolExecutor(1) as threads:
        trained = threads.submit(fit, watched, RELU, SHORT, tmp_path, place=ALONE).result()
    assert same(trained, train_here(RELU, SHORT))
    assert len(seen) > SHORT.steps
    assert all(meanwhile == outside for meanwhile, _ in seen)
    assert all(thread is not threading.main_thread() for _, thread in seen)
    assert SAE.load(tmp_path).d_sae == RELU.d_sae
