"""One campaign from the command line: Prefect and Ray up side by side, the flow, everything down again.

Ctrl-C or SIGTERM at any moment: the flow's waiting ends at once, workers are killed, Prefect is told,
our servers are stopped.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType

import psutil
from rich.console import Console

from flows import stages
from flows.prefect_server import PrefectServer
from flows.recipe import Recipe
from sae_ext.store import Store
from workers.cluster import Cluster

_RAY_SECONDS = 2.5


def run(recipe: Recipe) -> dict[str, str]:
    """Run the recipe's campaign; returns the key of every artefact, by kind.

    Raises:
        UserError: bad input or environment.
        KeyboardInterrupt: stopped by the user.
    """
    store = Store.open(recipe.store, writable=True)
    todo = stages.pending(recipe, store)
    harvest = stages.of_activations(recipe)
    reads = not harvest.done(store)
    if reads:
        stages.preflight(recipe)
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
            from flows.campaign import campaign
            from flows.session import lend

            server.wait()
        patience = 0.5
        with lend(cluster):
            keys = campaign(recipe)
        patience = 5.0
        return keys
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
