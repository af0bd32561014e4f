"""Running a command while watching what it says and how much memory each of its processes takes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_SAMPLE_SECONDS = 0.2
_LAST_WORDS_SECONDS = 5.0


class Watched(NamedTuple):
    """One finished command."""

    code: int
    """Exit code."""
    seconds: float
    """From its start to its end."""
    lines: list[tuple[float, str]]
    """What it printed, each line with the seconds since the start at which it came."""
    peaks: dict[str, int]
    """Highest resident memory, in bytes, of any one process of that name."""


def watch(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Watched:
    """Run a command in `folder` to its end, passing its lines on to this terminal as they come."""
    began = time.perf_counter()
    lines: list[tuple[float, str]] = []
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )

    def listen() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append((time.perf_counter() - began, line.rstrip()))
            sys.stderr.write(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        peaks = _sample_until_the_end(child)
        seconds = time.perf_counter() - began
    finally:
        child.terminate()  # only one that is still running hears it
        child.wait()
    # Not for ever: a process left behind may hold the pipe open.
    listener.join(_LAST_WORDS_SECONDS)
    return Watched(child.returncode, seconds, lines, peaks)


def _sample_until_the_end(child: subprocess.Popen[str]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    family = {child.pid}
    while True:
        family = _sample(family, peaks)
        try:
            child.wait(_SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return peaks


def _sample(family: set[int], peaks: dict[str, int]) -> set[int]:
    """Raise `peaks` to what is in use now; returns the living members of the family.

    A process once seen stays a member when its parent ends and it is handed to another.
    """
    alive: set[int] = set()
    for process in psutil.process_iter():  # by ascending number: parents before their children
        with contextlib.suppress(psutil.Error), process.oneshot():
            if process.pid in family or process.ppid() in alive:
                alive.add(process.pid)
                if memory := process.memory_info().rss:  # none is left in one that is just ending
                    name = _name(process)
                    peaks[name] = max(peaks.get(name, 0), memory)
    return alive


def _name(process: psutil.Process) -> str:
    """A name people know: Ray writes one over the command line, Prefect is a Python module."""
    words = process.cmdline()
    if words and words[0].startswith("ray::"):
        return words[0].partition(".")[0]  # without the method it happens to run
    return "prefect server" if "prefect" in words else process.name()
