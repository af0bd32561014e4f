"""Driving a pool of actors over a list of jobs: submission, waiting, stopping, cleaning up.

One retry owner: Ray's own retries are off, a dead worker ends the call with `WorkerDied`, and
whoever called decides (finished jobs are in the store, so a second call only does the rest).
Waiting is always in slices with a look at the stop flag, so Ctrl-C ends in a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayTaskError

from sae_ext.errors import Stopped
from workers.cluster import require_cpus
from workers.events import Event, Log, Result, Update

log = logging.getLogger("workers")

_SLICE_SECONDS = 0.25


class WorkerDied(Exception):
    """A worker process ended in the middle of a job (killed, out of memory, node lost)."""


class Job(NamedTuple):
    """One call: a method of the worker and its arguments."""

    method: str
    args: tuple[Any, ...]


OnEvent = Callable[[int, Event], None]
"""Called in the driver with the job's index and what its worker sent (`Update` or `Log`)."""


def run(
    worker: type,
    arguments: tuple[Any, ...],
    jobs: Sequence[Job],
    *,
    workers: int,
    cpus: float,
    on_event: OnEvent = lambda job, event: None,
    on_result: Callable[[int, Any], None] = lambda job, value: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """Run the jobs on up to `workers` actors of `cpus` CPUs each, made from `worker(*arguments)`.

    Returns:
        The jobs' results, in the order of the jobs.

    Raises:
        WorkerDied: a worker process died.
        Stopped: `stop` said so.
        Exception: whatever a job raised, as it was raised there.
    """
    if not jobs:
        return []
    require_cpus(cpus)
    remote = ray.remote(num_cpus=cpus, max_restarts=0, max_task_retries=0)(worker)
    idle = [remote.remote(*arguments) for _ in range(min(workers, len(jobs)))]
    actors = list(idle)
    results: list[Any] = [None] * len(jobs)
    waiting = list(range(len(jobs)))[::-1]
    running: dict[Any, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                index, actor = waiting.pop(), idle.pop(0)
                job = jobs[index]
                call = getattr(actor, job.method).options(num_returns="streaming")
                running[call.remote(*job.args)] = (index, actor)
            ready, _ = ray.wait(
                list(running), num_returns=1, timeout=_SLICE_SECONDS, fetch_local=False
            )
            if stop():
                raise Stopped
            for stream in ready:
                index, actor = running[stream]
                event = _next_event(stream)
                if event is None:
                    del running[stream]
                    idle.append(actor)
                elif isinstance(event, Result):
                    results[index] = event.value
                    on_result(index, event.value)
                else:
                    on_event(index, event)
    finally:
        for actor in actors:
            ray.kill(actor)
    return results


def _next_event(stream: Any) -> Event | None:
    """The next thing a job sent; None at its end."""
    try:
        event: Event = ray.get(next(stream))
    except StopIteration:
        return None
    except RayTaskError as error:
        if error.cause is not None:
            raise error.cause from None
        raise
    except RayActorError as error:
        raise WorkerDied(str(error).splitlines()[0]) from error
    return event


__all__ = ["Job", "Log", "Update", "WorkerDied", "run"]
