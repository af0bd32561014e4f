"""The feature browser's content: which features, and what the page knows of each."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sae_ext.report.data import ReportData
from sae_ext.report.tokens import display
from sae_ext.report.words import fixed, missing, percent, show, signed, uses_language_model


def candidates(data: ReportData) -> list[int]:
    """Ids of the features with evidence; where some of them are explained, of those alone."""
    shown: list[int] = pc.unique(data.windows["feature"]).to_pylist()
    told = set(data.explanations["feature"].to_pylist())
    return [feature for feature in shown if feature in told] or shown


def choose(data: ReportData, limit: int) -> list[int]:
    """Ids of the features to browse, among the `candidates`.

    More than `limit` are thinned evenly from the highest lift to the lowest (unscored ones last,
    by id), so that the page shows failures in their true proportion and not only the best.
    """
    lift = dict(
        zip(data.scores["feature"].to_pylist(), data.scores["lift"].to_pylist(), strict=True)
    )

    def order(feature: int) -> tuple[bool, float, int]:
        value = lift.get(feature)
        return (missing(value), 0.0 if value is None or math.isnan(value) else -value, feature)

    ranked = sorted(candidates(data), key=order)
    if len(ranked) <= limit:
        return ranked
    if limit == 1:
        return ranked[:1]
    return [ranked[round(i * (len(ranked) - 1) / (limit - 1))] for i in range(limit)]


def describe(data: ReportData, chosen: list[int], examples: int) -> list[dict[str, Any]]:
    """One JSON-ready record per chosen feature, in the given order.

    Args:
        data: the completed report data.
        chosen: feature ids; one without a row in `features` has null statistics.
        examples: evidence windows per feature: strongest ones and, for about three in eight,
            windows sampled uniformly from all that fire, which show what it does on a usual day.
    """
    wanted = pa.array(chosen, data.windows["feature"].type)
    statistics = {row["feature"]: row for row in _rows(data.features, wanted)}
    scores = {row["feature"]: row for row in _rows(data.scores, wanted)}
    told, windows = _grouped(data.explanations, wanted), _grouped(data.windows, wanted)
    return [
        _record(
            feature,
            statistics.get(feature, {}),
            told.get(feature, []),
            scores.get(feature),
            _pick(windows.get(feature, []), examples),
        )
        for feature in chosen
    ]


def _rows(table: pa.Table, wanted: pa.Array) -> list[dict[str, Any]]:
    kept = table.filter(pc.is_in(table["feature"], value_set=wanted.cast(table["feature"].type)))
    rows: list[dict[str, Any]] = kept.to_pylist()
    return rows


def _grouped(table: pa.Table, wanted: pa.Array) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in _rows(table, wanted):
        groups[row["feature"]].append(row)
    return groups


def _pick(windows: list[dict[str, Any]], examples: int) -> list[dict[str, Any]]:
    ranked = sorted(windows, key=lambda row: row["rank"])
    top = [row for row in ranked if row["kind"] == "top"]
    places = {(row["doc_id"], row["start"]) for row in top}
    sample = [
        row
        for row in ranked
        if row["kind"] == "sample" and (row["doc_id"], row["start"]) not in places
    ]
    usual = min(len(sample), max(examples * 3 // 8, examples - len(top)))
    return top[: examples - usual] + sample[:usual]


def _record(
    feature: int,
    statistics: dict[str, Any],
    told: list[dict[str, Any]],
    score: dict[str, Any] | None,
    windows: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "id": feature,
        "max": _number(statistics.get("max")),
        "histogram": statistics.get("histogram"),
        "facts": _facts(statistics, score),
        "explanations": [_explanation(row) for row in told],
        "examples": [_example(row) for row in windows],
        "row": {
            "density": _number(statistics.get("density")),
            "balanced_accuracy": _number((score or {}).get("balanced_accuracy")),
            "control": _number((score or {}).get("control_balanced_accuracy")),
            "lift": _number((score or {}).get("lift")),
            "top_label": statistics.get("top_label"),
            "top_label_share": _number(statistics.get("top_label_share")),
        },
    }


def _facts(statistics: dict[str, Any], score: dict[str, Any] | None) -> list[list[str]]:
    scored = score or {}
    facts = [
        ["status", (statistics.get("status") or "unknown").replace("_", " ")],
        ["density", percent(statistics.get("density"))],
        ["density, held-out", percent(statistics.get("density_heldout"))],
        ["mean when firing", show(statistics.get("mean_active"))],
        ["largest activation", show(statistics.get("max"))],
        ["encoder–decoder cosine", fixed(statistics.get("decoder_encoder_cosine"))],
        ["balanced accuracy", fixed(scored.get("balanced_accuracy"))],
        ["shuffled control", fixed(scored.get("control_balanced_accuracy"))],
        ["lift", signed(scored.get("lift"))],
        ["F1", fixed(scored.get("f1"))],
        ["AUROC", fixed(scored.get("auroc"))],
        ["answers read", percent(scored.get("coverage"))],
    ]
    if score is not None:
        facts.append(["judged on", f"{show(score['n_pos'])} firing, {show(score['n_neg'])} not"])
    if statistics.get("top_label") is not None:
        share = percent(statistics.get("top_label_share"))
        facts.append(["top label", f"{statistics['top_label']} ({share})"])
    return facts


def _explanation(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": row["explainer_kind"],
        "model": row["model"],
        "llm": uses_language_model(row["explainer_kind"]),
        "text": row["text"] or f"not explained ({row['status']})",
        "told": bool(row["text"]),
    }


def _example(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": row["kind"],
        "doc": str(row["doc_id"]),
        "start": row["start"],
        "max": _number(row["max"]),
        "raw": row["tokens"],
        "shown": display(row["tokens"]),
        "values": [_number(value) or 0 for value in row["activations"]],
    }


def _number(value: float | None) -> float | None:
    """Four significant digits, and null for what JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
