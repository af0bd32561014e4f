"""Times and memory of queued work: CUDA's events on a GPU, the process's clock on the CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch

from sae_ext.step_cuda import Precision

STEPS, LEAST, SECONDS = 25, 7, 2.0
"""Timed calls; fewer, but so many at least, where they would take longer than this."""


class Times(NamedTuple):
    """Timed calls of one kind."""

    steps: int
    median_ms: float
    min_ms: float


class Marks:
    """Moments in the work of a device, in its order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._set: list[Any] = []

    def mark(self) -> None:
        """Everything queued so far lies before this one."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._set.append(event)
        else:
            self._set.append(time.perf_counter())

    def gaps_ms(self) -> list[float]:
        """From each to the next; waits for the last."""
        synchronize(self._device)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) for before, after in pairwise(self._set)]
        return [1000 * (after - before) for before, after in pairwise(self._set)]


def time_calls(device: torch.device, call: Callable[[int], object], warm_ups: int = 3) -> Times:
    """Warm up, then time calls that are queued one behind the other; `call` is told its number.

    From end to end: time that the device spends waiting for Python counts.
    """
    for i in range(warm_ups):
        call(i)
    synchronize(device)
    began = time.perf_counter()
    call(warm_ups)
    synchronize(device)
    steps = max(LEAST, min(STEPS, int(SECONDS / (time.perf_counter() - began))))
    marks = Marks(device)
    marks.mark()
    for i in range(steps):
        call(i)
        marks.mark()
    gaps = marks.gaps_ms()
    return Times(steps, median(gaps), min(gaps))


def synchronize(device: torch.device) -> None:
    """Until everything queued has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of live tensors; not counted on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def forget_peak(device: torch.device) -> None:
    """Count the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The most bytes there were at once since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextlib.contextmanager
def products(precision: Precision) -> Iterator[None]:
    """PyTorch's products of float32 matrices in this precision."""
    # The older of PyTorch's two switches: while the newer one differs from it, torch.compile may fail.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
