"""Driving a pool of actors over a list of jobs: submission, waiting, stopping, cleaning up.

One retry owner: Ray's own retries are off, a dead worker ends the call with `WorkerDied`, and
whoever called decides (finished jobs are in the store, so a second call only does the rest).
Waiting is always in slices with a look at the stop flag, so Ctrl-C ends in a second or, where a worker
has a `stop` method, as soon as it has saved what it is doing.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from sae_ext.errors import Stopped
from workers.cluster import require_room
from workers.events import Event, Result

_SLICE_SECONDS = 0.25
SAVING_SECONDS = 20.0
"""What workers have at most to save their state before they are killed."""


class WorkerDied(Exception):
    """A worker process ended in the middle of a job (killed, out of memory, node lost)."""


TRANSIENT = (WorkerDied, RayError, ConnectionError)
"""Faults after which the same work may go well."""


class Job(NamedTuple):
    """One call: a method of the worker and its arguments."""

    method: str
    args: tuple[Any, ...]


OnEvent = Callable[[int, Event], None]
"""Called in the driver with the job's index and what its worker sent (`Update` or `Log`)."""


def run(
    worker: type,
    arguments: tuple[Any, ...],
    jobs: Iterable[Job],
    *,
    workers: int,
    cpus: float,
    gpus: float = 0,
    on_event: OnEvent = lambda job, event: None,
    on_result: Callable[[int, Any], None] = lambda job, value: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run the jobs on up to `workers` actors of `cpus` CPUs and `gpus` GPUs each, made from `worker(*arguments)`.

    Args:
        jobs: taken one by one as workers become free, so that what is still to be done need not be held.
        on_event: called with the job's index and each `Update` or `Log` its worker sends.
        on_result: called with the job's index and its result, in order of completion.

    Raises:
        WorkerDied: a worker process died.
        Stopped: `stop` said so.
        Exception: whatever a job raised, as it was raised there.
    """
    each = enumerate(jobs)
    first = next(each, None)
    if first is None:
        return
    coming = itertools.chain([first], each)
    require_room(cpus, gpus)
    saves = hasattr(worker, "stop")
    remote = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=2 if saves else 1,  # `stop` is heard beside the work
    )(worker)
    actors = [
        remote.remote(*arguments) for _ in range(min(workers, operator.length_hint(jobs, workers)))
    ]
    # Only an actor that exists gets work: where fewer fit than were asked for, the rest never start.
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}
    idle: list[Any] = []
    running: dict[Any, tuple[int, Any]] = {}
    more = True
    try:
        while more or running:
            while more and idle:
                following = next(coming, None)
                more = following is not None
                if following is None:
                    break
                (index, job), actor = following, idle.pop(0)
                call = getattr(actor, job.method).options(num_returns="streaming")
                running[call.remote(*job.args)] = (index, actor)
            if not (more or running):
                break
            watched = [*running, *starting]
            ready, _ = ray.wait(watched, num_returns=1, timeout=_SLICE_SECONDS, fetch_local=False)
            if (
                ready
            ):  # and whatever else is, or one that sends much would be all that is ever heard
                ready, _ = ray.wait(watched, num_returns=len(watched), timeout=0, fetch_local=False)
            if stop():
                raise Stopped
            for each in ready:
                if each in starting:
                    mapped(ray.get, each)
                    idle.append(starting.pop(each))
                    continue
                index, actor = running[each]
                event = _next_event(each)
                if event is None:
                    del running[each]
                    idle.append(actor)
                elif isinstance(event, Result):
                    on_result(index, event.value)
                else:
                    on_event(index, event)
    finally:
        try:
            if saves and running:
                _let_save(running)
        finally:
            for actor in actors:
                ray.kill(actor)


def _let_save(running: dict[Any, tuple[int, Any]]) -> None:
    """Ask workers to stop, and wait a little until they have; what they still send is not wanted."""
    for _, actor in running.values():
        actor.stop.remote()
    left = list(running)
    end = time.monotonic() + SAVING_SECONDS
    while left and time.monotonic() < end:
        ready, _ = ray.wait(left, num_returns=1, timeout=_SLICE_SECONDS, fetch_local=False)
        for stream in ready:
            try:
                ended = _next_event(stream) is None
            except Exception:  # noqa: BLE001 - it has ended, and why is no longer of interest
                ended = True
            if ended:
                left.remove(stream)


def _next_event(stream: Any) -> Event | None:
    """The next thing a job sent; None at its end."""
    try:
        event: Event = mapped(lambda: ray.get(next(stream)))
    except StopIteration:
        return None
    return event


def mapped(get: Callable[..., Any], *arguments: Any) -> Any:
    """Ray's errors as what they mean here: the job's own exception, or a dead worker."""
    try:
        return get(*arguments)
    except RayTaskError as error:
        if error.cause is not None:
            raise error.cause from None
        raise
    except RayActorError as error:
        raise WorkerDied(str(error).splitlines()[0]) from error
