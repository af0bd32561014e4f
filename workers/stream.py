"""Rows for a training as it goes: harvest workers whose rows go to the trainer through Ray's object store.

The trainer's process owns the workers, so they end with it. Units come back in the order of the documents,
whoever computed them. What is on the way is bounded: two units a worker, fewer where the object store has no room.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy.typing as npt
import ray
import torch
from torch import Tensor

from sae_ext.activations.dataset import Stream
from sae_ext.activations.streaming import UnitRows, streamed, unit_rows
from sae_ext.config import CorpusConfig, HarvestConfig
from sae_ext.corpora import Document
from sae_ext.errors import Stopped, UserError
from sae_ext.hosts import Host, HostConfig
from workers.pool import mapped

log = logging.getLogger("workers.stream")

_SLICE_SECONDS = 0.25
_AHEAD = 2  # units a worker has: one that it computes, and one that waits
_ROOM = 0.5  # of the object store, for all that is on the way


class Feeders(NamedTuple):
    """The harvest workers beside a trainer, and what they read."""

    host: HostConfig
    corpus: CorpusConfig
    harvest: HarvestConfig
    workers: int
    cpus: int
    gpus: float


class StreamWorker:
    """Computes units with one copy of the host; stores nothing."""

    def __init__(self, host: HostConfig, harvest: HarvestConfig, threads: int) -> None:
        self.host_config, self.harvest, self.threads = host, harvest, threads
        self.host: Host | None = None

    def rows(self, documents: list[Document]) -> tuple[npt.NDArray[Any], dict[str, int]]:
        """The bits of a unit's rows, [n, d_in], and why documents gave none (see `UnitRows`)."""
        torch.set_num_threads(self.threads)
        if self.host is None:
            device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
            self.host = self.host_config.open(device)
        x, rejected = unit_rows(self.host, documents, self.harvest)
        bits = torch.int32 if x.dtype == torch.float32 else torch.int16  # numpy has no bfloat16
        return x.view(bits).numpy(), rejected


def require_room_beside(cpus: float, gpus: float, feeders: Feeders, trainers: int) -> None:
    """Check that trainers of that size could run with their harvest workers at once.

    Raises:
        UserError: they could not, so that they would wait for each other for ever.
    """
    have = ray.cluster_resources()
    for name, one, each, fields in (
        ("CPU", cpus, feeders.cpus, "resources.workers, cpus_per_worker or train_cpus"),
        ("GPU", gpus, feeders.gpus, "resources.workers, harvest_gpus or train_gpus"),
    ):
        needed = trainers * (one + feeders.workers * each)
        if needed > have.get(name, 0.0):
            raise UserError(
                f"a stream needs {feeders.workers} harvest workers beside each trainer at once: {needed:g} "
                f"{name}s, but Ray has {have.get(name, 0.0):g}: lower {fields}"
            )


def fed_by(feeders: Feeders, stop: Callable[[], bool]) -> Stream:
    """The stream as those workers compute it. Reading it ends with `Stopped` once `stop` says so."""
    host, corpus, harvest = feeders.host, feeders.corpus, feeders.harvest
    return streamed(host, corpus, harvest, lambda units: _rows(feeders, units, stop))


def _rows(
    feeders: Feeders, units: Iterator[list[Document]], stop: Callable[[], bool]
) -> Iterator[UnitRows]:
    """Rows of the units in their order.

    Raises:
        WorkerDied: a worker process died.
        Stopped: `stop` said so.
        UserError: a unit alone has no room in the object store.
    """
    remote = ray.remote(num_cpus=feeders.cpus, num_gpus=feeders.gpus, max_restarts=0, max_task_retries=0)(
        StreamWorker
    )  # fmt: skip
    actors = [
        remote.remote(feeders.host, feeders.harvest, feeders.cpus) for _ in range(feeders.workers)
    ]
    ahead, number = feeders.workers, 0
    pending: deque[Any] = deque()
    try:
        while True:
            while len(pending) < ahead:
                pending.append(actors[number % len(actors)].rows.remote(next(units)))
                number += 1
            bits, rejected = _waited(pending.popleft(), stop)
            if len(bits):
                ahead = _fitting(bits.nbytes, feeders)
            found = UnitRows(_as_rows(bits, feeders.harvest), rejected)
            del bits  # gives its place in the object store back
            yield found
    finally:
        for actor in actors:
            ray.kill(actor)


def _waited(found: Any, stop: Callable[[], bool]) -> Any:
    while not ray.wait([found], timeout=_SLICE_SECONDS)[0]:
        if stop():
            raise Stopped("stopped while waiting for rows of the stream; a checkpoint is saved")
    return mapped(ray.get, found)


def _fitting(size: int, feeders: Feeders) -> int:
    """How many units of so many bytes may be on the way."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = _ROOM * min(node.get("object_store_memory", 0.0) for node in nodes)
    if size > room:
        raise UserError(
            f"stream: the rows of a unit take {size / 2**20:,.0f} MiB, and Ray's object store has room for "
            f"{room / 2**20:,.0f} MiB: lower harvest.unit_kb"
        )
    return min(_AHEAD * feeders.workers, int(room / size))


def _as_rows(bits: npt.NDArray[Any], harvest: HarvestConfig) -> Tensor:
    """The rows, in memory of their own."""
    return torch.tensor(bits).view(getattr(torch, harvest.dtype))
