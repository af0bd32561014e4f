"""Campaigns: everything brought together, for people and for other programs.

`report.html` with `plotly.min.js` beside it, `campaign.parquet` (columns:
`sae_ext.report.campaign_table`), and `export/`, the SAE's folder, which SAELens opens as well where it has
such an SAE: `differs_in_saelens` in the manifest says why it does not, null where it does. Content depends on
the inputs alone, as everywhere: dates and timings stand in the manifests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from sae_ext.analysis import histogram_edges
from sae_ext.artefacts import Stage, features, interpretations, saes, trials
from sae_ext.interchange import saelens
from sae_ext.model import SAE
from sae_ext.report import ReportData, build_report, campaign_facts, campaign_table
from sae_ext.store import Manifest, Store, code_version, table_bytes

KIND = "campaigns"
REPORT, TABLE = "report.html", "campaign.parquet"
EXPORT = (*SAE.FILES, "sparsity.safetensors")

# What a usable SAE looks like, shown beside the measured values.
MIN_EXPLAINED_VARIANCE, MAX_L0, MAX_DEAD, MIN_LIFT = 0.65, 64.0, 0.05, 0.1


def stage(name: str, recipe: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage:
    """The report over artefacts `activations`, `saes`, `features`, `interpretations`, maybe `trials`.

    Args:
        recipe: the resolved recipe without what does not change results.
    """
    return Stage(KIND, {"name": name, "recipe": dict(recipe)}, dict(inputs))


def commit(store: Store, stage: Stage) -> Manifest:
    """Build the report, the table and the export, and write the manifest."""
    data = report_data(store, stage)
    files = build_report(data, max_features=max(1, data.explanations.num_rows))
    files[TABLE] = table_bytes(campaign_table(data))
    sae = stage.inputs["saes"]
    files |= {f"export/{name}": store.read(saes.KIND, sae, name) for name in EXPORT}
    facts = {name: store.put(KIND, stage.key, name, content) for name, content in files.items()}
    differs = saelens.difference(saes.load(store, sae), data.summary.get("clip_rate"))
    return stage.commit(store, facts, {**campaign_facts(data), "differs_in_saelens": differs})


def report_data(store: Store, stage: Stage) -> ReportData:
    """Everything the report shows, read from the store."""
    keys = stage.inputs
    held_out = store.manifest(features.KIND, keys["features"]).extra["held_out"]
    told = store.manifest(interpretations.KIND, keys["interpretations"]).extra["summary"]

    def table(kind: str, name: str) -> pa.Table:
        return store.read_table(kind, keys[kind], name)

    explanations = table(interpretations.KIND, interpretations.EXPLANATIONS)
    plan = table(interpretations.KIND, interpretations.PLAN)
    windows = table(features.KIND, features.WINDOWS)
    chosen = pa.compute.is_in(windows["feature"], explanations["feature"].combine_chunks())
    searched = "trials" in keys
    return ReportData(
        name=stage.config["name"],
        recipe=stage.config["recipe"],
        keys=keys,
        scorecard=scorecard(held_out, told),
        summary=held_out,
        history=table(saes.KIND, "history.parquet"),
        features=table(features.KIND, features.FEATURES).append_column("status", plan["status"]),
        windows=windows.filter(chosen),
        explanations=explanations,
        scores=table(interpretations.KIND, interpretations.SCORES),
        interpretation=told,
        trials=table(trials.KIND, trials.TRIALS) if searched else None,
        best_trial=store.manifest(trials.KIND, keys["trials"]).extra["best"]["trial"]
        if searched
        else None,
        l0_band=tuple(stage.config["recipe"]["tune"]["l0_band"]) if searched else None,
        histogram_edges=histogram_edges().tolist(),
        versions={"sparsemill": code_version()},
    )


def scorecard(held_out: Mapping[str, Any], told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The key figures with their targets: metric, value, target, ok (None without one), note."""
    n = held_out["n_rows"]
    rows = f"{n:,} rows of test documents"
    kind = told["explainer_kind"] or "none"
    baseline = "; a baseline without a language model" if kind.startswith("baseline:") else ""
    return [
        _line("explained variance", held_out.get("explained_variance"), f"1 - FVU on {rows}",
              ">=", MIN_EXPLAINED_VARIANCE),
        _line("L0", held_out.get("l0"), f"mean active features per row, {rows}", "<=", MAX_L0),
        _line("dead features", held_out.get("dead_fraction"), f"fired in none of {rows}", "<=", MAX_DEAD),
        _line("dense features", held_out.get("dense_fraction"), f"fire in more than a tenth of {rows}"),
        _line("clipped activations", held_out.get("clip_rate"), "share of firings at the clip"),
        _line("median lift", told["median_lift"],
              f"detection above shuffled explanations, {told['n_scored']} features, {kind}{baseline}",
              ">", MIN_LIFT),
        _line("coverage", told["coverage"], "judgements answered of those asked"),
    ]  # fmt: skip


def _line(
    metric: str, value: float | None, note: str, relation: str = "", target: float | None = None
) -> dict[str, Any]:
    ok = None
    if target is not None and value is not None:
        ok = {">=": value >= target, "<=": value <= target, ">": value > target}[relation]
    return {
        "metric": metric,
        "value": value,
        "target": None if target is None else f"{relation} {target:g}",
        "ok": ok,
        "note": note,
    }
