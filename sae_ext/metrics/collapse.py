"""Whether codes still tell classes apart, or have collapsed to one pattern for everything.

Sparsity and explained variance can look well while every row has nearly the same code. With H the
codes [n, d_sae], μ_c the mean code of class c, and σ the singular values of H centred:
    class cosine     C = mean over pairs of classes of cos(μ_a, μ_b)
    top-1 share      = max_j E z_j / Σ_j E z_j
    effective rank   = exp(-Σ p log p), p = σ / Σσ       (Roy & Vetterli 2007); 0 where all rows are alike
    participation    = (Σσ²)² / Σσ⁴
    Gini             of the mean activations: 0 where all are equal, near 1 where one has everything
Class means alone cannot tell "all rows alike" from "other rows, same mean", so the mean cosine of
pairs of rows within a class stands beside them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sae_ext.errors import UserError
from sae_ext.metrics.reconstruction import ROUNDING
from sae_ext.ops import SparseCode

ALARMS: dict[str, tuple[Callable[[float, float], bool], float]] = {
    "class_cosine": (operator.ge, 0.99),
    "top1_share": (operator.gt, 0.5),
    "effective_rank": (operator.lt, 2.0),
    "projection_variance": (operator.lt, 0.05),
}
"""The entries of the panel that tell a collapse, and how: the alarm sounds where this holds."""
EXACT_FEATURES = 2048
"""Up to this many features HᵀH is summed over all rows; beyond, the spectrum is that of a sample."""
SAMPLE_ROWS = 1024

Float64 = npt.NDArray[np.float64]


class CollapseSums:
    """Mergeable sums over the codes of rows with a class each."""

    def __init__(self, d_sae: int, classes: Sequence[str], seed: int = 0) -> None:
        """Sums over no rows.

        Args:
            d_sae: number of features.
            classes: names; a row's label is its class' place here.
            seed: of the sample of rows that stands for all where d_sae > EXACT_FEATURES. Give the
                partitions of one pass seeds of their own.
        """
        k = len(classes)
        self.classes = tuple(classes)
        self.rows = np.zeros(k, dtype=np.int64)
        self.fired = np.zeros(k, dtype=np.int64)
        self.code = np.zeros((k, d_sae))
        self.active_rows = np.zeros(k, dtype=np.int64)
        self.direction = np.zeros((k, d_sae))
        self.second: _SecondMoment | _Sample = (
            _SecondMoment(d_sae) if d_sae <= EXACT_FEATURES else _Sample(d_sae, seed)
        )

    def update(self, code: SparseCode, labels: Tensor) -> None:
        """Add a batch: the code of B rows, and their labels, integers [B].

        Raises:
            UserError: there is not one label per row, or one is not the place of a class.
        """
        ptr, col = code.row_ptr.cpu().numpy(), code.col.cpu().numpy()
        val, label = code.val.double().cpu().numpy(), labels.cpu().numpy()
        l0 = np.diff(ptr)
        k, d_sae = self.code.shape
        if label.shape != l0.shape or label.dtype.kind not in "iu":
            raise UserError(
                f"labels are {label.dtype} {list(label.shape)}: give an integer for each of the "
                f"{len(l0)} rows"
            )
        wrong = np.flatnonzero((label < 0) | (label >= k))
        if len(wrong):
            raise UserError(
                f"row {wrong[0]} of the batch has label {label[wrong[0]]}, but there are {k} classes "
                f"({', '.join(self.classes)}): labels count from 0"
            )
        row = np.repeat(np.arange(len(l0)), l0)
        norm = np.sqrt(np.bincount(row, np.square(val), minlength=len(l0)))
        cell = label[row].astype(np.int64) * d_sae + col
        self.rows += np.bincount(label, minlength=k)
        self.fired += np.bincount(label, l0, minlength=k).astype(np.int64)
        self.code += np.bincount(cell, val, minlength=k * d_sae).reshape(k, d_sae)
        self.active_rows += np.bincount(label[norm > 0], minlength=k)
        with np.errstate(invalid="ignore"):
            unit = np.where(norm[row] > 0, val / norm[row], 0.0)
        self.direction += np.bincount(cell, unit, minlength=k * d_sae).reshape(k, d_sae)
        self.second.update(ptr, col, val)

    def merge(self, other: CollapseSums) -> None:
        """Add another partition's sums, over the same classes."""
        self.rows += other.rows
        self.fired += other.fired
        self.code += other.code
        self.active_rows += other.active_rows
        self.direction += other.direction
        self.second.merge(other.second)

    def panel(
        self,
        projection_variance: float | None = None,
        initial_projection_variance: float | None = None,
    ) -> dict[str, Any]:
        """The collapse panel; None where something has no meaning, as a class cosine of one class.

        Where a trained projection P makes the rows, `projection_variance` is Var(P(e)) over them
        now and `initial_projection_variance` before training; the panel holds their quotient.

        Returns:
            n_rows; class_cosine; top1_share; effective_rank and participation_ratio, from
            spectrum_rows rows; gini; within_class_cosine (mean over classes); projection_variance;
            classes (per class: name, rows, l0, active_fraction, within_cosine); class_cosines and
            class_distances, [k][k] in their order, distances between class means in units of the
            mean length of a class mean; alarms, the names of `ALARMS` that sound.
        """
        n = int(self.rows.sum())
        if n == 0:
            return {"n_rows": 0}
        mean = self.code.sum(axis=0) / n
        total = float(mean.sum())
        spectrum, spectrum_rows = self.second.spectrum(mean)
        cosines, distances = self._between()
        pairs = [c for i, row in enumerate(cosines or []) for c in row[i + 1 :] if c is not None]
        classes = [self._of_class(c) for c in range(len(self.classes))]
        within = [c["within_cosine"] for c in classes if c["within_cosine"] is not None]
        panel: dict[str, Any] = {
            "n_rows": n,
            "class_cosine": float(np.mean(pairs)) if pairs else None,
            "top1_share": float(mean.max()) / total if total > 0 else None,
            "effective_rank": _effective_rank(spectrum) if spectrum_rows > 1 else None,
            "participation_ratio": _participation(spectrum) if spectrum_rows > 1 else None,
            "spectrum_rows": spectrum_rows,
            "gini": _gini(mean) if total > 0 else None,
            "within_class_cosine": float(np.mean(within)) if within else None,
            "projection_variance": projection_variance / initial_projection_variance
            if projection_variance is not None and initial_projection_variance
            else None,
            "classes": classes,
            "class_cosines": cosines,
            "class_distances": distances,
        }
        panel["alarms"] = [
            name
            for name, (sounds, threshold) in ALARMS.items()
            if panel[name] is not None and sounds(panel[name], threshold)
        ]
        return panel

    def _of_class(self, c: int) -> dict[str, Any]:
        rows, active = int(self.rows[c]), int(self.active_rows[c])
        l0 = float(self.fired[c]) / rows if rows else None
        # ‖Σ u‖² counts every pair of unit rows twice and each row with itself once.
        same = float(np.square(self.direction[c]).sum()) - active
        return {
            "name": self.classes[c],
            "rows": rows,
            "l0": l0,
            "active_fraction": None if l0 is None else l0 / self.code.shape[1],
            "within_cosine": same / (active * (active - 1)) if active > 1 else None,
        }

    def _between(self) -> tuple[list[list[float | None]] | None, list[list[float | None]] | None]:
        """Cosines and relative distances of the class means; None where no two classes have rows."""
        known = self.rows > 0
        if known.sum() < 2:
            return None, None
        # 0/0, of a class without rows or a mean without length, is NaN here and None for the caller.
        with np.errstate(invalid="ignore"):
            mean = self.code / self.rows[:, None]
            length = np.linalg.norm(mean, axis=1)
            cosine = mean @ mean.T / np.outer(length, length)
            apart = np.stack([np.linalg.norm(mean - of_class, axis=1) for of_class in mean])
            distance = apart / length[known].mean()
        return _with_none(cosine), _with_none(distance)


class _SecondMoment:
    """HᵀH over all rows."""

    def __init__(self, d_sae: int) -> None:
        self.rows = 0
        self.gram = np.zeros((d_sae, d_sae))

    def update(self, ptr: npt.NDArray[np.int64], col: npt.NDArray[np.int32], val: Float64) -> None:
        h = np.zeros((len(ptr) - 1, len(self.gram)))
        h[np.repeat(np.arange(len(h)), np.diff(ptr)), col] = val
        self.rows += len(h)
        self.gram += h.T @ h

    def merge(self, other: Any) -> None:
        self.rows += other.rows
        self.gram += other.gram

    def spectrum(self, mean: Float64) -> tuple[Float64, int]:
        """Eigenvalues of centred HᵀH, and the number of rows behind them."""
        return _eigenvalues(self.gram - self.rows * np.outer(mean, mean), self.gram), self.rows


class _Sample:
    """The rows with the smallest of seeded random numbers, one per row: uniform, and mergeable."""

    def __init__(self, d_sae: int, seed: int) -> None:
        from scipy.sparse import csr_array

        self.random = np.random.default_rng(seed)
        self.place = np.zeros(0)
        self.kept = csr_array((0, d_sae))

    def update(self, ptr: npt.NDArray[np.int64], col: npt.NDArray[np.int32], val: Float64) -> None:
        from scipy.sparse import csr_array

        n = len(ptr) - 1
        self._keep(self.random.random(n), csr_array((val, col, ptr), (n, self.kept.shape[1])))

    def merge(self, other: Any) -> None:
        self._keep(other.place, other.kept)

    def _keep(self, place: Float64, h: Any) -> None:
        from scipy.sparse import vstack

        place, h = np.concatenate([self.place, place]), vstack([self.kept, h], format="csr")
        first = np.argsort(place, kind="stable")[:SAMPLE_ROWS]
        self.place, self.kept = place[first], h[first]

    def spectrum(self, mean: Float64) -> tuple[Float64, int]:
        """Eigenvalues of centred HHᵀ, those of HᵀH that are not 0, and the number of rows.

        The sample's own mean is taken out, not that of all rows.
        """
        gram = (self.kept @ self.kept.T).toarray()
        rows = gram.mean(axis=0)
        return _eigenvalues(gram - rows - rows[:, None] + rows.mean(), gram), len(self.place)


def _eigenvalues(centred: Float64, gram: Float64) -> Float64:
    """Those of `centred`, without what rounding leaves of 0 where `gram` was subtracted from."""
    values = np.linalg.eigvalsh(centred)
    positive: Float64 = values[values > ROUNDING * np.trace(gram)]
    return positive


def _effective_rank(spectrum: Float64) -> float:
    if len(spectrum) == 0:
        return 0.0
    p = np.sqrt(spectrum)
    p /= p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _participation(spectrum: Float64) -> float:
    return float(spectrum.sum() ** 2 / np.square(spectrum).sum()) if len(spectrum) else 0.0


def _gini(values: Float64) -> float:
    n = len(values)
    rank = 2 * np.arange(1, n + 1) - n - 1
    return float(rank @ np.sort(values) / (n * values.sum()))


def _with_none(matrix: Float64) -> list[list[float | None]]:
    return [[None if np.isnan(x) else float(x) for x in row] for row in matrix]
