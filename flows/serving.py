"""Deployments: the campaign on a schedule and on demand, startable from the Prefect UI."""

from __future__ import annotations

import signal

from rich.console import Console

from flows import recipe as recipes
from flows.prefect_server import PrefectServer
from flows.recipe import Recipe
from sae_ext.errors import UserError
from sae_ext.store import Store

SCHEDULED, ON_DEMAND = "scheduled", "on-demand"


def serve(recipe: Recipe, cron: str, console: Console) -> None:
    """Offer two deployments of the recipe until interrupted; runs are processes of their own.

    Raises:
        UserError: the schedule is not a cron expression, or the Prefect API does not answer.
    """
    store = Store.open(recipe.store, writable=True)
    server = PrefectServer(store.state_dir())
    server.begin()
    try:
        server.wait()
        console.print(f"Prefect UI  {(server.url or '').removesuffix('/api')}", soft_wrap=True)
        console.print(
            f"deployments campaign/{recipe.name}-{SCHEDULED} ({cron}), campaign/{recipe.name}-{ON_DEMAND}"
        )
        # A run may stand in another folder: it is told the store's absolute address.
        _serve(recipes.changed(recipe, {"store": store.url}), cron)
    finally:
        server.stop()


def _serve(recipe: Recipe, cron: str) -> None:
    from prefect import serve as serve_deployments
    from prefect.deployments.runner import RunnerDeployment

    from flows.campaign import campaign

    def deployment(name: str, schedule: str | None) -> RunnerDeployment:
        made = campaign.to_deployment(
            f"{recipe.name}-{name}",
            cron=schedule,
            concurrency_limit=1,
            parameters={"recipe": recipe.model_dump(mode="json")},
            tags=["sparsemill", recipe.name],
            description=f"Harvest, train, analyse, interpret and report `{recipe.name}`.",
        )
        assert isinstance(made, RunnerDeployment)  # a coroutine only when called from one
        return made

    try:
        scheduled = deployment(SCHEDULED, cron)
    except ValueError as error:
        raise UserError(f'--cron {cron!r} is not a schedule: write such as "0 2 * * *"') from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve_deployments(scheduled, deployment(ON_DEMAND, None))
