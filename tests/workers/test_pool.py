"""Driving real actors on a real local Ray: results, faults, stopping, cleaning up."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from ray.cloudpickle import register_pickle_by_value

from sae_ext.errors import Stopped, UserError
from workers import pool
from workers.cluster import Cluster, require_room
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


class Saver:
    """A worker that saves what it is doing when it is asked to stop, and takes a while for it."""

    def __init__(self, folder: str, deaf: bool) -> None:
        self.folder, self.deaf = Path(folder), deaf
        self.stopping = threading.Event()

    def stop(self) -> None:
        if not self.deaf:
            self.stopping.set()

    def work(self, name: str) -> Iterator[Event]:
        yield from streamed(self._work(name))

    def _work(self, name: str) -> Generator[Update, None, str]:
        for i in itertools.count():
            # What was said and is never taken must not keep a worker from ending either.
            yield Update(i, 1, str(os.getpid()))
            if self.stopping.wait(0.02):
                log.info("saving")
                time.sleep(0.5)
                (self.folder / name).write_text(str(i))
                raise Stopped("saved")
        return "never"

    def refuse(self, name: str) -> Iterator[Event]:
        yield from streamed(self._refuse(name))

    def _refuse(self, name: str) -> Generator[Update, None, None]:
        while not (self.folder / f"{name} works").exists():
            yield Update(0, 1, str(os.getpid()))
            time.sleep(0.02)
        raise UserError("row 3 is bad")


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


class Driver:
    """Jobs of a `Saver` and what was seen of its workers."""

    def __init__(self, folder: Path, names: Sequence[str], *, deaf: bool = False) -> None:
        self.folder, self.names, self.deaf = folder, names, deaf
        self.pids: dict[int, int] = {}
        self.ended = 0.0

    def work(self, stop: Callable[[], bool] = lambda: False) -> None:
        def note(job: int, event: Event) -> None:
            if isinstance(event, Update):
                self.pids[job] = int(event.note)

        try:
            pool.run(
                Saver, (str(self.folder), self.deaf), [Job("work", (n,)) for n in self.names],
                workers=len(self.names), cpus=1, on_event=note, stop=stop,
            )  # fmt: skip
        finally:
            self.ended = time.monotonic()

    def all_work(self) -> bool:
        return len(self.pids) == len(self.names)

    def saved(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def all_gone(self) -> bool:
        alive = [psutil.Process(p) for p in self.pids.values() if psutil.pid_exists(p)]
        return not psutil.wait_procs(alive, 10)[1]


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["one worker", "two workers"])
def test_workers_that_can_save_have_done_so_when_the_stop_flag_has_ended_the_call(
    ray_here, tmp_path, names
):
    driver = Driver(tmp_path, names)
    with pytest.raises(Stopped, match=r"^$"):
        driver.work(stop=driver.all_work)
    assert driver.saved() == set(names)
    assert driver.all_gone()


def interrupt_once(condition: Callable[[], bool]) -> float:
    """Ctrl-C as soon as something holds; the moment it was pressed."""
    while not condition():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
    return time.monotonic()


def test_workers_that_can_save_have_done_so_after_ctrl_c(ray_here, tmp_path):
    driver = Driver(tmp_path, ["one", "two"])
    with ThreadPoolExecutor() as threads:
        threads.submit(interrupt_once, driver.all_work)
        with pytest.raises(KeyboardInterrupt):
            driver.work()
    assert driver.saved() == {"one", "two"}
    assert driver.all_gone()


def test_workers_that_can_save_have_done_so_when_another_job_fails(ray_here, tmp_path):
    def note(job: int, event: Event) -> None:
        if job == 0:
            (tmp_path / "one works").touch()

    jobs = [Job("work", ("one",)), Job("refuse", ("one",))]
    with pytest.raises(UserError, match="row 3 is bad"):
        pool.run(Saver, (str(tmp_path), False), jobs, workers=2, cpus=1, on_event=note)
    assert (tmp_path / "one").exists()


@pytest.mark.parametrize("how", ["stop flag", "ctrl-c"])
def test_a_worker_that_does_not_hear_is_killed_after_a_while(ray_here, tmp_path, monkeypatch, how):
    monkeypatch.setattr(pool, "SAVING_SECONDS", 1.5)
    driver = Driver(tmp_path, ["one"], deaf=True)
    asked: list[float] = []

    def stop() -> bool:
        if driver.all_work():
            asked.append(time.monotonic())
        return bool(asked)

    if how == "ctrl-c":
        with ThreadPoolExecutor() as threads:
            pressed = threads.submit(interrupt_once, driver.all_work)
            with pytest.raises(KeyboardInterrupt):
                driver.work()
            asked.append(pressed.result())
    else:
        with pytest.raises(Stopped):
            driver.work(stop)
    assert 1.5 <= driver.ended - asked[0] < 8
    assert driver.all_gone()
    assert driver.saved() == set()


def test_a_second_ctrl_c_does_not_wait_for_workers_that_save(ray_here, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "SAVING_SECONDS", 60.0)
    driver = Driver(tmp_path, ["one"], deaf=True)

    def twice() -> float:
        interrupt_once(driver.all_work)
        time.sleep(1)
        return interrupt_once(lambda: True)

    with ThreadPoolExecutor() as threads:
        pressed = threads.submit(twice)
        with pytest.raises(KeyboardInterrupt):
            driver.work()
    assert driver.ended - pressed.result() < 10
    assert driver.all_gone()


def test_a_worker_no_node_could_hold_is_refused_instead_of_waited_for(ray_here):
    with pytest.raises(UserError, match="a worker needs 999 CPUs"):
        pool.run(Clerk, ("hi",), [Job("count", (1,))], workers=1, cpus=999)
    with pytest.raises(UserError, match=r"a worker needs 99 GPUs.* lower resources\.train_gpus"):
        pool.run(Clerk, ("hi",), [Job("count", (1,))], workers=1, cpus=1, gpus=99)


@pytest.mark.parametrize(
    ("nodes", "size", "fit"),
    [
        ([{"CPU": 4.0}], {"cpus": 2}, 2),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"cpus": 2}, 2),
        ([{"CPU": 8.0, "GPU": 1.0}], {"cpus": 1, "gpus": 0.1}, 8),
        ([{"CPU": 20.0, "GPU": 1.0}], {"cpus": 1, "gpus": 0.1}, 10),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], {"cpus": 1, "gpus": 1}, 2),
        ([{"CPU": 8.0}, {"CPU": 1.0, "GPU": 2.0}], {"cpus": 2, "gpus": 1}, 0),
    ],
)
def test_workers_that_could_never_run_at_once_are_refused(monkeypatch, nodes, size, fit):
    monkeypatch.setattr(
        "ray.nodes",
        lambda: [
            *({"Alive": True, "Resources": node} for node in nodes),
            {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}},
        ],
    )
    if fit:
        require_room(**size, together=fit)
    with pytest.raises(UserError, match=rf"^{fit + 1} workers of .* room for {fit}: lower"):
        require_room(**size, together=fit + 1)


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
