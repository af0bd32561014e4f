"""Training on real Ray workers: alone, several SAEs at once, two on one SAE, killed and stopped."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from made_up_store import made_up_activations
from ray.cloudpickle import register_pickle_by_value

from sae_ext.architectures import BatchTopK, JumpReLU
from sae_ext.artefacts import Stage, activations, saes
from sae_ext.config import (
    SAEConfig,
    TrainConfig,
    with_changes,
)
from sae_ext.errors import Stopped, UserError
from sae_ext.schedules import Schedule
from sae_ext.store import Store
from sae_ext.training.run import run_to_end
from sae_ext.training.terms import L0, L1, ObjectiveConfig
from workers import pool
from workers.cluster import Cluster
from workers.events import Event, Update
from workers.pool import Job, WorkerDied
from workers.train import Meeting, Share, TrainWorker

pytestmark = pytest.mark.slow
SAE = SAEConfig(d_sae=32)
TRAIN = TrainConfig(
    steps=160, batch_rows=33, lr=1e-2, lr_schedule=Schedule(kind="linear", warmup_steps=5),
    objective=ObjectiveConfig(l1=L1(weight=6.0, schedule=Schedule(warmup_steps=8))), dead_rows=64,
    checkpoint_every=80, log_every=5,
)  # fmt: skip
"""Of every batch one of two workers has 16 rows and the other 17."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": {
        "sae.architecture": JumpReLU(bandwidth=0.1, threshold=0.4),
        "train.objective": ObjectiveConfig(l1=None, l0=L0(schedule=Schedule(warmup_steps=8))),
    },
}
"""One whose step is the fused kernel's, and one that goes through autograd."""
MIDDLE = 100
"""The step at which trainings are interrupted; the checkpoint before it is that of step 80."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with nothing but the activations."""
    store = Store.open(str(tmp_path_factory.mktemp("rows")), writable=True)
    made_up_activations(store)
    return store


@pytest.fixture
def store(rows: Store, tmp_path: Path) -> Store:
    """Another such store."""
    return copied(rows, tmp_path / "store")


def copied(store: Store, to: Path) -> Store:
    shutil.copytree(store.root, to)
    return Store.open(str(to), writable=True)


def stage_of(store: Store, architecture: str = "relu", **changes: Any) -> Stage:
    """An SAE on the activations of a store, with fields of its training changed."""
    (source,) = store.list(activations.KIND)
    chosen = ARCHITECTURES[architecture]
    sae = with_changes(SAE, {n[4:]: v for n, v in chosen.items() if n.startswith("sae.")})
    train = {n[6:]: v for n, v in chosen.items() if n.startswith("train.")}
    return saes.stage(sae, with_changes(TRAIN, {**train, **changes}), source)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the workers have: sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Cluster]:
    register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file
    cluster = Cluster()
    before = set(psutil.Process().children(recursive=True))
    cluster.wait()
    yield cluster
    cluster.stop()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, 10)
    assert not alive


class Waiting(TrainWorker):
    """Waits in the middle of a training until it is asked to stop, and tells its process before."""

    def __init__(
        self, url: str, threads: int, readers: int, board: str | None, waiting: Sequence[int]
    ) -> None:
        super().__init__(url, threads, readers, board)
        self.waiting = waiting

    def train(self, stages: Sequence[Stage], share: Share | None = None) -> Iterator[Event]:
        waits = (0 if share is None else share.rank) in self.waiting
        for event in super().train(stages, share):
            if waits and isinstance(event, Update) and event.done == MIDDLE:
                yield event._replace(note=f"waiting {os.getpid()}")
                self.stopping.wait(60)
            else:
                yield event


class Driver:
    """One call that trains, and what was seen of its workers."""

    def __init__(self, store: Store, *, members: int = 1, board: Path | None = None) -> None:
        self.store, self.members = store, members
        self.board = None if board is None else str(board)
        self.results: dict[int, Any] = {}
        self.steps: dict[int, list[float]] = {}
        self.waiting: dict[int, int] = {}
        """Processes of the members that wait in the middle."""

    def train(
        self,
        *stages: Stage,
        waiting: Sequence[int] = (),
        look: Callable[[], object] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train, as a session of a flow does.

        Args:
            waiting: members that wait in the middle.
            look: called whenever one of them has begun to.
        """
        shares: list[Share | None] = [None]
        if self.members > 1:
            meeting = Meeting(self.members)
            shares = list(meeting.shares())

        def note(job: int, event: Event) -> None:
            if not isinstance(event, Update):
                return
            self.steps.setdefault(job, []).append(event.done)
            if event.note.startswith("waiting"):
                self.waiting[job] = int(event.note.split()[1])
                look()

        pool.run(
            Waiting,
            (self.store.url, 1, 1, self.board, waiting),
            [Job("train", (stages, share)) for share in shares],
            workers=len(shares),
            cpus=0.5,
            on_event=note,
            on_result=self.results.__setitem__,
            stop=stop,
        )

    def all_gone(self) -> bool:
        """Whether the processes that waited have ended."""
        alive = [psutil.Process(p) for p in self.waiting.values() if psutil.pid_exists(p)]
        return not psutil.wait_procs(alive, 10)[1]


def files(store: Store, stage: Stage) -> dict[str, str]:
    """Of every file of a committed SAE, the hash."""
    return {n: f["sha256"] for n, f in store.manifest(saes.KIND, stage.key).files.items()}


def alone(rows: Store, folder: Path, *stages: Stage) -> Store:
    """Another store, with SAEs each trained by itself in this process."""
    store = copied(rows, folder / "alone")
    for stage in stages:
        run_to_end(saes.train_and_commit(store, [stage]))
    return store


@pytest.fixture(scope="module")
def pair(ray_here: Cluster, rows: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which two workers have trained the SAE without any interruption."""
    store = copied(rows, tmp_path_factory.mktemp("pair") / "store")
    Driver(store, members=2).train(stage_of(store))
    return store


def validation(store: Store, stage: Stage) -> dict[str, Any]:
    """What an SAE's manifest says of its validation."""
    found: dict[str, Any] = store.manifest(saes.KIND, stage.key).extra["validation"]
    return found


def history(store: Store, stage: Stage) -> dict[str, list[float]]:
    """The columns of the history; NaN where there is no value."""
    columns = store.read_table(saes.KIND, stage.key, "history.parquet").to_pydict()
    return {n: [math.nan if v is None else v for v in values] for n, values in columns.items()}


# -- alone ---------------------------------------------------------------------------------------


def test_a_worker_trains_what_the_library_trains_and_tells_how_far_it_is(
    ray_here, rows, store, tmp_path
):
    stage, driver = stage_of(store), Driver(store)
    driver.train(stage)
    expected = alone(rows, tmp_path, stage)
    assert driver.results == {0: [validation(expected, stage)]}
    assert files(store, stage) == files(expected, stage)
    assert driver.steps == {0: [*range(5, 161, 5)]}


def test_several_stages_in_one_call_end_as_each_alone_does(ray_here, rows, store, tmp_path):
    wanted = [stage_of(store, "jumprelu"), stage_of(store, seed=1), stage_of(store, steps=60)]
    driver = Driver(store)
    driver.train(*wanted)
    expected = alone(rows, tmp_path, *wanted)
    assert driver.results == {0: [validation(expected, stage) for stage in wanted]}
    assert [files(store, s) for s in wanted] == [files(expected, s) for s in wanted]
    assert driver.steps[0][-1] == 160 + 160 + 60
    assert driver.steps[0] == sorted(driver.steps[0])


def test_tensorboard_finds_every_line_of_the_history_in_a_folder_named_by_the_key(
    ray_here, store, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = stage_of(store)
    Driver(store, members=2, board=tmp_path / "board").train(stage)
    (folder,) = (tmp_path / "board").iterdir()
    assert folder.name == stage.key
    found = EventAccumulator(str(folder))
    found.Reload()
    expected = history(store, stage)
    assert [e.step for e in found.Scalars("loss")] == expected["step"]
    assert [e.value for e in found.Scalars("loss")] == pytest.approx(expected["loss"])
    assert len(found.Scalars("validation_fvu")) == 2


# -- stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "members"), [("flag", 1), ("ctrl-c", 2)])
def test_stopped_it_saves_where_it_was_and_the_same_call_ends_the_same(
    ray_here, rows, pair, store, tmp_path, how, members
):
    stage, driver = stage_of(store), Driver(store, members=members)

    def all_wait() -> bool:
        return len(driver.waiting) == members

    def press() -> None:
        if all_wait():
            signal.raise_signal(signal.SIGINT)

    options = {"stop": all_wait} if how == "flag" else {"look": press}
    with pytest.raises(Stopped if how == "flag" else KeyboardInterrupt):
        driver.train(stage, waiting=range(members), **options)
    assert driver.all_gone()
    assert not stage.done(store)

    again = Driver(store, members=members)
    again.train(stage)
    assert again.steps[0][0] == MIDDLE + 5, "it goes on from there, not from step 80"
    expected = pair if members == 2 else alone(rows, tmp_path, stage)
    assert files(store, stage) == files(expected, stage)


# -- together ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_workers_find_what_one_does_but_for_rounding(
    ray_here, rows, pair, store, tmp_path, architecture
):
    stage = stage_of(store, architecture)
    if architecture == "relu":
        store = pair
    else:
        Driver(store, members=2).train(stage)
    expected = alone(rows, tmp_path, stage)
    one, two = history(expected, stage), history(store, stage)
    assert one.keys() == two.keys()
    assert two["dead_fraction"] == one["dead_fraction"]
    assert 0 < max(one["dead_fraction"][4:]) < 1
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4, nan_ok=True), name
    assert files(store, stage) != files(expected, stage), "summed in another order"
    ours, theirs = (saes.load(s, stage.key).parameters.tensors() for s in (expected, store))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_killed_is_told_in_seconds_and_the_same_call_ends_the_same(
    ray_here, pair, store, victim
):
    stage, driver = stage_of(store), Driver(store, members=2)
    killed: list[float] = []

    def kill() -> None:
        time.sleep(0.5)  # the other waits for this one's sums by then
        os.kill(driver.waiting[victim], signal.SIGKILL)
        killed.append(time.monotonic())

    with pytest.raises(WorkerDied):
        driver.train(stage, waiting=[victim], look=kill)
    assert time.monotonic() - killed[0] < 20
    assert driver.all_gone()
    assert not stage.done(store)

    again = Driver(store, members=2)
    again.train(stage)
    assert again.steps[0][0] == 85
    assert files(store, stage) == files(pair, stage)


def vanish(url: str, stage: Stage, share: Share) -> None:
    """Be a member that is suddenly gone."""
    for event in TrainWorker(url, 1, 1, None).train([stage], share):
        if isinstance(event, Update):
            os._exit(1)


def test_what_another_one_loses_by_a_death_is_told_as_that(ray_here, store):
    stage, meeting = stage_of(store), Meeting(2)
    ours, theirs = meeting.shares()
    call = f"from test_train import *; vanish({store.url!r}, {stage!r}, {theirs!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", call], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        with pytest.raises(WorkerDied, match="one that shares the training is gone"):
            list(TrainWorker(store.url, 1, 1, None).train([stage], ours))
    finally:
        assert process.wait(60) == 1
    assert not torch.distributed.is_initialized()


def test_two_workers_do_not_share_what_looks_at_a_whole_batch(ray_here, store):
    stage = saes.stage(
        SAEConfig(d_sae=32, architecture=BatchTopK(k=3)),
        with_changes(TRAIN, {"objective.l1": None}),
        stage_of(store).inputs["activations"],
    )
    with pytest.raises(UserError, match=r"sae\.architecture \(BatchTopK\).*train_workers to 1"):
        Driver(store, members=2).train(stage)
