"""What training must know of its rows before the first step: mean, spread, geometric median.

All of it is computed in float64 from a stream of batches, so that it costs no memory and loses
nothing where the rows' common offset is large against their spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_ext.activations.dataset import Dataset
from sae_ext.activations.order import Rows
from sae_ext.errors import UserError

_BATCH_ROWS = 4096
_SAME_POINT = 1e-9
"""Points nearer than this fraction of the mean distance from the mean count as one."""


class DataStatistics(NamedTuple):
    """Of a set of rows, raw units."""

    mean: npt.NDArray[np.float64]
    """[d_in]"""
    mean_norm: float
    """E‖x‖."""
    variance: float
    """E‖x - mean‖²."""


def data_statistics(
    data: Dataset, rows: Rows, tick: Callable[[], None] = lambda: None
) -> DataStatistics:
    """Mean, mean norm and variance of the given rows in one pass.

    Batches are merged by their means and squared deviations (Chan, Golub, LeVeque 1983), never as
    E‖x‖² - ‖mean‖², which cancels where the mean is large.

    Args:
        tick: called before each batch; what it raises ends the pass.

    Raises:
        UserError: there are no rows, or some are not finite.
    """
    mean = torch.zeros(data.d_in, dtype=torch.float64)
    n, norms, deviations = 0, 0.0, 0.0
    for x in _finite_batches(data, rows, tick):
        exact = x.double()
        norms += float(exact.norm(dim=1).sum())
        here = exact.mean(dim=0)
        step = here - mean
        total = n + len(x)
        deviations += float((exact - here).square().sum())
        deviations += float(step.square().sum()) * n * len(x) / total
        mean += step * (len(x) / total)
        n = total
    return DataStatistics(mean.numpy(), norms / n, deviations / n)


def geometric_median(
    data: Dataset,
    rows: Rows,
    *,
    seed: int,
    sample: int = 65_536,
    tolerance: float = 1e-6,
    iterations: int = 200,
    tick: Callable[[], None] = lambda: None,
) -> npt.NDArray[np.float64]:
    """The point with the smallest mean distance to the rows, [d_in], by Weiszfeld's iteration.

    At a row the iteration divides by zero; there the step of Vardi and Zhang (PNAS 97, 2000) is
    taken, which leaves the row unless it is the median. Every iterate lowers the mean distance.

    Args:
        sample: at most so many rows, drawn by `seed`, are looked at; they are held as float32.
        tolerance: where the gradient of the mean distance is no longer than this, the iteration
            ends; the mean distance is then at most tolerance · (distance to the median) too large.
        iterations: after so many the last iterate is returned, whatever its gradient.
        tick: called before each batch and each iteration; what it raises ends the work.

    Raises:
        UserError: there are no rows, or some are not finite.
    """
    if len(rows) > sample:
        places = np.random.default_rng(seed).choice(len(rows), sample, replace=False)
        rows = Rows.of(rows[np.sort(places)])
    batches = list(_finite_batches(data, rows, tick))
    y = sum((x.double().sum(dim=0) for x in batches), torch.zeros(data.d_in).double()) / len(rows)
    spread = sum(float((x.double() - y).norm(dim=1).sum()) for x in batches) / len(rows)
    for _ in range(iterations):
        tick()
        pull, inverses, at_y = torch.zeros_like(y), 0.0, 0
        for x in batches:
            away = x.double() - y
            distance = away.norm(dim=1)
            same = distance <= _SAME_POINT * spread
            inverse = torch.where(same, 0.0, 1 / distance)
            pull += inverse @ away
            inverses += float(inverse.sum())
            at_y += int(same.sum())
        length = float(pull.norm())
        if length <= at_y + tolerance * len(rows):
            break
        y = y + (1 - at_y / length) / inverses * pull
    return y.numpy()


def _finite_batches(data: Dataset, rows: Rows, tick: Callable[[], None]) -> Iterator[Tensor]:
    """The rows in order, float32; the error for rows that are not finite comes when all are counted."""
    if len(rows) == 0:
        raise UserError("there are no rows to take statistics of: give the split some")
    count, first = 0, -1
    for number, x in enumerate(data.in_order(rows, _BATCH_ROWS)):
        tick()
        bad = torch.isfinite(x).all(dim=1).logical_not().nonzero()
        if len(bad) and not count:
            first = int(rows[number * _BATCH_ROWS + int(bad[0])])
        count += len(bad)
        if not count:
            yield x
    if count:
        raise UserError(
            f"{data.where(first)}: not finite, as are {count:,} of {len(rows):,} rows in all: leave "
            "those documents out, or store the activations as float32"
        )
