"""Training workers: one or several SAEs each (a tuning trial being one too), or a share of one.

Workers that share an SAE meet at a key-value store in the driver's process and sum their gradients over
`torch.distributed`; each reads its part of every batch. When one dies the driver ends them all, and the
same call goes on from the checkpoint.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed as dist

from sae_ext import ops
from sae_ext.activations.dataset import Stream
from sae_ext.artefacts import Stage, saes
from sae_ext.errors import Diverged
from sae_ext.store import Store
from sae_ext.training.history import Line, TensorBoard
from sae_ext.training.job import Place
from workers.events import Event, Update, streamed
from workers.pool import WorkerDied
from workers.stream import Feeders, fed_by

log = logging.getLogger("workers.train")

_PATIENCE = timedelta(minutes=10)  # between two sums; a member that is gone is noticed at once


class Share(NamedTuple):
    """A worker's part in training one SAE together."""

    rank: int
    members: int
    host: str
    port: int


class Meeting:
    """Where workers that share an SAE find each other; lives in the driver while they work."""

    def __init__(self, members: int) -> None:
        self.members = members
        self._host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            self._host, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE
        )

    def shares(self) -> list[Share]:
        """One for each worker."""
        return [Share(r, self.members, self._host, self._store.port) for r in range(self.members)]


class TrainWorker:
    """Trains SAEs into the store, going on from a checkpoint where there is one."""

    def __init__(
        self,
        store_url: str,
        threads: int,
        readers: int,
        board: str | None,
        feeders: Feeders | None = None,
    ) -> None:
        self.store = Store(store_url)
        self.threads, self.readers, self.board = threads, readers, board
        self.feeders = feeders
        self.stopping = threading.Event()

    def stop(self) -> None:
        """Let `train` save a checkpoint and end."""
        self.stopping.set()

    def train(self, stages: Sequence[Stage], share: Share | None = None) -> Iterator[Event]:
        """Train SAEs on the same activations and commit them; the result is as `saes.train_and_commit` has it."""
        yield from streamed(self._train(stages, share))

    def _train(
        self, stages: Sequence[Stage], share: Share | None
    ) -> Generator[Update, None, list[dict[str, Any] | Diverged]]:
        torch.set_num_threads(self.threads)
        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        log.info(
            "training on %s with %d threads%s",
            device if device == "cuda" else ops.implementation(),
            self.threads,
            "" if share is None else f", worker {share.rank + 1} of {share.members}",
        )
        with _together(share, device) as group:
            metrics = yield from self._train_at(stages, Place(device, self.readers, group))
        return metrics

    def _train_at(
        self, stages: Sequence[Stage], place: Place
    ) -> Generator[Update, None, list[dict[str, Any] | Diverged]]:
        boards: dict[int, TensorBoard] = {}

        def on_line(number: int, line: Line) -> None:
            if self.board is not None and place.share[0] == 0:
                if number not in boards:
                    boards[number] = TensorBoard(Path(self.board) / stages[number].key)
                boards[number](line)

        total = sum(stage.config["train"]["steps"] for stage in stages)
        steps = [0] * len(stages)
        work = saes.train_and_commit(
            self.store, stages, place=place, stop=self.stopping.is_set, on_line=on_line,
            stream=self._stream(stages),
        )  # fmt: skip
        while True:
            try:
                p = next(work)
            except StopIteration as stop:
                metrics: list[dict[str, Any] | Diverged] = stop.value
                return metrics
            steps[p.number] = p.step
            told = [
                f"{p.rows_per_second:,.0f} rows/s",
                f"loss {p.loss:.3g}",
                f"FVU {p.fvu:.3f}",
                f"L0 {p.l0:.1f}",
                f"dead {100 * p.dead_fraction:.1f} %",
            ]
            yield Update(sum(steps), total, " · ".join(t for t in told if "nan" not in t))

    def _stream(self, stages: Sequence[Stage]) -> Stream | None:
        if self.feeders is None:
            return None
        return fed_by(self.feeders, stages[0].inputs["stream"], self.stopping.is_set)


@contextmanager
def _together(share: Share | None, device: str) -> Iterator[dist.ProcessGroup | None]:
    """The group of all workers that share an SAE; None for one that is alone.

    Raises:
        WorkerDied: another one is gone, which torch tells as a DistError or a plain RuntimeError.
    """
    if share is None:
        yield None
        return
    try:
        meeting = dist.TCPStore(  # type: ignore[attr-defined]
            share.host, share.port, is_master=False, timeout=_PATIENCE
        )
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=meeting, rank=share.rank, world_size=share.members, timeout=_PATIENCE,
        )  # fmt: skip
        yield dist.group.WORLD
    except RuntimeError as error:
        # Of a plain RuntimeError only the text says where it comes from; any other fault is no lost worker.
        if isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE):
            first = (str(error).splitlines() or [""])[0]
            raise WorkerDied(f"one that shares the training is gone: {first}") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
