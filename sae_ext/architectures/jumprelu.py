"""JumpReLU: z = pre where pre > θ_j, else 0, with a learned threshold for each feature.

The step at θ has no gradient, so θ gets that of a rectangle of width ε around it (Rajamanoharan et al.
2024, §3, eqs. 10-12), in the reconstruction and in the L0 penalty:

    dz/dθ_j = -(θ_j / ε) 1[|pre - θ_j| < ε/2]      dL0/dθ_j = -(1/ε) 1[|pre - θ_j| < ε/2]

θ itself is learned, and brought back to 0 where a step takes it below: Adam moves what it learns by about lr in
a step, so that the logarithm of a small θ would take thousands of steps to matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sae_ext import ops
from sae_ext.architectures.base import (
    Architecture,
    Forward,
    Now,
    Weights,
    code_on,
    four,
    joined,
    listed,
    pre_activations,
    support_of,
)
from sae_ext.fields import STRICT, require_above, require_finite
from sae_ext.ops import Parameters, SparseCode, Support

_GATHER_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Thresholds(Architecture):
    """A JumpReLU after training: θ is given."""

    __pydantic_config__ = STRICT
    layout: ClassVar[str] = "jumprelu"

    kind: Literal["thresholds"] = "thresholds"

    def encode(self, x: Tensor, params: Parameters, more: Mapping[str, Tensor]) -> SparseCode:
        """Active where pre > θ, and positive."""
        return code_on(x, params, _above(x, params, more["threshold"]))


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Architecture):
    """See the module. Sparse by the term `l0`, or `l1`."""

    __pydantic_config__ = STRICT
    gives: ClassVar[frozenset[str]] = frozenset({"l0"})
    per_feature: ClassVar[tuple[str, ...]] = ("threshold",)
    selects: ClassVar[bool] = False

    kind: Literal["jumprelu"] = "jumprelu"
    bandwidth: float = 0.05
    """ε: width of the rectangle in which θ has a gradient, in units where E‖x‖ = sqrt(d_in)."""
    threshold: float = 0.01
    """θ of every feature as training begins, in the same units."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(self, 0, "bandwidth", "threshold")

    def initial(
        self, d_in: int, d_sae: int, b_dec: Tensor, classes: Mapping[str, list[str]], seed: int
    ) -> Weights:
        """Beside the four θ [d_sae]."""
        weights = super().initial(d_in, d_sae, b_dec, classes, seed)
        return weights | {"threshold": torch.full((d_sae,), self.threshold)}

    def forward(self, x: Tensor, weights: Weights, now: Now, *, price: Tensor | None) -> Forward:
        """Gradients of θ come from the entries around it, active or not."""
        params, threshold = four(weights), weights["threshold"]
        near, active = [], []
        with torch.no_grad():
            for _, pre in pre_activations(x, params):
                near.append(listed((pre - threshold).abs() < self.bandwidth / 2))
                active.append(listed(pre > threshold))
            window, support = joined(near), joined(active)
        out = ops.autoencode(x, params, feature_weight=price, support=support)
        row = torch.repeat_interleave(torch.arange(len(x), device=x.device), window.row_ptr.diff())
        entries = (row, window.col.long())
        slope = -threshold.detach() / self.bandwidth
        x_hat: Tensor = _Straight.apply(  # type: ignore[no-untyped-call]
            out.x_hat, threshold, weights["W_dec"].detach(), slope, *entries
        )
        # Values that are 0 and have the slope of the rectangle.
        # (An index_select, since the backward of plain indexing adds up in no fixed order.)
        hinge = torch.index_select(threshold - threshold.detach(), 0, entries[1])
        ones = torch.ones_like(out.code.val).detach()
        l0 = torch.segment_reduce(ones, "sum", offsets=out.code.row_ptr, initial=0.0)
        l0 = l0.index_add(0, row, hinge, alpha=-1 / self.bandwidth)
        cost = (slope if price is None else slope * price.detach())[entries[1]]
        l1 = out.l1.index_add(0, row, hinge * cost)
        return Forward(x_hat, out.code, l1, more={"l0": l0})

    def constrain(self, weights: Weights) -> None:
        """θ >= 0."""
        weights["threshold"].clamp_(min=0)

    def revive(self, weights: Weights, which: Tensor) -> None:
        """The threshold of the beginning."""
        weights["threshold"][which] = self.threshold

    def final(self, weights: Weights, counters: Mapping[str, Tensor]) -> tuple[Thresholds, Weights]:
        """The thresholds themselves."""
        return Thresholds(), {"threshold": weights["threshold"]}


class _Straight(torch.autograd.Function):
    """x̂ unchanged, with a gradient to θ through the entries of a window: slope_j ⟨dL/dx̂_b, W_dec,j⟩."""

    @staticmethod
    def forward(
        ctx: Any, x_hat: Tensor, threshold: Tensor, W_dec: Tensor, slope: Tensor, row: Tensor,
        col: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(W_dec, slope, row, col)
        return x_hat.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, slope, row, col = ctx.saved_tensors
        (grad,) = grads
        total = torch.zeros_like(slope)
        size = max(1, _GATHER_BYTES // (W_dec.shape[1] * W_dec.element_size()))
        for start in range(0, len(row), size):
            r, c = row[start : start + size], col[start : start + size]
            total.index_add_(0, c, (grad[r] * W_dec[c]).sum(dim=1))
        return grad, slope * total, None, None, None, None


def _above(x: Tensor, params: Parameters, threshold: Tensor) -> Support:
    return support_of([(pre > threshold) & (pre > 0) for _, pre in pre_activations(x, params)])
