"""Training from mapped shards (in the page cache) against the same steps on rows that are tensors already."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.quality.contenders import train_config
from benchmarks.quality.problem import Settings
from sae_ext.activations.batches import EpochRows
from sae_ext.activations.reader import Activations
from sae_ext.config import SAEConfig
from sae_ext.training.learner import Learner

_TURN = 25  # steps of each in turn


def ratio(data: Activations, settings: Settings, l1: float, tell: Callable[[str], None]) -> float:
    """Rate of steps from mapped shards ÷ rate of steps on resident rows, the same rows, in turns."""
    rows = data.rows("train")
    mean, scale = _start(data)
    learners = [_learner(settings, l1, data.d_in, mean) for _ in range(2)]
    seconds = [0.0, 0.0]
    # Past the dense phase, in which reading matters less.
    warm = settings.l1_warmup + settings.lr_warmup
    with (
        EpochRows(data, rows, settings.batch_rows, seed=0) as from_shards,
        EpochRows(data, rows, settings.batch_rows, seed=0, readers=0) as resident,
    ):
        for turn in range(settings.steps // _TURN):
            batches = [resident.next().x * scale for _ in range(_TURN)]
            for which, source in enumerate((_read(from_shards, scale), iter(batches))):
                started = time.perf_counter()
                for x in source:
                    learners[which].step(x, {})
                learners[which].settle()
                if turn * _TURN >= warm:
                    seconds[which] += time.perf_counter() - started
    steps = settings.steps - -(-warm // _TURN) * _TURN
    for name, spent in zip(("from shards", "resident"), seconds, strict=True):
        tell(f"{name:<11} {1000 * spent / steps:6.1f} ms a step")
    return seconds[1] / seconds[0]


def _read(source: EpochRows, scale: float) -> Iterator[Tensor]:
    for _ in range(_TURN):
        yield source.next().x * scale


def _start(data: Activations) -> tuple[Tensor, float]:
    """Mean and scale of the stored rows, as the manifest has them."""
    facts = data.manifest.extra
    scale = data.d_in**0.5 / facts["mean_norm"]
    return torch.tensor(facts["mean"]) * scale, scale


def _learner(settings: Settings, l1: float, d_in: int, b_dec: Tensor) -> Learner:
    learner = Learner(
        SAEConfig(d_sae=settings.d_sae), train_config(settings, 0, l1), {},
        device=torch.device("cpu"), group=None,
    )  # fmt: skip
    learner.begin(d_in, b_dec)
    return learner
