"""What is trained on: rows in an array file, in the same order for everyone, and how.

Imported by the peers' process too, so it needs nothing but numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Settings(NamedTuple):
    """What all contenders share."""

    d_sae: int
    steps: int
    batch_rows: int
    lr: float
    lr_warmup: int
    lr_decay: int
    """Steps, at the end, over which the learning rate falls to 0."""
    l1_warmup: int
    held_out: int
    """Rows, at the end of the file, that are not trained on."""


class Planted(NamedTuple):
    """Rows that are sums of a few of many fixed directions."""

    n_features: int
    d_in: int
    active: int


def planted(
    kind: Planted, rows: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Rows x [rows, d_in], scaled so that E‖x‖ = sqrt(d_in), and the directions [n_features, d_in].

    Each feature is in a row with probability active / n_features, with a strength of 0.5 + |N(0, 1)|.
    """
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((kind.n_features, kind.d_in), dtype=np.float32)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    x = np.empty((rows, kind.d_in), dtype=np.float32)
    for start in range(0, rows, 4096):
        n = min(4096, rows - start)
        there = rng.random((n, kind.n_features), dtype=np.float32) < kind.active / kind.n_features
        strength = 0.5 + np.abs(rng.standard_normal((n, kind.n_features), dtype=np.float32))
        x[start : start + n] = (there * strength) @ truth
    return x * scale_of(x), truth


def scale_of(x: npt.NDArray[np.float32]) -> np.float32:
    """The factor that makes E‖x‖ = sqrt(d_in)."""
    return np.float32(np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1).mean(dtype=np.float64))


def batches(path: Path, settings: Settings, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """The batches of a run: epoch after epoch, each in an order by (seed, epoch)."""
    x = np.load(path, mmap_mode="r")
    rows = np.arange(len(x) - settings.held_out)
    order, epoch = np.empty(0, dtype=np.int64), 0
    for _ in range(settings.steps):
        while len(order) < settings.batch_rows:
            order = np.concatenate([order, np.random.default_rng([seed, epoch]).permutation(rows)])
            epoch += 1
        yield np.asarray(x[order[: settings.batch_rows]])
        order = order[settings.batch_rows :]
