"""Bayesian search over learning rate and λ: scikit-optimize proposes, Ray trains, validation judges.

Trials go in rounds of `parallel`. Each round is proposed from the finished trials alone and written
to the ledger before it starts, so an interrupted search goes on exactly as if it had not been.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from prefect import task
from prefect.futures import PrefectFuture, wait

from flows import ledger, session, stages
from flows.ledger import Ledger, Trial
from flows.policy import STAGE
from flows.recipe import Recipe
from sae_ext.artefacts import Stage, activations, saes, trials
from sae_ext.config import TuneConfig, with_changes
from sae_ext.errors import Diverged, UserError
from sae_ext.store import Store
from workers.pool import SAVING_SECONDS

_COLUMNS = pa.schema(
    [
        ("trial", pa.int32()),
        ("lr", pa.float64()),
        ("l1", pa.float64()),
        ("sae", pa.string()),
        ("fvu", pa.float64()),
        ("l0", pa.float64()),
        ("objective", pa.float64()),
        ("state", pa.string()),
        ("error", pa.string()),
    ]
)


# What fails in a trial has been tried again there; and a failed round has told its trials to stop.
@task(name="tune", task_run_name="tune {recipe.tune.trials} trials", **{**STAGE, "retries": 0})
def tune(recipe: Recipe, keys: dict[str, str]) -> str:
    """Search, commit the table of trials and its winner; returns the key."""
    run = session.current()
    wanted = stages.of_trials(recipe, keys)
    if wanted.done(run.store):
        run.display.say(f"[green]✓[/] [bold]tune      [/] found {wanted.key}")
        return wanted.key
    book = Ledger(run.store.state_dir(), wanted.key)
    bar = run.display.bar("tune")
    try:
        while unfinished := _next_round(book, recipe):
            bar.update(sum(t.state != ledger.ASKED for t in book.rows()), recipe.tune.trials, "")
            _run_round(book, recipe, keys[activations.KIND], unfinished)
        best = _commit(run.store, wanted, book.rows())
    except BaseException:
        bar.abandon()
        raise
    finally:
        book.close()
    bar.finish(f"best of {recipe.tune.trials}: lr {best['lr']:.2e}, λ {best['l1']:.2f} → FVU "
               f"{best['fvu']:.3f} at L0 {best['l0']:.1f}")  # fmt: skip
    return wanted.key


@task(
    name="trial", task_run_name="trial {trial.trial} lr {trial.lr:.1e} l1 {trial.l1:.2f}", **STAGE
)
def trial(recipe: Recipe, source: str, trial: Trial) -> tuple[str, dict[str, Any]]:
    """Train one candidate; returns its SAE's key and validation metrics."""
    run = session.current()
    steps = recipe.tune.steps or recipe.train.steps
    changes = {"lr": trial.lr, trials.PENALTY: trial.l1, "steps": steps}
    wanted = saes.stage(recipe.sae, with_changes(recipe.train, changes), source)
    if not wanted.done(run.store):
        cpus = max(1, recipe.resources.train_cpus // recipe.tune.parallel)
        bar = run.display.bar(f"trial {trial.trial}")
        try:
            diverged = run.train(bar, [wanted], cpus=cpus)
        finally:
            bar.abandon()
        if diverged:
            raise diverged[wanted.key]
    return wanted.key, run.store.manifest(saes.KIND, wanted.key).extra["validation"]


def propose(config: TuneConfig, finished: Sequence[Trial], count: int) -> list[tuple[float, float]]:
    """The next `count` points (lr, λ) given the finished trials; a function of its arguments alone.

    The first `initial_trials` points are a Latin hypercube; then a Gaussian process with expected
    improvement, parallel points by the constant-liar rule. A failed trial counts as worse than the
    worst seen, as NaN would poison the model for good.
    """
    from skopt import Optimizer
    from skopt.sampler import Lhs
    from skopt.space import Real, Space

    space = Space([Real(*config.lr, prior="log-uniform"), Real(*config.l1, prior="log-uniform")])
    done = len(finished)
    if done < config.initial_trials:
        points = Lhs().generate(space, config.initial_trials, random_state=config.seed)
        points = points[done : done + count]
    else:
        known = [t.objective for t in finished if t.objective is not None]
        penalty = max(known) + (max(known) - min(known)) + 1.0 if known else 1.0
        values = [penalty if t.objective is None else t.objective for t in finished]
        optimizer = Optimizer(space, base_estimator="GP", n_initial_points=1, acq_func="EI",
                              random_state=config.seed + done)  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # repeated points and flat fits are handled here
            clipped = [[_clip(t.lr, config.lr), _clip(t.l1, config.l1)] for t in finished]
            optimizer.tell(clipped, values)
            points = optimizer.ask(n_points=count, strategy="cl_min")
    return [(float(lr), float(l1)) for lr, l1 in points]


def _next_round(book: Ledger, recipe: Recipe) -> list[Trial]:
    """Trials asked for and not ended; when there are none, a new round; empty at the end."""
    rows = book.rows()
    waiting = [t for t in rows if t.state == ledger.ASKED]
    left = recipe.tune.trials - len(rows)
    if waiting or left <= 0:
        return waiting
    count = min(recipe.tune.parallel, left)
    if len(rows) < recipe.tune.initial_trials:
        count = min(count, recipe.tune.initial_trials - len(rows))
    book.ask(propose(recipe.tune, rows, count))
    return _next_round(book, recipe)


def _run_round(book: Ledger, recipe: Recipe, source: str, round_: Sequence[Trial]) -> None:
    run = session.current()
    futures: list[tuple[Trial, PrefectFuture[Any]]] = []
    try:
        for candidate in round_:
            futures.append((candidate, trial.submit(recipe, source, candidate)))
        for candidate, future in futures:
            try:
                key, seen = future.result()
                if seen["fvu"] is None:
                    raise Diverged("the validation rows are all alike, so FVU means nothing")
            except Diverged as error:  # part of the search; anything else stops it, to go on later
                book.failed(candidate.trial, str(error))
                continue
            score = trials.objective(seen["fvu"], seen["l0"], recipe.tune.l0_band)
            book.done(candidate.trial, sae=key, fvu=seen["fvu"], l0=seen["l0"], objective=score)
    except BaseException:
        # The trials' threads must have left Ray before anyone shuts it down.
        run.stopping.set()
        wait([future for _, future in futures], timeout=SAVING_SECONDS)
        raise


def _commit(store: Store, wanted: Stage, rows: list[Trial]) -> dict[str, Any]:
    good = [t for t in rows if t.objective is not None and math.isfinite(t.objective)]
    if not good:
        raise UserError(f"all {len(rows)} trials failed; the last one with: {rows[-1].error}")
    best = min(good, key=lambda t: (t.objective, t.trial))
    table = pa.Table.from_pylist([t._asdict() for t in rows], schema=_COLUMNS)
    files = {trials.TRIALS: store.put_table(trials.KIND, wanted.key, trials.TRIALS, table)}
    extra = {"best": best._asdict(), "n_trials": len(rows), "n_failed": len(rows) - len(good)}
    wanted.commit(store, files, extra)
    return best._asdict()


def _clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
