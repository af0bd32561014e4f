"""Timing contenders of two environments in turn, as if they were in one."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.step.problem import BATCHES, Settings
from benchmarks.step.process import ROOT, ContenderFailed, Entrant, Outcome, Worker

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SAELENS, DICTIONARY_LEARNING, TOPK = "SAELens", "dictionary_learning", "sparsify TopK"
PEERS = (SAELENS, DICTIONARY_LEARNING, TOPK)
DENSE = ("dense whole", "dense chunked", "dense compiled", "autograd", "autograd compiled")
PRODUCT, TRAFFIC = "encoder product", "Adam traffic"

WARM_UPS = 3
SLOW_SECONDS = 1.0  # steps of more than this are timed in every other round
SETTINGS = Settings(l1=1.0, lr=1e-6, eps=1e-8, clip=2.0)
"""A learning rate so small that the L0 stays."""


class Times(NamedTuple):
    """Timed steps of one contender."""

    rounds: int
    median_ms: float
    min_ms: float
    nnz: float | None
    """Active entries of a step, on average; None where it does not count them."""

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Times:
        """Summarise."""
        ms = [1000 * o.seconds for o in outcomes]
        counts = [o.nnz for o in outcomes if o.nnz is not None]
        return cls(len(ms), median(ms), min(ms), sum(counts) / len(counts) if counts else None)


class Bench:
    """The workers as one: who has been made, and which of them answers for whom."""

    def __init__(self, threads: int) -> None:
        self.notes: list[str] = []
        self._threads = threads
        self._own = self._worker(peer=False)
        self._peers: Worker | None = None
        if PEERS_PYTHON.exists():
            self._peers = self._worker(peer=True)
        else:
            self.note(f"no peers: {PEERS_PYTHON} is missing (`make peers`)")
        self._entrants: dict[str, Entrant] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in (self._own, self._peers):
            if worker is not None:
                worker.close()

    def note(self, text: str) -> None:
        """Say it now, and once more at the end."""
        self.notes.append(text)
        print(f"note: {text}", file=sys.stderr)

    def prepare(self, start: Path, entrants: Sequence[Entrant], settings: Settings) -> list[str]:
        """Make these contenders in place of those before; returns who is there."""
        self._entrants = {}
        for worker, peers in ((self._own, False), (self._peers, True)):
            wanted = [e for e in entrants if (e.kind in PEERS) == peers]
            if worker is not None:
                failed = worker.prepare(start, wanted, settings)
                for name, why in failed.items():
                    self.note(f"{name} is left out: {why}")
                self._entrants |= {e.name: e for e in wanted if e.name not in failed}
        return [e.name for e in entrants if e.name in self._entrants]

    def step(self, name: str, batch: int) -> Outcome:
        """One step of a contender."""
        return self._of(self._entrants[name].kind).step(name, batch)

    def save(self, name: str, path: Path) -> None:
        """Write a contender's weights to a file."""
        self._of(self._entrants[name].kind).save(name, path)

    def time(self, names: Sequence[str], rounds: int) -> dict[str, Times]:
        """Warm up, then time the contenders' steps in turn, in another order each round."""
        outcomes: dict[str, list[Outcome]] = {}
        slow = set()
        for name in names:
            try:
                for i in range(WARM_UPS):
                    warm = self.step(name, i % BATCHES)
            except ContenderFailed as error:
                self.note(f"{name} is left out: {error}")
                continue
            outcomes[name] = []
            if warm.seconds > SLOW_SECONDS:
                slow.add(name)
        order, shuffler = list(outcomes), random.Random(0)
        for i in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                if i % 2 == 0 or name not in slow:
                    outcomes[name].append(self.step(name, i % BATCHES))
        return {name: Times.of(seen) for name, seen in outcomes.items()}

    def memory_mb(self, start: Path, entrant: Entrant) -> float | None:
        """Peak memory (10⁶ bytes) of one step in a fresh process, beyond weights, moments, batch.

        None where it could not be measured.
        """
        worker = self._worker(peer=entrant.kind in PEERS, return_memory=True)
        try:
            return worker.memory(start, entrant, SETTINGS) / 1e6
        except ContenderFailed as error:
            self.note(f"memory of {entrant.name} is not measured: {error}")
            return None
        finally:
            worker.close()

    def _of(self, kind: str) -> Worker:
        worker = self._peers if kind in PEERS else self._own
        assert worker is not None
        return worker

    def _worker(self, *, peer: bool, return_memory: bool = False) -> Worker:
        python = PEERS_PYTHON if peer else Path(sys.executable)
        module = "benchmarks.step.peers" if peer else "benchmarks.step.own"
        return Worker(python, module, self._threads, return_memory=return_memory)
