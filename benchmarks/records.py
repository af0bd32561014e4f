"""What every benchmark's CSV file shares: the machine it ran on, and rows added one run at a time."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

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
