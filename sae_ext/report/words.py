"""Numbers as text, and the report's opening paragraph, each sentence computed from the data.

None and NaN read "not computed": a number that was not measured is never shown as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from sae_ext.report.data import ReportData

MISSING = "not computed"
BASELINE = "baseline:"

_PERCENT = frozenset(
    {"dead_fraction", "dense_fraction", "frequent_fraction", "clip_rate", "coverage"}
)
_SIGNED = frozenset({"median_lift", "median_lift_ci", "mean_lift"})
_LABELS = {
    "fvu": "Fraction of variance unexplained (FVU)",
    "explained_variance": "Explained variance (1 − FVU)",
    "mse": "Squared error per row",
    "cosine": "Cosine of x and x̂",
    "l0": "Active features per row (mean L0)",
    "l1": "Sum of activations per row (mean L1)",
    "l1_weighted": "The same, each times its decoder row’s length",
    "shrinkage": "Mean of ‖x̂‖ / ‖x‖",
    "rows_without_length": "Rows of zeros",
    "relative_reconstruction_bias": "E‖x̂‖² / E[x·x̂] (1 is unbiased)",
    "dead_fraction": "Dead features",
    "dead_rows": "Rows over which dead is counted",
    "dense_fraction": "Dense features (in more than 10 % of rows)",
    "frequent_fraction": "Frequent features (in more than 1 %)",
    "clip_rate": "Activations at the clip",
    "n_rows": "Held-out rows",
    "median_lift": "Median lift over the shuffled control",
    "median_lift_ci": "95 % interval of the median lift",
    "coverage": "Judge’s answers that could be read",
    "explainer_kind": "Explainer",
    "model": "Model",
}
_SUMMARY = (
    "fvu",
    "explained_variance",
    "mse",
    "cosine",
    "l0",
    "dead_fraction",
    "dead_rows",
    "dense_fraction",
    "clip_rate",
    "n_rows",
)
_INTERPRETATION = ("median_lift", "median_lift_ci", "coverage", "explainer_kind", "model")


def missing(value: Any) -> bool:
    """Whether a value stands for "not computed": None, or a float that is not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def show(value: Any) -> str:
    """Any value as text: integers with thousands separators, floats to four significant digits."""
    if missing(value):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, list | tuple):
        return " to ".join(map(show, value)) if len(value) == 2 else ", ".join(map(show, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {show(v)}" for k, v in value.items())
    return str(value)


def _float(value: float, digits: int = 4) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e7:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{min(decimals, 7)}f}"
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    return f"{mantissa} × 10{_superscript(int(exponent))}"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def fixed(value: Any, decimals: int = 2) -> str:
    """A score with a fixed number of decimals, so that columns line up."""
    return MISSING if missing(value) else f"{value:.{decimals}f}"


def signed(value: Any, decimals: int = 2) -> str:
    """A difference, its sign always shown."""
    return MISSING if missing(value) else f"{value:+.{decimals}f}".replace("-", "−")


def percent(value: Any) -> str:
    """A fraction in [0, 1] as a percentage with two significant digits at least."""
    if missing(value):
        return MISSING
    scaled = 100 * float(value)
    if scaled in (0, 100):
        return f"{scaled:.0f} %"
    if scaled >= 1:
        return f"{scaled:.1f} %"
    return f"{scaled:.2g} %" if scaled >= 1e-3 else f"{_float(scaled, 3)} %"


def uses_language_model(explainer_kind: str | None) -> bool:
    """Whether an explainer asks a language model; baselines do not, and say so in their name."""
    return not (explainer_kind or "").startswith(BASELINE)


def held_out_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of every held-out number, the expected ones first and never left out."""
    nested = ("l0_quantiles", "density_histogram")
    return _labelled(_SUMMARY, {k: v for k, v in summary.items() if k not in nested})


def interpretation_rows(interpretation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of every number about the explanations."""
    values = dict(interpretation)
    kind = values.get("explainer_kind")
    if values.get("model") is None and kind and not uses_language_model(kind):
        values["model"] = "none: a baseline without a language model"
    return _labelled(_INTERPRETATION, values)


def _labelled(expected: tuple[str, ...], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = [*expected, *(name for name in values if name not in expected)]
    return [
        (_LABELS.get(name, name.replace("_", " ").capitalize()), _known(name, values.get(name)))
        for name in names
    ]


def _known(name: str, value: Any) -> str:
    """A value's text, in the form its name asks for."""
    if name in _PERCENT:
        return percent(value)
    if name in _SIGNED and isinstance(value, list | tuple):
        return " to ".join(map(signed, value))
    return signed(value) if name in _SIGNED else show(value)


def status_counts(features: pa.Table) -> dict[str, int]:
    """Number of features of each status, in a fixed order, zero counts included."""
    counts = dict.fromkeys(("ok", "dead", "too_rare", "dense"), 0)
    for status in features["status"].to_pylist():
        name = status or "unknown"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _get(values: Mapping[str, Any], *names: str) -> list[Any]:
    return [values.get(name) for name in names]


def opening(data: ReportData) -> str:
    """The report's first paragraph: what came out, in sentences made from the numbers."""
    return " ".join(
        sentence
        for sentence in (
            _reconstruction(data.summary),
            _dictionary(data.summary, data.features.num_rows),
            _explained(data),
            _targets(data),
        )
        if sentence
    )


def _reconstruction(summary: Mapping[str, Any]) -> str:
    fvu, l0, rows = _get(summary, "fvu", "l0", "n_rows")
    where = "On held-out documents" if missing(rows) else f"On {show(rows)} held-out rows"
    if missing(fvu):
        return f"{where}, the quality of the reconstruction was not computed."
    words = f"{where}, the autoencoder explains {percent(1 - fvu)} of the variance"
    if missing(l0):
        return f"{words}; the number of active features was not computed."
    return f"{words} with {l0:.1f} active features per row on average."


def _dictionary(summary: Mapping[str, Any], n_features: int) -> str:
    dead, rows, dense = _get(summary, "dead_fraction", "dead_rows", "dense_fraction")
    whole = f"its {n_features:,} features"
    if missing(dead):
        return f"How many of {whole} are dead was not computed."
    window = "" if missing(rows) else f" (no firing in {show(rows)} rows)"
    tail = "" if missing(dense) else f" and {percent(dense)} are dense"
    return f"Of {whole}, {percent(dead)} are dead{window}{tail}."


def _explained(data: ReportData) -> str:
    told = [row for row in data.explanations.to_pylist() if row["text"]]
    if not told:
        return "No feature was explained."
    count = len({row["feature"] for row in told})
    kind = data.interpretation.get("explainer_kind") or told[0]["explainer_kind"]
    model = data.interpretation.get("model")
    who = f"{model}" if model and uses_language_model(kind) else f"“{kind}”"
    how = "" if uses_language_model(kind) else ", a baseline without a language model"
    noun = "feature was" if count == 1 else "features were"
    start = f"{count:,} {noun} explained by {who}{how}"
    lift, interval, coverage = _get(
        data.interpretation, "median_lift", "median_lift_ci", "coverage"
    )
    if missing(lift):
        return f"{start}; how well the explanations predict firing was not computed."
    span = ""
    if interval and not any(map(missing, interval)):
        span = f" (95 % interval {signed(interval[0])} to {signed(interval[1])})"
    verdict = _verdict(lift, interval)
    read = "" if missing(coverage) else f"; {percent(coverage)} of the judge’s answers were read"
    return (
        f"{start}: the median lift in balanced accuracy over a shuffled explanation is "
        f"{signed(lift)}{span}{verdict}{read}."
    )


def _verdict(lift: float, interval: Any) -> str:
    if interval and not any(map(missing, interval)) and interval[0] <= 0 <= interval[1]:
        return ", which cannot be told from none"
    return ", worse than shuffled explanations" if lift < 0 else ""


def _targets(data: ReportData) -> str:
    judged = [row for row in data.scorecard if row.get("ok") is not None]
    if not judged:
        return ""
    missed = [str(row["metric"]) for row in judged if not row["ok"]]
    if not missed:
        return "The one target was met." if len(judged) == 1 else f"All {len(judged)} targets met."
    return f"{len(judged) - len(missed)} of {len(judged)} targets met; missed: {', '.join(missed)}."
