"""One training step by the compiled kernels on the CPU.

Which way a step takes, entries or the dense phase, depends on its batch and weights alone, so that a
step done again, by a resumed run for one, is the same step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext import coding, native
from sae_ext.native import Gradient, Run, Spaces, Workspace
from sae_ext.parameters import (
    AdamState,
    Objective,
    Parameters,
    StepResult,
    Support,
    Update,
    check_finite,
)

_DENSE_BYTES = 64 << 20  # pre-activations of one chunk in the dense phase
DENSE_ABOVE = 0.26
"""Share of active entries above which a step takes the dense path (docs/kernels.md has the curve)."""


class _Seen(NamedTuple):
    """What the forward half of a step saw: sums over rows, on one device."""

    sums: Tensor
    """float64 [5]: Σ_b ‖e_b‖², Σ_b Σ_j p_j n_j z_bj, these with the rows' weights, rows."""
    counts: Tensor
    """int64 [1]: entries above the clip."""
    fired: Tensor
    """int64 [d_sae]"""


def step(
    spaces: Spaces,
    params: Parameters,
    adam: AdamState,
    x: Tensor,
    objective: Objective,
    update: Update,
    support: Support | None,
    group: dist.ProcessGroup | None,
) -> StepResult:
    """One training step in place; `adam.step` is counted up."""
    space, run = spaces.always, Run.on(x)
    # The members of a group add up sums over rows; only together do they know what to divide by.
    batch = len(x) if group is None else 1
    l1_scale = torch.tensor([objective.l1 / batch], dtype=torch.float64, device=x.device)
    xc = torch.sub(x, params.b_dec, out=space.get("xc", x.dtype, *x.shape))
    lengths = None
    price = objective.feature_weight
    if objective.decoder_norm == "free":
        lengths = native.row_norms(params.W_dec)
        price = lengths if price is None else lengths * price
    if support is not None:
        listed: coding.Listed | None = coding.gather(space, xc, params, objective.clip, support)
    else:
        listed = coding.encode_up_to(space, xc, params, objective.clip, densest=DENSE_ABOVE)
    if listed is None:
        seen, gradient = _dense(run, spaces, params, xc, objective, price, batch, l1_scale)
    else:
        spaces.dense.clear()
        seen, gradient = _sparse(run, space, listed, params, xc, objective, price, batch, l1_scale)
    native.set_pull(gradient, objective, lengths, l1_scale)
    b_dec = None
    if update.train_b_dec:  # reads the encoder, so before that moves
        b_dec = native.b_dec_gradient(
            run, space, gradient.grad, gradient.grad_b_enc, params.W_enc_rows
        )
    if group is not None:
        also = [*seen, *([] if b_dec is None else [b_dec])]
        gradient = native.reduced(run, space, gradient, params, group, also)
    squared_error, l1, weighted_error, weighted_l1, rows = seen.sums.tolist()
    loss = (weighted_error + objective.l1 * weighted_l1) / rows
    check_finite(params, loss)
    norm = _update(
        run, space, params, adam, gradient, b_dec, update, batch / rows, unit_norm=lengths is None
    )
    # Whole numbers: their sums are exact in any order.
    nnz, saturated = int(seen.fired.sum()), int(seen.counts)
    return StepResult(loss, squared_error, l1, nnz, saturated, seen.fired, norm)


def _sparse(
    run: Run,
    space: Workspace,
    listed: coding.Listed,
    params: Parameters,
    xc: Tensor,
    objective: Objective,
    price: Tensor | None,
    batch: int,
    l1_scale: Tensor,
) -> tuple[_Seen, Gradient]:
    """Loss and gradients through the listed entries."""
    sums = torch.empty(5, dtype=torch.float64, device=run.device)
    sums[4] = len(xc)
    grad, dz = native.residual(
        run, space, listed.code, params.W_dec, xc, None, objective, price, batch, l1_scale, sums
    )
    entries, grad_b_enc, z_sum = native.transpose(
        run, space, listed.code, dz, objective.l1_weight, len(params.b_enc)
    )
    saturated = torch.tensor([listed.saturated], device=run.device)
    seen = _Seen(sums, saturated, entries.feature_ptr.diff())
    return seen, Gradient(xc, grad, grad_b_enc, z_sum, entries)


def _dense(
    run: Run,
    spaces: Spaces,
    params: Parameters,
    xc: Tensor,
    objective: Objective,
    price: Tensor | None,
    batch: int,
    l1_scale: Tensor,
) -> tuple[_Seen, Gradient]:
    """The same where so many entries are active that matrix products are faster: five of them."""
    (d_sae, d_in), dtype, space = params.W_dec.shape, xc.dtype, spaces.dense
    grad = spaces.always.get("grad", dtype, *xc.shape)
    total = native.DenseSums(run, space, d_sae, d_in)
    for rows in native.chunks(0, len(xc), d_sae * xc.itemsize, _DENSE_BYTES):
        native.dense_chunk(
            run, space, total, params, xc, None, xc, grad, objective, price, batch, l1_scale, rows,
            W_enc_rows=params.W_enc_rows, W_dec=params.W_dec,
        )  # fmt: skip
    sizes = [_total(row if price is None else row * price) for row in total.z_sum]
    squared_error, weighted_error = total.errors.tolist()
    sums = torch.tensor(
        [squared_error, sizes[0], weighted_error, sizes[1], len(xc)], dtype=torch.float64,
        device=run.device,
    )  # fmt: skip
    gradient = Gradient(
        xc, grad, total.grad_b_enc.to(dtype), total.z_sum[1].to(dtype),
        dW_enc=total.dW_enc, dW_dec=total.dW_dec,
    )  # fmt: skip
    return _Seen(sums, total.saturated, total.fired), gradient


def _update(
    run: Run,
    space: Workspace,
    params: Parameters,
    adam: AdamState,
    gradient: Gradient,
    b_dec: Tensor | None,
    update: Update,
    share: float,
    *,
    unit_norm: bool,
) -> float | None:
    """Move all parameters and their moments by `share` of the gradient; its norm where it is limited."""
    norm = None
    if update.max_grad_norm is not None:
        own = 0.0 if b_dec is None else _total(b_dec.double().square())
        squares, gradient = native.squared_norms(run, space, gradient, params)
        norm = share * math.sqrt(_total(squares) + own)
        # Worded so that a norm that is no number reaches all parameters, as it does in PyTorch.
        limited = update.max_grad_norm / (norm + 1e-6)
        share *= 1.0 if limited >= 1 else limited
    adam.step += 1
    f64, device = torch.float64, run.device
    numbers = torch.tensor(native.adam_numbers(update, adam.step), dtype=f64, device=device)
    scale = None if share == 1 else torch.tensor([share], dtype=f64, device=device)
    native.move(run, space, params, adam, gradient, b_dec, numbers, scale, unit_norm=unit_norm)
    return norm


def _total(values: Tensor) -> float:
    """A sum whose order no number of threads changes, as torch's own would."""
    return float(values.numpy().sum())
