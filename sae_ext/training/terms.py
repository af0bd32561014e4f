"""The named terms of an objective: loss = Σ weight · schedule(step) · value.

Values are means over the rows of a batch where a term is `by_row`; the others look at the batch as a whole.
`mse` and `l1` alone are what the fused kernels lower by themselves; any other term makes the step go through
autograd. Each term has a real gradient, which a test compares with finite differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae_ext import ops
from sae_ext.architectures import Architecture, Now
from sae_ext.architectures.base import four
from sae_ext.architectures.topk import largest
from sae_ext.errors import UserError
from sae_ext.fields import STRICT, require, require_above
from sae_ext.schedules import Schedule
from sae_ext.training.reward import Reward
from sae_ext.training.slot_terms import Alignment, Entropy, Independence, Value
from sae_ext.training.term import Seen, Term, moved


class _RowWeighted(Term):
    """A term whose rows may count differently."""

    __slots__ = ()

    row_weight: str | None
    class_weights: Mapping[str, float] | None
    label: str

    def columns(self) -> dict[str, Literal["class", "number"]]:
        """The weights' columns."""
        found: dict[str, Literal["class", "number"]] = {}
        if self.row_weight is not None:
            found[self.row_weight] = "number"
        if self.class_weights is not None:
            found[self.label] = "class"
        return found

    def check_classes(self, classes: Mapping[str, list[str]]) -> None:
        """Every class has a weight."""
        if self.class_weights is None:
            return
        missing = [name for name in classes[self.label] if name not in self.class_weights]
        require(
            not missing,
            f"class_weights lacks {', '.join(map(repr, missing[:5]))}: give every value of column "
            f"{self.label!r} a weight",
        )

    def row_weights(self, now: Now) -> Tensor | None:
        """Weights [B] of a batch; None where all are 1."""
        weights: Tensor | None = None
        if self.row_weight is not None:
            weights = now.columns[self.row_weight]
        if self.class_weights is not None:
            names, places = now.classes[self.label], now.columns[self.label]
            table = moved(torch.tensor([self.class_weights[n] for n in names]), places.device)
            weights = table[places] if weights is None else weights * table[places]
        return weights

    def _check_weights(self) -> None:
        self._check()
        for name, weight in (self.class_weights or {}).items():
            require(weight >= 0, f"class_weights.{name} must be 0 or more, got {weight}")


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return (values if weights is None else weights * values).mean()


@dataclass(frozen=True, kw_only=True)
class MSE(_RowWeighted):
    """The reconstruction: mean_b w_b ‖x̂_b - t_b‖², on scaled activations."""

    __pydantic_config__ = STRICT

    weight: float = 1.0
    """Factor of the term."""
    schedule: Schedule = Schedule()
    """How the factor moves."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the inputs: their sum, or their mean (the same as a weight smaller by d_in)."""
    row_weight: str | None = None
    """Numeric document column with a weight w for each document's rows."""
    class_weights: dict[str, float] | None = None
    """Weight w for each value of the column `label`."""
    label: str = "label"
    """Document column of the classes."""

    def __post_init__(self) -> None:
        self._check_weights()

    def scale(self, d_out: int) -> float:
        """What the sum over inputs is multiplied by."""
        return 1.0 if self.reduction == "sum" else 1.0 / d_out

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        error = (seen.forward.x_hat - seen.target).square().sum(dim=1)
        weights = self.row_weights(seen.now)
        return self.scale(seen.target.shape[1]) * _weighted_mean(error, weights)


@dataclass(frozen=True, kw_only=True)
class L1(_RowWeighted):
    """Sparsity: mean_b s_b Σ_j n_j z_bj; its weight is λ. n_j = ‖W_dec,j‖ for a free decoder, else 1."""

    __pydantic_config__ = STRICT

    weight: float = 2.0
    """λ; where a `target_l0` is given, what the search for it begins with."""
    schedule: Schedule = Schedule(warmup_steps=200)
    """How λ moves."""
    target_l0: float | None = None
    """Mean number of active features wanted; λ is found during training."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the features: their sum, or their mean (the same as a λ smaller by d_sae)."""
    row_weight: str | None = None
    """Numeric document column with a weight s for each document's rows."""
    class_weights: dict[str, float] | None = None
    """Weight s for each value of the column `label`."""
    label: str = "label"
    """Document column of the classes."""

    def __post_init__(self) -> None:
        self._check_weights()
        require_above(self, 0, "target_l0")
        require(
            self.target_l0 is None or self.weight > 0,
            "weight must be positive where target_l0 is given: the search begins there",
        )

    def scale(self, d_sae: int) -> float:
        """What the sum over features is multiplied by."""
        return 1.0 if self.reduction == "sum" else 1.0 / d_sae

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        d_sae = len(seen.weights["b_enc"])
        return self.scale(d_sae) * _weighted_mean(seen.forward.l1, self.row_weights(seen.now))


def l1_weight_between(
    weight: float,
    given: Literal["sum", "mean", "sum_all"],
    wanted: Literal["sum", "mean"],
    *,
    d_sae: int,
    batch_rows: int = 1,
) -> float:
    """λ for another reduction of the L1 term, the objective being the same.

    sum: Σ over features, mean over rows.  mean: mean over both.  sum_all: Σ over both, whose pressure grows
    with the batch, so that it can only be converted from.
    """
    as_sum = {"sum": weight, "mean": weight / d_sae, "sum_all": weight * batch_rows}[given]
    return as_sum * (d_sae if wanted == "mean" else 1)


@dataclass(frozen=True, kw_only=True)
class L0(Term):
    """The number of active features itself, mean_b ‖z_b‖₀, for architectures with learned thresholds."""

    __pydantic_config__ = STRICT
    needs: ClassVar[str | None] = "l0"

    weight: float = 1.0
    """Factor of the term; where a `target_l0` is given, what the search for it begins with."""
    schedule: Schedule = Schedule(warmup_steps=200)
    """How the factor moves."""
    target_l0: float | None = None
    """Mean number of active features wanted; the weight is found during training."""

    def __post_init__(self) -> None:
        self._check()
        require_above(self, 0, "target_l0")
        require(
            self.target_l0 is None or self.weight > 0,
            "weight must be positive where target_l0 is given: the search begins there",
        )

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        return seen.forward.more["l0"].mean()


_RATE, _RATE_STEPS = "usage.rate", "usage.steps"


@dataclass(frozen=True, kw_only=True)
class Usage(Term):
    """How often features fire: mean_j KL(ρ ‖ p_j), with a gradient to the activations of this batch.

    p_j = memory · u_j + (1 - memory) · mean_b tanh(z_bj / T), u being the running firing rate (corrected for
    its start at 0). The gradient is that of p with respect to the batch's share of it, times 1 / (1 - memory):
    as strong as if p were the batch alone.
    """

    __pydantic_config__ = STRICT
    by_row: ClassVar[bool] = False

    weight: float = 1.0
    """Factor of the term."""
    schedule: Schedule = Schedule()
    """How the factor moves."""
    target: float = 0.05
    """ρ: the firing rate wanted."""
    memory: float = 0.99
    """Share of the running rate in p, and its decay."""
    temperature: float = 0.1
    """T: activations well above it count as one firing."""

    def __post_init__(self) -> None:
        self._check()
        require_above(self, 0, "temperature")
        require(0 < self.target < 1, f"target must lie in (0, 1), got {self.target}")
        require(0 <= self.memory < 1, f"memory must lie in [0, 1), got {self.memory}")

    def counted(self, d_sae: int) -> dict[str, Tensor]:
        """The running rate and how many steps it has seen."""
        return {_RATE: torch.zeros(d_sae), _RATE_STEPS: torch.zeros(1)}

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        code, rate, steps = seen.forward.code, *(seen.now.counters[n] for n in (_RATE, _RATE_STEPS))
        rows, col = len(code.row_ptr) - 1, code.col.long()
        with torch.no_grad():
            fired = torch.bincount(col, minlength=len(rate)).to(rate.dtype) / rows
            rate.mul_(self.memory).add_(fired, alpha=1 - self.memory)
            steps += 1
            known = rate / (1 - self.memory ** float(steps)) if self.memory else fired
        soft = code.val.new_zeros(len(rate))
        soft = soft.index_add(0, col, torch.tanh(code.val / self.temperature)) / rows
        live = soft + (self.memory * (known - soft)).detach()
        p = live.clamp(1e-6, 1 - 1e-6)
        rho = self.target
        kl = rho * (rho / p).log() + (1 - rho) * ((1 - rho) / (1 - p)).log()
        return kl.mean()


@dataclass(frozen=True, kw_only=True)
class AuxK(Term):
    """Dead features learn what the living ones leave: V Σ_b ‖ê_b - e_b‖² / Σ_b ‖e_b - ē‖², e = x - x̂ held fixed.

    ê is the reconstruction of e by the k dead features with the largest pre-activations, without b_dec
    (Gao et al. 2024, app. A.2), V = mean_b ‖x_b - x̄‖². 0 while no feature is dead.
    """

    __pydantic_config__ = STRICT
    by_row: ClassVar[bool] = False

    weight: float = 1 / 32
    """Factor of the term, beside a reconstruction term in units of the batch's own variance."""
    schedule: Schedule = Schedule()
    """How the factor moves."""
    k: int = 64
    """Dead features that may be active in a row."""

    def __post_init__(self) -> None:
        self._check()
        require_above(self, 0, "k")

    def value(self, seen: Seen) -> Tensor:
        """See the class."""
        dead = seen.now.dead
        params = four(seen.weights)
        count = 0 if dead is None else int(dead.sum())
        if count == 0:
            return params.b_dec.sum() * 0
        with torch.no_grad():
            error = seen.target - seen.forward.x_hat
            spread = (error - error.mean(dim=0)).square().sum().clamp_min(1e-12)
            variance = (seen.target - seen.target.mean(dim=0)).square().sum(dim=1).mean()
            support = largest(seen.x, params, min(self.k, count), among=dead)
        out = ops.autoencode(seen.x, params, support=support)
        share = (out.x_hat - params.b_dec - error).square().sum() / spread
        return variance * share


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training lowers: the sum of the terms that are there."""

    __pydantic_config__ = STRICT

    mse: MSE = MSE()
    """Reconstruction."""
    l1: L1 | None = L1()
    """Sparsity by the size of activations."""
    l0: L0 | None = None
    """Sparsity by their number (JumpReLU)."""
    usage: Usage | None = None
    """How often each feature fires."""
    auxk: AuxK | None = None
    """Dead features learn what is left over."""
    entropy: Entropy | None = None
    """How sure the slots are (Slots)."""
    alignment: Alignment | None = None
    """Each row takes the slot of its rule (Slots)."""
    independence: Independence | None = None
    """Slots vary together no more than rules do (Slots)."""
    value: Value | None = None
    """What a slot reads of a row tells the row's answer (Slots)."""
    reward: Reward | None = None
    """Gates open where that pays (Gated)."""

    def __post_init__(self) -> None:
        targets = [name for name, term in self.terms().items() if getattr(term, "target_l0", None)]
        require(len(targets) < 2, f"target_l0 may stand in one term only, found it in {targets}")

    def terms(self) -> dict[str, Term]:
        """The terms that are there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: term for name, term in found.items() if term is not None}

    def check_fits(self, steps: int) -> None:
        """Raise `UserError` where a schedule is longer than the run."""
        for name, term in self.terms().items():
            term.schedule.check_fits(steps, f"objective.{name}.schedule")

    def check_serves(self, architecture: Architecture) -> None:
        """Raise `UserError` where the architecture does not give what a term is made of."""
        for name, term in self.terms().items():
            if term.needs is not None and term.needs not in architecture.gives:
                raise UserError(
                    f"train.objective.{name} needs {term.needs!r}, which the architecture "
                    f"{type(architecture).__name__} does not have: leave {name} out, or choose another one"
                )
