"""What a worker sends back while it works: progress, log lines, and at last the result.

A worker's method is a generator, which Ray streams: every value it yields reaches the driver at
once, without a second channel. `streamed` turns the library's own generators (which yield progress
and return a result) into such a stream and adds the log lines written meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

LOGGERS = ("sae_ext", "workers")
"""Loggers whose lines are sent to the driver."""


class Log(NamedTuple):
    """A line a worker logged."""

    level: int
    message: str


class Update(NamedTuple):
    """How far a job is: `done` of `total` in its own units, and a few words for people."""

    done: float
    total: float
    note: str = ""


class Result(NamedTuple):
    """The last thing a job sends."""

    value: Any


Event = Log | Update | Result


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Log] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(Log(record.levelno, record.getMessage()))

    def take(self) -> list[Log]:
        lines, self.lines = self.lines, []
        return lines


def streamed(work: Generator[Update, None, T]) -> Iterator[Event]:
    """Run `work` in this worker, sending its updates, the log lines in between, and its result."""
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(collector)
    # No `yield from` below: Ray sends values into generators, which a list's iterator cannot take.
    try:
        while True:
            last: Result | Update
            try:
                last = next(work)
            except StopIteration as stop:
                last = Result(stop.value)
            except Exception:
                for line in collector.take():
                    yield line
                raise
            for line in collector.take():
                yield line
            yield last
            if isinstance(last, Result):
                return
    finally:
        for logger in loggers:
            logger.removeHandler(collector)
