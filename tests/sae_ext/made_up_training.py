"""Data with planted structure and trainings of a few steps, for the tests of the training engine."""

from __future__ import annotations

import functools
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_ext.activations.dataset import Dataset, InMemory
from sae_ext.architectures import BatchTopK, JumpReLU, TopK
from sae_ext.config import SAEConfig, TrainConfig, with_changes
from sae_ext.schedules import Schedule
from sae_ext.training.config import BufferConfig, EarlyStoppingConfig, RevivalConfig
from sae_ext.training.job import Trained
from sae_ext.training.run import run_to_end, train
from sae_ext.training.terms import L0, L1, AuxK, ObjectiveConfig, Usage

D_IN, D_SAE, CLASSES = 16, 32, ("apple", "banana", "cherry")


def directions(seed: int = 7) -> npt.NDArray[np.float64]:
    """What rows are made of: 24 of length 1 [24, D_IN]."""
    found = np.random.default_rng(seed).standard_normal((24, D_IN))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@functools.cache
def planted(rows: int = 2400, seed: int = 7) -> InMemory:
    """Rows that are each a sum of about two directions around a common offset, with columns.

    `label` and `other` are classes, `importance` numbers from 0 on.
    """
    rng = np.random.default_rng([seed, rows])
    z = np.where(rng.random((rows, 24)) < 0.08, rng.uniform(1, 3, (rows, 24)), 0)
    x = z @ directions(seed) + 0.5 + 0.01 * rng.standard_normal((rows, D_IN))
    columns = {
        "label": rng.choice(CLASSES, rows),
        "other": rng.choice(CLASSES, rows),
        "importance": rng.uniform(0, 2, rows),
    }
    return InMemory(x.astype(np.float32), columns)


WARM = Schedule(warmup_steps=8)
SHORT = TrainConfig(
    steps=40, batch_rows=32, lr=3e-3, lr_schedule=Schedule(kind="linear", warmup_steps=5, last=0.2),
    objective=ObjectiveConfig(l1=L1(weight=1.0, schedule=WARM)), checkpoint_every=10, log_every=5,
    dead_rows=64, max_grad_norm=None,
)  # fmt: skip
"""Features are dead here when they were silent in two batches, so that some are."""
RELU = SAEConfig(d_sae=D_SAE)

ARCHITECTURES = {
    "relu": (RELU, SHORT.objective),
    "topk": (SAEConfig(d_sae=D_SAE, architecture=TopK(k=3)), ObjectiveConfig(l1=None)),
    "batchtopk": (SAEConfig(d_sae=D_SAE, architecture=BatchTopK(k=3)), ObjectiveConfig(l1=None)),
    "jumprelu": (
        SAEConfig(d_sae=D_SAE, architecture=JumpReLU(bandwidth=0.1, threshold=0.1)),
        ObjectiveConfig(l1=None, l0=L0(weight=0.3, schedule=WARM)),
    ),
}
"""Each with what makes it sparse."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "revival": {"revival": RevivalConfig(every=8, verify_after=6, candidates=200, rewarm_steps=4)},
    "auxk": {"objective.auxk": AuxK(k=4)},
    "usage": {"objective.usage": Usage(weight=5.0, memory=0.9)},
    "target_l0": {"objective.SPARSITY.target_l0": 2.0},
    "early_stopping": {
        "early_stopping": EarlyStoppingConfig(patience=2, metric="fvu", min_change=0.9)
    },
    "buffer": {"buffer": BufferConfig(rows=300, min_rows=100, fresh=0.7)},
    "unit": {},  # of the decoder, a field of the SAE
    "max_grad_norm": {"max_grad_norm": 0.5},
    "weight_decay": {"weight_decay": 0.3},
}
"""What else may be asked for, by its name."""


def variant(architecture: str, name: str) -> tuple[SAEConfig, TrainConfig]:
    """A short run of an architecture in which one of `VARIANTS` happens."""
    sae, objective = ARCHITECTURES[architecture]
    changes: dict[str, Any] = {"objective": objective}
    if name in ("revival", "auxk"):  # which take features that fall silent
        if architecture == "relu":
            changes |= {"objective.l1.weight": 12.0, "lr": 2e-2}
        if architecture == "jumprelu":
            sae = with_changes(sae, {"architecture.threshold": 0.2})
            changes |= {"lr": 1e-2}
    if name == "unit":
        sae = with_changes(sae, {"decoder": "unit"})
    sparsity = "l1" if objective.l0 is None else "l0"
    for key, value in VARIANTS[name].items():
        changes[key.replace("SPARSITY", sparsity)] = value
    config = SHORT
    for key, value in changes.items():
        config = with_changes(config, {key: value})
    return sae, config


def fit(sae: SAEConfig, config: TrainConfig, data: Dataset | None = None, **more: Any) -> Trained:
    """A training from its beginning to its end, on `planted()` where no data is given."""
    return run_to_end(train(planted() if data is None else data, sae, config, **more))


def weights(trained: Trained) -> dict[str, Tensor]:
    """All tensors of the SAE."""
    return trained.sae.parameters.tensors() | trained.sae.more


def same_weights(one: Trained, two: Trained) -> bool:
    """Whether two results have the same SAE, bit for bit."""
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(one: Trained, two: Trained) -> bool:
    """Whether two results are the same in everything, bit for bit."""
    return (
        same_weights(one, two)
        and one.history.equals(two.history)
        and one.events.equals(two.events)
        and (one.validation, one.scale, one.penalty, one.steps)
        == (two.validation, two.scale, two.penalty, two.steps)
        and torch.equal(one.density, two.density)
    )


def events(trained: Trained, name: str) -> list[dict[str, Any]]:
    """The events of that name."""
    return [event for event in trained.events.to_pylist() if event["event"] == name]


class Folder:
    """Checkpoints in a folder, each written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, data: bytes) -> None:
        """Keep these bytes in place of those before."""
        new = self.path / f"new-{os.getpid()}"
        new.write_bytes(data)
        new.replace(self.path / "checkpoint")

    def load(self) -> bytes | None:
        """The bytes last kept."""
        file = self.path / "checkpoint"
        return file.read_bytes() if file.exists() else None


def slow_process(folder: str, begun: Event, architecture: str, name: str) -> None:
    """Train in a process that may be killed, into a folder, going on from what lies there."""
    torch.set_num_threads(1)
    kept = Folder(Path(folder))
    begun.set()

    def wait() -> bool:
        time.sleep(0.01)
        return False

    trained = fit(
        *variant(architecture, name), stop=wait, load_checkpoint=kept.load,
        save_checkpoint=kept.save,
    )  # fmt: skip
    new = kept.path / "new-weights"
    save_file({name: t.contiguous() for name, t in weights(trained).items()}, new)
    new.replace(kept.path / "weights")


def weights_in(folder: Path) -> dict[str, Tensor]:
    """What `slow_process` has left at its end."""
    return load_file(folder / "weights")
