"""Training workers: one SAE each, a tuning trial being one too."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Any

import torch

from sae_ext import ops
from sae_ext.artefacts import Stage, saes
from sae_ext.store import Store
from workers.events import Event, Update, streamed

log = logging.getLogger("workers.train")


class TrainWorker:
    """Trains SAEs into the store, going on from a checkpoint where there is one."""

    def __init__(self, store_url: str, threads: int) -> None:
        self.store = Store(store_url)
        self.threads = threads

    def train(self, stage: Stage) -> Iterator[Event]:
        """Train one SAE and commit it; the result is its validation metrics."""
        yield from streamed(self._train(stage))

    def _train(self, stage: Stage) -> Generator[Update, None, dict[str, Any]]:
        torch.set_num_threads(self.threads)
        log.info("training on %s with %d threads", ops.implementation(), self.threads)
        work = saes.train_and_commit(self.store, stage)
        while True:
            try:
                p = next(work)
            except StopIteration as stop:
                metrics: dict[str, Any] = stop.value
                return metrics
            note = f"{p.rows_per_second:,.0f} rows/s · FVU {p.fvu:.3f} · L0 {p.l0:.1f}"
            yield Update(p.step, p.steps, note)
