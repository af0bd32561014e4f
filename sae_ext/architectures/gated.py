"""Stochastic gates: in training a coin decides for each feature of each row whether it is active.

    l = ((x - b_dec) W_enc + b_gate) / T        m ~ Bernoulli(σ(l))        z = m · relu(pre)

The gates learn by the term `reward`, whose policy gradient needs every gate of a batch: a training step holds
tensors [B, d_sae], as no other architecture does. The rest learns by the term `mse` through the gates that
were open.

After training a gate is open where that was more likely than not, l > 0. Since pre = (x - b_dec) W_enc +
b_enc, this is a JumpReLU with the thresholds b_enc - b_gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae_ext import ops
from sae_ext.architectures.base import (
    Architecture,
    Forward,
    Now,
    Weights,
    four,
    require_never_zero,
    support_of,
)
from sae_ext.architectures.jumprelu import Thresholds
from sae_ext.fields import STRICT, require, require_above, require_finite
from sae_ext.schedules import Schedule

_BIAS = "gate_bias"


@dataclass(frozen=True, kw_only=True)
class Gated(Architecture):
    """See the module. Sparse by the cost of open gates in the term `reward`."""

    __pydantic_config__ = STRICT
    gives: ClassVar[frozenset[str]] = frozenset({"gate_logits", "gates"})
    sparse_alone: ClassVar[bool] = True
    selects: ClassVar[bool] = False
    per_feature: ClassVar[tuple[str, ...]] = (_BIAS,)
    by_row: ClassVar[bool] = False  # the coins are thrown for a batch as a whole

    kind: Literal["gated"] = "gated"
    share: float = 0.1
    """Share of the gates that are open as training begins, if rows spread alike in all directions."""
    temperature: float = 1.0
    """T as the schedule `anneal` has it at 1, in units where E‖x‖ = sqrt(d_in): the higher, the more a gate is
    left to chance."""
    anneal: Schedule = Schedule(kind="linear", final=0.2)
    """How T moves."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(self, 0, "temperature")
        require(0 < self.share < 1, f"share must lie in (0, 1), got {self.share}")
        require_never_zero(self.anneal, "anneal")

    def schedules(self) -> dict[str, Schedule]:
        """That of the temperature."""
        return {"anneal": self.anneal}

    def initial(
        self, d_in: int, d_sae: int, b_dec: Tensor, classes: Mapping[str, list[str]], seed: int
    ) -> Weights:
        """Beside the four b_gate [d_sae]."""
        weights = super().initial(d_in, d_sae, b_dec, classes, seed)
        weights[_BIAS] = torch.zeros(d_sae)
        self.revive(weights, torch.arange(d_sae))
        return weights

    def forward(self, x: Tensor, weights: Weights, now: Now, *, price: Tensor | None) -> Forward:
        """Gates are drawn; the weights' gradient passes through those that are open."""
        params = four(weights)
        temperature = self.temperature * now.factors["anneal"]
        rows = x.to(params.b_dec.dtype) - params.b_dec
        logits = torch.addmm(weights[_BIAS], rows, params.W_enc_rows.T) / temperature
        with torch.no_grad():
            coins = torch.rand(logits.shape, generator=now.generator("gates"), dtype=logits.dtype)
            gates = coins.to(logits.device) < torch.sigmoid(logits)
            support = support_of([gates])
        out = ops.autoencode(x, params, feature_weight=price, support=support)
        more = {"gate_logits": logits, "gates": gates.to(logits.dtype)}
        return Forward(out.x_hat, out.code, out.l1, more=more)

    def revive(self, weights: Weights, which: Tensor) -> None:
        """A bias with which a gate is open in that share of rows again."""
        rows, b_dec = weights["W_enc_rows"][which], weights["b_dec"]
        # Rows have E‖x‖² of about d_in, of which ‖b_dec‖² is their mean's.
        left = max(0.0, 1 - float(b_dec.square().sum()) / len(b_dec))
        spread = math.sqrt(left) * float(rows.norm(dim=1).mean())
        weights[_BIAS][which] = bias_for(self.share, spread, self.temperature)

    def final(self, weights: Weights, counters: Mapping[str, Tensor]) -> tuple[Thresholds, Weights]:
        """A gate that is a threshold; below 0 the ReLU is the only one."""
        return Thresholds(), {"threshold": (weights["b_enc"] - weights[_BIAS]).clamp_min(0.0)}


def bias_for(share: float, spread: float, temperature: float) -> float:
    """b with E σ((a + b) / T) = share, for a normal with mean 0 and this standard deviation."""
    quantiles = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
    normal = spread * torch.special.ndtri(quantiles)
    low, high = -50 * (spread + temperature), 50 * (spread + temperature)
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.sigmoid((normal + middle) / temperature).mean()) < share:
            low = middle
        else:
            high = middle
    return middle
