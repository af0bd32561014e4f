"""What supervised slots are taught: to be sure, to be right, to vary as rules do, and to tell the answer.

l are the K slots' logits of a row, z its shares of the slots (`sae_ext.architectures.slots`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_ext.architectures.slots import answer_logits
from sae_ext.fields import STRICT
from sae_ext.schedules import Schedule
from sae_ext.training.term import Seen, Term, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Entropy(Term):
    """How undecided the slots are: mean_b H(softmax(l_b)), log K where all are alike, 0 where one is sure.

    Of the logits themselves, not of a sample: noise and temperature have no say.
    """

    __pydantic_config__ = STRICT
    needs: ClassVar[str | None] = "slot_logits"

    weight: float = 1e-3
    """Factor of the term."""
    schedule: Schedule = Schedule()
    """How the factor moves."""

    def __post_init__(self) -> None:
        self._check()

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        log_p = seen.forward.more["slot_logits"].log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1).mean()


@dataclass(frozen=True, kw_only=True)
class Alignment(Term):
    """Each row takes the slot of its rule: mean_b CE(l_b / τ, rule_b).

    Of the logits: log z of a sample at a low temperature would be log 0. Rows of a rule that training has
    never seen do not count.
    """

    __pydantic_config__ = STRICT
    needs: ClassVar[str | None] = "slot_scaled"
    by_row: ClassVar[bool] = False  # a mean over those rows of a batch that are known

    weight: float = 1.0
    """Factor of the term."""
    schedule: Schedule = Schedule()
    """How the factor moves."""

    def __post_init__(self) -> None:
        self._check()

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        more = seen.forward.more
        return cross_entropy(more["slot_scaled"], more["slot_rule"])


@dataclass(frozen=True, kw_only=True)
class Independence(Term):
    """Slots vary together no more than the rules do: ‖Cov(z) - (diag(p) - p pᵀ)‖², the sum over K x K.

    p are the frequencies of the rules among the rows of this batch, and Cov divides by their number: that is
    exactly the covariance of one-hot rules, so slots that match them reach 0 in every batch. (Against
    frequencies of the whole split there would be a floor of sampling noise, and against the identity, as if
    slots could be independent, perfect slots would be punished.) Constant slots do not reach it.
    """

    __pydantic_config__ = STRICT
    needs: ClassVar[str | None] = "slot_shares"
    by_row: ClassVar[bool] = False

    weight: float = 1e-2
    """Factor of the term."""
    schedule: Schedule = Schedule()
    """How the factor moves."""

    def __post_init__(self) -> None:
        self._check()

    def value(self, seen: Seen) -> Tensor:
        """See the class; 0 where no row's rule is known."""
        shares, rule = (seen.forward.more[name] for name in ("slot_shares", "slot_rule"))
        known = rule >= 0
        shares, rule = shares[known], rule[known]
        if len(rule) == 0:
            return shares.sum()
        p = torch.bincount(rule, minlength=shares.shape[1]).to(shares) / len(rule)
        centred = shares - shares.mean(dim=0)
        covariance = centred.T @ centred / len(rule)
        return (covariance - (p.diag() - torch.outer(p, p))).square().sum()


@dataclass(frozen=True, kw_only=True)
class Value(Term):
    """What a slot reads of a row tells the row's answer: mean_b CE(head_i(u_bi), answer_b), i the row's rule.

    u_i = z_i V_i (x - b_dec): a head that saw z alone could learn no more than how frequent answers are.
    Rows whose rule or answer training has never seen do not count.
    """

    __pydantic_config__ = STRICT
    needs: ClassVar[str | None] = "slot_answer"
    by_row: ClassVar[bool] = False  # a mean over those rows of a batch that are known

    weight: float = 0.5
    """Factor of the term."""
    schedule: Schedule = Schedule()
    """How the factor moves."""

    def __post_init__(self) -> None:
        self._check()

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        more = seen.forward.more
        rule, answer = more["slot_rule"], more["slot_answer"]
        known = rule >= 0
        rule, answer = rule[known], answer[known]
        centred = seen.x[known].to(seen.weights["b_dec"].dtype) - seen.weights["b_dec"]
        share = more["slot_shares"][known].gather(1, rule[:, None])
        return cross_entropy(answer_logits(centred, rule, share, seen.weights), answer)
