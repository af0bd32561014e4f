"""What benchmarks share: the machine they ran on, CSV files with a row a run, and bars to reach."""

from __future__ import annotations

import csv
import datetime
import operator
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sae_ext.errors import UserError

Value = float | str | None
"""What was measured; None is not measured."""


def machine() -> dict[str, Value]:
    """Date, processor, cores and torch, the first columns of every file."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
    }


def append(path: Path, figures: Mapping[str, Value]) -> None:
    """Add a row to a CSV file, which is begun with the columns' names.

    Raises:
        UserError: the file has other columns.
    """
    new = not path.exists()
    if not new:
        with path.open(encoding="utf-8", newline="") as stream:
            if next(csv.reader(stream), []) != list(figures):
                raise UserError(f"{path} has other columns: move it away to begin another")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if new:
            writer.writerow(figures)
        writer.writerow("" if v is None else shown(v) for v in figures.values())


def shown(value: Value) -> str:
    """A figure as text, to four digits."""
    if value is None:
        return "not measured"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


_RELATIONS = {"<=": operator.le, ">=": operator.ge}


class Bar(NamedTuple):
    """What a figure must reach, and what was measured."""

    what: str
    measured: float | None
    relation: str
    target: float

    @property
    def missed(self) -> bool:
        """Whether it was measured and falls short."""
        if self.measured is None:
            return False
        return not _RELATIONS[self.relation](self.measured, self.target)

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.what} not measured ({self.relation} {self.target:g})"
        verdict = "MISSED" if self.missed else "ok"
        return f"{self.what} {shown(self.measured)} {self.relation} {self.target:g} {verdict}"


def missed_any(bars: Sequence[Bar], path: Path) -> bool:
    """Print a line for each bar and add it to a CSV file; whether one is missed."""
    for bar in bars:
        print(f"bar: {bar}", flush=True)
        figures = {"bar": bar.what, "measured": bar.measured, "target": bar.target}
        append(path, {**machine(), **figures, "missed": str(bar.missed)})
    return any(bar.missed for bar in bars)
