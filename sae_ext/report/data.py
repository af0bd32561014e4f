"""What a report is made of: plain tables and dicts, and the columns each table must have.

The page knows nothing of stores or stages; whoever holds the tables can make a report, from a
notebook as well as from a campaign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sae_ext.errors import UserError

SCHEMAS: dict[str, pa.Schema] = {
    "history": pa.schema(
        [
            ("step", pa.int64()),
            ("loss", pa.float64()),
            ("mse", pa.float64()),
            ("fvu", pa.float64()),
            ("l0", pa.float64()),
            ("dead_fraction", pa.float64()),
            ("lr", pa.float64()),
            ("l1", pa.float64()),
            ("validation_fvu", pa.float64()),
            ("validation_l0", pa.float64()),
        ]
    ),
    "features": pa.schema(
        [
            ("feature", pa.int32()),
            ("density", pa.float64()),
            ("density_heldout", pa.float64()),
            ("mean_active", pa.float32()),
            ("max", pa.float32()),
            ("status", pa.string()),
            ("decoder_encoder_cosine", pa.float32()),
            ("top_label", pa.string()),
            ("top_label_share", pa.float32()),
            ("histogram", pa.list_(pa.int64())),
        ]
    ),
    "windows": pa.schema(
        [
            ("feature", pa.int32()),
            ("kind", pa.string()),
            ("rank", pa.int32()),
            ("doc_id", pa.string()),
            ("start", pa.int32()),
            ("tokens", pa.list_(pa.string())),
            ("activations", pa.list_(pa.float32())),
            ("max", pa.float32()),
        ]
    ),
    "explanations": pa.schema(
        [
            ("feature", pa.int32()),
            ("explainer_kind", pa.string()),
            ("model", pa.string()),
            ("text", pa.string()),
            ("status", pa.string()),
        ]
    ),
    "scores": pa.schema(
        [
            ("feature", pa.int32()),
            ("balanced_accuracy", pa.float64()),
            ("control_balanced_accuracy", pa.float64()),
            ("lift", pa.float64()),
            ("f1", pa.float64()),
            ("auroc", pa.float64()),
            ("coverage", pa.float64()),
            ("n_pos", pa.int32()),
            ("n_neg", pa.int32()),
        ]
    ),
    "trials": pa.schema(
        [
            ("trial", pa.int32()),
            ("lr", pa.float64()),
            ("l1", pa.float64()),
            ("fvu", pa.float64()),
            ("l0", pa.float64()),
            ("objective", pa.float64()),
            ("state", pa.string()),
            ("error", pa.string()),
        ]
    ),
}
"""Columns of each table. One row per: logged step, feature, evidence window, explanation, scored
feature, tuning trial. `SCHEMAS["scores"].empty_table()` stands for "nothing was scored"."""

_OPTIONAL: dict[str, frozenset[str]] = {
    "history": frozenset({"validation_fvu", "validation_l0"}),
    "features": frozenset(
        {
            "density_heldout",
            "decoder_encoder_cosine",
            "top_label",
            "top_label_share",
            "histogram",
        }
    ),
    "explanations": frozenset({"model"}),
    "scores": frozenset({"auroc", "f1"}),
    "trials": frozenset({"error"}),
}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the page shows. A value of None anywhere reads "not computed" on the page."""

    name: str
    """Name of the campaign."""
    recipe: Mapping[str, Any]
    """The resolved recipe, printed as YAML."""
    keys: Mapping[str, str]
    """Stage to artefact key."""
    scorecard: Sequence[Mapping[str, Any]]
    """Rows of metric, value, target, ok, note; ok is None where there is no target."""
    summary: Mapping[str, Any]
    """Held-out numbers: fvu, explained_variance, mse, cosine, l0, l0_quantiles (p05, p25, p50, p75,
    p95), dead_fraction, dead_rows (rows over which dead is counted), dense_fraction, clip_rate,
    n_rows, and any further ones."""
    history: pa.Table
    """Training curves, `SCHEMAS["history"]`."""
    features: pa.Table
    """Feature statistics, `SCHEMAS["features"]`."""
    windows: pa.Table
    """Evidence of the features to be browsed, `SCHEMAS["windows"]`; kind is `top` or `sample`."""
    explanations: pa.Table
    """Explanations, `SCHEMAS["explanations"]`; the first of a feature is the one in the table."""
    scores: pa.Table
    """Scores of explanations, `SCHEMAS["scores"]`."""
    interpretation: Mapping[str, Any]
    """Summary over features: median_lift, median_lift_ci [low, high], coverage, explainer_kind,
    model, and any further ones."""
    trials: pa.Table | None = None
    """Tuning trials, `SCHEMAS["trials"]`, or None when nothing was tuned."""
    best_trial: int | None = None
    """Number of the trial that won."""
    l0_band: tuple[float, float] | None = None
    """Wanted mean L0, shaded in the tuning plot."""
    histogram_edges: Sequence[float] | None = None
    """Edges of the activation histograms, one more than there are bins."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Software to version."""

    def completed(self) -> ReportData:
        """A copy whose tables have every column, absent optional ones filled with null.

        Raises:
            UserError: a table lacks a column, or a window has not one activation per token.
        """
        tables = {name: complete(name, getattr(self, name)) for name in SCHEMAS if name != "trials"}
        if self.trials is not None:
            tables["trials"] = complete("trials", self.trials)
        _check_windows(tables["windows"])
        return replace(self, **tables)


def complete(name: str, table: pa.Table) -> pa.Table:
    """`table` with the columns of `SCHEMAS[name]`, absent optional ones filled with null.

    Raises:
        UserError: a column that is not optional is missing.
    """
    schema = SCHEMAS[name]
    for column in schema:
        if column.name in table.column_names:
            continue
        if column.name not in _OPTIONAL.get(name, frozenset()):
            raise UserError(
                f"report: table '{name}' has no column '{column.name}': it needs "
                f"{', '.join(schema.names)}"
            )
        table = table.append_column(column.name, pa.nulls(table.num_rows, column.type))
    return table.select(schema.names)


def campaign_table(data: ReportData) -> pa.Table:
    """The campaign as one table, one row per feature: campaign.parquet.

    Columns: those of `SCHEMAS["features"]`; explainer_kind, model, explanation and
    explanation_status (of the feature's first explanation); those of `SCHEMAS["scores"]` without
    the id. What a feature does not have is null.
    """
    data = data.completed()
    told = data.explanations.rename_columns(
        ["feature", "explainer_kind", "model", "explanation", "explanation_status"]
    )
    table = data.features
    for other in (told, data.scores):
        place: dict[int, int] = {}
        for row, feature in enumerate(other["feature"].to_pylist()):
            place.setdefault(feature, row)
        rows = pa.array([place.get(f) for f in data.features["feature"].to_pylist()], pa.int64())
        for column in other.column_names[1:]:
            table = table.append_column(column, other[column].take(rows))
    return table


def campaign_facts(data: ReportData) -> dict[str, Any]:
    """What a reader of `campaign_table` needs beside it, JSON-ready, NaN turned to None.

    Keys: name, scorecard, summary, interpretation, histogram_edges.
    """
    names = ("name", "scorecard", "summary", "interpretation", "histogram_edges")
    facts: dict[str, Any] = {name: _jsonable(getattr(data, name)) for name in names}
    return facts


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_windows(windows: pa.Table) -> None:
    tokens, values = (pc.list_value_length(windows[c]) for c in ("tokens", "activations"))
    row = pc.index(pc.fill_null(pc.equal(tokens, values), False), False).as_py()
    if row >= 0:
        raise UserError(
            f"report: table 'windows', row {row} has {tokens[row]} tokens but {values[row]} "
            "activations: each token needs one"
        )
