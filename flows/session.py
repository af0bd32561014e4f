"""What the tasks of one run share: the store, Ray, the terminal, the stop flag.

A session is opened by the flow and found by its tasks (which run in the flow's process, in its
thread or in others) through `current`. Opening costs nothing: Ray starts when a task first has
something to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from flows.display import Bar, Display
from flows.recipe import Recipe, Resources
from sae_ext import corpora
from sae_ext.artefacts import Stage
from sae_ext.errors import Diverged
from sae_ext.store import Store
from workers import pool
from workers.cluster import Cluster, require_room
from workers.events import Event, Log, Update
from workers.pool import Job
from workers.stream import Feeders, require_room_beside
from workers.train import Meeting, Share, TrainWorker

_REPORT_SECONDS = 3.0

_current: Session | None = None
_lent: Cluster | None = None


class Session:
    """See the module."""

    def __init__(self, recipe: Recipe, cluster: Cluster, display: Display) -> None:
        self.recipe = recipe
        self.resources: Resources = recipe.resources
        self.store = Store.open(recipe.store, writable=True)
        self.cluster = cluster
        self.display = display
        self.stopping = threading.Event()

    def work(
        self,
        bar: Bar,
        worker: type,
        arguments: tuple[Any, ...],
        jobs: Iterable[pool.Job],
        *,
        sizes: list[float],
        workers: int,
        cpus: int,
        gpus: float = 0,
        on_result: Callable[[int, Any], None] = lambda job, value: None,
        pace: Callable[[], str] | None = None,
    ) -> None:
        """Run jobs on Ray (see `pool.run`), showing progress in the terminal and in Prefect.

        Args:
            sizes: how much of the bar each job is; a job's updates count within its share.
            pace: says in a few words how fast it goes; how much of the bar a second where absent.
        """
        if not sizes:
            return
        self.cluster.wait()
        report = _PrefectProgress(bar.name)
        done = [0.0] * len(sizes)
        total = sum(sizes)

        def on_event(index: int, event: Event) -> None:
            if isinstance(event, Log):
                report.logger.log(event.level, "%s", event.message)
                self.display.log(event.level, bar.name, event.message)
            elif isinstance(event, Update):
                done[index] = sizes[index] * event.done / max(event.total, 1e-9)
                show(event.note)

        def finished(index: int, value: Any) -> None:
            done[index] = sizes[index]
            on_result(index, value)
            if len(sizes) > 1:  # a job alone has said how it went itself
                show("")

        def show(note: str) -> None:
            seconds = max(time.perf_counter() - bar.started, 1e-9)
            speed = f"{sum(done) / seconds:,.0f}/s" if pace is None else pace()
            bar.update(sum(done), total, note or speed)
            report(sum(done) / max(total, 1e-9), note or speed)

        pool.run(
            worker,
            arguments,
            jobs,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            on_event=on_event,
            on_result=finished,
            stop=self.stopping.is_set,
        )

    def train(
        self, bar: Bar, wanted: list[Stage], *, cpus: int, workers: int = 1
    ) -> dict[str, Diverged]:
        """Train SAEs on the same activations; several workers share out the SAEs, or the batches of one.

        Returns:
            The SAEs that are not in the store now, by key, and why.
        """
        self.cluster.wait()
        r = self.resources
        parts: list[tuple[list[Stage], Share | None]]
        if len(wanted) == 1 < workers:
            require_room(cpus, r.train_gpus, workers)  # they wait for each other
            meeting = Meeting(workers)  # stays until they are done
            parts = [(wanted, share) for share in meeting.shares()]
        else:
            parts = [(wanted[i::workers], None) for i in range(min(workers, len(wanted)))]
        feeders = None
        if "stream" in wanted[0].config:
            feeders = self._feeders()
            require_room_beside(cpus, r.train_gpus, feeders)
        for stage in wanted:
            self.store.sweep(stage.kind, stage.key)
        diverged: dict[str, Diverged] = {}

        def on_result(part: int, found: list[Any]) -> None:
            for stage, result in zip(parts[part][0], found, strict=True):
                if isinstance(result, Diverged):
                    diverged[stage.key] = result

        board = None if r.tensorboard is None else str(Path(r.tensorboard).absolute())
        self.work(
            bar,
            TrainWorker,
            (self.store.url, cpus, r.train_readers, board, feeders),
            [Job("train", part) for part in parts],
            sizes=[float(sum(s.config["train"]["steps"] for s in stages)) for stages, _ in parts],
            workers=len(parts),
            cpus=cpus,
            gpus=r.train_gpus,
            on_result=on_result,
        )
        return diverged

    def _feeders(self) -> Feeders:
        """The harvest workers that a training on a stream has beside it."""
        recipe, r = self.recipe, self.resources
        assert recipe.stream is not None
        host, corpus = recipe.host.hooks()[0].portable(), corpora.portable(recipe.stream)
        return Feeders(host, corpus, recipe.harvest, r.workers, r.cpus_per_worker, r.harvest_gpus)


class _PrefectProgress:
    """The same progress for the Prefect UI: an artifact and a log line every few seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.logger = get_run_logger()
        self._last = time.perf_counter()
        self._artifact: Any = None

    def __call__(self, fraction: float, note: str) -> None:
        now = time.perf_counter()
        if now - self._last < _REPORT_SECONDS:
            return
        self._last = now
        percent = min(100.0, 100.0 * fraction)
        self.logger.info("%s: %.0f %% %s", self.name, percent, note)
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, description=self.name)
            else:
                update_progress_artifact(self._artifact, progress=percent)
        except httpx.HTTPError as error:  # a view of the work must never end the work
            self.logger.warning("progress is not shown: %s", error)


@contextmanager
def lend(cluster: Cluster) -> Iterator[None]:
    """Give the next flow of this process a Ray that the caller has begun to start and will stop."""
    global _lent
    _lent = cluster
    try:
        yield
    finally:
        _lent = None


@contextmanager
def opened(recipe: Recipe) -> Iterator[Session]:
    """Open the session of a run; on the way out, end the tasks' waiting and stop a Ray of our own."""
    global _current
    cluster = _lent or Cluster(recipe.resources.ray_address)
    with Display() as display:
        _current = Session(recipe, cluster, display)
        try:
            yield _current
        finally:
            _current.stopping.set()
            _current = None
            if cluster is not _lent:
                cluster.stop()


def current() -> Session:
    """The session of the run this task belongs to."""
    if _current is None:
        raise RuntimeError("tasks run inside a flow that opened a session")
    return _current
