"""Killing a training at random moments: does it end with the bytes of one never killed?

python -m benchmarks.quality.resume ROWS.npy FOLDER     (the training itself, as a child)
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sae_ext.activations.dataset import InMemory, Percentages
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.schedules import Schedule
from sae_ext.training.config import RevivalConfig
from sae_ext.training.run import run_to_end, train
from sae_ext.training.terms import L1, ObjectiveConfig

_ROOT = Path(__file__).parents[2]
_CONFIG = TrainConfig(
    steps=600, batch_rows=512, lr=3e-3,
    objective=ObjectiveConfig(
        l1=L1(weight=1.0, target_l0=12.0, schedule=Schedule(warmup_steps=100))
    ),
    revival=RevivalConfig(every=100, verify_after=50), dead_rows=20_000,
    checkpoint_every=30, log_every=10,
)  # fmt: skip


def kills(x: Path, work: Path, count: int, tell: Callable[[str], None]) -> int:
    """How many of `count` trainings, each killed at a random moment after its first checkpoint, go on from
    there and end with the same bytes."""
    folder = work / "whole"
    child = _start(x, folder)
    _until(folder / "state", child)
    begun = time.perf_counter()
    whole, rest = _ended(child, folder), time.perf_counter() - begun
    rng = random.Random(0)
    same = killed = 0
    while killed < count:
        folder = work / f"killed-{killed}"
        child = _start(x, folder)
        _until(folder / "state", child)
        moment = rng.uniform(0, rest)
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (folder / "hash").exists():  # it was quicker than the first one, and had ended
            shutil.rmtree(folder)
            continue
        killed += 1
        again = _ended(_start(x, folder), folder)
        same += again == whole
        tell(
            f"killed {moment:4.1f} s after its first checkpoint: "
            f"{'same bytes' if again == whole else 'DIFFERENT'}"
        )
    return same


def _until(path: Path, child: subprocess.Popen[bytes]) -> None:
    """Wait for a file."""
    while not path.exists():
        if child.poll():
            raise RuntimeError(f"the training in {path.parent} failed")
        time.sleep(0.01)


def _ended(child: subprocess.Popen[bytes], folder: Path) -> str:
    """The hash of a training's weights, history and events, once it has ended."""
    if child.wait():
        raise RuntimeError(f"the training in {folder} failed")
    return (folder / "hash").read_text(encoding="utf-8")


def _start(x: Path, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.quality.resume", str(x), str(folder)], cwd=_ROOT
    )


def _child(x: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    data = InMemory(np.load(x)[:40_000], split=Percentages())
    state = folder / "state"

    def save(content: bytes) -> None:
        fresh = folder / "state.new"
        fresh.write_bytes(content)
        os.replace(fresh, state)  # noqa: PTH105 - the atomic one

    trained = run_to_end(
        train(
            data, SAEConfig(d_sae=512), _CONFIG,
            load_checkpoint=lambda: state.read_bytes() if state.exists() else None,
            save_checkpoint=save,
        )
    )  # fmt: skip
    digest = hashlib.sha256()
    for tensor in trained.sae.parameters.tensors().values():
        digest.update(tensor.numpy().tobytes())
    digest.update(repr(trained.history.to_pylist()).encode())
    digest.update(repr(trained.events.to_pylist()).encode())
    (folder / "hash").write_text(digest.hexdigest(), encoding="utf-8")


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
