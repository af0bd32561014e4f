"""Composes the report: tables to figures, words and browser records, and these to one HTML page.

Style sheet and script are inlined; Plotly lies beside the page and is loaded by its relative path.
The page's content security policy lets nothing else run or load, so text from a corpus stays text
even if it looks like a script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_ext.errors import UserError
from sae_ext.report import browser, figures, words
from sae_ext.report.data import ReportData

_HISTORY = {
    "loss": ("Loss", "reconstruction + λ · sparsity"),
    "fvu": ("FVU", "fraction of variance unexplained"),
    "l0": ("L0", "active features per row"),
    "dead_fraction": ("Dead", "share of features"),
    "l1": ("λ", "weight of the sparsity term"),
    "lr": ("Learning rate", "Adam"),
}
_FOR_JSON_IN_HTML = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def build_report(
    data: ReportData, *, max_features: int = 60, examples: int = 8
) -> dict[str, bytes]:
    """The report as files to be laid side by side.

    Args:
        data: everything the page shows.
        max_features: features in the browser at most, spread evenly from best to worst lift.
        examples: evidence windows per feature at most.

    Returns:
        `report.html` and the `plotly.min.js` it loads.

    Raises:
        UserError: a table lacks a column, a window is uneven, or a limit is below 1.
    """
    for name, value in (("max_features", max_features), ("examples", examples)):
        if value < 1:
            raise UserError(f"report: {name} must be at least 1, got {value}")
    data = data.completed()
    sets = {
        "light": _figures(data, figures.LIGHT),
        "dark": _figures(data, figures.DARK),
    }
    chosen = browser.choose(data, max_features)
    records = browser.describe(data, chosen, examples)
    embedded = {
        "figures": {k: {n: json.loads(f.to_json()) for n, f in v.items()} for k, v in sets.items()},
        "features": records,
        "edges": _rounded_edges(data),
    }
    script = _resource("page.js")
    template = _environment().get_template("page.html.j2")
    html = template.render(
        data=data,
        css=Markup(_resource("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        embedded=Markup(_json_for_html(embedded)),
        opening=words.opening(data),
        shown=set(sets["light"]),
        captions=_captions(data),
        history_names=_HISTORY,
        statuses=words.status_counts(data.features),
        held_out=words.held_out_rows(data.summary),
        interpretation=words.interpretation_rows(data.interpretation),
        records=records,
        candidates=len(browser.candidates(data)),
        recipe=yaml.safe_dump(_plain(data.recipe), sort_keys=False, allow_unicode=True),
    )
    return {"report.html": html.encode(), "plotly.min.js": get_plotlyjs().encode()}


def _figures(data: ReportData, palette: figures.Palette) -> dict[str, go.Figure]:
    """Figures by the name of their place on the page; what was not computed has none."""
    made: dict[str, go.Figure] = {}
    if data.history.num_rows:
        curves = figures.training_figures(data.history, palette)
        made |= {f"history-{name}": figure for name, figure in curves.items()}
    if data.features.num_rows:
        made["density"] = figures.density_histogram(data.features, palette)
        if data.features["decoder_encoder_cosine"].null_count < data.features.num_rows:
            made["cosine"] = figures.cosine_histogram(data.features, palette)
    quantiles = figures.l0_quantiles(data.summary, palette)
    if quantiles is not None:
        made["l0"] = quantiles
    if data.trials is not None and data.trials.num_rows:
        made["tuning"] = figures.tuning_scatter(data.trials, data.best_trial, data.l0_band, palette)
    if data.scores.num_rows:
        made["lift"] = figures.lift_histogram(data.scores, palette)
        made["control"] = figures.own_against_control(data.scores, palette)
    return made


def _captions(data: ReportData) -> dict[str, str]:
    """One computed line under each figure that needs one."""
    captions = {}
    silent = sum(1 for d in data.features["density"].to_pylist() if d == 0)
    captions["density"] = (
        f"{data.features.num_rows:,} features; {silent:,} never fired, so have no logarithm and "
        "are not drawn."
    )
    quantiles = data.summary.get("l0_quantiles") or {}
    if quantiles:
        named = ", ".join(
            f"{name} {words.fixed(quantiles.get(name), 0)}" for name in figures.QUANTILES
        )
        captions["l0"] = (
            f"Quantiles: {named}. Thin line: 5 to 95 %; thick: 25 to 75 %; circle: median; "
            "diamond: mean."
        )
    if data.scores.num_rows:
        lift = np.array([v for v in data.scores["lift"].to_pylist() if not words.missing(v)])
        better = int((lift > 0).sum())
        captions["lift"] = (
            f"{lift.size:,} scored features; {better:,} explained better than their control. "
            "Dotted: no lift. Solid: median."
        )
        captions["control"] = (
            "One point per feature. Above the diagonal the explanation beats a shuffled one; "
            "chance is 0.5."
        )
    if data.trials is not None:
        broken = sum(1 for v in data.trials["fvu"].to_pylist() if words.missing(v))
        band = ""
        if data.l0_band is not None:
            band = f" Shaded: the wanted L0, {data.l0_band[0]:g} to {data.l0_band[1]:g}."
        failed = "" if broken == 0 else f" {broken} without a result, not drawn."
        captions["tuning"] = f"{data.trials.num_rows} trials on validation documents.{failed}{band}"
    return captions


def _rounded_edges(data: ReportData) -> list[float] | None:
    if data.histogram_edges is None:
        return None
    return [float(f"{edge:.3g}") for edge in data.histogram_edges]


def _json_for_html(content: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever text it holds."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_FOR_JSON_IN_HTML)


def _plain(value: Any) -> Any:
    """Mappings and sequences as the dicts and lists YAML has words for."""
    if hasattr(value, "items"):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        show=words.show,
        fixed=words.fixed,
        signed=words.signed,
        percent=words.percent,
    )
    return environment
