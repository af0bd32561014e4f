"""How good a reconstruction is, and how sparse: sums streamed in float64, ratios taken once at the end.

x is what the decoder approximates. Definitions (Σ and E over all evaluated rows; never an average
of per-batch ratios):
    FVU = Σ‖x - x̂‖² / Σ‖x - x̄‖²        explained variance = 1 - FVU
    shrinkage = E(‖x̂‖ / ‖x‖)            below 1: reconstructions are too short
    relative reconstruction bias = E‖x̂‖² / E⟨x, x̂⟩       (Rajamanoharan et al. 2024, Gated SAEs, eq. 10)
    L0  = mean number of active features per row
    L1  = E Σ_j z_j; weighted = E Σ_j z_j ‖W_dec,j‖, the same however length is shared between the two
    density of a feature = fraction of the rows in which it fires
    dead = features that fired in none of the evaluated rows; the number of rows is stated with it
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sae_ext.model import SAE
from sae_ext.ops import SparseCode

DENSE = 0.1
"""A feature that fires in more than this fraction of rows counts as dense."""
FREQUENT = 0.01
"""A feature that fires in more than this fraction of rows counts as frequent."""
ROUNDING = 1e-12
"""A variance below this fraction of the mean square is what float64 sums leave of zero."""
DENSITY_EDGES = np.arange(-14, 1) / 2
"""Edges of the density histogram in log10: half decades from 1e-7 to 1. Bins hold their lower edge,
the last one both; what fires more rarely than 1e-7 counts in the first."""
_NO_LENGTH = 1e-12
_PERCENTS = (5, 25, 50, 75, 95)


class ReconstructionSums:
    """Mergeable sums over rows; partition and order of merging do not change the metrics' meaning."""

    def __init__(
        self, d_in: int, d_sae: int, decoder_lengths: npt.NDArray[np.float64] | None = None
    ) -> None:
        """Sums over no rows.

        Args:
            d_in: width of x and x̂.
            d_sae: number of features.
            decoder_lengths: ‖W_dec,j‖ [d_sae], without which the weighted L1 is None.
        """
        self.rows = 0
        self.x = np.zeros(d_in)
        self.fired = np.zeros(d_sae, dtype=np.int64)
        self.activation = np.zeros(d_sae)
        self.decoder_lengths = decoder_lengths
        self.l0_counts = np.zeros(d_sae + 1, dtype=np.int64)
        self.rows_without_length = 0
        self.scalars = dict.fromkeys(
            ("x_sq", "error_sq", "reconstruction_sq", "cross", "cosine", "shrinkage", "clipped"),
            0.0,
        )

    @classmethod
    def of(cls, sae: SAE) -> ReconstructionSums:
        """Sums over no rows yet for this SAE's reconstructions."""
        W_dec = sae.parameters.W_dec
        d_out = sae.architecture.d_out(sae.parameters, sae.more)
        return cls(d_out, W_dec.shape[0], W_dec.double().norm(dim=1).cpu().numpy())

    def update(
        self, x: Tensor, reconstruction: Tensor, code: SparseCode, clip: float | None
    ) -> None:
        """Add a batch: x and reconstruction [B, d_in], and the code that made it."""
        exact, guess = x.double(), reconstruction.double()
        x_norm, guess_norm = exact.norm(dim=1), guess.norm(dim=1)
        cross = (exact * guess).sum(dim=1)
        col, d_sae = code.col.cpu().numpy(), len(self.fired)
        self.rows += len(x)
        self.x += exact.sum(dim=0).cpu().numpy()
        self.fired += np.bincount(col, minlength=d_sae)
        self.activation += np.bincount(col, code.val.double().cpu().numpy(), minlength=d_sae)
        self.l0_counts += np.bincount(code.row_ptr.diff().cpu().numpy(), minlength=d_sae + 1)
        long = x_norm >= _NO_LENGTH
        self.rows_without_length += int((~long).sum())
        both = long & (guess_norm > 0)
        add = {
            "x_sq": x_norm.square().sum(),
            "error_sq": (exact - guess).square().sum(),
            "reconstruction_sq": guess_norm.square().sum(),
            "cross": cross.sum(),
            "cosine": (cross[both] / x_norm[both] / guess_norm[both]).sum(),
            "shrinkage": (guess_norm[long] / x_norm[long]).sum(),
            "clipped": (code.val >= clip).sum() if clip is not None else 0.0,
        }
        for name, value in add.items():
            self.scalars[name] += float(value)

    def merge(self, other: ReconstructionSums) -> None:
        """Add another partition's sums."""
        self.rows += other.rows
        self.x += other.x
        self.fired += other.fired
        self.activation += other.activation
        self.l0_counts += other.l0_counts
        self.rows_without_length += other.rows_without_length
        for name, value in other.scalars.items():
            self.scalars[name] += value

    def metrics(self) -> dict[str, Any]:
        """The metrics; a ratio whose denominator is zero is None, never a made-up number.

        `cosine` and `shrinkage` leave out the `rows_without_length` (‖x‖ < 1e-12), which have
        neither; a reconstruction of zero has cosine 0. `clip_rate` is the share of firings at the
        clip, `density_histogram` the number of features per bin of `DENSITY_EDGES`.
        """
        s, n = self.scalars, self.rows
        if n == 0:
            return {"n_rows": 0}
        variance = s["x_sq"] - float(np.square(self.x).sum()) / n
        nnz = int(self.fired.sum())
        fvu = s["error_sq"] / variance if variance > ROUNDING * s["x_sq"] else None
        long = n - self.rows_without_length
        density = self.fired / n
        lengths = self.decoder_lengths
        return {
            "n_rows": n,
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1 - fvu,
            "mse": s["error_sq"] / n,
            "l0": nnz / n,
            "l0_quantiles": _quantiles(self.l0_counts),
            "l1": float(self.activation.sum()) / n,
            "l1_weighted": None if lengths is None else float(self.activation @ lengths) / n,
            "dead_fraction": float((self.fired == 0).mean()),
            "dead_rows": n,
            "dense_fraction": float((density > DENSE).mean()),
            "frequent_fraction": float((density > FREQUENT).mean()),
            "density_histogram": _density_histogram(density),
            "clip_rate": s["clipped"] / nnz if nnz else None,
            "cosine": s["cosine"] / long if long else None,
            "shrinkage": s["shrinkage"] / long if long else None,
            "rows_without_length": self.rows_without_length,
            "relative_reconstruction_bias": s["reconstruction_sq"] / s["cross"]
            if s["cross"]
            else None,
        }


def evaluate(sae: SAE, batches: Iterable[Tensor]) -> ReconstructionSums:
    """Run the SAE over batches [B, d_in] of raw activations."""
    sums = ReconstructionSums.of(sae)
    for x in batches:
        code = sae.encode(x)
        sums.update(sae.target(x), sae.decode(code), code, sae.clip)
    return sums


def encoder_decoder_cosine(sae: SAE) -> dict[str, float] | None:
    """Quantiles over features of cos(W_enc[:, j], W_dec[j]); features without length are left out.

    None where encoder and decoder have different widths, or no feature has a length.
    """
    p = sae.parameters
    if p.W_enc_rows.shape != p.W_dec.shape:
        return None
    long = (p.W_enc_rows.norm(dim=1) > 0) & (p.W_dec.norm(dim=1) > 0)
    if not long.any():
        return None
    cosine = sae.encoder_decoder_cosine()[long].double().cpu().numpy()
    return {f"p{percent:02d}": float(np.percentile(cosine, percent)) for percent in _PERCENTS}


def _quantiles(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Quantiles of L0 over rows, from the number of rows with each L0."""
    total = np.cumsum(counts)
    return {
        f"p{percent:02d}": float(np.searchsorted(total, percent / 100 * total[-1]))
        for percent in _PERCENTS
    }


def _density_histogram(density: npt.NDArray[np.float64]) -> dict[str, Any]:
    fires = density > 0
    rate = np.maximum(np.log10(density[fires]), DENSITY_EDGES[0])
    return {
        "log10_edges": DENSITY_EDGES.tolist(),
        "features": np.histogram(rate, DENSITY_EDGES)[0].tolist(),
        "never_fired": int((~fires).sum()),
    }
