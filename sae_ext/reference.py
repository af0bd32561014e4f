"""The sparse autoencoder's step in plain PyTorch: the equations, the oracle and the fallback.

The compiled kernels are tested against this file, and where none are built this file does their
work. It also holds the tensors both share: `Parameters`, `AdamState`, `SparseCode`, `StepResult`.
Arguments are checked in `sae_ext.ops`, the public face; call that one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_BYTES = 32 << 20  # bounds every [rows, d_sae] temporary


class SparseCode(NamedTuple):
    """Feature activations as compressed sparse rows: only the active entries, columns ascending."""

    row_ptr: Tensor
    """int64 [B + 1]: the entries of row b are row_ptr[b] to row_ptr[b + 1]."""
    col: Tensor
    """int32 [nnz]: feature of each entry."""
    val: Tensor
    """[nnz], >= 0: activation z of each entry."""


@dataclass
class Parameters:
    """Weights of one autoencoder, or anything of the same shape (a gradient, a moment)."""

    W_enc_rows: Tensor
    """[d_sae, d_in]: the encoder, one row per feature."""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_in]: the decoder, one row of unit length per feature."""
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


class StepResult(NamedTuple):
    """What one step saw, before its update; sums over rows, without the rows' weights."""

    squared_error: float
    """Σ_b ‖x̂_b - x_b‖²"""
    l1: float
    """Σ_b Σ_j z_bj"""
    nnz: int
    """Number of active entries."""
    saturated: int
    """Number of entries with pre > clip."""
    fired: Tensor
    """int64 [d_sae]: in how many rows each feature was active."""


def activations(x: Tensor, params: Parameters, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """Dense pre-activations and activations of x [B, d_in], both [B, d_sae].

    pre = (x - b_dec) W_enc + b_enc
    z   = min(max(pre, 0), clip)
    """
    pre = (x - params.b_dec) @ params.W_enc + params.b_enc
    return pre, pre.relu() if clip is None else pre.relu().clamp(max=clip)


def loss(
    x: Tensor,
    params: Parameters,
    *,
    l1: float,
    clip: float | None = None,
    recon_weight: Tensor | None = None,
    l1_weight: Tensor | None = None,
) -> Tensor:
    """The scalar that training lowers, differentiable by autograd.

    mean_b w_b ‖x̂_b - x_b‖² + l1 · mean_b s_b Σ_j z_bj   with   x̂ = z W_dec + b_dec

    The weights w (`recon_weight`) and s (`l1_weight`) are [B] tensors, 1 where absent.
    """
    _, z = activations(x, params, clip)
    error = (z @ params.W_dec + params.b_dec - x).square().sum(1)
    size = z.sum(1)
    if recon_weight is not None:
        error = recon_weight * error
    if l1_weight is not None:
        size = l1_weight * size
    return error.mean() + l1 * size.mean()


def gradients(
    x: Tensor,
    params: Parameters,
    *,
    l1: float,
    clip: float | None = None,
    recon_weight: Tensor | None = None,
    l1_weight: Tensor | None = None,
) -> tuple[Parameters, StepResult]:
    """Gradients of `loss`, written out, in chunks of rows so that memory stays bounded.

    g     = (2 / B) w (x̂ - x)
    gz    = (g W_decᵀ + (l1 / B) s) · 1[0 < pre <= clip]
    W_dec : zᵀ g          W_enc : (x - b_dec)ᵀ gz          b_enc : Σ_b gz
    b_dec : Σ_b g - (Σ_b gz) W_encᵀ
    """
    total = params.zeros_like()
    fired = torch.zeros_like(params.b_enc, dtype=torch.int64)
    squared_error, size, saturated = 0.0, 0.0, 0
    for rows in _chunks(x, params):
        pre, z = activations(x[rows], params, clip)
        error = z @ params.W_dec + params.b_dec - x[rows]
        g = (2 / len(x)) * error * _column(recon_weight, rows)
        gz = g @ params.W_dec.T + (l1 / len(x)) * _column(l1_weight, rows)
        # Worded so that a NaN counts as active and reaches the gradients.
        active, over = ~(pre <= 0), pre > (math.inf if clip is None else clip)
        gz.masked_fill_(~active | over, 0)

        total.W_dec += z.T @ g
        total.W_enc_rows += gz.T @ (x[rows] - params.b_dec)
        total.b_enc += gz.sum(0)
        total.b_dec += g.sum(0)
        squared_error += error.double().square().sum().item()
        size += z.sum(dtype=torch.float64).item()
        saturated += int(over.sum())
        fired += active.sum(0)
    total.b_dec -= total.b_enc @ params.W_enc_rows
    return total, StepResult(squared_error, size, int(fired.sum()), saturated, fired)


def project(gradient: Parameters, params: Parameters) -> None:
    """Remove from each decoder row's gradient, in place, the part along the row itself."""
    length2 = params.W_dec.square().sum(1, keepdim=True)
    share = (gradient.W_dec * params.W_dec).sum(1, keepdim=True) / length2
    gradient.W_dec -= torch.where(length2 == 0, 0, share) * params.W_dec


def adam_update(
    params: Parameters,
    adam: AdamState,
    gradient: Parameters,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """One Adam update in place, with torch.optim.Adam's conventions (Kingma & Ba, 2015, alg. 1).

    m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
    p ← p - lr · m / (1 - β₁ᵗ) / (sqrt(v / (1 - β₂ᵗ)) + eps)
    """
    adam.step += 1
    rate = lr / (1 - beta1**adam.step)
    v_root = math.sqrt(1 - beta2**adam.step)
    moments = zip(adam.m.tensors().values(), adam.v.tensors().values(), strict=True)
    for p, g, (m, v) in zip(
        params.tensors().values(), gradient.tensors().values(), moments, strict=True
    ):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, (v.sqrt() / v_root).add_(eps), value=-rate)


def renormalise(params: Parameters) -> None:
    """Bring each decoder row back to length 1, in place; a row of zeros stays."""
    length = params.W_dec.norm(dim=1, keepdim=True)
    params.W_dec /= torch.where(length == 0, 1, length)


@torch.no_grad()
def step(
    params: Parameters,
    adam: AdamState,
    x: Tensor,
    *,
    l1: float,
    lr: float,
    clip: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    recon_weight: Tensor | None = None,
    l1_weight: Tensor | None = None,
) -> StepResult:
    """One training step in place: gradients, projection, Adam, decoder rows of unit length."""
    gradient, result = gradients(
        x, params, l1=l1, clip=clip, recon_weight=recon_weight, l1_weight=l1_weight
    )
    project(gradient, params)
    adam_update(params, adam, gradient, lr=lr, beta1=beta1, beta2=beta2, eps=eps)
    renormalise(params)
    return result


@torch.no_grad()
def encode(x: Tensor, params: Parameters, clip: float | None = None) -> SparseCode:
    """Active entries of x [B, d_in], in chunks of rows."""
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device)]
    cols = [torch.zeros(0, dtype=torch.int32, device=x.device)]
    vals = [x.new_zeros(0)]
    for rows in _chunks(x, params):
        pre, z = activations(x[rows], params, clip)
        active = ~(pre <= 0)
        counts.append(active.sum(1))
        cols.append(active.nonzero()[:, 1].int())
        vals.append(z[active])
    return SparseCode(torch.cat(counts).cumsum(0), torch.cat(cols), torch.cat(vals))


@torch.no_grad()
def decode(code: SparseCode, params: Parameters) -> Tensor:
    """Reconstruction x̂ [B, d_in] of a code, in chunks of rows."""
    batch = len(code.row_ptr) - 1
    out = params.b_dec.expand(batch, -1).clone()
    for rows in _chunks(out, params):
        entries = slice(int(code.row_ptr[rows.start]), int(code.row_ptr[rows.stop]))
        z = out.new_zeros(rows.stop - rows.start, len(params.W_dec))
        lengths = code.row_ptr[rows.start : rows.stop + 1].diff()
        row = torch.repeat_interleave(torch.arange(len(z), device=out.device), lengths)
        z[row, code.col[entries].long()] = code.val[entries]
        out[rows] += z @ params.W_dec
    return out


def _chunks(x: Tensor, params: Parameters) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (len(params.b_enc) * x.element_size()))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def _column(weight: Tensor | None, rows: slice) -> Tensor | float:
    return 1.0 if weight is None else weight[rows, None]
