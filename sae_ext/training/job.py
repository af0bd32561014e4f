"""One autoencoder to train, where the work is done, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch.distributed as dist
from torch import Tensor

from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.model import SAE
from sae_ext.training.history import Line


class Progress(NamedTuple):
    """Where a run is; means since the last time."""

    step: int
    steps: int
    rows_per_second: float
    loss: float
    fvu: float
    l0: float
    dead_fraction: float
    number: int = 0
    """Which of several runs."""


@dataclass
class Trained:
    """The result of a run."""

    sae: SAE
    """Ready for raw activations: the last one, or with early stopping the best."""
    history: pa.Table
    """`sae_ext.training.history.COLUMNS`."""
    events: pa.Table
    """`sae_ext.training.history.EVENT_COLUMNS`."""
    scale: float
    """The factor by which activations were scaled in training; folded into the SAE."""
    penalty: float | None
    """Weight of the term for sparsity at the end: λ as given or as found; None where there is none."""
    steps: int
    """Steps done."""
    validation: dict[str, Any]
    """Metrics on the whole validation split, see `sae_ext.metrics`."""
    density: Tensor
    """Fraction of the validation rows in which each feature fires, float64 [d_sae]."""

    def told(self, config: Mapping[str, Any], activations: str) -> bytes:
        """training.json: the configuration, the key of the data, and what was found."""
        facts = {
            "config": config,
            "activations": activations,
            "scale": self.scale,
            "penalty": self.penalty,
            "steps": self.steps,
            "validation": self.validation,
        }
        return json.dumps(facts, indent=1, sort_keys=True).encode()


@dataclass
class Job:
    """One autoencoder to train, and where its checkpoints go."""

    sae: SAEConfig
    config: TrainConfig
    load_checkpoint: Callable[[], bytes | None] = lambda: None
    """Gives the bytes last saved for this run, or None to start."""
    save_checkpoint: Callable[[bytes], object] = lambda data: None
    """Keeps the bytes of a checkpoint."""
    keep: Callable[[int, SAE, dict[str, Any]], object] = lambda step, sae, seen: None
    """Keeps an SAE of that step with its validation metrics, for `keep_checkpoints`."""
    on_line: Callable[[Line], object] = lambda line: None
    """Called with every line of the history."""


@dataclass(frozen=True)
class Place:
    """Where the work is done; none of it changes what is found (but for the last bits of sums)."""

    device: str = "cpu"
    readers: int = 1
    """Threads that read batches ahead."""
    group: dist.ProcessGroup | None = None
    """Workers that train one autoencoder together, each with its share of every batch."""

    @property
    def share(self) -> tuple[int, int]:
        """This worker's number and how many there are."""
        if self.group is None:
            return (0, 1)
        return dist.get_rank(self.group), dist.get_world_size(self.group)
