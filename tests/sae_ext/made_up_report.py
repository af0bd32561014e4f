"""Test fixture: a plausible but invented campaign, as the tables a report is made from.

None of its numbers was measured; they only have the shapes and ranges of real ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from sae_ext.report import SCHEMAS, ReportData

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>"
"""What a corpus may hold: text that would run if any part of the page forgot to escape it."""

_TEXT = """
return the value of a path as string ; if no file is found , raise an error and close it , else a
un ##iform ##ly sample ##d token ##izer ( see open ) for each item in this list call iter ##ate
"""
_WORDS = _TEXT.split()
_TOPICS = (
    ["regular", "expression", "pattern"],
    ["socket", "address", "host"],
    ["thread", "lock", "acquire"],
    ["decimal", "rounding", "context"],
    ["encode", "##d", "bytes"],
    ["calendar", "week", "##day"],
)
_EDGES = np.geomspace(1e-3, 1e2, 65)


def made_up_data(
    *, n_features: int = 600, shown: int = 24, hostile: bool = False, **changes: Any
) -> ReportData:
    """A whole report's data, drawn from a fixed seed; `changes` replace fields.

    Args:
        n_features: rows of the feature table.
        shown: features with evidence, explanations and scores.
        hostile: put `HOSTILE` wherever text from outside can appear.
        changes: fields of `ReportData` to replace.
    """
    rng = np.random.default_rng(0)
    table = _features(rng, n_features, hostile)
    live = [f for f, s in enumerate(table["status"].to_pylist()) if s == "ok"][:shown]
    fields: dict[str, Any] = {
        "name": f"made up {HOSTILE}" if hostile else "standard-library-docstrings",
        "recipe": {"sae": {"d_sae": n_features}, "corpus": {"source": HOSTILE if hostile else "x"}},
        "keys": {"activations": "5f0c9a11d2e84b70", "saes": "0b6e1d2c3f4a5968"},
        "scorecard": _scorecard(),
        "summary": _summary(),
        "history": _history(rng),
        "features": table,
        "windows": _windows(rng, live, hostile),
        "explanations": _explanations(live, hostile),
        "scores": _scores(rng, live),
        "interpretation": {
            "median_lift": 0.21,
            "median_lift_ci": [0.17, 0.25],
            "coverage": 1.0,
            "explainer_kind": "baseline:keywords",
            "model": None,
        },
        "trials": _trials(rng),
        "best_trial": 7,
        "l0_band": (16.0, 64.0),
        "histogram_edges": _EDGES.tolist(),
        "versions": {"sparsemill": "0.1.0", "torch": "2.13.0"},
    }
    return ReportData(**{**fields, **changes})


def _table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMAS[name])


def _scorecard() -> list[dict[str, Any]]:
    return [
        {"metric": "FVU", "value": 0.1834, "target": "≤ 0.20", "ok": True, "note": "held out"},
        {"metric": "Mean L0", "value": 31.42, "target": "16 to 64", "ok": True, "note": ""},
        {
            "metric": "Dead features",
            "value": 0.0613,
            "target": "≤ 0.05",
            "ok": False,
            "note": "no firing in 1,204,224 rows",
        },
        {"metric": "AUROC", "value": None, "target": None, "ok": None, "note": "judge gave none"},
    ]


def _summary() -> dict[str, Any]:
    return {
        "fvu": 0.1834,
        "explained_variance": 0.8166,
        "mse": 70.43,
        "cosine": 0.913,
        "l0": 31.42,
        "l0_quantiles": {"p05": 14.0, "p25": 23.0, "p50": 30.0, "p75": 38.0, "p95": 54.0},
        "dead_fraction": 0.0613,
        "dead_rows": 1_204_224,
        "dense_fraction": 0.0007,
        "n_rows": 48_213,
        "clip_rate": None,
    }


def _history(rng: np.random.Generator) -> pa.Table:
    rows = []
    for step in range(0, 3001, 25):
        decay = np.exp(-step / 350)
        noise = 1 + 0.02 * rng.standard_normal()
        checked = step % 500 == 0 and step > 0
        rows.append(
            {
                "step": step,
                "loss": (420 * decay + 165) * noise,
                "mse": (400 * decay + 70) * noise,
                "fvu": (0.9 * decay + 0.18) * noise,
                "l0": 1400 * np.exp(-step / 120) + 31 * noise,
                "dead_fraction": 0.06 * (1 - decay),
                "lr": 1e-3 * min(1.0, step / 100, (3000 - step) / 600),
                "l1": 10.0 * min(1.0, step / 500),
                "validation_fvu": 0.9 * decay + 0.185 if checked else None,
                "validation_l0": 31.5 if checked else None,
            }
        )
    return _table("history", rows)


def _features(rng: np.random.Generator, count: int, hostile: bool) -> pa.Table:
    rows = []
    for feature in range(count):
        density = float(10 ** rng.normal(-2.2, 0.6))
        status = "dead" if feature % 16 == 5 else "dense" if density > 0.5 else "ok"
        status = "too_rare" if status == "ok" and density < 5e-4 else status
        dead = status == "dead"
        peak = float(rng.uniform(4, 14))
        shape = np.exp(-0.5 * ((_EDGES[:-1] - peak / 5) / (peak / 6)) ** 2)
        labelled = feature % 3 == 0
        rows.append(
            {
                "feature": feature,
                "density": 0.0 if dead else density,
                "density_heldout": 0.0 if dead else density * 1.03,
                "mean_active": None if dead else peak / 4,
                "max": 0.0 if dead else peak,
                "status": status,
                "decoder_encoder_cosine": float(np.clip(rng.normal(0.7, 0.12), -1, 1)),
                "top_label": (HOSTILE if hostile else "re") if labelled else None,
                "top_label_share": 0.42 if labelled else None,
                "histogram": [0] * 64 if dead else (4000 * shape).astype(int).tolist(),
            }
        )
    return _table("features", rows)


def _windows(rng: np.random.Generator, live: list[int], hostile: bool) -> pa.Table:
    rows = []
    for feature in live:
        topic = _TOPICS[feature % len(_TOPICS)]
        for rank in range(12):
            tokens = [str(w) for w in rng.choice(_WORDS, 32)]
            values = np.zeros(32)
            at = int(rng.integers(2, 28))
            strength = 12 * 0.9**rank if rank < 8 else float(rng.uniform(0.5, 6))
            tokens[at : at + len(topic)] = topic
            values[at : at + len(topic)] = strength * np.array([1.0, 0.55, 0.3])[: len(topic)]
            if hostile and rank == 0:
                tokens[0] = HOSTILE
            rows.append(
                {
                    "feature": feature,
                    "kind": "top" if rank < 8 else "sample",
                    "rank": rank if rank < 8 else rank - 8,
                    "doc_id": f"re.{feature}.{rank}",
                    "start": 32 * rank,
                    "tokens": tokens,
                    "activations": values,
                    "max": strength,
                }
            )
    return _table("windows", rows)


def _explanations(live: list[int], hostile: bool) -> pa.Table:
    rows = [
        {
            "feature": feature,
            "explainer_kind": "baseline:keywords",
            "model": None,
            "text": HOSTILE if hostile else ", ".join(_TOPICS[feature % len(_TOPICS)]),
            "status": "ok",
        }
        for feature in live
    ]
    rows[-1] |= {"text": None, "status": "no reply"}
    return _table("explanations", rows)


def _scores(rng: np.random.Generator, live: list[int]) -> pa.Table:
    rows = []
    for feature in live[:-1]:
        own = float(np.clip(rng.normal(0.76, 0.1), 0.4, 1))
        control = float(np.clip(rng.normal(0.53, 0.05), 0.3, 1))
        rows.append(
            {
                "feature": feature,
                "balanced_accuracy": own,
                "control_balanced_accuracy": control,
                "lift": own - control,
                "f1": own - 0.02,
                "auroc": None,
                "coverage": 1.0,
                "n_pos": 20,
                "n_neg": 20,
            }
        )
    return _table("scores", rows)


def _trials(rng: np.random.Generator) -> pa.Table:
    rows = []
    for trial in range(12):
        l1 = float(10 ** rng.uniform(0.5, 1.5)) if trial != 7 else 5.4
        l0, fvu = 320 / l1, 0.12 + 0.012 * l1 + float(rng.normal(0, 0.008))
        failed = trial == 3
        rows.append(
            {
                "trial": trial,
                "lr": float(10 ** rng.uniform(-3.5, -2.5)),
                "l1": l1,
                "fvu": None if failed else fvu,
                "l0": None if failed else l0,
                "objective": None if failed else fvu,
                "state": "failed" if failed else "done",
                "error": "loss is not finite" if failed else None,
            }
        )
    return _table("trials", rows)
