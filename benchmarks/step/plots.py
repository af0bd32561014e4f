"""The step benchmark's two pictures: time against active entries, and against density."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, DENSE, PRODUCT, INK, FAINT = "#0b6e4f", "#b5482e", "#7a7a7a", "#222222", "#d9d9d9"


class Fit(NamedTuple):
    """A straight line through measured points."""

    intercept: float
    slope: float
    r2: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares, with the share of the variance that the line explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (intercept + slope * np.asarray(x))
    return Fit(intercept, slope, 1 - residual.var() / np.asarray(y).var())


def scaling(
    path: Path,
    where: str,
    l0: Sequence[float],
    ms: Sequence[float],
    line: Fit,
    dense_ms: float,
    product_ms: float,
) -> None:
    """Whole-step time against L0, with its fitted line (per unit of L0), the dense step and the product."""
    axes = _begin("A step costs its screen plus its active entries", where)
    right = max(l0) * 1.02
    axes.plot([0, right], [line.intercept, line.intercept + line.slope * right], color=OURS, lw=1.5)
    axes.plot(l0, ms, "o", color=OURS, ms=6)
    axes.axhline(dense_ms, color=DENSE, lw=1.5)
    axes.axhline(product_ms, color=PRODUCT, lw=1.2, ls=(0, (4, 3)))
    axes.set(xlim=(0, right), ylim=(0, dense_ms * 1.15))
    axes.set_xlabel("active features per row, L0", color=INK)
    _label(axes, right * 0.01, dense_ms, f"best dense PyTorch step, {dense_ms:.0f} ms", DENSE)
    _label(
        axes, right * 0.99, product_ms, f"one float32 encoder product, {product_ms:.0f} ms", PRODUCT,
        side="right", below=True,
    )  # fmt: skip
    middle = 0.55 * right
    _label(
        axes, middle, line.intercept + line.slope * middle,
        f"Sparsemill: {line.intercept:.0f} ms + {line.slope:.3f} ms · L0   (R² = {line.r2:.4f})",
        OURS, side="right", lift=10,
    )  # fmt: skip
    _save(axes, path)


def density(
    path: Path, where: str, shares: Sequence[float], ms: Sequence[float], dense_ms: float
) -> None:
    """Whole-step time against the share of active features, and the dense step's."""
    axes = _begin("From 1 % of the features active to half of them", where)
    percent = [100 * share for share in shares]
    axes.plot(percent, ms, "o-", color=OURS, lw=1.5, ms=6)
    axes.axhline(dense_ms, color=DENSE, lw=1.5)
    for x, y in zip(percent, ms, strict=True):
        axes.annotate(
            f"{y / dense_ms:.2f}", (x, y), (0, -15), textcoords="offset points", ha="center",
            color=OURS, fontsize=9,
        )  # fmt: skip
    axes.set(xscale="log", xlim=(0.9 * percent[0], 1.1 * percent[-1]))
    axes.set_ylim(0, 1.15 * max(dense_ms, *ms))
    axes.set_xticks(percent, [f"{p:.0f}" for p in percent])
    axes.minorticks_off()
    axes.set_xlabel("active share of all entries, %", color=INK)
    _label(axes, 0.92 * percent[0], dense_ms, f"best dense PyTorch step, {dense_ms:.0f} ms", DENSE)
    _label(
        axes, percent[-1], 0.05 * dense_ms,
        "Sparsemill; the figure at a point is its share of the dense step", OURS, side="right",
    )  # fmt: skip
    _save(axes, path)


def _begin(title: str, where: str) -> Axes:
    figure = Figure(figsize=(8, 4.6), dpi=160)
    axes: Axes = figure.subplots()
    figure.subplots_adjust(left=0.085, right=0.97, top=0.86, bottom=0.13)
    figure.text(0.02, 0.94, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(0.02, 0.885, where, fontsize=9, color="#666666")
    axes.set_ylabel("median time of one training step, ms", color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PRODUCT)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    return axes


def _label(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    color: str,
    *,
    side: str = "left",
    below: bool = False,
    lift: float = 5,
) -> None:
    axes.annotate(
        text, (x, y), (0, -lift if below else lift), textcoords="offset points", ha=side,
        va="top" if below else "bottom", color=color, fontsize=9.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=1.5,
    )  # fmt: skip


def _save(axes: Axes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.get_figure(root=True).savefig(path)
