"""Harvest workers on Ray against the bare forward of the same model, and how much memory a worker takes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from flows.recipe import Recipe, to_yaml
from sae_ext.activations.harvest import parts
from sae_ext.artefacts import activations
from sae_ext.store import Store
from workers import pool
from workers.events import Event, Update
from workers.harvest import HarvestWorker
from workers.pool import Job

_ROOT = Path(__file__).parents[2]


class Harvested(NamedTuple):
    """One harvest into an empty store, committed."""

    rows: int
    rows_per_second: float
    """Of the units that are made once every worker holds the model, until the manifest is there."""
    peak: int
    """Resident memory of the largest worker, in bytes, at its highest."""


def harvested(recipe: Recipe, workers: int, folder: Path) -> Harvested:
    """Harvest with so many workers of one thread; Ray must be up."""
    store = Store.open(str(folder), writable=True)
    (stage,) = activations.stages(recipe.corpus, recipe.host, recipe.harvest)
    plan = list(parts(recipe.host.documents(recipe.corpus), recipe.harvest))
    loaded: list[float] = []
    peaks: list[int] = []
    counted: list[int] = []

    def on_event(_job: int, event: Event) -> None:
        if isinstance(event, Update):
            loaded.append(time.perf_counter())
            counted.clear()

    def on_result(_job: int, value: tuple[int, float, str]) -> None:
        peaks.append(_peak(int(value[2].rpartition("-")[2])))
        counted.append(value[0])

    pool.run(
        HarvestWorker,
        (store.url, recipe.corpus, recipe.host.portable(), recipe.harvest, 1),
        [Job("make", ([stage.key], unit, documents)) for unit, documents in plan],
        workers=workers, cpus=1, on_event=on_event, on_result=on_result,
    )  # fmt: skip
    rows = activations.commit(store, stage, len(plan), {}).extra["n_rows"]
    return Harvested(rows, sum(counted) / (time.perf_counter() - loaded[-1]), max(peaks))


def loaded_memory(recipe: Recipe) -> int:
    """Resident memory of a process that has imported what a worker has and holds the model, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(to_yaml(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.harvest.speed", str(path)]
        told = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return int(told.stdout.split()[-1])


def forwards_together(recipe: Recipe, count: int) -> float:
    """Rows per second of so many processes that do nothing but the bare forward, of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(to_yaml(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.harvest.speed", str(path), "forward"]
        children = [
            subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]  # fmt: skip
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()  # it holds the model
        rates = []
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children:
            said, _ = child.communicate()
            rates.append(float(said.split()[-1]))
    return sum(rates)


def _peak(pid: int) -> int:
    """The highest resident memory of a process until now, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _child(path: Path, what: str) -> None:
    from benchmarks.bare_forward import BareForward
    from flows import recipe as recipes

    torch.set_num_threads(1)
    recipe = recipes.load(path)
    if what == "forward":
        bare = BareForward(recipe)
        print("ready", flush=True)
        sys.stdin.readline()
        print(bare.rows_per_second(1))
        return
    host: Any = recipe.host.open()
    for weight in host.model.parameters():  # they are mapped, and take memory once they are read
        weight.sum()
    print(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "memory")
