"""BatchTopK: of a whole batch the B·k largest pre-activations (Bussmann et al. 2024).

Rows may differ in how many features they use. A single row cannot know the rest of a batch, so after
training an entry is active where it is above a fixed threshold: the running mean of the smallest
activation chosen in training (§3 there). That is a JumpReLU with one threshold for all features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae_ext.architectures.base import (
    Architecture,
    Now,
    Weights,
    pre_activations,
    support_of,
)
from sae_ext.architectures.jumprelu import Thresholds
from sae_ext.fields import STRICT, require, require_above
from sae_ext.ops import Parameters, Support

_THRESHOLD = "batchtopk.threshold"
_MEMORY = 0.9  # short: weights move, and one batch has enough entries to tell


@dataclass(frozen=True, kw_only=True)
class BatchTopK(Architecture):
    """See the module."""

    __pydantic_config__ = STRICT
    sparse_alone: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    kind: Literal["batchtopk"] = "batchtopk"
    k: int = 32
    """Features that are active in a row on average."""

    def __post_init__(self) -> None:
        require_above(self, 0, "k")

    def check(self, d_sae: int) -> None:
        """k features must be there."""
        require(self.k <= d_sae, f"architecture.k is {self.k}, but d_sae is only {d_sae}: lower it")

    def counted(self) -> dict[str, Tensor]:
        """The threshold, 0 before the first step, and how many steps it was seen in."""
        return {_THRESHOLD: torch.zeros(2, dtype=torch.float64)}

    def support(self, x: Tensor, params: Parameters, now: Now) -> Support:
        """The B·k largest entries of the batch that are positive, and what equals the least of them; fewer
        where fewer are positive."""
        count = len(x) * self.k
        # What may be among them: of each chunk no more than `count`. The chunks are computed again afterwards.
        tops = []
        for _, pre in pre_activations(x, params):
            flat = pre.flatten()
            tops.append(flat.topk(min(count, flat.numel()), sorted=False).values)
        least = torch.cat(tops).topk(count, sorted=False).values.min().clamp(min=0.0)
        self._remember(float(least), now.counters[_THRESHOLD])
        return support_of((pre >= least) & (pre > 0) for _, pre in pre_activations(x, params))

    def final(self, weights: Weights, counters: Mapping[str, Tensor]) -> tuple[Thresholds, Weights]:
        """A threshold on every feature."""
        mean, steps = counters[_THRESHOLD].tolist()
        known = mean / (1 - _MEMORY**steps) if steps else 0.0
        return Thresholds(), {"threshold": torch.full_like(weights["b_enc"], known)}

    def _remember(self, least: float, threshold: Tensor) -> None:
        """A running mean, corrected for its start at 0 where it is read."""
        threshold[0] = _MEMORY * threshold[0] + (1 - _MEMORY) * least
        threshold[1] += 1
