"""Several SAEs in one pass over the activations, or in one a worker: a grid of values, compared in one table.

Every SAE ends as it would have alone, under its own key, so a sweep shares what other runs have made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow, task

from flows import recipe as recipes
from flows import session, stages
from flows.harvesting import harvest
from flows.policy import STAGE
from flows.recipe import Recipe
from sae_ext.artefacts import Stage, activations, saes
from sae_ext.errors import Diverged


@flow(name="sweep", flow_run_name="{recipe.name} sweep", log_prints=False)
def sweep(recipe: Recipe, grid: list[dict[str, Any]]) -> list[str | Diverged]:
    """Train every point of a grid in one pass.

    Returns:
        In the grid's order the SAEs' keys, or why one diverged.
    """
    with session.opened(recipe):
        keys = {activations.KIND: harvest(recipe)}
        points = [recipes.replaced(recipe, point) for point in grid]
        return train_together(recipe, points, keys)


@task(name="train", task_run_name="train {recipe.name} sweep", **STAGE)
def train_together(
    recipe: Recipe, points: list[Recipe], keys: Mapping[str, str]
) -> list[str | Diverged]:
    """Train what is not in the store yet."""
    run, resources = session.current(), recipe.resources
    source, stream = keys[activations.KIND], stages.streaming(recipe)
    wanted = [saes.stage(p.sae, p.train, source, stream) for p in points]
    missing = [stage for stage in _different(wanted) if not stage.done(run.store)]
    diverged: dict[str, Diverged] = {}
    if missing:
        bar = run.display.bar("sweep")
        try:
            # The last one of a sweep that was killed is no more shared by workers than the others were.
            workers = min(resources.train_workers, len(missing))
            diverged = run.train(bar, missing, cpus=resources.train_cpus, workers=workers)
        except BaseException:
            bar.abandon()
            raise
        done = len(missing) - len(diverged)
        bar.finish(f"{done} SAE{'s' * (done != 1)}")
    return [diverged.get(stage.key, stage.key) for stage in wanted]


def _different(wanted: Sequence[Stage]) -> list[Stage]:
    return list({stage.key: stage for stage in wanted}.values())
