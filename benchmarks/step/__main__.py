"""One training step, ours against dense PyTorch and the peer libraries, at set densities.

    python -m benchmarks.step [--shape D_INxD_SAExB ...] [--l0 L0 ...] [--rounds N]

Every contender starts from the same weights and batches, is checked against the reference, and is
then timed in turn with the others. Peers run in an environment of their own, made by `make peers`;
without it their bars are not measured. The whole grid takes about an hour and wants an otherwise
idle machine. Prints tables and one line per bar, adds rows to `benchmarks/results/step.csv`, draws
`docs/images/step_*.png`, and exits with 1 if a bar is missed, with 2 if a contender computes something
else or ours cannot be measured. Needs the packages of the `dev` extra.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.records import Bar
from benchmarks.step import parity, plots
from benchmarks.step.measure import (
    DENSE,
    PEERS,
    PRODUCT,
    SAELENS,
    SETTINGS,
    TOPK,
    TRAFFIC,
    Bench,
    Times,
)
from benchmarks.step.problem import Shape, Start, made_up
from benchmarks.step.process import ROOT, ContenderFailed, Entrant
from sae_ext import ops
from sae_ext.errors import UserError

RESULTS = ROOT / "benchmarks" / "results" / "step.csv"
IMAGES = ROOT / "docs" / "images"

SHAPES = (
    Shape(512, 2048, 4096),
    Shape(768, 6144, 2048),
    Shape(768, 16384, 2048),
    Shape(2048, 16384, 1024),
)
AT_INIT = "init"  # b_enc = 0: half of the features are active
L0S = ("16", "64", "256", AT_INIT)
ROUNDS = 15

OURS, OURS_FREE = "ours", "ours free"
BAR_L0 = "64"
MEMORY_SHAPE = SCALING_SHAPE = Shape(768, 16384, 2048)
SCALING_L0S = (16, 32, 64, 128, 192, 256, 384, 512)
DENSITY_SHAPE = Shape(768, 6144, 2048)
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class Targets(NamedTuple):
    """Bars of one shape at L0 64 on two cores: how many times faster, and the floor ratio."""

    dense: float
    saelens: float | None
    peers: float | None
    floor: float


TARGETS = dict(
    zip(
        SHAPES,
        (
            Targets(2.9, 4.0, 3.2, 2.0),
            Targets(3.3, 4.3, 2.4, 1.5),
            Targets(4.0, 5.0, 2.8, 1.4),
            Targets(3.0, None, None, 1.5),
        ),
        strict=True,
    )
)
DENSE_MEMORY_SHARE = 0.05
LINEAR_R2 = 0.99
DENSITY_RATIO = 1.05


class Row(NamedTuple):
    """All contenders at one shape and L0."""

    shape: Shape
    asked: str
    times: Mapping[str, Times]
    memory_mb: Mapping[str, float]

    @property
    def l0(self) -> float:
        """Measured active features per row."""
        nnz = self.times[OURS].nnz
        assert nnz is not None
        return nnz / self.shape.rows

    @property
    def floor_ms(self) -> float:
        """One encoder product and one pass over weights and moments."""
        return self.times[PRODUCT].median_ms + self.times[TRAFFIC].median_ms

    def best(self, names: Sequence[str]) -> str | None:
        """The fastest of these contenders; None if none was measured."""
        there = [name for name in names if name in self.times]
        return min(there, key=lambda name: self.times[name].median_ms, default=None)

    def over_ours(self, name: str) -> float:
        """How many times longer than ours a contender takes."""
        return self.times[name].median_ms / self.times[OURS].median_ms


class Sweep(NamedTuple):
    """Our step at several L0s, between the dense steps."""

    shape: Shape
    l0: list[float]
    ms: list[float]
    dense_ms: float
    product_ms: float


def main() -> int:
    """Measure, print, record; the exit code."""
    options = _options()
    torch.set_num_threads(options.threads)
    console = Console()
    try:
        with Bench(options.threads) as bench, tempfile.TemporaryDirectory() as folder:
            rows, sweeps = [], {}
            for shape in options.shape:
                start, file = made_up(shape), Path(folder) / "start.safetensors"
                start.save(file)
                for asked in options.l0:
                    rows.append(measure(bench, start, file, asked, options.rounds))
                    console.print(table(rows[-1]))
                    for line in csv_lines(rows[-1], options.threads):
                        records.append(RESULTS, line)
                if not options.sweeps:
                    continue
                if shape == SCALING_SHAPE:
                    sweeps["scaling"] = sweep(bench, shape, file, SCALING_L0S, options.rounds)
                if shape == DENSITY_SHAPE:
                    l0s = [share * shape.d_sae for share in DENSITIES]
                    sweeps["density"] = sweep(bench, shape, file, l0s, options.rounds)
        where = f"float32, {options.threads} threads, {records.machine()['cpu']}, {ops.implementation()}"
        bars = [bar for row in rows for bar in bars_of(row)]
        if "scaling" in sweeps:
            bars.append(scaling_bar(sweeps["scaling"], where))
        if "density" in sweeps:
            bars.append(density_bar(sweeps["density"], where))
    except (UserError, ContenderFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in bench.notes:
        print(f"note: {note}")
    for row in rows:
        if row.shape == MEMORY_SHAPE and row.asked == BAR_L0:
            print(f"aim: {_product_aim(row)}")
    for bar in bars:
        print(f"bar: {bar}")
    return 1 if any(bar.missed for bar in bars) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shape", type=_shape, nargs="+", default=SHAPES, metavar="D_INxD_SAExB",
        help="sizes to measure",
    )  # fmt: skip
    parser.add_argument(
        "--l0", nargs="+", default=L0S, help="active features per row; init is half of them all"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps per contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--sweeps", action=argparse.BooleanOptionalAction, default=True,
        help="also time ours over many densities, at the shapes where the bars ask for it",
    )  # fmt: skip
    return parser.parse_args()


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split("x")))


# -- measuring -----------------------------------------------------------------------------------


def measure(bench: Bench, start: Start, file: Path, asked: str, rounds: int) -> Row:
    """Check and time every contender at one L0.

    Raises:
        UserError: a contender does not compute what it should.
        ContenderFailed: our own step, or the floor, could not be measured.
    """
    shape = start.shape
    l0 = shape.d_sae / 2 if asked == AT_INIT else float(asked)
    kinds = [OURS, *DENSE, PRODUCT, TRAFFIC, *PEERS]
    if asked == BAR_L0:
        kinds.insert(1, OURS_FREE)
    # Its backward pass writes out a [B, k, d_in] tensor, which near d_sae / 2 no machine has room for.
    needed = 4 * shape.rows * l0 * shape.d_in
    if needed > psutil.virtual_memory().available / 4:
        kinds.remove(TOPK)
        bench.note(f"{TOPK} is left out at {shape}, L0 {asked}: it needs {needed / 1e9:.0f} GB")
    entrants = [Entrant(kind, kind, l0) for kind in kinds]
    check(bench, start, file, entrants)
    times = bench.time(bench.prepare(file, entrants, SETTINGS), rounds)
    _insist({OURS, PRODUCT, TRAFFIC}, times)
    memory = {}
    if shape == MEMORY_SHAPE and asked == BAR_L0:
        bench.prepare(file, [], SETTINGS)  # gives their memory back first
        found = {e.name: bench.memory_mb(file, e) for e in entrants if e.name in times}
        memory = {name: mb for name, mb in found.items() if mb is not None}
    return Row(shape, asked, times, memory)


def check(bench: Bench, start: Start, file: Path, entrants: Sequence[Entrant]) -> None:
    """One step of every contender against the reference in float64; raises `UserError`."""
    oracle = parity.Oracle(start, entrants[0].l0)
    weights = file.with_name("weights.safetensors")
    for name in bench.prepare(file, entrants, parity.SETTINGS):
        if name in (PRODUCT, TRAFFIC):
            continue
        try:
            loss = bench.step(name, 0).loss
        except ContenderFailed:
            continue  # and again when it is to be timed, where that is noted
        if name == TOPK:
            oracle.check_topk(name, loss)
        elif name in PEERS:
            oracle.check_peer(name, loss)
        else:
            bench.save(name, weights)
            oracle.check_step(name, loss, weights, free=name == OURS_FREE)


def sweep(bench: Bench, shape: Shape, file: Path, l0s: Sequence[float], rounds: int) -> Sweep:
    """Time ours at each L0, and the dense steps, all in turn."""
    own = [Entrant(f"{OURS} at L0 {l0:g}", OURS, l0) for l0 in l0s]
    others = [Entrant(kind, kind, l0s[0]) for kind in (*DENSE, PRODUCT)]
    times = bench.time(bench.prepare(file, [*own, *others], SETTINGS), rounds)
    _insist({entrant.name for entrant in own}, times)
    ours = [times[entrant.name] for entrant in own]
    return Sweep(
        shape,
        l0=[(t.nnz or 0) / shape.rows for t in ours],
        ms=[t.median_ms for t in ours],
        dense_ms=min(times[kind].median_ms for kind in DENSE if kind in times),
        product_ms=times[PRODUCT].median_ms,
    )


def _insist(names: set[str], times: Mapping[str, Times]) -> None:
    if missing := names - set(times):
        raise ContenderFailed(f"not measured: {', '.join(sorted(missing))}; see the notes above")


# -- telling -------------------------------------------------------------------------------------


def table(row: Row) -> Table:
    """One shape and L0 for the terminal; MB is the peak memory of a step, where that was measured."""
    shown = Table(title=f"{row.shape}, L0 {row.l0:.1f}", title_justify="left")
    shown.add_column("contender", no_wrap=True)
    for column in ("median ms", "min ms", "steps", "÷ ours", "÷ floor", "MB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name in [*row.times, *(peer for peer in PEERS if peer not in row.times)]:
        if (t := row.times.get(name)) is None:
            shown.add_row(name, *("—",) * 6)
            continue
        memory = row.memory_mb.get(name)
        shown.add_row(
            name, f"{t.median_ms:.1f}", f"{t.min_ms:.1f}", str(t.rounds), f"{row.over_ours(name):.2f}",
            f"{t.median_ms / row.floor_ms:.2f}", "" if memory is None else f"{memory:.1f}",
        )  # fmt: skip
    return shown


def csv_lines(row: Row, threads: int) -> list[dict[str, records.Value]]:
    """One line per contender."""
    return [
        {
            **records.machine(),
            "threads": str(threads),
            "implementation": ops.implementation(),
            **{name: str(size) for name, size in row.shape._asdict().items()},
            "l0_asked": row.asked,
            "l0": row.l0,
            "contender": name,
            "steps": str(t.rounds),
            "median_ms": t.median_ms,
            "min_ms": t.min_ms,
            "over_ours": row.over_ours(name),
            "over_floor": t.median_ms / row.floor_ms,
            "peak_mb": row.memory_mb.get(name),
        }
        for name, t in row.times.items()
    ]


def bars_of(row: Row) -> list[Bar]:
    """The bars of one shape; there are some at L0 64 and at the beginning of a training."""
    here = f"at {row.shape}, L0 {row.asked}"
    dense = row.best(DENSE)
    if row.asked == AT_INIT:
        slower = 1 / row.over_ours(dense) if dense else None
        return [Bar(f"step over best dense ({dense}) {here}", slower, "<=", DENSITY_RATIO)]
    targets = TARGETS.get(row.shape)
    if targets is None or row.asked != BAR_L0:
        return []

    def faster(than: str, name: str | None, target: float) -> Bar:
        return Bar(
            f"times faster than {than} {here}", row.over_ours(name) if name else None, ">=", target
        )

    bars = [faster(f"best dense PyTorch ({dense})", dense, targets.dense)]
    if targets.saelens is not None:
        bars.append(faster(SAELENS, row.best([SAELENS]), targets.saelens))
    if targets.peers is not None:
        # Every peer, so all must have been measured.
        fastest = row.best(PEERS) if set(PEERS) <= set(row.times) else None
        bars.append(faster("every peer", fastest, targets.peers))
    ratio = row.times[OURS].median_ms / row.floor_ms
    bars.append(Bar(f"step over floor {here}", ratio, "<=", targets.floor))
    if row.shape == MEMORY_SHAPE:
        ours, theirs = row.memory_mb.get(OURS), row.memory_mb.get(dense or "")
        share = ours / theirs if ours is not None and theirs else None
        what = f"peak memory of a step over the best dense step's ({dense}) {here}"
        bars.append(Bar(what, share, "<=", DENSE_MEMORY_SHARE))
    return bars


def _product_aim(row: Row) -> str:
    ratio = row.times[OURS].median_ms / row.times[PRODUCT].median_ms
    reached = "reached" if ratio < 1 else "not reached"
    return f"whole step over one float32 encoder product at {row.shape} {ratio:.3g} < 1 {reached}"


def scaling_bar(seen: Sweep, where: str) -> Bar:
    """Draw and print the step's time against L0; the bar on how straight it is."""
    line = plots.fit(seen.l0, seen.ms)
    print(f"time against L0 at {seen.shape}: {line.intercept:.1f} ms + {line.slope:.4f} ms L0")
    print(f"best dense {seen.dense_ms:.1f} ms, encoder product alone {seen.product_ms:.1f} ms")
    plots.scaling(
        IMAGES / "step_scaling.png", f"{seen.shape}, {where}", seen.l0, seen.ms, line,
        seen.dense_ms, seen.product_ms,
    )  # fmt: skip
    return Bar(
        f"R² of a straight line through time against L0 at {seen.shape}", line.r2, ">=", LINEAR_R2
    )


def density_bar(seen: Sweep, where: str) -> Bar:
    """Draw and print ours over best dense at each density; the bar on the worst."""
    for l0, ms in zip(seen.l0, seen.ms, strict=True):
        density = 100 * l0 / seen.shape.d_sae
        print(f"density {density:5.1f} %: {ms:7.1f} ms, {ms / seen.dense_ms:.2f} of best dense")
    shares = [l0 / seen.shape.d_sae for l0 in seen.l0]
    plots.density(
        IMAGES / "step_density.png", f"{seen.shape}, {where}", shares, seen.ms, seen.dense_ms
    )
    worst = max(seen.ms) / seen.dense_ms
    return Bar(f"step over best dense at any density at {seen.shape}", worst, "<=", DENSITY_RATIO)


if __name__ == "__main__":
    sys.exit(main())
