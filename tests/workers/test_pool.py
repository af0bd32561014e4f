"""Driving real actors on a real local Ray: results, faults, stopping, cleaning up."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator

import psutil
import pytest
from ray.cloudpickle import register_pickle_by_value

from sae_ext.errors import Stopped, UserError
from workers import pool
from workers.cluster import Cluster
from workers.events import Event, Log, Result, Update, streamed
from workers.pool import Job, WorkerDied

log = logging.getLogger("workers.test")


class Clerk:
    """A worker with something of everything."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def count(self, n: int) -> Iterator[Event]:
        yield from streamed(self._count(n))

    def _count(self, n: int) -> Generator[Update, None, tuple[str, int]]:
        log.info("%s, counting to %d", self.greeting, n)
        for i in range(1, n + 1):
            yield Update(i, n)
        return self.greeting, n

    def refuse(self) -> Iterator[Event]:
        yield from streamed(self._refuse())

    def _refuse(self) -> Generator[Update, None, None]:
        log.warning("about to refuse")
        yield from ()
        raise UserError("row 3 is bad")

    def die(self) -> Iterator[Event]:
        yield from streamed(self._die())

    def _die(self) -> Generator[Update, None, None]:
        yield Update(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    def wait(self) -> Iterator[Event]:
        yield from streamed(self._wait())

    def _wait(self) -> Generator[Update, None, None]:
        yield Update(os.getpid(), 1)
        time.sleep(600)


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


def run(
    jobs: list[Job], workers: int = 2, **options: object
) -> tuple[dict[int, object], list[Event]]:
    results: dict[int, object] = {}
    events: list[Event] = []
    pool.run(
        Clerk,
        ("hello",),
        jobs,
        workers=workers,
        cpus=1,
        on_event=lambda job, event: events.append(event),
        on_result=results.__setitem__,
        **options,
    )
    return results, events


def test_every_job_gives_its_result_and_its_updates_and_log_lines(ray_here):
    results, events = run([Job("count", (n,)) for n in (3, 1, 2)])
    assert results == {0: ("hello", 3), 1: ("hello", 1), 2: ("hello", 2)}
    assert sum(isinstance(e, Update) for e in events) == 6
    assert Log(logging.INFO, "hello, counting to 3") in events


def test_more_workers_than_fit_do_not_hang(ray_here):
    wanted = (os.cpu_count() or 1) + 2
    results, _ = run([Job("count", (1,)) for _ in range(2 * wanted)], workers=wanted)
    assert len(results) == 2 * wanted


def test_a_jobs_own_error_arrives_as_it_was_raised_after_its_log_lines(ray_here):
    events: list[Event] = []
    with pytest.raises(UserError, match=r"^row 3 is bad$"):
        pool.run(
            Clerk, ("hi",), [Job("refuse", ())], workers=1, cpus=1,
            on_event=lambda job, event: events.append(event),
        )  # fmt: skip
    assert events == [Log(logging.WARNING, "about to refuse")]


def test_a_killed_worker_is_told_and_the_next_call_works(ray_here):
    with pytest.raises(WorkerDied):
        run([Job("die", ())])
    assert run([Job("count", (1,))])[0] == {0: ("hello", 1)}


def test_the_stop_flag_ends_waiting_and_the_workers(ray_here):
    pids: list[int] = []

    def note(job: int, event: Event) -> None:
        assert isinstance(event, Update)
        pids.append(int(event.done))

    started = time.monotonic()
    with pytest.raises(Stopped):
        pool.run(
            Clerk, ("hi",), [Job("wait", ())], workers=1, cpus=1, on_event=note,
            stop=lambda: bool(pids),
        )  # fmt: skip
    assert time.monotonic() - started < 30
    psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 10)
    assert not any(psutil.pid_exists(p) for p in pids)


def test_a_worker_no_node_could_hold_is_refused_instead_of_waited_for(ray_here):
    with pytest.raises(UserError, match="a worker needs 999 CPUs"):
        pool.run(Clerk, ("hi",), [Job("count", (1,))], workers=1, cpus=999)


def test_no_jobs_need_no_workers():
    pool.run(Clerk, ("hi",), [], workers=2, cpus=1)


def test_streamed_ends_with_the_result_and_keeps_the_order_of_lines():
    def work() -> Generator[Update, None, str]:
        log.info("one")
        yield Update(1, 2)
        log.info("two")
        return "done"

    assert list(streamed(work())) == [
        Log(logging.INFO, "one"),
        Update(1, 2),
        Log(logging.INFO, "two"),
        Result("done"),
    ]
