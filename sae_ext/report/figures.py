"""The Plotly figures of the report and of the dashboard, each a function of one table.

Every figure takes a `Palette`, so the page can carry a light and a dark set. SVG traces hold at
most `POINTS` points (longer tables are thinned evenly) and histograms are binned here: raw
activations never reach the browser. Titles belong to the page, not to the figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

POINTS = 5000
QUANTILES = ("p05", "p25", "p50", "p75", "p95")
_CURVE_POINTS = 1000
_FONT = (
    "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
)


@dataclass(frozen=True)
class Palette:
    """Colours of one appearance of the page."""

    ink: str
    muted: str
    rule: str
    paper: str
    first: str
    second: str
    third: str
    shade: str


LIGHT = Palette(
    ink="#22211e",
    muted="#6d6a62",
    rule="#e6e2d9",
    paper="#fffefb",
    first="#2c6591",
    second="#c0631a",
    third="#a8a397",
    shade="rgba(44,101,145,0.10)",
)
DARK = Palette(
    ink="#e9e6df",
    muted="#a09c92",
    rule="#33353a",
    paper="#1c1d21",
    first="#7db4dd",
    second="#eb9a55",
    third="#6b6a66",
    shade="rgba(125,180,221,0.13)",
)


def training_figures(history: pa.Table, palette: Palette) -> dict[str, go.Figure]:
    """Small multiples over the steps, by name: loss, fvu, l0, dead_fraction, l1, lr.

    Validation values, where the history has them, are drawn as points over FVU and L0.

    Args:
        history: `SCHEMAS["history"]`, one row per logged step; nulls are gaps.
        palette: the page's colours.
    """
    steps = history["step"].to_numpy()
    figures = {}
    for name, log, tickformat in (
        ("loss", True, "~s"),
        ("fvu", True, ".3~g"),
        ("l0", True, "~s"),
        ("dead_fraction", False, ".1~%"),
        ("l1", False, "~g"),
        ("lr", False, "~g"),
    ):
        validation = f"validation_{name}"
        traces = [_curve(steps, _values(history, name), "training", palette.first, "lines")]
        if validation in history.column_names:
            values = _values(history, validation)
            if np.isfinite(values).any():
                traces.append(_curve(steps, values, "validation", palette.second, "markers"))
        figure = go.Figure(traces, _layout(palette, height=210))
        figure.update_layout(showlegend=len(traces) > 1, hovermode="x unified")
        figure.update_xaxes(title_text="step", tickformat="~s")
        figure.update_yaxes(tickformat=tickformat)
        # A log axis drops zeros silently, so it is used only where there are none.
        drawn = np.concatenate([np.asarray(t.y, dtype=float) for t in traces])
        if log and drawn.size and drawn.min() > 0:
            figure.update_yaxes(type="log", nticks=5, **_log_ticks(drawn))
        elif name in ("dead_fraction", "l1", "lr"):
            figure.update_yaxes(rangemode="tozero")
        figures[name] = figure
    return figures


def density_histogram(features: pa.Table, palette: Palette) -> go.Figure:
    """Histogram of log10 firing density, four bins per decade, stacked by status.

    Features that never fired have no logarithm; the page states their number beside the figure.

    Args:
        features: `SCHEMAS["features"]`.
        palette: the page's colours.
    """
    density = _values(features, "density")
    status = np.array([s or "unknown" for s in features["status"].to_pylist()], dtype=object)
    fired = density > 0
    logs = np.log10(density[fired])
    low = math.floor(logs.min()) if logs.size else -4
    edges = np.arange(low, 0.25, 0.25)
    shades = {"ok": palette.first, "too_rare": palette.third, "dense": palette.second}
    bars = []
    for name in dict.fromkeys([*shades, *status[fired].tolist()]):
        counts = np.histogram(logs[status[fired] == name], edges)[0]
        if counts.any():
            bars.append(_bars(edges, counts, name.replace("_", " "), shades.get(name, palette.ink)))
    figure = go.Figure(bars, _layout(palette, height=280))
    figure.update_layout(barmode="stack", bargap=0, showlegend=len(bars) > 1)
    figure.update_xaxes(title_text="firing density (share of rows, log scale)", **_decades(low))
    figure.update_yaxes(title_text="features")
    return figure


def cosine_histogram(features: pa.Table, palette: Palette) -> go.Figure:
    """Histogram of the cosine between each feature's encoder and decoder direction.

    Args:
        features: `SCHEMAS["features"]`; null cosines are left out.
        palette: the page's colours.
    """
    values = _values(features, "decoder_encoder_cosine")
    return _plain_histogram(
        values, np.linspace(-1, 1, 81), "cosine of encoder and decoder", palette
    )


def lift_histogram(scores: pa.Table, palette: Palette) -> go.Figure:
    """Histogram of lift: balanced accuracy of an explanation minus that of a shuffled one.

    Args:
        scores: `SCHEMAS["scores"]`; null lifts are left out.
        palette: the page's colours.
    """
    lift = _values(scores, "lift")
    figure = _plain_histogram(lift, np.linspace(-1, 1, 41), "lift over the control", palette)
    figure.add_vline(x=0, line={"color": palette.ink, "width": 1, "dash": "dot"})
    known = lift[np.isfinite(lift)]
    if known.size:
        figure.add_vline(x=float(np.median(known)), line={"color": palette.second, "width": 2})
    return figure


def own_against_control(scores: pa.Table, palette: Palette) -> go.Figure:
    """Each explanation's balanced accuracy against that of its shuffled control; chance is 0.5.

    Args:
        scores: `SCHEMAS["scores"]`.
        palette: the page's colours.
    """
    own = _values(scores, "balanced_accuracy")
    control = _values(scores, "control_balanced_accuracy")
    rows = _thin(np.flatnonzero(np.isfinite(own) & np.isfinite(control)), POINTS)
    points = go.Scatter(
        x=control[rows],
        y=own[rows],
        mode="markers",
        marker={"color": palette.first, "size": 7, "opacity": 0.6, "line": {"width": 0}},
        customdata=_values(scores, "feature")[rows],
        hovertemplate="feature %{customdata:d}<br>own %{y:.2f}, control %{x:.2f}<extra></extra>",
    )
    figure = go.Figure([points], _layout(palette, height=300))
    lowest = float(min([0.3, *own[rows], *control[rows]]))
    span = [math.floor(lowest * 20) / 20 - 0.02, 1.02]
    line = {"color": palette.muted, "width": 1, "dash": "dot"}
    figure.add_shape(type="line", x0=span[0], y0=span[0], x1=1, y1=1, line=line, layer="below")
    figure.update_xaxes(title_text="balanced accuracy, shuffled control", range=span, showgrid=True)
    figure.update_yaxes(title_text="balanced accuracy, own", range=span)
    return figure


def activation_histogram(
    counts: Sequence[int], edges: Sequence[float] | None, palette: Palette
) -> go.Figure:
    """One feature's activations where it fires, from counts in log-spaced bins.

    Args:
        counts: [bins] number of activations.
        edges: [bins + 1] edges of the bins; bins are numbered when they are not known.
        palette: the page's colours.
    """
    values = np.asarray(counts, dtype=np.int64)
    at = np.arange(values.size + 1) if edges is None else np.log10(np.asarray(edges))
    used = np.flatnonzero(values)
    first, last = (used[0], used[-1] + 1) if used.size else (0, values.size)
    bars = _bars(at[first : last + 1], values[first:last], "activations", palette.first)
    bars.hovertemplate = "%{y}<extra></extra>"
    figure = go.Figure([bars], _layout(palette, height=180))
    figure.update_layout(bargap=0)
    figure.update_xaxes(title_text="activation (log scale)" if edges is not None else "bin")
    if edges is not None:
        ticks = _log_ticks(10.0 ** at[[first, last]])["tickvals"]
        figure.update_xaxes(tickvals=np.log10(ticks), ticktext=[f"{tick:g}" for tick in ticks])
        figure.update_xaxes(range=[at[first], at[last]])
    return figure


def l0_quantiles(summary: Mapping[str, Any], palette: Palette) -> go.Figure | None:
    """Active features per held-out row: 5–95 % thin, 25–75 % thick, median and mean marked.

    Args:
        summary: holds `l0_quantiles` (p05, p25, p50, p75, p95) and `l0`.
        palette: the page's colours.

    Returns:
        The figure, or None when a quantile is missing.
    """
    quantiles = summary.get("l0_quantiles") or {}
    at: list[Any] = [quantiles.get(name) for name in QUANTILES]
    if any(value is None or math.isnan(value) for value in at):
        return None

    def line(x: Sequence[float], width: int, name: str) -> go.Scatter:
        style = {"color": palette.first, "width": width}
        return go.Scatter(x=x, y=[0, 0], mode="lines", line=style, name=name, hoverinfo="x+name")

    def mark(x: float, symbol: str, color: str, name: str) -> go.Scatter:
        style = {"symbol": symbol, "size": 13, "color": color}
        style["line"] = {"color": palette.paper, "width": 2}
        return go.Scatter(x=[x], y=[0], mode="markers", marker=style, name=name, hoverinfo="x+name")

    traces = [
        line([at[0], at[4]], 2, "5–95 %"),
        line([at[1], at[3]], 12, "25–75 %"),
        mark(at[2], "circle", palette.first, "median"),
    ]
    mean = summary.get("l0")
    if mean is not None and not math.isnan(mean):
        traces.append(mark(mean, "diamond", palette.second, "mean"))
    figure = go.Figure(traces, _layout(palette, height=150))
    figure.update_xaxes(title_text="active features per row", range=[0, 1.06 * max(at[4], 1)])
    figure.update_yaxes(visible=False, range=[-1, 1], fixedrange=True)
    return figure


def tuning_scatter(
    trials: pa.Table,
    best: int | None,
    band: tuple[float, float] | None,
    palette: Palette,
) -> go.Figure:
    """FVU against L0 of every finished trial, the wanted L0 band shaded, the best trial marked.

    Args:
        trials: `SCHEMAS["trials"]`; trials without numbers are left out (the page counts them).
        best: number of the winning trial.
        band: lowest and highest wanted mean L0.
        palette: the page's colours.
    """
    l0, fvu = _values(trials, "l0"), _values(trials, "fvu")
    rows = _thin(np.flatnonzero(np.isfinite(fvu) & (l0 > 0)), POINTS)
    number, l1, lr = (_values(trials, name)[rows] for name in ("trial", "l1", "lr"))
    won = number == (-1 if best is None else best)
    traces = []
    for chosen, name, color, symbol, size in (
        (~won, "trial", palette.first, "circle", 9),
        (won, "best", palette.second, "star", 16),
    ):
        if chosen.any():
            traces.append(
                go.Scatter(
                    x=l0[rows][chosen],
                    y=fvu[rows][chosen],
                    name=name,
                    mode="markers",
                    marker={"color": color, "symbol": symbol, "size": size},
                    customdata=np.stack([number, l1, lr], axis=1)[chosen],
                    hovertemplate="trial %{customdata[0]:d}<br>L0 %{x:.3~g}, FVU %{y:.3~g}<br>"
                    "λ %{customdata[1]:.3~g}, learning rate %{customdata[2]:.2~e}<extra></extra>",
                )
            )
    figure = go.Figure(traces, _layout(palette, height=320))
    figure.update_layout(showlegend=len(traces) > 1)
    if band is not None:
        figure.add_vrect(
            x0=band[0], x1=band[1], fillcolor=palette.shade, line_width=0, layer="below"
        )
    figure.update_xaxes(title_text="mean L0 (log scale)", type="log", **_log_ticks(l0[rows]))
    figure.update_yaxes(title_text="FVU")
    return figure


def _layout(palette: Palette, height: int) -> dict[str, Any]:
    axis = {
        "gridcolor": palette.rule,
        "linecolor": palette.rule,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"size": 12, "color": palette.muted}, "standoff": 8},
        "tickfont": {"size": 11, "color": palette.muted},
    }
    return {
        "template": go.layout.Template(),
        "height": height,
        "autosize": True,
        "margin": {"l": 44, "r": 10, "t": 12, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "size": 12, "color": palette.ink},
        "hoverlabel": {"bgcolor": palette.paper, "bordercolor": palette.rule},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "showlegend": False,
        "xaxis": {**axis, "showgrid": False, "showline": True},
        "yaxis": axis,
    }


def _values(table: pa.Table, column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(
        [math.nan if v is None else v for v in table[column].to_pylist()], dtype=np.float64
    )


def _thin(rows: np.ndarray[Any, Any], limit: int) -> np.ndarray[Any, Any]:
    if rows.size <= limit:
        return rows
    return rows[np.linspace(0, rows.size - 1, limit).round().astype(np.int64)]


def _curve(
    steps: np.ndarray[Any, Any], values: np.ndarray[Any, Any], name: str, color: str, mode: str
) -> go.Scatter:
    rows = _thin(np.flatnonzero(np.isfinite(values)), _CURVE_POINTS)
    return go.Scatter(
        x=steps[rows],
        y=values[rows],
        name=name,
        mode=mode,
        line={"color": color, "width": 1.75},
        marker={"color": color, "size": 6},
        hovertemplate="%{y:.4~g}",
    )


def _bars(
    edges: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], name: str, color: str
) -> go.Bar:
    return go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=np.diff(edges),
        name=name,
        marker={"color": color, "line": {"width": 0}},
        hovertemplate="%{y} features<extra>" + name + "</extra>",
    )


def _plain_histogram(
    values: np.ndarray[Any, Any], edges: np.ndarray[Any, Any], title: str, palette: Palette
) -> go.Figure:
    known = values[np.isfinite(values)]
    counts = np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0]
    used = np.flatnonzero(counts)
    if used.size:
        first, last = max(0, used[0] - 1), min(counts.size, used[-1] + 2)
        counts, edges = counts[first:last], edges[first : last + 1]
    figure = go.Figure([_bars(edges, counts, title, palette.first)], _layout(palette, height=280))
    figure.update_layout(bargap=0)
    figure.update_xaxes(title_text=title)
    figure.update_yaxes(title_text="features")
    return figure


def _decades(low: int) -> dict[str, Any]:
    ticks = list(range(low, 1))
    shares = [f"{float(f'1e{t + 2}'):.{max(0, -t - 2)}f} %" for t in ticks]
    return {"tickvals": ticks, "ticktext": shares, "range": [low, 0.05]}


def _log_ticks(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Tick marks at 1, 2 and 5 times powers of ten; fewer when there are many powers."""
    if not values.size:
        return {}
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    steps = (1, 2, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,)
    ticks = [m * 10.0**e for e in range(low, high + 1) for m in steps]
    return {"tickvals": ticks}
