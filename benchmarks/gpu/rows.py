"""One row of the table: all contenders at one shape, precision and L0."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks import records
from benchmarks.gpu import contenders, peers
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.contenders import (
    COMPILED,
    COMPILED_CAPTURED,
    DENSE,
    EAGER,
    OURS,
    OURS_CAPTURED,
    OWN,
    Ours,
)
from benchmarks.gpu.sizes import weights
from benchmarks.gpu.timing import Times, allocated, forget_peak, peak, products, time_calls
from benchmarks.records import Bar
from benchmarks.step.measure import SETTINGS
from benchmarks.step.problem import BATCHES, Shape, Start
from sae_ext import reference
from sae_ext.parameters import Objective
from sae_ext.step_cuda import Precision

BUILDERS = {**contenders.BUILDERS, **peers.BUILDERS}
CAPTURED_BELOW_MS = 20.0  # longer steps hide their launches anyway

LOSS_ERROR = {"bfloat16": 1e-2, "tf32": 1e-3, "float32": 1e-4}
"""Relative, of the first loss. Ours and dense ones start at the same weights and are to agree."""

FLOOR, FLOAT32_FASTER, MEMORY = 1.4, 3.0, 0.05


class Row(NamedTuple):
    """What was measured of each contender."""

    shape: Shape
    precision: Precision
    asked: int
    l0: float
    times: dict[str, Times]
    peak_mb: dict[str, float]
    """The most memory during the timed steps, beyond weights, moments and batches."""
    floor_ms: float | None

    def best(self, names: Sequence[str]) -> float | None:
        """The least median of these, in ms."""
        return min((self.times[n].median_ms for n in names if n in self.times), default=None)

    def faster(self) -> float | None:
        """How many times longer the compiled dense step takes than ours; graphs allowed to both."""
        ours, dense = self.best(OWN), self.best((COMPILED, COMPILED_CAPTURED))
        return dense / ours if ours is not None and dense is not None else None

    def over_floor(self) -> float | None:
        """Ours over the floor."""
        ours = self.best(OWN)
        return ours / self.floor_ms if ours is not None and self.floor_ms is not None else None

    def memory_share(self) -> float | None:
        """What ours needs for a step beside the 16-bit weights it keeps, over what compiled dense does."""
        ours, dense = self.peak_mb.get(OURS), self.peak_mb.get(COMPILED)
        if ours is None or not dense:
            return None
        kept = 4 * self.shape.d_in * self.shape.d_sae / 1e6 if self.precision == "bfloat16" else 0.0
        return (ours - kept) / dense


class Seen(NamedTuple):
    """One contender's."""

    error: float
    """Of its first loss, relative."""
    times: Times
    peak_mb: float | None
    nnz: int | None
    """Active entries of its last step; only ours counts them."""


def measure(
    start: Start,
    precision: Precision,
    asked: int,
    names: Sequence[str],
    ceilings: Ceilings,
    failures: list[str],
) -> Row:
    """Time these contenders one after the other; what goes wrong is added to `failures`."""
    shape = start.shape
    times: dict[str, Times] = {}
    peak_mb: dict[str, float] = {}
    l0, expected = float(asked), _first_loss(start, asked)
    for name in names:
        if name in (OURS_CAPTURED, COMPILED_CAPTURED):
            plain = times.get(OURS if name == OURS_CAPTURED else COMPILED)
            slow = plain is not None and plain.median_ms > CAPTURED_BELOW_MS
            if slow or not start.x.is_cuda:
                continue
        where = f"{name} at {shape}, L0 {asked}, {precision}"
        try:
            with products(precision):
                seen = _time(start, precision, asked, name, expected)
        except Exception as failure:
            failures.append(f"{where}: {one_line(failure)}")
            if is_fatal(failure):
                raise
            continue
        finally:
            gc.collect()  # one contender's memory goes back before the next is made
        if name in (*OWN, *DENSE) and not seen.error <= LOSS_ERROR[precision]:
            failures.append(f"{where}: the first loss is off by {seen.error:.2g}")
        times[name] = seen.times
        if seen.peak_mb is not None:
            peak_mb[name] = seen.peak_mb
        if seen.nnz is not None:
            l0 = seen.nnz / shape.rows
    floor = ceilings.floor_ms(shape, precision, l0 * shape.rows)
    return Row(shape, precision, asked, l0, times, peak_mb, floor)


def _time(start: Start, precision: Precision, l0: float, name: str, expected: float) -> Seen:
    device = start.x.device
    contender = BUILDERS[name](start, l0, precision)

    def step(i: int) -> None:
        contender(start.x[i % BATCHES])

    before = allocated(device)
    step(0)
    error = abs(contender.loss() / expected - 1)
    for i in range(contender.warm_ups):
        step(i)
    forget_peak(device)  # what graphs and compilation took is no part of a step
    times = time_calls(device, step)
    # The memory of a graph is not among live tensors.
    counted = device.type == "cuda" and name not in (OURS_CAPTURED, COMPILED_CAPTURED)
    return Seen(
        error,
        times,
        (peak(device) - before) / 1e6 if counted else None,
        contender.nnz() if isinstance(contender, Ours) else None,
    )


def _first_loss(start: Start, l0: float) -> float:
    params, _ = weights(start, l0)
    with torch.no_grad(), products("float32"):
        objective = Objective(l1=SETTINGS.l1, clip=SETTINGS.clip)
        return reference.loss(start.x[0], params, objective).item()


def one_line(failure: Exception) -> str:
    """An exception in a line."""
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:160]}"


def is_fatal(failure: Exception) -> bool:
    """Whether the device answers nothing more: an error of a kernel stays with its process."""
    text = str(failure)
    return "CUDA error" in text and "out of memory" not in text


HEADINGS = (
    f"{'d_in':>5}{'d_sae':>7}{'B':>6} {'precision':9}{'L0':>6}{'ours':>8}{'graph':>8}{'eager':>8}"
    f"{'compiled':>9}{'graph':>8}{'faster':>7}{'floor':>8}{'÷floor':>7}{'MB':>7}{'dense':>7}"
)


def line(row: Row) -> str:
    """A row for the terminal: ms, then MB of ours and of compiled dense."""

    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'—' if value is None else f'{value:.{digits}f}':>{width}}"

    ms = {name: t.median_ms for name, t in row.times.items()}
    return (
        f"{row.shape.d_in:5}{row.shape.d_sae:7}{row.shape.rows:6} {row.precision:9}{row.l0:6.1f}"
        + cell(ms.get(OURS), 8, 3)
        + cell(ms.get(OURS_CAPTURED), 8, 3)
        + cell(ms.get(EAGER), 8, 3)
        + cell(ms.get(COMPILED), 9, 3)
        + cell(ms.get(COMPILED_CAPTURED), 8, 3)
        + cell(row.faster(), 7, 2)
        + cell(row.floor_ms, 8, 3)
        + cell(row.over_floor(), 7, 2)
        + cell(row.peak_mb.get(OURS), 7, 0)
        + cell(row.peak_mb.get(COMPILED), 7, 0)
        + "".join(f"  {name} {ms[name]:.3f}" for name in peers.BUILDERS if name in ms)
    )


def csv_lines(row: Row, machine: dict[str, records.Value]) -> list[dict[str, records.Value]]:
    """One line per contender."""
    ours = row.best(OWN)
    return [
        {
            **machine,
            **{name: str(size) for name, size in row.shape._asdict().items()},
            "precision": row.precision,
            "l0_asked": str(row.asked),
            "l0": row.l0,
            "contender": name,
            "steps": str(t.steps),
            "median_ms": t.median_ms,
            "min_ms": t.min_ms,
            "over_ours": t.median_ms / ours if ours is not None else None,
            "over_floor": t.median_ms / row.floor_ms if row.floor_ms is not None else None,
            "peak_mb": row.peak_mb.get(name),
        }
        for name, t in row.times.items()
    ]


def bars(row: Row, faster: float) -> list[Bar]:
    """Those of a shape; `faster` is its own in bfloat16."""
    here = f"at {row.shape}, L0 {row.asked}, {row.precision}"
    if row.precision == "float32":
        return [Bar(f"times faster than compiled dense {here}", row.faster(), ">=", FLOAT32_FASTER)]
    if row.precision != "bfloat16":
        return []
    return [
        Bar(f"times faster than compiled dense {here}", row.faster(), ">=", faster),
        Bar(f"step over floor {here}", row.over_floor(), "<=", FLOOR),
        Bar(f"memory of a step over compiled dense's {here}", row.memory_share(), "<=", MEMORY),
    ]
