"""The sparse autoencoder's step in plain PyTorch: the equations, the oracle and the fallback.

The compiled kernels are tested against this file, and where none are built this file does their
work. Arguments are checked in `sae_ext.ops`, the public face; call that one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext.parameters import (
    AdamState,
    Objective,
    Parameters,
    SparseCode,
    StepResult,
    Support,
    Update,
    check_finite,
)

_CHUNK_BYTES = 32 << 20  # bounds every [rows, d_sae] temporary


def activations(
    x: Tensor, params: Parameters, clip: float | None = None, support: Support | None = None
) -> tuple[Tensor, Tensor]:
    """Dense pre-activations and activations of x [B, d_in], both [B, d_sae].

    pre = (x - b_dec) W_enc + b_enc, -inf where a support does not list the entry
    z   = min(max(pre, 0), clip)
    """
    pre = (x - params.b_dec) @ params.W_enc + params.b_enc
    if support is not None:
        ones = torch.ones_like(support.col, dtype=torch.bool)
        pre = pre.masked_fill(
            ~_dense(support, ones, slice(0, len(x)), len(params.b_enc)), -math.inf
        )
    return pre, pre.relu() if clip is None else pre.relu().clamp(max=clip)


def loss(
    x: Tensor, params: Parameters, objective: Objective, support: Support | None = None
) -> Tensor:
    """The scalar that training lowers, differentiable by autograd.

    mean_b w_b ‖x̂_b - x_b‖² + l1 · mean_b s_b Σ_j p_j n_j z_bj   with   x̂ = z W_dec + b_dec

    The names are those of `Objective`.
    """
    _, z = activations(x, params, objective.clip, support)
    error = (z @ params.W_dec + params.b_dec - x).square().sum(1)
    size = (z * _prices(params, objective)).sum(1)
    if objective.recon_weight is not None:
        error = objective.recon_weight * error
    if objective.l1_weight is not None:
        size = objective.l1_weight * size
    return error.mean() + objective.l1 * size.mean()


@torch.no_grad()
def gradients(
    x: Tensor, params: Parameters, objective: Objective, support: Support | None = None
) -> tuple[Parameters, StepResult]:
    """Gradients of `loss`, written out, in chunks of rows so that memory stays bounded.

    g     = (2 / B) w (x̂ - x)
    gz    = (g W_decᵀ + (l1 / B) s p n) · 1[0 < pre <= clip]
    W_dec : zᵀ g          W_enc : (x - b_dec)ᵀ gz          b_enc : Σ_b gz
    b_dec : Σ_b g - (Σ_b gz) W_encᵀ

    A free decoder's rows also feel the penalty: W_dec,j : + (l1 / B) p_j (Σ_b s_b z_bj) W_dec,j / n_j,
    and 0 for a row of zeros.
    """
    rate = objective.l1 / len(x)
    prices = _prices(params, objective)
    total = params.zeros_like()
    sum_z = torch.zeros_like(params.b_enc, dtype=torch.float64)
    sum_sz = torch.zeros_like(sum_z)
    fired = torch.zeros_like(params.b_enc, dtype=torch.int64)
    value, squared_error, saturated = 0.0, 0.0, 0
    for rows in _chunks(x, params):
        w, s = _column(objective.recon_weight, rows), _column(objective.l1_weight, rows)
        pre, z = activations(x[rows], params, objective.clip, _part(support, rows))
        error = z @ params.W_dec + params.b_dec - x[rows]
        g = (2 / len(x)) * error * w
        gz = g @ params.W_dec.T + rate * s * prices
        # Worded so that a NaN counts as active and reaches the gradients.
        active, over = ~(pre <= 0), pre > _bound(objective.clip)
        gz.masked_fill_(~active | over, 0)

        total.W_dec += z.T @ g
        total.W_enc_rows += gz.T @ (x[rows] - params.b_dec)
        total.b_enc += gz.sum(0)
        total.b_dec += g.sum(0)
        square = error.double().square()
        squared_error += square.sum().item()
        value += (w * square).sum().item() / len(x)
        exact, weight = z.double(), objective.l1_weight
        sum_z += exact.sum(0)
        sum_sz += exact.sum(0) if weight is None else weight[rows].double() @ exact
        saturated += int(over.sum())
        fired += active.sum(0)
    total.b_dec -= total.b_enc @ params.W_enc_rows
    if objective.decoder_norm == "free":
        push = rate * _feature_weights(params, objective) * sum_sz.to(params.W_dec.dtype)
        total.W_dec += push[:, None] * params.W_dec / _lengths(params)
    value += rate * (prices * sum_sz).sum().item()
    size = (prices * sum_z).sum().item()
    nnz = int(fired.sum())
    return total, StepResult(value, squared_error, size, nnz, saturated, fired, None)


def clip_gradient(gradient: Parameters, update: Update) -> float | None:
    """Shorten the gradient in place to `max_grad_norm`; its norm before, None where there is no bound.

    All gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)), as
    torch.nn.utils.clip_grad_norm_ does.
    """
    if update.max_grad_norm is None:
        return None
    trained = [gradient.tensors()[name] for name in _trained(update)]
    norm = torch.stack([g.double().square().sum() for g in trained]).sum().sqrt()
    share = (update.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # NaN stays NaN
    for g in trained:
        g *= share
    return norm.item()


def project(gradient: Parameters, params: Parameters) -> None:
    """Remove from each decoder row's gradient, in place, the part along the row itself."""
    length2 = params.W_dec.square().sum(1, keepdim=True)
    share = (gradient.W_dec * params.W_dec).sum(1, keepdim=True) / length2
    gradient.W_dec -= torch.where(length2 == 0, 0, share) * params.W_dec


def adam_update(params: Parameters, adam: AdamState, gradient: Parameters, update: Update) -> None:
    """One Adam update in place, with the conventions of torch.optim.Adam and AdamW.

    p ← p - lr · weight_decay · p
    m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
    p ← p - lr · m / (1 - β₁ᵗ) / (sqrt(v / (1 - β₂ᵗ)) + eps)

    Sources: Kingma & Ba, 2015, alg. 1; Loshchilov & Hutter, 2019, alg. 2.
    """
    adam.step += 1
    rate = update.lr / (1 - update.beta1**adam.step)
    v_root = math.sqrt(1 - update.beta2**adam.step)
    groups = [group.tensors() for group in (params, gradient, adam.m, adam.v)]
    for name in _trained(update):
        p, g, m, v = (group[name] for group in groups)
        p.mul_(1 - update.lr * update.weight_decay)
        m.lerp_(g, 1 - update.beta1)
        v.mul_(update.beta2).addcmul_(g, g, value=1 - update.beta2)
        p.addcdiv_(m, (v.sqrt() / v_root).add_(update.eps), value=-rate)


def renormalise(params: Parameters) -> None:
    """Bring each decoder row back to length 1, in place; a row of zeros stays."""
    params.W_dec /= _lengths(params)


@torch.no_grad()
def step(
    params: Parameters,
    adam: AdamState,
    x: Tensor,
    objective: Objective,
    update: Update,
    support: Support | None = None,
    group: dist.ProcessGroup | None = None,
) -> StepResult:
    """One training step in place, on the rows of all members of a group where there is one.

    Gradients, clipping of their norm, projection, Adam, rows of unit length; the projection and the
    lengths only where the objective's `decoder_norm` is "unit".
    """
    gradient, result = gradients(x, params, objective, support)
    if group is not None:
        result = _over_all(group, gradient, result, len(x))
    check_finite(params, result.loss)
    grad_norm = clip_gradient(gradient, update)
    if objective.decoder_norm == "unit":
        project(gradient, params)
    adam_update(params, adam, gradient, update)
    if objective.decoder_norm == "unit":
        renormalise(params)
    return result._replace(grad_norm=grad_norm)


@torch.no_grad()
def encode(
    x: Tensor, params: Parameters, clip: float | None = None, support: Support | None = None
) -> SparseCode:
    """Active entries of x [B, d_in], in chunks of rows."""
    code = _signed_code(x, params, clip, support)
    return code._replace(val=code.val.abs())


@torch.no_grad()
def decode(code: SparseCode, params: Parameters) -> Tensor:
    """Reconstruction x̂ [B, d_in] of a code, in chunks of rows."""
    out = params.b_dec.expand(len(code.row_ptr) - 1, -1).clone()
    for rows in _chunks(out, params):
        out[rows] += _dense(code, code.val, rows, len(params.b_enc)) @ params.W_dec
    return out


@torch.no_grad()
def autoencode(
    x: Tensor,
    params: Parameters,
    clip: float | None = None,
    feature_weight: Tensor | None = None,
    support: Support | None = None,
) -> tuple[Tensor, Tensor, Tensor, SparseCode]:
    """What a loss may be made of: x̂ [B, d_in], Σ_j p_j z_bj [B], Σ_b z_bj [d_sae] and the code.

    p is `feature_weight` [d_sae]. In the code, `val` is z but -clip where pre > clip: the sign says
    that no gradient passes. `autoencode_backward` takes it back.
    """
    code = _signed_code(x, params, clip, support)
    p = torch.ones_like(params.b_enc) if feature_weight is None else feature_weight
    x_hat, l1, activity = torch.empty_like(x), x.new_empty(len(x)), torch.zeros_like(params.b_enc)
    for rows in _chunks(x, params):
        z = _dense(code, code.val.abs(), rows, len(activity))
        x_hat[rows] = z @ params.W_dec + params.b_dec
        l1[rows] = z @ p
        activity += z.sum(0)
    return x_hat, l1, activity, code


@torch.no_grad()
def autoencode_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    params: Parameters,
    code: SparseCode,
    feature_weight: Tensor | None = None,
    *,
    of_x: bool = True,
    of_weights: bool = True,
) -> tuple[Tensor, Parameters, Tensor]:
    """Gradients of x [B, d_in], the parameters and p [d_sae], written out, in chunks of rows.

    dz    = g_x̂ W_decᵀ + g_l1 p + g_activity + g_val    on the listed entries with pre <= clip
    W_dec : zᵀ g_x̂        W_enc : (x - b_dec)ᵀ dz        b_enc : Σ_b dz        x : dz W_encᵀ
    b_dec : Σ_b g_x̂ - (Σ_b dz) W_encᵀ                    p_j   : Σ_b g_l1,b z_bj

    Args:
        grads: of `autoencode`'s x̂, l1, activity and of each entry's z; None counts as zeros.
        code: as `autoencode` returned it.
        of_x, of_weights: whether the gradient of x, and those of the parameters and p, are wanted;
            where not, empty tensors take their place.
    """
    g_x_hat, g_l1, g_activity, g_val = grads
    p = torch.ones_like(params.b_enc) if feature_weight is None else feature_weight
    grad_p, total = torch.zeros_like(p), params.zeros_like()
    grad_x = torch.empty_like(x) if of_x else x.new_empty(0)
    for rows in _chunks(x, params):
        val = _dense(code, code.val, rows, len(p))
        z, dz = val.abs(), torch.zeros_like(val)
        if g_x_hat is not None:
            dz += g_x_hat[rows] @ params.W_dec.T
            total.W_dec += z.T @ g_x_hat[rows]
            total.b_dec += g_x_hat[rows].sum(0)
        if g_l1 is not None:
            dz += g_l1[rows, None] * p
            grad_p += g_l1[rows] @ z
        if g_activity is not None:
            dz += g_activity
        if g_val is not None:
            dz += _dense(code, g_val, rows, len(p))
        dz.masked_fill_(val <= 0, 0)  # not listed, or above the clip

        total.W_enc_rows += dz.T @ (x[rows] - params.b_dec)
        total.b_enc += dz.sum(0)
        if of_x:
            grad_x[rows] = dz @ params.W_enc_rows
    total.b_dec -= total.b_enc @ params.W_enc_rows
    if not of_weights:
        # One for each: what an operator returns must not share memory.
        return grad_x, Parameters(*(x.new_empty(0) for _ in range(4))), x.new_empty(0)
    return grad_x, total, grad_p


def _over_all(
    group: dist.ProcessGroup, gradient: Parameters, result: StepResult, rows: int
) -> StepResult:
    """The result over the rows of all members, and their gradient in place."""
    sums = torch.tensor(
        [rows * result.loss, *result[1:5], rows], dtype=torch.float64, device=gradient.b_dec.device
    )
    for g in gradient.tensors().values():
        g *= rows
    for tensor in (sums, result.fired, *gradient.tensors().values()):
        dist.all_reduce(tensor, group=group)
    loss, squared_error, l1, nnz, saturated, all_rows = sums.tolist()
    for g in gradient.tensors().values():
        g /= all_rows
    return StepResult(
        loss / all_rows, squared_error, l1, int(nnz), int(saturated), result.fired, None
    )


def _signed_code(
    x: Tensor, params: Parameters, clip: float | None, support: Support | None
) -> SparseCode:
    """Active entries of x, in chunks of rows; an entry with pre > clip is held as -clip."""
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device)]
    cols = [torch.zeros(0, dtype=torch.int32, device=x.device)]
    vals = [x.new_zeros(0)]
    for rows in _chunks(x, params):
        pre, z = activations(x[rows], params, clip, _part(support, rows))
        active = ~(pre <= 0)
        counts.append(active.sum(1))
        cols.append(active.nonzero()[:, 1].int())
        vals.append(torch.where(pre > _bound(clip), -z, z)[active])
    return SparseCode(torch.cat(counts).cumsum(0), torch.cat(cols), torch.cat(vals))


def _dense(code: SparseCode | Support, val: Tensor, rows: slice, d_sae: int) -> Tensor:
    """Some rows, [rows, d_sae]: `val` at the code's entries, 0 elsewhere."""
    entries = slice(int(code.row_ptr[rows.start]), int(code.row_ptr[rows.stop]))
    lengths = code.row_ptr[rows.start : rows.stop + 1].diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=val.device), lengths)
    out = val.new_zeros(len(lengths), d_sae)
    out[row, code.col[entries].long()] = val[entries]
    return out


def _part(support: Support | None, rows: slice) -> Support | None:
    """The support of some rows."""
    if support is None:
        return None
    row_ptr = support.row_ptr[rows.start : rows.stop + 1]
    return Support(row_ptr - row_ptr[0], support.col[int(row_ptr[0]) : int(row_ptr[-1])])


def _feature_weights(params: Parameters, objective: Objective) -> Tensor:
    p = objective.feature_weight
    return torch.ones_like(params.b_enc) if p is None else p


def _prices(params: Parameters, objective: Objective) -> Tensor:
    """p n [d_sae]: what a unit of z costs."""
    p = _feature_weights(params, objective)
    return p * params.W_dec.norm(dim=1) if objective.decoder_norm == "free" else p


def _lengths(params: Parameters) -> Tensor:
    """Length of each decoder row, [d_sae, 1], to divide by: 1 for a row of zeros."""
    length = params.W_dec.norm(dim=1, keepdim=True)
    return torch.where(length == 0, 1, length)


def _trained(update: Update) -> list[str]:
    """Names of the tensors an update moves."""
    names = [field.name for field in dataclasses.fields(Parameters)]
    return [name for name in names if update.train_b_dec or name != "b_dec"]


def _bound(clip: float | None) -> float:
    return math.inf if clip is None else clip


def _chunks(x: Tensor, params: Parameters) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (len(params.b_enc) * x.element_size()))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def _column(weight: Tensor | None, rows: slice) -> Tensor | float:
    return 1.0 if weight is None else weight[rows, None]
