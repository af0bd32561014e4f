"""Killing a harvest at random moments: does the same command end with the store of one never killed?"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil

from sae_ext import upkeep
from sae_ext.artefacts import activations
from sae_ext.store import Store

KINDS: tuple[Literal["worker", "driver", "both"], ...] = ("worker", "driver", "both")
_ROOT = Path(__file__).parents[2]
_PATIENCE = 300.0


def survived(recipe: Path, work: Path, moments: int, tell: Callable[[str], None]) -> dict[str, int]:
    """For each of `KINDS`, after how many of so many kills the store was that of an uninterrupted harvest."""
    whole = _Run(recipe, work / "whole")
    whole.until_begun()
    began = time.perf_counter()
    whole.until_committed()
    seconds = time.perf_counter() - began
    whole.finish()
    wanted = whole.digest()
    rng = random.Random(0)
    found = dict.fromkeys(KINDS, 0)
    for number in range(moments):
        for kind in KINDS:
            units = None
            while units is None:  # until one was killed before its end
                moment = rng.uniform(0, seconds)
                store = work / f"{kind}-{number}"
                shutil.rmtree(store, ignore_errors=True)
                units = _killed(recipe, store, kind, moment)
            again = _Run(recipe, store)
            same = again.finish() == 0 and again.digest() == wanted
            found[kind] += same
            tell(
                f"{kind:<6} killed {moment:4.1f} s after the first unit "
                f"({units} units there): {'same bytes' if same else 'DIFFERENT'}"
            )
    return found


def _killed(recipe: Path, store: Path, kind: str, moment: float) -> int | None:
    """Run until that moment, kill, and wait until it is all gone.

    Returns:
        How many units there were; None where there was nothing to kill any more.

    Raises:
        RuntimeError: a worker was killed, and the command did not go on by itself.
    """
    run = _Run(recipe, store)
    run.until_begun()
    time.sleep(moment)
    units = None if run.committed() else run.units()
    if kind in ("worker", "both") and not run.kill_worker():
        units = None
    if kind in ("driver", "both"):
        run.process.kill()
        run.process.wait()
    elif run.finish():
        raise RuntimeError(f"the command did not outlive its worker: see {run.log}")
    run.reap()
    return units


class _Run:
    """`sparsemill harvest RECIPE --store FOLDER` and all of its processes."""

    def __init__(self, recipe: Path, store: Path) -> None:
        self.store = store
        store.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_"))}
        self.log = store.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows", "harvest", str(recipe), "--store", str(store)],
                cwd=_ROOT, env=settings, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._family: dict[int, psutil.Process] = {}

    def units(self) -> int:
        """How many units are whole."""
        return len(list(self.store.glob("activations/*/unit-*.safetensors")))

    def until_begun(self) -> None:
        """Wait for the first unit."""
        end = time.monotonic() + _PATIENCE
        while not self.units():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no harvest has begun: see {self.log}")
            self._look()
            time.sleep(0.05)

    def committed(self) -> bool:
        """Whether the manifest is there."""
        return any(self.store.glob("activations/*/manifest.json"))

    def until_committed(self) -> None:
        """Wait for the manifest."""
        while not self.committed() and self.process.poll() is None:
            time.sleep(0.05)

    def kill_worker(self) -> bool:
        """Kill the first harvest worker, if there is one."""
        self._look()
        for process in self._family.values():
            with contextlib.suppress(psutil.Error):
                if "HarvestWorker" in "".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    return True
        return False

    def finish(self) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + _PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            self._look()
            time.sleep(0.1)
        self.reap()
        return self.process.wait()

    def reap(self) -> None:
        """End whatever is left of it."""
        for process in [*self._family.values()]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def digest(self) -> str:
        """Hash over what was committed, every file of which is read and compared with its checksum."""
        store = Store(str(self.store))
        (key,) = store.list(activations.KIND)
        if any(checked.wrong for checked in upkeep.verify(store, [(activations.KIND, key)])):
            return "a file is not what was committed"
        return store.manifest(activations.KIND, key).digest

    def _look(self) -> None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._family.setdefault(child.pid, child)
