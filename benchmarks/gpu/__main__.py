"""Our training step on a GPU: against compiled dense PyTorch, and against the device's own ceilings.

    python -m benchmarks.gpu [--minutes M] [--out DIR] [--trial]

First looks whether ours computes what it should; then measures the ceilings, the table, and the sweeps
that constants of `sae_ext.step_cuda` come from, most important things first and as many as fit into the
time. Prints what it has: tables, one line per bar, and what went wrong. The figures go to files in DIR,
those of the table also to `benchmarks/results/gpu.csv`. Exits with 1 if a bar is missed or anything went
wrong. `--trial` goes through all of it on the CPU with tiny sizes, where figures mean nothing and none is
kept in `benchmarks/results`. The whole check of a machine is `benchmarks/gpu_check.sh`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import records
from benchmarks.gpu import ceilings, check, rows, sweeps
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.contenders import COMPILED, COMPILED_CAPTURED, OWN
from benchmarks.gpu.rows import BUILDERS, HEADINGS, Row
from benchmarks.gpu.sizes import FULL, PRECISIONS, TRIAL, Sizes, made_up
from benchmarks.gpu.sweeps import Choice, Density
from benchmarks.records import Bar
from benchmarks.step.problem import Shape, Start
from sae_ext import native
from sae_ext.step_cuda import Precision

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.csv"


class Item(NamedTuple):
    """A part of the plan."""

    name: str
    seconds: float
    """About how long it takes on an H200; it is left out where less is left."""
    do: Callable[[], None]


@dataclass
class Bench:
    """What to measure on, and what has been found so far."""

    device: torch.device
    sizes: Sizes
    out: Path
    results: Path | None
    """Where rows of the table are kept beside `out`."""
    machine: dict[str, records.Value]
    ceilings: Ceilings = field(default_factory=Ceilings)
    rows: list[Row] = field(default_factory=list)
    densities: list[Density] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    curve: list[Bar] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def plan(self) -> list[Item]:
        """Everything, the most important first."""
        s, device = self.sizes, self.device
        first, *others = s.l0s
        plan = [
            Item("one step against the reference", 10, lambda: check.steps(device, self.failures)),
            Item("200 steps against the reference", 15, self._curve),
            Item("ceilings", 20, self._ceilings),
        ]
        names = tuple(BUILDERS)

        def table(precision: Precision, l0: int, names: tuple[str, ...]) -> Iterator[Item]:
            for shape in s.faster:
                # Products in float32 are what takes long; a graph is compiled once.
                work = shape.d_in * shape.d_sae * shape.rows / 2e12
                seconds = (
                    3 + (8 if l0 == first else 0) + (30 if precision == "float32" else 4) * work
                )
                yield Item(
                    f"{shape}, L0 {l0}, {precision}", seconds,
                    partial(self._row, shape, precision, l0, names),
                )  # fmt: skip

        for precision in ("bfloat16", "float32", "tf32"):
            plan += table(precision, first, names)
            density = partial(self._density, precision)
            plan.append(Item(f"densities, {s.density_shape}, {precision}", 15, density))
            if precision == "bfloat16":
                plan += [
                    Item(f"constants, {shape}", 8, partial(self._choices, shape))
                    for shape in s.constant_shapes
                ]
                plan.append(Item("profiles", 12, self._profiles))
        for precision in PRECISIONS:
            for l0 in others:
                plan += table(precision, l0, (*OWN, COMPILED, COMPILED_CAPTURED))
        return plan

    def run(self, deadline: float) -> None:
        """Do what fits; a failure is noted, and ends the rest only if the device is lost."""
        plan = self.plan()
        print("plan:", "; ".join(f"{item.name} ({item.seconds:.0f} s)" for item in plan))
        for item in plan:
            began = time.monotonic()
            if began + item.seconds > deadline:
                self.left_out.append(item.name)
                continue
            try:
                item.do()
            except Exception as failure:  # noqa: BLE001  the table comes whatever happens
                self.failures.append(f"{item.name}: {rows.one_line(failure)}")
                if rows.is_fatal(failure):
                    self.failures.append("the device answers nothing more: the rest is left out")
                    return
            print(f"done: {item.name}, {time.monotonic() - began:.1f} s", flush=True)

    def _start(self, shape: Shape) -> Start:
        return made_up(shape, self.device)

    def _curve(self) -> None:
        self.curve = check.curve(self.device, self.sizes.curve, self.out / "curve.csv")

    def _ceilings(self) -> None:
        found, sizes = self.ceilings, self.sizes
        ceilings.measure_copy(self.device, sizes, found)
        ceilings.measure_gathers(self.device, sizes, found)
        for shape in sizes.faster:
            for precision in PRECISIONS:
                ceilings.measure_product(self.device, shape, precision, found)
        print(*found.lines(), sep="\n")

    def _row(self, shape: Shape, precision: Precision, l0: int, names: tuple[str, ...]) -> None:
        row = rows.measure(
            self._start(shape), precision, l0, names, self.ceilings, self.failures
        )  # fmt: skip
        self.rows.append(row)
        print(HEADINGS, rows.line(row), sep="\n")
        for line in rows.csv_lines(row, self.machine):
            for file in filter(None, (self.out / "gpu.csv", self.results)):
                records.append(file, line)

    def _density(self, precision: Precision) -> None:
        start = self._start(self.sizes.density_shape)
        found = sweeps.density(start, precision, self.sizes.densities, self.failures)
        self.densities.append(found)
        for point in found.points:
            line = {**self.machine, "precision": precision, **point._asdict()}
            records.append(self.out / "densities.csv", line)

    def _choices(self, shape: Shape) -> None:
        self.choices += sweeps.choices(self._start(shape), self.sizes.l0s[0], self.failures)

    def _profiles(self) -> None:
        file = self.out / "profile.txt"
        file.unlink(missing_ok=True)
        for shape in self.sizes.faster:
            sweeps.profile(self._start(shape), "bfloat16", self.sizes.l0s[0], file)

    def bars(self) -> list[Bar]:
        """Of everything that was measured."""
        found = [
            bar
            for row in self.rows
            if row.asked == self.sizes.l0s[0]
            for bar in rows.bars(row, self.sizes.faster[row.shape])
        ]
        return [*found, *(sweep.bar() for sweep in self.densities), *self.curve]

    def report(self) -> None:
        """Everything at once, in few lines."""
        print(f"\n{', '.join(f'{value}' for value in self.machine.values())}")
        print(*self.ceilings.lines(), sep="\n")
        for sweep in self.densities:
            print(*sweep.lines(), sep="\n")
        print(*self.choices, sep="\n")
        print(
            "ms; graph: as one CUDA graph; MB: beside weights, moments and batches",
            HEADINGS,
            sep="\n",
        )
        print(*map(rows.line, self.rows), sep="\n")
        if self.left_out:
            print(f"no time for: {'; '.join(self.left_out)}")
        for failure in self.failures[:12]:
            print(f"wrong: {failure}")
        if len(self.failures) > 12:
            print(f"wrong: and {len(self.failures) - 12} more")
        for bar in self.bars():
            print(f"bar: {bar}")


def machine(device: torch.device) -> dict[str, records.Value]:
    """Date, device, driver and torch, the first columns of every file."""
    common = records.machine()
    if device.type != "cuda":
        return {"date": common["date"], "gpu": "trial", "driver": None, "torch": common["torch"]}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split()
    except OSError:
        said = []
    return {
        "date": common["date"],
        "gpu": torch.cuda.get_device_name(device),
        "driver": said[0] if said else None,
        "torch": common["torch"],
    }


def main() -> int:
    """Measure and print; the exit code."""
    began = time.monotonic()
    options = _options()
    device = torch.device("cpu") if options.trial else torch.device("cuda", 0)
    if not options.trial:
        missing = native.cuda_missing() or (
            None if torch.cuda.is_available() else "no CUDA in torch"
        )
        if missing is not None:
            print(f"error: {missing}", file=sys.stderr)
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        device,
        TRIAL if options.trial else FULL,
        options.out,
        None if options.trial else RESULTS,
        machine(device),
    )
    bench.run(began + 60 * options.minutes)
    bench.report()
    if options.trial:
        print("a trial: the figures mean nothing")
        return 1 if bench.failures else 0
    return 1 if bench.failures or any(bar.missed for bar in bench.bars()) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="what does not fit is left out")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu_check", help="folder for the figures"
    )
    parser.add_argument(
        "--trial", action="store_true", help="a trial run on the CPU: tiny sizes, no figures"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
