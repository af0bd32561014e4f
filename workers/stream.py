"""Rows for a training as it goes: harvest workers whose rows go to the trainer through Ray's object store.

The trainer's process owns the workers, so they end with it. Units come back in the order of the documents,
whoever computed them. They cross in pieces, of which each worker has two on the way at most.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy.typing as npt
import ray
import torch
from torch import Tensor

from sae_ext.activations.dataset import Stream
from sae_ext.activations.streaming import UnitRows, of_stream, streamed, unit_rows
from sae_ext.config import CorpusConfig, HarvestConfig
from sae_ext.corpora import Document
from sae_ext.errors import Stopped, UserError
from sae_ext.hosts import Host, HostConfig
from workers.pool import mapped

log = logging.getLogger("workers.stream")

_SLICE_SECONDS = 0.25
_AHEAD = 2  # units a worker has: one that it computes, and one that waits
_PIECE_BYTES = (
    16 * 2**20
)  # of rows that cross at once; of them a worker has two in the object store at most
_START_SECONDS = 60.0


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

    def rows(self, documents: list[Document]) -> Iterator[tuple[npt.NDArray[Any], dict[str, int]]]:
        """The bits of a unit's rows, [n, d_in] in pieces, and with the last of them why documents gave none."""
        torch.set_num_threads(self.threads)
        if self.host is None:
            device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
            self.host = self.host_config.open(device)
        x, rejected = unit_rows(self.host, documents, self.harvest)
        bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).numpy()
        each = max(1, _PIECE_BYTES // max(1, bits[:1].nbytes))
        for start in range(0, max(1, len(bits)), each):
            last = start + each >= len(bits)
            yield bits[start : start + each], rejected if last else {}


def require_room_beside(cpus: float, gpus: float, feeders: Feeders) -> None:
    """Check that a trainer of that size could run with its harvest workers at once.

    Raises:
        UserError: they could not, so that they would wait for each other for ever.
    """
    have = ray.cluster_resources()
    for name, one, each, fields in (
        ("CPU", cpus, feeders.cpus, "resources.workers, cpus_per_worker or train_cpus"),
        ("GPU", gpus, feeders.gpus, "resources.workers, harvest_gpus or train_gpus"),
    ):
        needed = one + feeders.workers * each
        if needed > have.get(name, 0.0):
            raise UserError(
                f"a stream needs {feeders.workers} harvest workers beside the trainer at once: {needed:g} "
                f"{name}s, but Ray has {have.get(name, 0.0):g}: lower {fields}"
            )


def fed_by(feeders: Feeders, fingerprint: str, stop: Callable[[], bool]) -> Stream:
    """The stream as those workers compute it. Reading it ends with `Stopped` once `stop` says so.

    Raises:
        UserError: the documents are not here, or are others than those with that fingerprint.
    """
    host, corpus, harvest = feeders.host, feeders.corpus, feeders.harvest
    try:
        found = host.documents_fingerprint(corpus)
    except UserError as error:
        raise of_stream(error) from error
    if found != fingerprint:
        raise UserError(
            f"stream: {corpus.source} on the machine that trains holds other documents than where the run was "
            "started: keep it where every machine reads the same"
        )
    return streamed(host, corpus, harvest, lambda units: _rows(feeders, units, stop), stop)


def _rows(
    feeders: Feeders, units: Iterator[list[Document]], stop: Callable[[], bool]
) -> Generator[UnitRows, None, None]:
    """Rows of the units in their order.

    Raises:
        WorkerDied: a worker process died.
        Stopped: `stop` said so.
        UserError: no worker could be started.
    """
    following = next(units)  # nothing is started before there is something to do
    remote = ray.remote(num_cpus=feeders.cpus, num_gpus=feeders.gpus, max_restarts=0, max_task_retries=0)(
        StreamWorker
    )  # fmt: skip
    actors = [
        remote.remote(feeders.host, feeders.harvest, feeders.cpus) for _ in range(feeders.workers)
    ]
    pending: deque[Any] = deque()
    try:
        ready = _started(actors, stop)
        log.info("%d harvest workers feed the training", len(ready))
        for actor in itertools.cycle(ready):
            call = actor.rows.options(
                num_returns="streaming", _generator_backpressure_num_objects=2
            )
            pending.append(call.remote(following))
            if len(pending) == _AHEAD * len(ready):
                yield _joined(pending.popleft(), feeders.harvest, stop)
            following = next(units)
    finally:
        for actor in actors:
            ray.kill(actor)


def _started(actors: list[Any], stop: Callable[[], bool]) -> list[Any]:
    """Those that run: of several nodes none may have room for the last of them."""
    refs = {actor.__ray_ready__.remote(): actor for actor in actors}
    end = time.monotonic() + _START_SECONDS
    ready: list[Any] = []
    while len(ready) < len(refs) and time.monotonic() < end:
        _check(stop)
        ready, _ = ray.wait([*refs], num_returns=len(refs), timeout=_SLICE_SECONDS)
    for each in ready:
        mapped(ray.get, each)
    if not ready:
        raise UserError(
            f"stream: no harvest worker could be started in {_START_SECONDS:g} s: lower resources.workers or "
            "cpus_per_worker, so that Ray has room for one beside the trainer"
        )
    return [refs[each] for each in ready]


def _joined(pieces: Any, harvest: HarvestConfig, stop: Callable[[], bool]) -> UnitRows:
    """A unit's rows, in memory of their own: each piece gives its place in the object store back."""
    found: list[Tensor] = []
    rejected: dict[str, int] = {}
    while True:
        while not ray.wait([pieces], timeout=_SLICE_SECONDS, fetch_local=False)[0]:
            _check(stop)
        try:
            bits, rejected = mapped(lambda: ray.get(next(pieces)))
        except StopIteration:
            return UnitRows(torch.cat(found), rejected)
        found.append(torch.tensor(bits).view(getattr(torch, harvest.dtype)))
        del bits


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped("stopped while waiting for rows of the stream")
