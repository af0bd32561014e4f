"""Scores: what the answers of a judge say about an explanation. Pure functions of stored trials.

Balanced accuracy = (TPR + TNR) / 2, over the answered trials; chance is 0.5 whatever the mix.
Lift = balanced accuracy with a feature's own explanation minus that with another feature's, on the
same windows. Coverage = answered / asked stands beside both. What cannot be computed is null.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext.errors import UserError
from sae_ext.interpret.examples import QUANTILES

OWN, SHUFFLED = "own", "shuffled"
_RESAMPLES = 2000

TRIALS = pa.schema(
    [
        ("feature", pa.int32()),
        ("scorer", pa.string()),
        ("role", pa.string()),
        ("explanation_of", pa.int32()),
        ("explainer_kind", pa.string()),
        ("judge", pa.string()),
        ("model", pa.string()),
        ("template_version", pa.int32()),
        ("example_id", pa.string()),
        ("doc_id", pa.string()),
        ("doc", pa.int64()),
        ("start", pa.int32()),
        ("stratum", pa.string()),
        ("truth", pa.bool_()),
        ("pred", pa.bool_()),
        ("prob", pa.float32()),
        ("parse_status", pa.string()),
        ("attempt", pa.int8()),
    ]
)
"""One row per answer asked for. role: "own" when the judge had the feature's own explanation,
"shuffled" when it had that of the control; explanation_of: the feature it was made for; stratum:
"q1".."q5" (firing, weakest to strongest) or "random", "hard" (silent); pred: null when there is no
answer; parse_status: how it was read, or why there is none."""

SCORES = pa.schema(
    [
        ("feature", pa.int32()),
        ("scorer", pa.string()),
        ("explainer_kind", pa.string()),
        ("judge", pa.string()),
        ("model", pa.string()),
        ("template_version", pa.int32()),
        ("n_pos", pa.int32()),
        ("n_neg", pa.int32()),
        ("n_failed", pa.int32()),
        ("tp", pa.int32()),
        ("fp", pa.int32()),
        ("tn", pa.int32()),
        ("fn", pa.int32()),
        ("coverage", pa.float64()),
        ("balanced_accuracy", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("balanced_accuracy_floor", pa.float64()),
        ("f1", pa.float64()),
        ("auroc", pa.float64()),
        ("brier", pa.float64()),
        ("recall_by_quantile", pa.list_(pa.float64())),
        ("fpr_random", pa.float64()),
        ("fpr_hard", pa.float64()),
        ("control_feature", pa.int32()),
        ("control_coverage", pa.float64()),
        ("control_balanced_accuracy", pa.float64()),
        ("lift", pa.float64()),
    ]
)
"""One row per feature and scorer. n_pos, n_neg: asked; n_failed: of these without an answer;
balanced_accuracy_floor: with missing answers counted as wrong; ci_low, ci_high: 95 % interval of
balanced_accuracy; auroc, brier: null unless the judge gives probabilities; fpr_*: share of silent
windows the judge took for firing; control_*: the same windows judged by `control_feature`'s
explanation."""


@dataclass(frozen=True)
class Confusion:
    """Counts of answered trials by truth and answer."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def balanced_accuracy(self) -> float | None:
        """(TPR + TNR) / 2; None when either class has no answer."""
        if not (self.tp + self.fn and self.tn + self.fp):
            return None
        return (self.tp / (self.tp + self.fn) + self.tn / (self.tn + self.fp)) / 2

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN); None when there is nothing to find or either class is empty."""
        if self.balanced_accuracy is None:
            return None
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of balanced accuracy, normal approximation.

        One success and one failure are added to either class, so that a perfect score on few
        windows does not look certain.
        """
        if self.balanced_accuracy is None:
            return None
        p, n = self.tp + self.fn + 2, self.tn + self.fp + 2
        tpr, tnr = (self.tp + 1) / p, (self.tn + 1) / n
        half = 1.96 * math.sqrt((tpr * (1 - tpr) / p + tnr * (1 - tnr) / n) / 4)
        middle = (tpr + tnr) / 2
        return max(0.0, middle - half), min(1.0, middle + half)


def confusion(truth: Sequence[bool], pred: Sequence[bool | None]) -> Confusion:
    """Counts over the trials with an answer."""
    counts = Counter((t, p) for t, p in zip(truth, pred, strict=True) if p is not None)
    return Confusion(
        tp=counts[True, True],
        fp=counts[False, True],
        tn=counts[False, False],
        fn=counts[True, False],
    )


def auroc(truth: Sequence[bool], prob: Sequence[float]) -> float | None:
    """Probability that a firing window ranks above a silent one, ties half; None without both."""
    label, value = np.asarray(truth, bool), np.asarray(prob, np.float64)
    p, n = int(label.sum()), int((~label).sum())
    if not (p and n):
        return None
    _, inverse, count = np.unique(value, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(count) - (count - 1) / 2
    return float((middle_rank[inverse][label].sum() - p * (p + 1) / 2) / (p * n))


def scores(trials: pa.Table) -> pa.Table:
    """Scores (columns: `SCORES`) from trials (columns: `TRIALS`), ordered by feature."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in trials.to_pylist():
        groups[row["feature"], row["scorer"]].append(row)
    return pa.Table.from_pylist([_score(groups[key]) for key in sorted(groups)], SCORES)


def _score(rows: list[dict[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["role"] == OWN]
    shuffled = [row for row in rows if row["role"] == SHUFFLED]
    found, control = _confusion(own), _confusion(shuffled)
    value, control_value = found.balanced_accuracy, control.balanced_accuracy
    low, high = found.interval or (None, None)
    given = [row for row in own if row["prob"] is not None]
    truth, prob = [row["truth"] for row in given], [row["prob"] for row in given]
    same = ("feature", "scorer", "explainer_kind", "judge", "model", "template_version")
    return {
        **{name: own[0][name] for name in same},
        "n_pos": sum(row["truth"] for row in own),
        "n_neg": sum(not row["truth"] for row in own),
        "n_failed": sum(row["pred"] is None for row in own),
        **vars(found),
        "coverage": _coverage(own),
        "balanced_accuracy": value,
        "ci_low": low,
        "ci_high": high,
        "balanced_accuracy_floor": _floor(own),
        "f1": found.f1,
        "auroc": auroc(truth, prob),
        "brier": float(np.mean(np.square(np.subtract(prob, truth)))) if prob else None,
        "recall_by_quantile": [_yes_rate(own, f"q{q}") for q in range(1, QUANTILES + 1)],
        "fpr_random": _yes_rate(own, "random"),
        "fpr_hard": _yes_rate(own, "hard"),
        "control_feature": shuffled[0]["explanation_of"] if shuffled else None,
        "control_coverage": _coverage(shuffled),
        "control_balanced_accuracy": control_value,
        "lift": None if value is None or control_value is None else value - control_value,
    }


def _confusion(rows: list[dict[str, Any]]) -> Confusion:
    return confusion([row["truth"] for row in rows], [row["pred"] for row in rows])


def _floor(rows: list[dict[str, Any]]) -> float | None:
    """Balanced accuracy with every missing answer counted as wrong."""
    pred = [(not row["truth"]) if row["pred"] is None else row["pred"] for row in rows]
    return confusion([row["truth"] for row in rows], pred).balanced_accuracy


def _coverage(rows: list[dict[str, Any]]) -> float | None:
    return sum(row["pred"] is not None for row in rows) / len(rows) if rows else None


def _yes_rate(rows: list[dict[str, Any]], stratum: str) -> float | None:
    said = [row["pred"] for row in rows if row["stratum"] == stratum and row["pred"] is not None]
    return sum(said) / len(said) if said else None


def summary(scores: pa.Table, plan: pa.Table, seed: int = 0) -> dict[str, Any]:
    """What the scores say about the whole SAE.

    Args:
        scores: columns `SCORES`, of one explainer and one judge.
        plan: the table of `plan.make_plan`.
        seed: seed of the bootstrap.

    Returns:
        explainer_kind, judge, model, template_version; n_features (chosen), n_scored (with a
        balanced accuracy); median_lift with median_lift_ci [low, high] (95 %, bootstrap over
        features) and mean_lift; mean_balanced_accuracy, mean_control_balanced_accuracy and
        weighted_balanced_accuracy (weights: firing rates); coverage (answered / asked over all
        features); status (number of features by status, over all d_sae). Null where nothing was
        computed.

    Raises:
        UserError: the scores come from more than one explainer or judge.
    """
    columns = {name: scores[name].to_pylist() for name in scores.column_names}
    identity = ("explainer_kind", "judge", "model", "template_version")
    judges = set(zip(*(columns[name] for name in identity), strict=True))
    if len(judges) > 1:
        raise UserError(
            f"scores of {len(judges)} different explainers or judges cannot be averaged: summarise "
            "each by itself"
        )
    lifts = _known(columns["lift"])
    asked = sum(columns["n_pos"]) + sum(columns["n_neg"])
    rate = dict(zip(plan["feature"].to_pylist(), plan["firing_rate"].to_pylist(), strict=True))
    of_feature = list(zip(columns["feature"], columns["balanced_accuracy"], strict=True))
    weights = [rate[feature] for feature, value in of_feature if value is not None]
    values = _known(columns["balanced_accuracy"])
    return {
        **dict(zip(identity, judges.pop() if judges else (None,) * 4, strict=True)),
        "n_features": sum(plan["chosen"].to_pylist()),
        "n_scored": len(values),
        "median_lift": float(np.median(lifts)) if len(lifts) else None,
        "median_lift_ci": median_interval(lifts, seed),
        "mean_lift": _mean(lifts),
        "mean_balanced_accuracy": _mean(values),
        "mean_control_balanced_accuracy": _mean(_known(columns["control_balanced_accuracy"])),
        "weighted_balanced_accuracy": float(np.average(values, weights=weights))
        if sum(weights)
        else None,
        "coverage": 1 - sum(columns["n_failed"]) / asked if asked else None,
        "status": dict(sorted(Counter(plan["status"].to_pylist()).items())),
    }


def median_interval(values: npt.NDArray[np.float64], seed: int = 0) -> list[float] | None:
    """95 % percentile-bootstrap interval of the median; None for fewer than two values."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).choice(values, (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def _known(values: list[float | None]) -> npt.NDArray[np.float64]:
    return np.array([v for v in values if v is not None], np.float64)


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None
