"""What a person sees in the terminal while a campaign runs: one bar per stage, and log lines above.

Without a terminal (a file, CI, a Prefect worker) the bars become a line now and then.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

_LINE_SECONDS = 10.0


class Bar:
    """One stage's line. `update` may be called from any thread."""

    def __init__(self, display: Display, name: str) -> None:
        self.display = display
        self.name = name
        self.started = time.perf_counter()
        self._said = self.started
        self._task = display.progress.add_task(name, total=None, note="")

    def update(self, done: float, total: float, note: str = "") -> None:
        """Show `done` of `total` and a few words."""
        self.display.progress.update(self._task, completed=done, total=total, note=note)
        now = time.perf_counter()
        if not self.display.live and now - self._said > _LINE_SECONDS:
            self._said = now
            self.display.say(f"{self.name:<10} {done:,.0f}/{total:,.0f} {note}")

    def finish(self, note: str) -> None:
        """Replace the bar by a finished line."""
        self.display.progress.remove_task(self._task)
        seconds = time.perf_counter() - self.started
        self.display.say(f"[green]✓[/] [bold]{self.name:<10}[/] {note} [dim]{seconds:.1f} s[/]")

    def abandon(self) -> None:
        """Take the bar away: the stage did not finish."""
        self.display.progress.remove_task(self._task)


class Display:
    """The terminal of one run; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def bar(self, name: str) -> Bar:
        """A new line for a stage."""
        return Bar(self, name)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line)

    def log(self, level: int, source: str, message: str) -> None:
        """Print a log line of a worker."""
        style = "yellow" if level >= logging.WARNING else "dim"
        self.console.print(f"[{style}]{source}: {_escape(message)}[/]")


def _escape(text: Any) -> str:
    return str(text).replace("[", r"\[")


def figure(value: float | None) -> str:
    """A number for a person; what was not computed is never shown as one."""
    return "not computed" if value is None else f"{value:.3f}"
