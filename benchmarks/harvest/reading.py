"""Reading shards back: in stored order, shuffled, and what the shuffle costs a training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sae_ext.activations.batches import EpochRows
from sae_ext.activations.order import Rows
from sae_ext.activations.reader import Activations
from sae_ext.activations.shards import shard_file
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.training.learner import Learner

_BATCH = 2048
_CHUNK = 1 << 22
_TURN, _TURNS, _WARM = 20, 16, 4


class Rates(NamedTuple):
    """Stored bytes read in a second, in GB (10⁹)."""

    plain: float
    """The same files by plain reads into a buffer."""
    in_order: float
    """The reader, rows as they are stored, given as float32."""
    shuffled: float
    """The reader, batches of a shuffled epoch, given as float32."""


def rates(data: Activations, threads: int) -> Rates:
    """The median of five, in turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = Rows([0], [data.n_rows])
        found: list[list[float]] = [[], [], []]
        size = data.n_rows * data.d_in * data.shard(0).element_size()
        for _ in range(6):  # the first one maps and checks the shards
            for each, work in zip(found, (_plain, _in_order, _shuffled), strict=True):
                began = time.perf_counter()
                work(data, rows)
                each.append(size / (time.perf_counter() - began) / 1e9)
    finally:
        torch.set_num_threads(before)
    return Rates(*(statistics.median(each[1:]) for each in found))


def _plain(data: Activations, _rows: Rows) -> None:
    buffer = bytearray(_CHUNK)
    for index in range(len(data.shard_rows)):
        path = Path(data.store.path("activations", data.key, shard_file(index)))
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _in_order(data: Activations, rows: Rows) -> None:
    for _ in data.in_order(rows, _BATCH):
        pass


def _shuffled(data: Activations, rows: Rows) -> None:
    with EpochRows(data, rows, _BATCH, seed=0, readers=0) as source:
        for _ in range(len(rows) // _BATCH):
            source.next()


def shuffle_overhead(data: Activations, tell: Callable[[str], None]) -> float:
    """How much longer steps of a training take while shuffled rows are read than while rows in stored order are.

    Steps of one training (d_sae 8 · d_in, past the dense beginning) in turns, on the same batches, while a thread
    reads ahead the one way or the other. Returns the share.
    """
    facts = data.manifest.extra
    scale = data.d_in**0.5 / facts["mean_norm"]
    rows = Rows([0], [data.n_rows])
    learner = Learner(
        SAEConfig(d_sae=8 * data.d_in), TrainConfig(), {}, device=torch.device("cpu"), group=None
    )
    learner.begin(data.d_in, torch.tensor(facts["mean"], dtype=torch.float64) * scale)
    seconds: list[list[float]] = [[], []]
    with (
        EpochRows(data, rows, _BATCH, seed=0) as shuffled,
        EpochRows(_Straight(data), rows, _BATCH, seed=0) as straight,
    ):
        batches = [shuffled.next().x * scale for _ in range(_TURN)]
        for turn in range(_TURNS):
            for which, source in enumerate((shuffled, straight)):
                began = time.perf_counter()
                for batch in batches:
                    source.next()
                    learner.step(batch, {})
                learner.settle()
                if turn >= _WARM:
                    seconds[which].append(time.perf_counter() - began)
    for name, spent in zip(("shuffled", "stored order"), seconds, strict=True):
        tell(f"{name:<13} {1000 * statistics.median(spent) / _TURN:6.1f} ms a step")
    return statistics.median(a / b for a, b in zip(*seconds, strict=True)) - 1


class _Straight(Activations):
    """The same data, whose batches are neighbours whatever rows are asked for."""

    def __init__(self, data: Activations) -> None:
        super().__init__(data.store, data.key)
        self._next = 0

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """As many rows as asked for, from where the last ones ended."""
        first = self._next if self._next + len(rows) <= self.n_rows else 0
        self._next = first + len(rows)
        return super().gather(np.arange(first, first + len(rows)))
