"""Which features are interpreted, and what each is compared with: decided once, before any batch.

Every feature gets a status; nothing is left out without one. The control of a feature is the
explanation of another chosen feature that fires about as often, fixed here, so that the result
does not depend on how the work is divided.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext.config import CorpusConfig, InterpretConfig
from sae_ext.errors import UserError
from sae_ext.interpret.examples import Examples
from sae_ext.interpret.reader import EvidenceReader
from sae_ext.interpret.split import held_out

DENSE = 0.5
"""A feature that fires in more than this share of the rows is dense."""
ENOUGH = 5
"""Fewest firing windows on either side of the split, one for each quantile of activation."""
BIN = 10
"""Fewest features of like firing rate among which controls are drawn, where there are so many."""


def survey(
    firing_rate: npt.NDArray[np.float64], evidence: EvidenceReader, corpus: CorpusConfig
) -> pa.Table:
    """The status of every feature.

    Args:
        firing_rate: [d_sae] fraction of rows in which each feature fires.
        evidence: the analysis of the same SAE.
        corpus: the split of the documents.

    Returns:
        One row per feature: feature int32; status "dead" (never fires), "dense" (fires in more
        than half the rows, or in nearly every held-out window), "too_rare" (fewer than `ENOUGH`
        firing windows to explain from or to score on) or "ok"; firing_rate float64; n_explain and
        n_score int32 (firing windows of the evidence on either side of the split).
    """
    n = len(firing_rate)
    found = evidence.columns("feature", "kind", "bucket")
    if len(found["feature"]) and found["feature"].max() >= n:
        raise UserError(
            f"evidence of feature {found['feature'].max()}, but firing rates of {n} features: use "
            "the features and the evidence of one analysis"
        )
    kept = held_out(found["bucket"], corpus)
    sampled = found["kind"] == "sample"
    n_explain = np.bincount(found["feature"][sampled & ~kept], minlength=n)
    n_score = np.bincount(found["feature"][sampled & kept], minlength=n)
    pool = held_out(evidence.pool.bucket, corpus)
    silent = pool.sum() - evidence.pool.count_firing(pool, n)
    status = np.select(
        [
            firing_rate == 0,
            (firing_rate > DENSE) | (silent < ENOUGH),
            (n_explain < ENOUGH) | (n_score < ENOUGH),
        ],
        ["dead", "dense", "too_rare"],
        "ok",
    )
    return pa.table(
        {
            "feature": pa.array(np.arange(n), pa.int32()),
            "status": pa.array(status.astype(object), pa.string()),
            "firing_rate": pa.array(firing_rate, pa.float64()),
            "n_explain": pa.array(n_explain, pa.int32()),
            "n_score": pa.array(n_score, pa.int32()),
        }
    )


def make_plan(
    firing_rate: npt.NDArray[np.float64],
    evidence: EvidenceReader,
    config: InterpretConfig,
    corpus: CorpusConfig,
) -> pa.Table:
    """Choose the features and fix their controls.

    Features are drawn in a seeded order from those with status "ok"; one whose held-out windows
    turn out to repeat what the explainer sees is passed over and marked "too_rare".

    Returns:
        The table of `survey` with two columns more: chosen bool; control int32, the feature whose
        explanation serves as the shuffled one (null when not chosen, or when chosen alone).
    """
    table = survey(firing_rate, evidence, corpus)
    status = table["status"].to_pylist()
    examples = Examples(evidence, config, corpus)
    chosen: list[int] = []
    for feature in select_features(table, config.seed):
        if len(chosen) == config.features:
            break
        if sum(e.fires for e in examples.to_score(feature)) >= min(ENOUGH, config.positives):
            chosen.append(feature)
        else:
            status[feature] = "too_rare"
    control = _controls(chosen, firing_rate, config.seed)
    rows = range(table.num_rows)
    table = table.set_column(1, "status", pa.array(status, pa.string()))
    table = table.append_column("chosen", pa.array([f in control for f in rows], pa.bool_()))
    return table.append_column("control", pa.array([control.get(f) for f in rows], pa.int32()))


def select_features(table: pa.Table, seed: int) -> list[int]:
    """All features with status "ok" in the seeded order in which they are chosen."""
    ok = [row["feature"] for row in table.select(["feature", "status"]).to_pylist() if _ok(row)]
    order = np.random.default_rng([seed, *b"features"]).permutation(table.num_rows)
    place = np.argsort(order)
    return sorted(ok, key=lambda feature: int(place[feature]))


def _ok(row: dict[str, Any]) -> bool:
    return bool(row["status"] == "ok")


def _controls(
    chosen: list[int], firing_rate: npt.NDArray[np.float64], seed: int
) -> dict[int, int | None]:
    """For each chosen feature another one of its firing-rate bin: the next on a seeded ring."""
    if len(chosen) < 2:
        return dict.fromkeys(chosen)
    ranked = np.array(sorted(chosen, key=lambda f: (firing_rate[f], f)))
    control: dict[int, int | None] = {}
    for number, members in enumerate(np.array_split(ranked, max(1, len(ranked) // BIN))):
        ring = np.random.default_rng([seed, number, *b"controls"]).permutation(members)
        control |= dict(zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True))
    return control
