"""Contenders in a process of their own: both ends of the pipe, one JSON object per line.

The benchmark holds a `Worker` for each environment and asks it for one step at a time, so that steps
of contenders that cannot share an environment are still taken in turn. In the child, `serve`
answers. Threads sleep while they wait (OMP_WAIT_POLICY=passive): a pool that spins would take the
cores from the other process. Needs nothing but PyTorch on the child's side.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.step.problem import Settings, Start

ROOT = Path(__file__).parents[2]

_CHILD = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
# Every block of this size or more is mapped by itself and goes back when freed, instead of staying
# with the process, where the next step would find it.
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Entrant(NamedTuple):
    """One contender of a run."""

    name: str
    kind: str
    """Which of the child's builders makes it."""
    l0: float
    """Features that are active in a row, on average."""


class Outcome(NamedTuple):
    """One step."""

    seconds: float
    loss: float | None
    """What the contender lowered, before the update; None where it does not say."""
    nnz: int | None
    """Active entries, where the contender counts them."""


class ContenderFailed(RuntimeError):
    """A contender could not be made or could not take its step; the message says why."""


class Contender(Protocol):
    """Weights with an optimizer, and the step that moves them."""

    def __call__(self, x: Tensor) -> tuple[float | None, int | None]:
        """Take one step on x [B, d_in]; returns loss and active entries where it knows them."""

    def parameters(self) -> dict[str, Tensor]:
        """The weights by our names and in our orientation."""


Builder = Callable[[Start, float, Settings], Contender]
"""Makes a contender from its start, its L0 and its settings."""


# -- the benchmark's side ------------------------------------------------------------------------


class Worker:
    """A child process that takes steps on request."""

    def __init__(
        self, python: Path, module: str, threads: int, *, return_memory: bool = False
    ) -> None:
        environment = {**os.environ, **_CHILD, **(_RETURN_MEMORY if return_memory else {})}
        self._child = subprocess.Popen(
            [str(python), "-m", module, str(threads)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def close(self) -> None:
        """End the child."""
        self._child.terminate()
        self._child.wait()

    def prepare(
        self, start: Path, entrants: Iterable[Entrant], settings: Settings
    ) -> dict[str, str]:
        """Make these contenders, in place of those before; returns why some could not be made."""
        return dict(
            self._ask(
                "prepare", start=str(start), entrants=list(entrants), settings=settings
            )["failed"]
        )  # fmt: skip

    def step(self, name: str, batch: int) -> Outcome:
        """One step of a contender on a batch of its start.

        Raises:
            ContenderFailed: it could not.
        """
        return Outcome(**self._ask("step", name=name, batch=batch))

    def save(self, name: str, path: Path) -> None:
        """Write a contender's weights to a safetensors file."""
        self._ask("save", name=name, path=str(path))

    def memory(self, start: Path, entrant: Entrant, settings: Settings) -> int:
        """Peak memory of a contender's first step in bytes, beyond weights, moments and batch.

        To be asked of a worker made with `return_memory` that has done nothing else.
        """
        return int(
            self._ask("memory", start=str(start), entrant=entrant, settings=settings)["bytes"]
        )

    def _ask(self, what: str, **arguments: object) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContenderFailed(
                f"the process ended with {self._child.wait()}: see its lines above"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(answer["error"])
        return answer


# -- the child's side ----------------------------------------------------------------------------


def serve(builders: Mapping[str, Builder]) -> None:
    """Answer requests from stdin until it closes; the first argument is the number of threads."""
    # Libraries print as they are imported: what they say goes to stderr, answers to the real stdout.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[1]))
    child = _Child(builders)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(child, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001  the benchmark decides what a failure means
            answer = {"error": _one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


class _Child:
    """The requests by name, and the contenders between them."""

    def __init__(self, builders: Mapping[str, Builder]) -> None:
        self._builders = builders
        self._contenders: dict[str, Contender] = {}
        self._x = torch.empty(0)

    def prepare(self, start: str, entrants: list[list[Any]], settings: list[float]) -> object:
        self._contenders.clear()
        gc.collect()
        begin = Start.load(Path(start))
        self._x = begin.x
        failed = {}
        for entrant in map(Entrant._make, entrants):
            try:
                self._contenders[entrant.name] = self._build(begin, entrant, settings)
            except Exception as error:  # noqa: BLE001  the benchmark decides what a failure means
                failed[entrant.name] = _one_line(error)
        return {"failed": failed}

    def step(self, name: str, batch: int) -> object:
        contender, x = self._contenders[name], self._x[batch]
        began = time.perf_counter()
        loss, nnz = contender(x)
        return Outcome(time.perf_counter() - began, loss, nnz)._asdict()

    def save(self, name: str, path: str) -> object:
        from safetensors.torch import save_file

        weights = self._contenders[name].parameters()
        save_file({k: t.detach().contiguous() for k, t in weights.items()}, path)
        return {}

    def memory(self, start: str, entrant: list[Any], settings: list[float]) -> object:
        begin, wanted = Start.load(Path(start)), Entrant._make(entrant)
        # Another of the same kind goes first: code, thread stacks and compiled graphs are no
        # memory of the step, and what it held itself goes back to the system.
        self._build(begin, wanted, settings)(begin.x[1])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        contender = self._build(begin, wanted, settings)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = _status("VmRSS")
        contender(begin.x[0])
        return {"bytes": _status("VmHWM") - before}

    def _build(self, begin: Start, entrant: Entrant, settings: list[float]) -> Contender:
        return self._builders[entrant.kind](begin, entrant.l0, Settings._make(settings))


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
