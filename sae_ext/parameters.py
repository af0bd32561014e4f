"""What every implementation of a step shares: parameters, Adam's state, sparse codes, and settings.

`sae_ext.ops` is the public face and checks arguments; `sae_ext.reference` and `sae_ext.native` compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_ext.errors import Diverged, UserError


class SparseCode(NamedTuple):
    """Feature activations as compressed sparse rows: only the active entries, columns ascending."""

    row_ptr: Tensor
    """int64 [B + 1]: the entries of row b are row_ptr[b] to row_ptr[b + 1]."""
    col: Tensor
    """int32 [nnz]: feature of each entry."""
    val: Tensor
    """[nnz], >= 0: activation z of each entry."""


class Support(NamedTuple):
    """Where features may be active, as TopK, BatchTopK or JumpReLU choose it.

    z = min(max(pre, 0), clip) on the listed entries and 0 elsewhere: a listed entry with pre <= 0
    is not active.
    """

    row_ptr: Tensor
    """int64 [B + 1]: the entries of row b are row_ptr[b] to row_ptr[b + 1]."""
    col: Tensor
    """int32 [n]: feature of each entry, strictly ascending within a row."""


@dataclass
class Parameters:
    """Weights of one autoencoder, or anything of the same shape (a gradient, a moment)."""

    W_enc_rows: Tensor
    """[d_sae, d_in]: the encoder, one row per feature."""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_in]: the decoder, one row per feature."""
    b_dec: Tensor
    """[d_in]"""

    @property
    def W_enc(self) -> Tensor:
        """The encoder as a [d_in, d_sae] view, the public orientation."""
        return self.W_enc_rows.T

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by field name (no copies)."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def zeros_like(self) -> Parameters:
        """Zeros of the same shapes, dtype and device."""
        return Parameters(**{name: torch.zeros_like(t) for name, t in self.tensors().items()})


@dataclass
class AdamState:
    """Adam's running moments, and how many updates they have seen."""

    m: Parameters
    v: Parameters
    step: int

    @classmethod
    def zeros(cls, params: Parameters) -> AdamState:
        """The state before the first update of `params`."""
        return cls(m=params.zeros_like(), v=params.zeros_like(), step=0)

    def give_to(self, optimizer: torch.optim.Optimizer, params: Parameters) -> None:
        """Let a torch.optim.Adam or AdamW go on from here: its state for the four tensors is set.

        The moments are shared, not copied, so the optimizer's next step moves them too and leaves
        `step` behind: read the state back with `take_from`. Raises `UserError` where a tensor of
        `params` is not one of the optimizer's parameters, or its group has amsgrad set.
        """
        groups = {name: _group(optimizer, name, p) for name, p in params.tensors().items()}
        for name, p in params.tensors().items():
            # Where torch.optim.Adam keeps its counter; one each, for it counts them up in place.
            on_device = groups[name].get("capturable") or groups[name].get("fused")
            optimizer.state[p] = {
                "step": torch.tensor(
                    self.step, dtype=torch.float32, device=p.device if on_device else "cpu"
                ),
                "exp_avg": self.m.tensors()[name],
                "exp_avg_sq": self.v.tensors()[name],
            }

    @classmethod
    def take_from(cls, optimizer: torch.optim.Optimizer, params: Parameters) -> AdamState:
        """The state a torch.optim.Adam or AdamW has reached; its moments are shared, not copied.

        Raises `UserError` where a tensor of `params` is not one of the optimizer's parameters or
        has no Adam state there, where it holds amsgrad's, or where the numbers of steps differ.
        """
        for name, p in params.tensors().items():
            _group(optimizer, name, p)
        states, steps = {}, {}
        for name, p in params.tensors().items():
            state = optimizer.state.get(p, {})
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
                raise UserError(
                    f"the optimizer holds no Adam state for {name}: let a torch.optim.Adam or "
                    "AdamW take a step with its gradient, or begin with AdamState.zeros(params)"
                )
            if "max_exp_avg_sq" in state:
                raise _no_amsgrad(name)
            states[name], steps[name] = state, int(state["step"])
        if len(set(steps.values())) > 1:
            seen = ", ".join(f"{name} {count}" for name, count in steps.items())
            raise UserError(
                f"the optimizer's numbers of steps differ ({seen}): all four tensors must have had "
                "a gradient in every step"
            )
        return cls(
            m=Parameters(**{name: state["exp_avg"] for name, state in states.items()}),
            v=Parameters(**{name: state["exp_avg_sq"] for name, state in states.items()}),
            step=steps["W_dec"],
        )


def _group(optimizer: torch.optim.Optimizer, name: str, p: Tensor) -> dict[str, Any]:
    """The parameter group of an Adam or AdamW that holds the tensor itself."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise UserError(
            f"the optimizer must be a torch.optim.Adam or AdamW, got {type(optimizer).__name__}"
        )
    for group in optimizer.param_groups:
        if any(p is other for other in group["params"]):
            if group.get("amsgrad"):
                raise _no_amsgrad(name)
            return group
    raise UserError(
        f"the optimizer does not hold {name}: make it from the tensors of `params` themselves, "
        "list(params.tensors().values())"
    )


def _no_amsgrad(name: str) -> UserError:
    return UserError(f"the optimizer has amsgrad set for {name}: make it with amsgrad=False")


@dataclass(frozen=True)
class Objective:
    """What a step lowers.

    mean_b w_b ‖x̂_b - x_b‖² + l1 · mean_b s_b Σ_j p_j n_j z_bj
    """

    l1: float
    clip: float | None = None
    """Upper bound of z, None for none."""
    recon_weight: Tensor | None = None
    """w [B], 1 where absent."""
    l1_weight: Tensor | None = None
    """s [B], 1 where absent."""
    feature_weight: Tensor | None = None
    """p [d_sae], >= 0, 1 where absent."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """"unit" keeps every decoder row at length 1, n_j = 1; "free" does not, n_j = ‖W_dec,j‖."""


@dataclass(frozen=True)
class Update:
    """How a step moves the parameters."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled, as in torch.optim.AdamW."""
    max_grad_norm: float | None = None
    """Bound of the norm of all gradients together, as in torch.nn.utils.clip_grad_norm_."""
    train_b_dec: bool = True
    """False: b_dec and its moments stay, and its gradient is not part of the norm."""


class StepResult(NamedTuple):
    """What one step saw, before its update."""

    loss: float
    """The objective: a mean over rows, with all weights."""
    squared_error: float
    """Σ_b ‖x̂_b - x_b‖², without the rows' weights."""
    l1: float
    """Σ_b Σ_j p_j n_j z_bj, without the rows' weights."""
    nnz: int
    """Number of active entries."""
    saturated: int
    """Number of active entries with pre > clip."""
    fired: Tensor
    """int64 [d_sae]: in how many rows each feature was active."""
    grad_norm: float | None
    """Norm of all gradients before clipping and projection; None unless max_grad_norm is set."""


def check_finite(params: Parameters, loss: float) -> None:
    """Raise `Diverged` where a loss that is not finite comes from a parameter that is not."""
    if math.isfinite(loss):
        return
    for name, tensor in params.tensors().items():
        if not bool(tensor.isfinite().all()):
            raise Diverged(
                f"{name} holds a NaN or an infinity: start from a checkpoint before that, with a lower lr"
            )
