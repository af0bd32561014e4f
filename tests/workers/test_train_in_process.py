"""What a training worker does around the training itself, without Ray and without training anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sae_ext.artefacts import Stage, saes
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.errors import UserError
from sae_ext.store import Store
from sae_ext.training.job import Progress
from workers import train as workers_train
from workers.events import Update
from workers.pool import WorkerDied
from workers.train import Meeting, TrainWorker

STAGES = [saes.stage(SAEConfig(), TrainConfig(seed=seed), "k") for seed in range(2)]


@pytest.fixture(autouse=True)
def here(monkeypatch) -> Iterator[None]:
    """Ray gives this process no GPU; a worker sets the number of its threads."""
    monkeypatch.setattr("ray.get_gpu_ids", list)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., TrainWorker]:
    store = Store.open(str(tmp_path / "store"), writable=True)

    def worker(*, threads: int = 1, readers: int = 1, board: str | None = None) -> TrainWorker:
        return TrainWorker(store.url, threads, readers, board)

    return worker


@pytest.fixture
def trained(monkeypatch) -> Callable[[Callable[..., Any]], None]:
    """Put a generator in the place of the training."""

    def trained(work: Callable[..., Any]) -> None:
        monkeypatch.setattr(workers_train.saes, "train_and_commit", work)

    return trained


def progress(number: int, step: int, **changes: float) -> Progress:
    told = {"rows_per_second": 1234.0, "loss": 0.5, "fvu": 0.25, "l0": 12.0, "dead_fraction": 0.25}
    return Progress(step, 2000, number=number, **(told | changes))


def updates(worker: TrainWorker, stages: list[Stage] = STAGES) -> list[Update]:
    return [event for event in worker.train(stages) if isinstance(event, Update)]


@pytest.mark.parametrize("readers", [0, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_trains_with_the_threads_and_readers_it_is_given(
    worker, trained, readers, threads
):
    seen = []

    def note(_store: Store, stages: list[Stage], *, place: Any, **_rest: Any) -> Iterator[Any]:
        seen.append((stages, place.device, place.readers, place.share, torch.get_num_threads()))
        yield from ()

    trained(note)
    list(worker(threads=threads, readers=readers).train(STAGES))
    assert seen == [(STAGES, "cpu", readers, (0, 1), threads)]


def test_progress_of_several_saes_is_told_as_one(worker, trained):
    trained(lambda *_, **__: iter([progress(0, 25), progress(1, 25), progress(0, 2000)]))
    told = updates(worker())
    assert [(u.done, u.total) for u in told] == [(25, 4000), (50, 4000), (2025, 4000)]
    assert told[0].note == "1,234 rows/s · loss 0.5 · FVU 0.250 · L0 12.0 · dead 25.0 %"


def test_what_was_not_computed_is_left_out_of_the_progress(worker, trained):
    trained(lambda *_, **__: iter([progress(0, 25, fvu=math.nan)]))
    (told,) = updates(worker())
    assert told.note == "1,234 rows/s · loss 0.5 · L0 12.0 · dead 25.0 %"


def test_a_worker_that_was_asked_to_stop_lets_the_training_know(worker, trained):
    asked = []

    def look(*_: Any, stop: Callable[[], bool], **__: Any) -> Iterator[Progress]:
        for step in (25, 50):
            asked.append(stop())
            yield progress(0, step)

    trained(look)
    stopped = worker()
    for event in stopped.train(STAGES):
        if isinstance(event, Update):
            stopped.stop()
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("error", "shared", "told"),
    [
        (RuntimeError("[gloo/tcp/pair.cc:1] Connection closed by peer\nmore"), True, WorkerDied),
        (dist.DistBackendError("NCCL error"), True, WorkerDied),
        (NotImplementedError("a bug"), True, NotImplementedError),
        (torch.OutOfMemoryError("memory"), True, torch.OutOfMemoryError),
        (UserError("row 3 is bad"), True, UserError),
        (RuntimeError("a bug"), True, RuntimeError),
        (RuntimeError("[gloo/tcp/pair.cc:1] Connection closed by peer"), False, RuntimeError),
    ],
)
def test_a_worker_whose_partner_is_gone_tells_it_as_a_death_which_is_tried_again(
    worker, trained, error, shared, told
):
    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        raise error
        yield

    trained(fail)
    meeting = Meeting(1)
    with pytest.raises(told) as raised:
        list(worker().train(STAGES, meeting.shares()[0] if shared else None))
    assert type(raised.value) is told
    assert "\n" not in str(raised.value)
    assert not dist.is_initialized(), "the next training may share again"


def test_lines_that_come_again_after_a_kill_are_shown_once(worker, trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = [25, 50, 75]

    def tell(*_: Any, on_line: Callable[..., object], **__: Any) -> Iterator[Any]:
        for step in told:
            on_line(0, {"step": float(step), "loss": 0.5})
        yield from ()

    trained(tell)
    board = str(tmp_path / "board")
    updates(worker(board=board))
    told = [50, 75, 100]
    updates(worker(board=board))
    (folder,) = (tmp_path / "board").iterdir()
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [25, 50, 75, 100]


def test_without_tensorboard_a_worker_that_should_write_it_says_what_to_do(
    worker, trained, monkeypatch, tmp_path
):
    def tell(*_: Any, on_line: Callable[..., object], **__: Any) -> Iterator[Any]:
        on_line(0, {"step": 25.0, "loss": 0.5})
        yield from ()

    trained(tell)
    assert updates(worker()) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard is missing: pip install tensorboard"):
        updates(worker(board=str(tmp_path / "board")))
