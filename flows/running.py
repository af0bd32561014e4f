"""One campaign from the command line: Prefect and Ray up side by side, the flow, everything down again.

Ctrl-C or SIGTERM at any moment: the flow's waiting ends at once, workers are killed, Prefect is told,
our servers are stopped.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

import psutil
from rich.console import Console

from flows import grid as grids
from flows import stages
from flows.prefect_server import PrefectServer
from flows.recipe import Recipe
from sae_ext.errors import Diverged
from sae_ext.store import Store
from sae_ext.training.history import require_tensorboard
from workers.cluster import Cluster

T = TypeVar("T")

_RAY_SECONDS = 2.5


def run(recipe: Recipe) -> dict[str, str]:
    """Run the recipe's campaign; returns the key of every artefact, by kind.

    Raises:
        UserError: bad input or environment.
        KeyboardInterrupt: stopped by the user.
    """
    store = Store.open(recipe.store, writable=True)

    def work() -> dict[str, str]:
        from flows.campaign import campaign

        return campaign(recipe)

    return _served(recipe, store, stages.pending(recipe, store), work)


def run_harvest(recipe: Recipe) -> list[str]:
    """Read the recipe's activations; returns the key of each place that is read.

    Raises:
        UserError, KeyboardInterrupt: as `run`.
    """
    recipe = recipe.model_copy(update={"stream": None})  # which is for training
    store = Store.open(recipe.store, writable=True)
    todo = not all(stage.done(store) for stage in stages.harvested(recipe))

    def work() -> list[str]:
        from flows.harvesting import harvest_alone

        return harvest_alone(recipe)

    return _served(recipe, store, todo, work)


def run_sweep(recipe: Recipe, vary: Sequence[str]) -> list[tuple[dict[str, Any], str | Diverged]]:
    """Train a grid of SAEs; returns what varies and the key of each, or why it diverged.

    Raises:
        UserError, KeyboardInterrupt: as `run`.
    """
    points = grids.variants(recipe, vary)
    store = Store.open(recipe.store, writable=True)
    todo = not all(stage.done(store) for stage in grids.stages_of(recipe, points))
    grid = [point.values for point in points]

    def work() -> list[str | Diverged]:
        from flows.sweep import sweep

        return sweep(recipe, grid)

    keys = _served(recipe, store, todo, work)
    return list(zip(grid, keys, strict=True))


def _served(recipe: Recipe, store: Store, todo: bool, work: Callable[[], T]) -> T:
    """Do the work of a flow with Prefect and, where anything is to do, Ray beside it."""
    harvest = stages.of_activations(recipe)
    reads = not harvest.done(store)
    if reads:
        stages.preflight(recipe)
    if todo:
        stages.check_stream(recipe)
    if todo and recipe.resources.tensorboard is not None:
        require_tensorboard()
    cluster = Cluster(recipe.resources.ray_address)
    server = PrefectServer(store.state_dir())
    signal.signal(signal.SIGTERM, _as_interrupt)
    patience = 0.0
    try:
        server.begin()
        if todo:
            cluster.begin()
        with Console(stderr=True).status("starting Prefect and Ray, reading the corpus"):
            # After the environment is settled, and while both servers start.
            if reads:
                stages.planned_harvest(recipe, harvest.key)
            from flows.session import lend

            server.wait()
        patience = 0.5
        with lend(cluster):
            result = work()
        patience = 5.0
        return result
    finally:
        _stop(server, cluster, patience)


def _stop(server: PrefectServer, cluster: Cluster, patience: float) -> None:
    """Both at once, so that leaving takes as long as the slower one; then whatever is left.

    Args:
        patience: seconds to let our Prefect server take in what the flow reported last.
    """
    for name in (signal.SIGINT, signal.SIGTERM):  # leaving is bounded; a second one would tear it
        signal.signal(name, signal.SIG_IGN)
    family = psutil.Process().children(recursive=True)
    ray = threading.Thread(target=cluster.stop, name="ray-stop", daemon=True)
    ray.start()
    if server.embedded and patience:
        from flows.draining import drain

        drain(server.url or "", patience)
    server.stop()
    ray.join(_RAY_SECONDS)
    # Ray's agents outlive a Ray that was stopped while it started.
    for process in {*family, *psutil.Process().children(recursive=True)}:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
