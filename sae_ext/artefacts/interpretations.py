"""Interpretations: explanations of features in words, and how well each predicts the firing.

`plan.parquet` (every feature's status, which were chosen, their controls), `explanations.parquet`,
`trials.parquet` (every single judgement, so that any score can be recomputed), `scores.parquet`;
columns: `sae_ext.interpret`. The manifest's `extra.summary` holds the figures over features.
Features are done in batches; a batch's tables wait as parts until all are there.
"""

from __future__ import annotations

import pyarrow as pa

from sae_ext.activations.reader import Activations
from sae_ext.artefacts import Stage, features
from sae_ext.config import InterpretConfig, to_dict
from sae_ext.interpret import run, score
from sae_ext.interpret.plan import make_plan
from sae_ext.interpret.reader import EvidenceReader
from sae_ext.store import Store

KIND = "interpretations"
PLAN, EXPLANATIONS, TRIALS, SCORES = (
    f"{name}.parquet" for name in ("plan", "explanations", "trials", "scores")
)
_TABLES = {EXPLANATIONS: run.EXPLANATIONS, TRIALS: score.TRIALS, SCORES: score.SCORES}
BATCH = 10
"""Features in one piece of work."""


def stage(config: InterpretConfig, features_key: str) -> Stage:
    """Explanations of an analysis' features."""
    return Stage(KIND, {"interpret": to_dict(config)}, {"features": features_key})


def evidence(store: Store, features_key: str) -> EvidenceReader:
    """The windows and the pool of an analysis."""
    return EvidenceReader(
        store.local(features.KIND, features_key, features.WINDOWS),
        store.local(features.KIND, features_key, features.POOL),
    )


def plan(store: Store, stage: Stage, activations: Activations) -> pa.Table:
    """Which features are interpreted and what each is compared with; see `interpret.plan`."""
    table = store.read_table(features.KIND, stage.inputs["features"], features.FEATURES)
    config = InterpretConfig(**stage.config["interpret"])
    reader = evidence(store, stage.inputs["features"])
    return make_plan(table["density"].to_numpy(), reader, config, activations.corpus)


def batches(plan: pa.Table) -> list[list[int]]:
    """The chosen features, in pieces of work."""
    chosen = plan.filter(plan["chosen"])["feature"].to_pylist()
    return [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]


def has_part(store: Store, key: str, index: int) -> bool:
    """Whether a batch's tables are all there."""
    return all(store.has_file(KIND, key, _part(name, index)) for name in _TABLES)


def put_part(store: Store, key: str, index: int, found: run.Interpretations) -> None:
    """Write a batch's tables."""
    for name, table in zip(_TABLES, (found.explanations, found.trials, found.scores), strict=True):
        store.put_table(KIND, key, _part(name, index), table)


def commit(store: Store, stage: Stage, plan: pa.Table, count: int) -> None:
    """Join the parts of `count` batches, write the manifest, and remove the parts.

    Does nothing when another run of the same work has come first.
    """
    if stage.done(store):
        return
    tables = {PLAN: plan}
    for name, schema in _TABLES.items():
        parts = [store.read_table(KIND, stage.key, _part(name, index)) for index in range(count)]
        # The empty table stands for a campaign in which no feature could be chosen.
        tables[name] = pa.concat_tables([schema.empty_table(), *parts])
    files = {name: store.put_table(KIND, stage.key, name, table) for name, table in tables.items()}
    stage.commit(store, files, {"summary": score.summary(tables[SCORES], plan)})
    for name in _TABLES:
        for index in range(count):
            store.remove(KIND, stage.key, _part(name, index))


def _part(name: str, index: int) -> str:
    return f"parts/{index:04d}-{name}"
