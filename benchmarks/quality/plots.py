"""Explained variance against L0, ours and the peers'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.contenders import OURS, Result


def pareto(results: Sequence[Result], path: Path) -> None:
    """Draw the curve of every contender and write it as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    for name in dict.fromkeys(r.name for r in results):
        points = sorted((r.l0, 1 - r.fvu) for r in results if r.name == name)
        style = (
            {"linewidth": 2.2, "marker": "o"} if name == OURS else {"linewidth": 1.2, "marker": "s"}
        )
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_xscale("log")
    ticks = [8, 16, 32, 64, 128, 256]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("L0, active features per row (held-out)")
    axes.set_ylabel("explained variance (held-out)")
    axes.set_title("all-MiniLM-L6-v2, layer 3: equal rows, equal steps, five λ each", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
