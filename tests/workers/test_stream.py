"""Training on what harvest workers send, on real Ray: the bytes of a training on stored rows, and nothing left."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sae_ext.activations.harvest import harvest_unit, parts
from sae_ext.artefacts import Stage, activations, saes
from sae_ext.config import CorpusConfig, HarvestConfig, SAEConfig, TrainConfig, with_changes
from sae_ext.errors import Stopped, UserError
from sae_ext.hosts import Planted
from sae_ext.schedules import Schedule
from sae_ext.store import Store
from sae_ext.training.config import BufferConfig
from sae_ext.training.run import run_to_end
from sae_ext.training.terms import L1, ObjectiveConfig
from workers import pool
from workers.cluster import Cluster
from workers.pool import Job, WorkerDied
from workers.stream import Feeders, require_room_beside
from workers.train import TrainWorker

pytestmark = pytest.mark.slow

HOST = Planted(rows=4000, d_in=16, n_features=32, active=3.0)
CORPUS = CorpusConfig()
HARVEST = HarvestConfig(unit_kb=1.0)
TRAIN = TrainConfig(
    steps=300, batch_rows=32, checkpoint_every=50, log_every=10,
    lr_schedule=Schedule(kind="linear", warmup_steps=10),
    objective=ObjectiveConfig(l1=L1(weight=1.0, schedule=Schedule(warmup_steps=20))),
    buffer=BufferConfig(rows=500, min_rows=400),
)  # fmt: skip
LONG = with_changes(TRAIN, {"steps": 1_000_000, "checkpoint_every": 1_000_000, "log_every": 100})


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Cluster]:
    cluster = Cluster()
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 4)  # as Ray counts them
        cluster.wait()
    yield cluster
    cluster.stop()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, 10)
    assert not alive


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One with the rows to judge by."""
    store = Store.open(str(tmp_path / "store"), writable=True)
    put_rows(store, HOST, CorpusConfig(limit=600), HARVEST)
    return store


def put_rows(store: Store, host: Planted, corpus: CorpusConfig, harvest: HarvestConfig) -> None:
    (stage,) = activations.stages(corpus, host, harvest)
    plan = list(parts(host.documents(corpus), harvest))
    for unit, documents in plan:
        (shard,) = harvest_unit(host.open(), documents, harvest, corpus)
        activations.put(store, stage.key, unit.number, shard)
    activations.commit(store, stage, len(plan), {})


def stage_of(store: Store, train: TrainConfig) -> Stage:
    (source,) = store.list(activations.KIND)
    stream = saes.Streaming(CORPUS, HOST.documents_fingerprint(CORPUS))
    return saes.stage(SAEConfig(d_sae=48), train, source, stream)


def feeders(workers: int) -> Feeders:
    return Feeders(HOST, CORPUS, HARVEST, workers, 1, 0)


def run(store: Store, stage: Stage, workers: int, **hooks: Any) -> None:
    arguments = (store.url, 1, 1, None, feeders(workers))
    pool.run(TrainWorker, arguments, [Job("train", ([stage],))], workers=1, cpus=1, **hooks)


def weights(store: Store, stage: Stage) -> bytes:
    return store.read(saes.KIND, stage.key, "sae_weights.safetensors")


def feeding() -> list[psutil.Process]:
    """The harvest workers' processes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "StreamWorker" in "".join(process.cmdline()):
                found.append(process)
    return found


def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_harvest_workers_gives_the_bytes_of_this_process_alone(
    ray_here, store, tmp_path, workers
):
    stage = stage_of(store, TRAIN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_to_end(saes.train_and_commit(store, [stage]))
    finally:
        torch.set_num_threads(threads)
    alone = weights(store, stage)
    store.fs.rm(store.path(saes.KIND, stage.key), recursive=True)
    run(store, stage, workers)
    assert weights(store, stage) == alone
    assert eventually(lambda: not feeding())
    assert len(store.list(activations.KIND)) == 1


def test_a_harvest_worker_that_dies_is_told_and_the_same_call_goes_on(ray_here, store):
    stage = stage_of(store, with_changes(TRAIN, {"steps": 4000}))
    killed = threading.Event()

    def kill() -> None:
        eventually(lambda: store.has_file(saes.KIND, stage.key, saes.CHECKPOINT))
        for process in feeding():
            os.kill(process.pid, signal.SIGKILL)
            killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(WorkerDied):
        run(store, stage, 2)
    thread.join()
    assert killed.is_set()
    assert not stage.done(store)
    run(store, stage, 2)
    resumed = weights(store, stage)
    store.fs.rm(store.path(saes.KIND, stage.key), recursive=True)
    run(store, stage, 2)
    assert weights(store, stage) == resumed


def test_a_stop_saves_a_checkpoint_and_leaves_no_worker(ray_here, store):
    stage = stage_of(store, LONG)
    seen: list[float] = []
    with pytest.raises(Stopped):
        run(store, stage, 2, on_event=lambda job, event: seen.append(time.monotonic()),
            stop=lambda: len(seen) > 2)  # fmt: skip
    assert store.has_file(saes.KIND, stage.key, saes.CHECKPOINT)
    assert eventually(lambda: not feeding(), 10)


def test_what_goes_wrong_in_a_harvest_worker_is_told_as_it_was_raised(ray_here, store):
    stage = stage_of(store, TRAIN)
    broken = Feeders(HOST, CorpusConfig(source="not-there.jsonl"), HARVEST, 1, 1, 0)
    arguments = (store.url, 1, 1, None, broken)
    with pytest.raises(UserError, match=r"^stream: .*not-there"):
        pool.run(TrainWorker, arguments, [Job("train", ([stage],))], workers=1, cpus=1)


def test_units_larger_than_the_object_store_has_room_for_come_in_pieces(ray_here, tmp_path):
    wide = Planted(rows=72_000, d_in=1000, n_features=32, active=3.0)
    harvest = HarvestConfig(unit_kb=300, dtype="float32")
    store = Store.open(str(tmp_path / "wide"), writable=True)
    put_rows(store, wide, CorpusConfig(limit=300), harvest)
    short = with_changes(TRAIN, {"steps": 60, "checkpoint_every": 60})
    stage = stage_of(store, short)
    arguments = (store.url, 1, 1, None, Feeders(wide, CORPUS, harvest, 1, 1, 0))
    pool.run(TrainWorker, arguments, [Job("train", ([stage],))], workers=1, cpus=1)
    assert stage.done(store)


def test_other_documents_where_the_training_is_than_where_it_began_are_refused(ray_here, store):
    (source,) = store.list(activations.KIND)
    stage = saes.stage(SAEConfig(d_sae=48), TRAIN, source, saes.Streaming(CORPUS, "another"))
    with pytest.raises(UserError, match="holds other documents than where the run was started"):
        run(store, stage, 1)


@pytest.mark.parametrize(("workers", "fits"), [(1, True), (79, False)])
def test_a_trainer_that_would_wait_for_its_workers_is_refused(ray_here, workers, fits):
    each = Feeders(HOST, CORPUS, HARVEST, workers, 1, 0)
    if fits:
        require_room_beside(1, 0, each)
    else:
        with pytest.raises(UserError, match=r"80 CPUs, but Ray has .*: lower resources\.workers"):
            require_room_beside(1, 0, each)
