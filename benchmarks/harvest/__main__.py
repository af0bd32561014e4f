"""The harvest and the store, measured: speed against the bare model, memory, reading, kills.

    python -m benchmarks.harvest                     everything, about 40 minutes on two idle cores
    python -m benchmarks.harvest --only reading      one section: speed, memory, reading, kills

Reads Python's documentation through all-MiniLM-L6-v2. Prints tables and a line per bar, adds the bars to
`benchmarks/results/harvest.csv`, and exits with 1 if one is missed. Needs the packages of the `dev` extra.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.bare_forward import BareForward
from benchmarks.harvest import kills, reading, speed
from benchmarks.records import Bar
from flows import recipe as recipes
from flows.recipe import Recipe
from sae_ext.activations.reader import Activations
from sae_ext.store import Store
from workers.cluster import Cluster

_CSV = Path(__file__).parents[1] / "results" / "harvest.csv"
_SECTIONS = ("speed", "memory", "reading", "kills")
_SPEED_DOCUMENTS, _MEMORY_DOCUMENTS, _KILL_DOCUMENTS = 2400, 1200, 500
_RECIPE = {"name": "harvest", "host": {"layer": 3, "max_tokens": 510}, "harvest": {"unit_kb": 16}}
_MB = 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=_SECTIONS, default=_SECTIONS)
    parser.add_argument("--repeats", type=int, default=3, help="of the measurements of speed")
    parser.add_argument("--moments", type=int, default=10, help="at which each kind is killed")
    chosen = parser.parse_args(arguments)
    missed = False

    def found(bars: Sequence[Bar]) -> None:  # at once, as a later section may fail
        nonlocal missed
        missed |= records.missed_any(bars, _CSV)

    with tempfile.TemporaryDirectory(prefix="harvest-") as folder:
        work = Path(folder)
        if {"speed", "memory", "reading"} & set(chosen.only):
            cluster = Cluster()
            cluster.wait()
            try:
                if "speed" in chosen.only:
                    found(_speed(chosen.repeats, work))
                if "memory" in chosen.only:
                    found(_memory(work))
                if "reading" in chosen.only:
                    found(_reading(work))
            finally:
                cluster.stop()
        if "kills" in chosen.only:
            found(_kills(chosen.moments, work))
    return int(missed)


def _recipe(documents: int, **host: int) -> Recipe:
    content = {**_RECIPE, "corpus": {"limit": documents}, "host": {**_RECIPE["host"], **host}}  # type: ignore[dict-item]
    return recipes.parse(content)


def _speed(repeats: int, work: Path) -> list[Bar]:
    recipe = _recipe(_SPEED_DOCUMENTS)
    bare, full = BareForward(recipe), BareForward(_recipe(_SPEED_DOCUMENTS, layer=6))
    bares = ("bare, 1 thread", "1 worker", "bare, 2 threads", "bare, 2 processes")
    columns = (*bares, "2 workers", "all 6 blocks, 1 thread")
    print(f"rows/s of {bare.rows:,} rows\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    one, two, early = [], [], []
    for repeat in range(repeats):
        line = [
            bare.rows_per_second(1),
            speed.harvested(recipe, 1, work / f"one-{repeat}").rows_per_second,
            bare.rows_per_second(2),
            speed.forwards_together(recipe, 2),
            speed.harvested(recipe, 2, work / f"two-{repeat}").rows_per_second,
            full.rows_per_second(1),
        ]
        print(f"| {' | '.join(f'{rate:,.0f}' for rate in line)} |", flush=True)
        one.append(line[1] / line[0])
        two.append(line[4] / max(line[2], line[3]))
        early.append(line[0] / line[5])
    median = statistics.median
    return [
        Bar("harvest ÷ bare forward, one worker", median(one), ">=", 0.90),
        Bar("harvest ÷ the faster bare forward on two cores, two workers", median(two), ">=", 0.85),
        Bar("forward up to layer 3 ÷ the full forward", median(early), ">=", 1.7),
    ]


def _memory(work: Path) -> list[Bar]:
    model = speed.loaded_memory(_recipe(_MEMORY_DOCUMENTS))
    once, double = (
        speed.harvested(_recipe(n * _MEMORY_DOCUMENTS), 1, work / f"memory-{n}").peak for n in (1, 2)
    )  # fmt: skip
    seen = f"worker {once / _MB:,.0f} MB, with twice the corpus {double / _MB:,.0f} MB"
    print(f"model {model / _MB:,.0f} MB, {seen}", flush=True)
    return [
        Bar("worker's peak RSS above the model's, MB", (max(once, double) - model) / _MB, "<=", 400.0),
        Bar("peak RSS with twice the corpus ÷ with once", double / once, "<=", 1.05),
    ]  # fmt: skip


def _reading(work: Path) -> list[Bar]:
    recipe = _recipe(2 * _SPEED_DOCUMENTS)
    speed.harvested(recipe, 2, work / "read")
    store = Store.open(str(work / "read"))
    (key,) = store.list("activations")
    data = Activations(store, key)
    print(f"{data.n_rows:,} rows in {len(data.shard_rows)} shards\nGB/s (stored bytes, page cache)")
    print("| threads | plain read | reader, stored order | reader, shuffled |\n|---|---|---|---|")
    for threads in (1, 2):
        rates = reading.rates(data, threads)
        print(
            f"| {threads} | {rates.plain:.2f} | {rates.in_order:.2f} | {rates.shuffled:.2f} |",
            flush=True,
        )
    overhead = reading.shuffle_overhead(data, lambda line: print(line, flush=True))
    return [
        Bar("reader in stored order, two threads, GB/s", rates.in_order, ">=", 1.5),
        Bar("what shuffling adds to a step of training", overhead, "<=", 0.15),
    ]


def _kills(moments: int, work: Path) -> list[Bar]:
    path = work / "kills.yaml"
    recipe = recipes.changed(_recipe(_KILL_DOCUMENTS), {"harvest.unit_kb": 4.0})
    path.write_text(recipes.to_yaml(recipe), encoding="utf-8")
    same = kills.survived(path, work, moments, lambda line: print(line, flush=True))
    return [
        Bar(f"same store after a kill of {kind}, of {moments}", float(count), ">=", float(moments))
        for kind, count in same.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
