"""The harvest: units of a corpus to Ray workers that hold the host, and the manifest once all are made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from prefect import flow, task
from prefect.runtime import task_run

from flows import session, stages
from flows.policy import STAGE
from flows.recipe import Recipe
from sae_ext.activations.harvest import parts
from sae_ext.artefacts import activations
from workers.harvest import HarvestWorker
from workers.pool import Job


def _named() -> str:
    recipe: Recipe = task_run.parameters["recipe"]
    return f"harvest {recipe.host.summary()}"


@task(name="harvest", task_run_name=_named, **STAGE)
def harvest(recipe: Recipe) -> str:
    """Read the host's activations over the corpus into shards, at every place that is read in one pass."""
    wanted = stages.harvested(recipe)
    run = session.current()
    missing = [stage for stage in wanted if not stage.done(run.store)]
    if not missing:
        run.display.say(f"[green]✓[/] [bold]harvest   [/] found {wanted[0].key}")
        return wanted[0].key
    for stage in missing:
        run.store.sweep(stage.kind, stage.key)
    bar = run.display.bar("harvest")
    try:
        stages.preflight(recipe)
        plan = stages.planned_harvest(recipe, wanted[0].key)
        made = {s.key: activations.made(run.store, s.key) for s in missing}
        todo = [unit for unit in plan if any(unit.number not in m for m in made.values())]
        pace = _Pace(sum(unit.size for unit in todo))

        def jobs() -> Iterator[Job]:
            wanting = {unit.number for unit in todo}
            for unit, documents in parts(recipe.host.documents(recipe.corpus), recipe.harvest):
                if unit.number in wanting:
                    keys = [
                        s.key if s.key in made and unit.number not in made[s.key] else None
                        for s in wanted
                    ]
                    yield Job("make", (keys, unit, documents))

        resources = recipe.resources
        run.work(
            bar,
            HarvestWorker,
            (
                run.store.url,
                recipe.corpus,
                recipe.host.portable(),
                recipe.harvest,
                resources.cpus_per_worker,
            ),
            jobs(),
            sizes=[float(unit.size) for unit in todo],
            workers=min(resources.workers, max(1, len(todo))),
            cpus=resources.cpus_per_worker,
            gpus=resources.harvest_gpus,
            on_result=lambda index, value: pace.add(todo[index].size, *value),
            pace=pace,
        )
        for stage in missing:
            manifest = activations.commit(
                run.store, stage, len(plan), {"computing": pace.computing}
            )
            run.display.say(f"  {activations.told(manifest)} → {stage.key}")
    except BaseException:
        bar.abandon()
        raise
    bar.finish(f"{recipe.host.summary()} → {wanted[0].key}")
    return wanted[0].key


@flow(name="harvest", flow_run_name="{recipe.name} harvest", log_prints=False)
def harvest_alone(recipe: Recipe) -> list[str]:
    """Read the activations and nothing more.

    Returns:
        The key of each place that is read, the recipe's own first.
    """
    with session.opened(recipe):
        harvest(recipe)
    return [stage.key for stage in stages.harvested(recipe)]


class _Pace:
    """How fast a harvest goes: rows a second, of each worker too, and the time that is left."""

    def __init__(self, size: int) -> None:
        self.left, self.done = size, 0
        self.computing = 0.0
        self._began = time.perf_counter()
        self._rows: Counter[str] = Counter()

    def add(self, size: int, rows: int, seconds: float, worker: str) -> None:
        """Count a unit that is made."""
        self.left, self.done = self.left - size, self.done + size
        self.computing += seconds
        self._rows[worker] += rows

    def __call__(self) -> str:
        if not self.done:
            return "loading"
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rates = [f"{rows / seconds:,.0f}" for _, rows in sorted(self._rows.items())]
        each = f" ({' + '.join(rates)})" if 1 < len(rates) <= 8 else ""
        left = self.left * seconds / self.done
        return f"{sum(self._rows.values()) / seconds:,.0f} rows/s{each}, {left:,.0f} s left"
