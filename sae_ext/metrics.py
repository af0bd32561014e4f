"""How good a reconstruction is, and how sparse: sums streamed in float64, ratios taken once at the end.

Definitions (Σ over all evaluated rows; never an average of per-batch ratios):
    FVU = Σ‖x - x̂‖² / Σ‖x - x̄‖²        explained variance = 1 - FVU
    L0  = mean number of active features per row
    dead = features that fired in none of the evaluated rows; the number of rows is stated with it
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_ext.model import SAE
from sae_ext.ops import SparseCode

DENSE = 0.1
"""A feature that fires in more than this fraction of rows counts as dense."""
ROUNDING = 1e-12
"""A variance below this fraction of the mean square is what float64 sums leave of zero."""


class ReconstructionSums:
    """Mergeable sums over rows; partition and order of merging do not change the metrics' meaning."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.rows = 0
        self.x = np.zeros(d_in)
        self.fired = np.zeros(d_sae, dtype=np.int64)
        self.l0_counts = np.zeros(d_sae + 1, dtype=np.int64)
        self.scalars = dict.fromkeys(
            ("x_sq", "error_sq", "reconstruction_sq", "cross", "cosine", "l1", "clipped"), 0.0
        )

    def update(
        self, x: Tensor, reconstruction: Tensor, code: SparseCode, clip: float | None
    ) -> None:
        """Add a batch: x and reconstruction [B, d_in], and the code that made it."""
        exact, guess = x.double(), reconstruction.double()
        x_norm, guess_norm = exact.norm(dim=1), guess.norm(dim=1)
        cross = (exact * guess).sum(dim=1)
        self.rows += len(x)
        self.x += exact.sum(dim=0).numpy()
        self.fired += np.bincount(code.col.numpy(), minlength=len(self.fired))
        self.l0_counts += np.bincount(code.row_ptr.diff().numpy(), minlength=len(self.l0_counts))
        add = {
            "x_sq": x_norm.square().sum(),
            "error_sq": (exact - guess).square().sum(),
            "reconstruction_sq": guess_norm.square().sum(),
            "cross": cross.sum(),
            "cosine": (cross / (x_norm * guess_norm).clamp_min(1e-12)).sum(),
            "l1": code.val.double().sum(),
            "clipped": (code.val >= clip).sum() if clip is not None else torch.tensor(0.0),
        }
        for name, value in add.items():
            self.scalars[name] += float(value)

    def merge(self, other: ReconstructionSums) -> None:
        """Add another partition's sums."""
        self.rows += other.rows
        self.x += other.x
        self.fired += other.fired
        self.l0_counts += other.l0_counts
        for name, value in other.scalars.items():
            self.scalars[name] += value

    def metrics(self) -> dict[str, Any]:
        """The metrics; a ratio whose denominator is zero is None, never a made-up number."""
        s, n = self.scalars, self.rows
        if n == 0:
            return {"n_rows": 0}
        variance = s["x_sq"] - float(np.square(self.x).sum()) / n
        nnz = int(self.fired.sum())
        fvu = s["error_sq"] / variance if variance > ROUNDING * s["x_sq"] else None
        density = self.fired / n
        return {
            "n_rows": n,
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1 - fvu,
            "mse": s["error_sq"] / n,
            "l0": nnz / n,
            "l0_quantiles": _quantiles(self.l0_counts),
            "l1": s["l1"] / n,
            "dead_fraction": float((self.fired == 0).mean()),
            "dead_rows": n,
            "dense_fraction": float((density > DENSE).mean()),
            "clip_rate": s["clipped"] / nnz if nnz else None,
            "cosine": s["cosine"] / n,
            "relative_reconstruction_bias": s["reconstruction_sq"] / s["cross"]
            if s["cross"]
            else None,
        }


def evaluate(sae: SAE, batches: Iterable[Tensor]) -> ReconstructionSums:
    """Run the SAE over batches [B, d_in] of raw activations."""
    sums = ReconstructionSums(sae.d_in, sae.d_sae)
    for x in batches:
        code = sae.encode(x)
        sums.update(x, sae.decode(code), code, sae.clip)
    return sums


def _quantiles(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Quantiles of L0 over rows, from the number of rows with each L0."""
    total = np.cumsum(counts)
    return {
        f"p{percent:02d}": float(np.searchsorted(total, percent / 100 * total[-1]))
        for percent in (5, 25, 50, 75, 95)
    }
