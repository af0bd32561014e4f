"""One campaign from the command line: Prefect and Ray up side by side, the flow, everything down again.

Ctrl-C or SIGTERM at any moment: the flow's waiting ends at once, workers are killed, Prefect is told,
our servers are stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

from flows import stages
from flows.prefect_server import PrefectServer
from flows.recipe import Recipe
from sae_ext.store import Store
from workers.cluster import Cluster


def run(recipe: Recipe) -> dict[str, str]:
    """Run the recipe's campaign; returns the key of every artefact, by kind.

    Raises:
        UserError: bad input or environment.
        KeyboardInterrupt: stopped by the user.
    """
    store = Store.open(recipe.store, writable=True)
    todo = stages.pending(recipe, store)
    cluster = Cluster(recipe.resources.ray_address)
    server = PrefectServer(store.state_dir())
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        server.begin()
        if todo:
            cluster.begin()
        # After the environment is settled, and while both servers start.
        from flows.campaign import campaign
        from flows.session import lend

        server.wait()
        with lend(cluster):
            return campaign(recipe)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(server, cluster)


def _stop(server: PrefectServer, cluster: Cluster) -> None:
    """Both at once, so that leaving takes as long as the slower one."""
    ray = threading.Thread(target=cluster.stop, name="ray-stop")
    ray.start()
    try:
        if server.embedded and "flows.campaign" in sys.modules:
            from flows.draining import drain

            drain(server.url or "")
    finally:
        server.stop()
        ray.join()


def _as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
