"""Trials: a finished search over learning rate and λ, as a table, with the winner in the manifest.

`trials.parquet`, one row per trial: trial, lr, l1 (λ), sae (key of the trained SAE, null when it
failed), fvu and l0 (on validation documents), objective, state (done|failed), error.
"""

from __future__ import annotations

import math

from sae_ext.artefacts import Stage
from sae_ext.artefacts.saes import shape
from sae_ext.config import SAEConfig, TrainConfig, TuneConfig, to_dict, with_changes

KIND = "trials"
TRIALS = "trials.parquet"
PENALTY = "objective.l1.weight"
"""Where λ stands in the training's configuration."""


def stage(sae: SAEConfig, train: TrainConfig, tune: TuneConfig, activations: str) -> Stage:
    """A search; the learning rate and λ written in the recipe do not count, they are searched."""
    fixed = to_dict(with_changes(train, {"lr": 1.0, PENALTY: 1.0}))
    config = {"sae": shape(sae), "train": fixed, "tune": to_dict(tune)}
    return Stage(KIND, config, {"activations": activations})


def objective(fvu: float, l0: float, band: tuple[float, float]) -> float:
    """What the search minimises: FVU within the band of mean L0; λ is never part of it.

    Outside the band it is at least 1 and grows with the logarithmic distance, so that any trial
    inside that explains anything wins, and the search still sees which way the band lies.
    """
    low, high = band
    if low <= l0 <= high:
        return fvu
    nearest = low if l0 < low else high
    return max(1.0, fvu) + abs(math.log(max(l0, 1e-3) / nearest))
