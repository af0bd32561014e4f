"""Ours over many densities, and under other values of its constants; and where a step's time goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.contenders import (
    COMPILED,
    COMPILED_CAPTURED,
    OWN,
    WAYS,
    Ours,
    constants,
)
from benchmarks.gpu.rows import measure
from benchmarks.gpu.timing import products, synchronize
from benchmarks.records import Bar
from benchmarks.step.problem import BATCHES, Shape, Start
from sae_ext import step_cuda
from sae_ext.step_cuda import Precision

SLOWER = 1.05
CONSTANTS = {
    "_PRE_BYTES": tuple(n << 20 for n in (6, 12, 25, 50, 100)),
    "_SHARED_BYTES": tuple(n << 10 for n in (0, 24, 48, 96, 160)),
}


class Point(NamedTuple):
    """Both of our ways and the best dense step at one density, in ms; None where one failed."""

    density: float
    entries: float | None
    dense: float | None
    best_dense: float | None


class Density(NamedTuple):
    """A sweep over densities."""

    shape: Shape
    precision: Precision
    points: list[Point]

    def crossover(self) -> float | None:
        """Density from which on listing entries takes longer than our dense way; between points, on a
        logarithmic scale. None where they do not cross.
        """
        both = [(p.density, p.entries / p.dense) for p in self.points if p.entries and p.dense]
        for (low, before), (high, after) in pairwise(both):
            if before < 1 <= after:
                share = -math.log(before) / (math.log(after) - math.log(before))
                return low * math.exp(share * math.log(high / low))
        return None

    def bar(self) -> Bar:
        """The way that the constants choose, against the best dense step, where it is worst."""
        below = step_cuda._SPARSE_BELOW[self.precision]
        ratios = [
            ours / p.best_dense
            for p in self.points
            if (ours := p.entries if p.density < below else p.dense) and p.best_dense
        ]
        what = f"step over best dense at any density at {self.shape}, {self.precision}"
        return Bar(what, max(ratios, default=None), "<=", SLOWER)

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        crossover = self.crossover()
        below, above = (limits[self.precision] for limits in _limits())
        yield (
            f"density, {self.shape}, {self.precision}: entries and dense cross at "
            f"{'no density tried' if crossover is None else f'{100 * crossover:.2g} %'} "
            f"(constants {100 * below:g} and {100 * above:g} %); % entries/dense/best dense, ms:"
        )
        yield " " + "  ".join(
            f"{100 * p.density:.3g} " + "/".join("—" if t is None else f"{t:.3g}" for t in p[1:])
            for p in self.points
        )


def _limits() -> tuple[dict[str, float], dict[str, float]]:
    return step_cuda._SPARSE_BELOW, step_cuda._DENSE_ABOVE


def density(
    start: Start, precision: Precision, densities: Iterable[float], failures: list[str]
) -> Density:
    """Time ours both ways, and compiled dense, at each density."""
    points = []
    for share in densities:
        l0 = round(share * start.shape.d_sae)
        found = {}
        for way, values in WAYS.items():
            with constants(**values):
                found[way] = measure(start, precision, l0, OWN, Ceilings(), failures)
        others = (COMPILED, COMPILED_CAPTURED)
        row = measure(start, precision, l0, others, Ceilings(), failures)
        seen = found["entries"].l0 / start.shape.d_sae
        entries, dense = (found[way].best(OWN) for way in ("entries", "dense"))
        points.append(Point(seen, entries, dense, row.best(others)))
    return Density(start.shape, precision, points)


class Choice(NamedTuple):
    """A step's ms under each value of a constant."""

    constant: str
    shape: Shape
    ms: dict[int, float | None]

    def __str__(self) -> str:
        shown = (
            f"{value >> 10} KB {'—' if ms is None else f'{ms:.3f}'}"
            for value, ms in self.ms.items()
        )
        return f"{self.constant}, {self.shape}, bfloat16, ms: {', '.join(shown)}"


def choices(start: Start, l0: int, failures: list[str]) -> list[Choice]:
    """Time ours in bfloat16 by entries, each constant in turn at each of its values."""
    found = []
    for constant, values in CONSTANTS.items():
        ms = {}
        for value in values:
            with constants(**WAYS["entries"], **{constant: value}):
                row = measure(start, "bfloat16", l0, OWN, Ceilings(), failures)
            ms[value] = row.best(OWN)
        found.append(Choice(constant, start.shape, ms))
    return found


def profile(start: Start, precision: Precision, l0: int, file: Path) -> None:
    """Append the time of each kernel of ours over a few steps to a file."""
    device = start.x.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step = Ours(start, l0, precision)
    with products(precision):
        for i in range(step.warm_ups):
            step(start.x[i % BATCHES])
        synchronize(device)
        with torch.profiler.profile(activities=activities) as seen:
            for i in range(5):
                step(start.x[i % BATCHES])
            synchronize(device)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=90)
    with file.open("a", encoding="utf-8") as stream:
        print(f"five steps, {start.shape}, L0 {l0}, {precision}\n{table}\n", file=stream)
