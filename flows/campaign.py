"""The campaign: harvest → tune → train → analyse → interpret → aggregate, each a Prefect task.

Every task is a function of the recipe and of keys in the store, and returns a key. A task whose
artefact is complete returns at once, so the same command run again does nothing, goes on after a
kill, or shares what another campaign has done. Prefect shows and retries; the store knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact

from flows import session, stages, tuning
from flows.display import Bar, figure
from flows.harvesting import harvest
from flows.policy import STAGE
from flows.recipe import Recipe
from flows.session import Session
from sae_ext.activations.reader import Activations
from sae_ext.analysis import ShardAnalysis, label_names
from sae_ext.artefacts import (
    Stage,
    activations,
    campaigns,
    features,
    interpretations,
    saes,
    trials,
)
from sae_ext.interpret.chat import KEY_VARIABLE
from sae_ext.interpret.run import check_server
from workers.analyse import AnalyseWorker
from workers.interpret import InterpretWorker
from workers.pool import Job

_SHARDS_PER_JOB = 4
"""An analysis job returns one merged finding; few shards each keep both workers busy to the end."""


@flow(name="campaign", flow_run_name="{recipe.name}", log_prints=False)
def campaign(recipe: Recipe) -> dict[str, str]:
    """Turn a model's activations into features a person can read.

    Returns:
        The key of every artefact, by kind.
    """
    with session.opened(recipe):
        keys = {activations.KIND: harvest(recipe)}
        if recipe.tune.trials:
            keys[trials.KIND] = tuning.tune(recipe, keys)
        keys[saes.KIND] = train(recipe, keys)
        keys[features.KIND] = analyse(recipe, keys)
        keys[interpretations.KIND] = interpret(recipe, keys)
        keys[campaigns.KIND] = aggregate(recipe, keys)
    return keys


@task(name="train", task_run_name="train d_sae {recipe.sae.d_sae}", **STAGE)
def train(recipe: Recipe, keys: dict[str, str]) -> str:
    """Train the sparse autoencoder, with the winner's values where there was a search."""
    wanted = stages.of_sae(recipe, keys, session.current().store)
    with _stage("train", wanted) as (run, bar):
        if bar is None:
            return wanted.key
        resources = recipe.resources
        diverged = run.train(
            bar, [wanted], cpus=resources.train_cpus, workers=resources.train_workers
        )
        if diverged:
            raise diverged[wanted.key]
        validation = run.store.manifest(saes.KIND, wanted.key).extra["validation"]
        bar.finish(
            f"validation FVU {figure(validation['fvu'])} at L0 {validation['l0']:.1f} → {wanted.key}"
        )
    return wanted.key


@task(name="analyse", task_run_name="analyse features", **STAGE)
def analyse(recipe: Recipe, keys: dict[str, str]) -> str:
    """Gather statistics and evidence for every feature, and quality on held-out documents."""
    wanted = stages.of_features(recipe, keys)
    with _stage("analyse", wanted) as (run, bar):
        if bar is None:
            return wanted.key
        source = Activations(run.store, keys[activations.KIND])
        shards = range(len(source.shard_rows))
        groups = [list(shards[i : i + _SHARDS_PER_JOB]) for i in shards[::_SHARDS_PER_JOB]]
        sae = saes.load(run.store, keys[saes.KIND])
        total = ShardAnalysis(recipe.analyse, sae, len(label_names(source)))
        merged = _InOrder(total.merge)
        run.work(
            bar,
            AnalyseWorker,
            (
                run.store.url,
                source.key,
                keys[saes.KIND],
                recipe.analyse,
                recipe.resources.cpus_per_worker,
            ),
            [Job("analyse", (group,)) for group in groups],
            sizes=[float(sum(source.shard_rows[i] for i in group)) for group in groups],
            workers=recipe.resources.workers,
            cpus=recipe.resources.cpus_per_worker,
            on_result=merged,
        )
        features.commit(run.store, wanted, source, sae, total)
        bar.finish(f"{recipe.sae.d_sae:,} features → {wanted.key}")
    return wanted.key


@task(name="interpret", task_run_name="interpret {recipe.interpret.features} features", **STAGE)
def interpret(recipe: Recipe, keys: dict[str, str]) -> str:
    """Explain features in words and score the explanations on held-out documents."""
    wanted = stages.of_interpretations(recipe, keys)
    with _stage("interpret", wanted) as (run, bar):
        if bar is None:
            return wanted.key
        check_server(recipe.interpret)
        source = Activations(run.store, keys[activations.KIND])
        plan = interpretations.plan(run.store, wanted, source)
        batches = interpretations.batches(plan)
        todo = [
            i for i in range(len(batches)) if not interpretations.has_part(run.store, wanted.key, i)
        ]
        api_key = os.environ.get(KEY_VARIABLE)
        run.work(
            bar,
            InterpretWorker,
            (run.store.url, keys[features.KIND], recipe.interpret, source.corpus, plan, api_key),
            [Job("interpret", (wanted.key, i, batches[i])) for i in todo],
            sizes=[float(len(batches[i])) for i in todo],
            workers=recipe.resources.workers,
            cpus=recipe.resources.cpus_per_worker,
        )
        interpretations.commit(run.store, wanted, plan, len(batches))
        bar.finish(f"{sum(map(len, batches))} features ({recipe.interpret.backend}) → {wanted.key}")
    return wanted.key


@task(name="aggregate", task_run_name="aggregate report", **STAGE)
def aggregate(recipe: Recipe, keys: dict[str, str]) -> str:
    """Bring everything together: scorecard, report, table, export."""
    wanted = stages.of_campaign(recipe, keys)
    with _stage("aggregate", wanted) as (run, bar):
        if bar is not None:
            campaigns.commit(run.store, wanted)
            bar.finish(f"report → {wanted.key}")
        card = run.store.manifest(campaigns.KIND, wanted.key).extra["scorecard"]
        try:
            create_table_artifact(card, key="scorecard", description=f"Scorecard of {recipe.name}")
            create_link_artifact(report_url(run, wanted.key), "report", key="report")
        except httpx.HTTPError as error:  # a view of the work must never end the work
            run.display.say(f"[yellow]Prefect does not show the scorecard: {error}[/]")
    return wanted.key


class _InOrder:
    """Passes results on in the order of their jobs, so that float sums come out the same each time."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self.take = take
        self.next = 0
        self.early: dict[int, Any] = {}

    def __call__(self, index: int, value: Any) -> None:
        self.early[index] = value
        while self.next in self.early:
            self.take(self.early.pop(self.next))
            self.next += 1


def report_url(run: Session, key: str) -> str:
    """Where a browser finds the report: a file URL for a local store."""
    path = run.store.path(campaigns.KIND, key, campaigns.REPORT)
    return Path(path).as_uri() if run.store.is_local else run.store.fs.unstrip_protocol(path)


@contextmanager
def _stage(name: str, wanted: Stage) -> Iterator[tuple[Session, Bar | None]]:
    """The session, and a bar to show the work on; no bar when the artefact is complete already."""
    run = session.current()
    if wanted.done(run.store):
        run.display.say(f"[green]✓[/] [bold]{name:<10}[/] found {wanted.key}")
        yield run, None
        return
    run.store.sweep(wanted.kind, wanted.key)
    bar = run.display.bar(name)
    try:
        yield run, bar
    except BaseException:
        bar.abandon()
        raise
