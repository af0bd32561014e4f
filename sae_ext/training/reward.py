"""The reward of stochastic gates, and its policy gradient (REINFORCE: Williams 1992).

    R_i   = -‖x̂_i - t_i‖² - l0_weight · Σ_j m_ij + diversity_weight · Div_i
    Div_i = mean_j (m_ij - m̄_j)²        m̄_j = mean_i m_ij over the batch

The mean of Div over the batch is mean_j m̄_j (1 - m̄_j), the variance of the gates between rows: with a
positive weight it pays if rows open different gates, and costs where a gate is open always or never.

R has no gradient to the gates that were drawn. What the logits l follow instead is

    dL/dl_ij = -(R_i - b_i) (m_ij - σ(l_ij)) / B - entropy_weight · dH/dl_ij

b_i being the mean reward of the other rows (Kool et al. 2019), H the mean over rows of the gates' summed
entropies. This is the gradient of the expected reward without bias; but of Div, whose m̄ is made of the same
rows, it is (B - 2) / (B - 1) of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_ext.fields import STRICT, require, require_at_least
from sae_ext.schedules import Schedule
from sae_ext.training.term import Seen, Term


@dataclass(frozen=True, kw_only=True)
class Reward(Term):
    """See the module. Its value is -mean_i R_i - entropy_weight · H, its gradient the one there.

    It moves what gates are made of; weights learn to reconstruct by the term `mse`, and sparsity comes from
    `l0_weight`, so that no other penalty is needed.
    """

    __pydantic_config__ = STRICT
    needs: ClassVar[str | None] = "gate_logits"
    by_row: ClassVar[bool] = False

    weight: float = 1.0
    """Factor of the term."""
    schedule: Schedule = Schedule()
    """How the factor moves."""
    l0_weight: float = 1.0
    """What an open gate costs, in units of squared error where E‖x‖² is about d_in."""
    diversity_weight: float = 0.0
    """What it pays if rows open different gates."""
    entropy_weight: float = 0.0
    """What it pays to leave gates undecided."""

    def __post_init__(self) -> None:
        self._check()
        require_at_least(self, 0, "l0_weight", "diversity_weight", "entropy_weight")

    def value(self, seen: Seen) -> Tensor:
        """See the class.

        Raises:
            UserError: the batch is a single row, which has no others to be compared with.
        """
        logits, gates = (seen.forward.more[name] for name in ("gate_logits", "gates"))
        rows = len(logits)
        require(rows > 1, "the term reward compares rows: train.batch_rows must be 2 or more")
        with torch.no_grad():
            rewards = self.rewards(seen.forward.x_hat, seen.target, gates)
            others = (rewards.sum() - rewards) / (rows - 1)
        log_probability = (gates * logits - F.softplus(logits)).sum(dim=1)
        surrogate = -((rewards - others) * log_probability).mean()
        entropy = (F.softplus(logits) - logits * torch.sigmoid(logits)).sum(dim=1).mean()
        # Its own value says nothing: it is there for its gradient.
        hidden = surrogate - surrogate.detach()
        return hidden - rewards.mean() - self.entropy_weight * entropy

    def rewards(self, x_hat: Tensor, target: Tensor, gates: Tensor) -> Tensor:
        """R [B] of gates m [B, d_sae], which are 0 or 1."""
        error = (x_hat - target).square().sum(dim=1)
        diversity = (gates - gates.mean(dim=0)).square().mean(dim=1)
        return -error - self.l0_weight * gates.sum(dim=1) + self.diversity_weight * diversity
