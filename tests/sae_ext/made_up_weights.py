"""Random autoencoders and batches for the tests of the kernels and their reference."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_ext.parameters import AdamState, Parameters, SparseCode, Support


def made_up(d_in: int, d_sae: int, *, bias: float = 0.0, seed: int = 0) -> Parameters:
    """A float64 autoencoder with unit decoder rows; `bias` moves every pre-activation."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    W_dec = normal(d_sae, d_in)
    return Parameters(
        W_enc_rows=normal(d_sae, d_in) / d_in**0.5,
        b_enc=bias + 0.1 * normal(d_sae),
        W_dec=W_dec / W_dec.norm(dim=1, keepdim=True),
        b_dec=0.1 * normal(d_in),
    )


def batch(rows: int, d_in: int, seed: int = 1) -> Tensor:
    return torch.randn(
        rows, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def copied(params: Parameters, dtype: torch.dtype = torch.float64) -> Parameters:
    return Parameters(**{name: t.to(dtype, copy=True) for name, t in params.tensors().items()})


def dense(code: SparseCode, d_sae: int) -> Tensor:
    """The code as a [B, d_sae] tensor."""
    out = torch.zeros(len(code.row_ptr) - 1, d_sae, dtype=code.val.dtype)
    for b in range(len(out)):
        entries = slice(int(code.row_ptr[b]), int(code.row_ptr[b + 1]))
        out[b, code.col[entries].long()] = code.val[entries]
    return out


def support_of(listed: Tensor) -> Support:
    """The entries that are true in `listed` [B, d_sae]."""
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    return Support(row_ptr, listed.nonzero()[:, 1].int())


def top_k(pre: Tensor, k: int) -> Tensor:
    """True at the k largest entries of each row of `pre`, whatever their sign."""
    listed = torch.zeros_like(pre, dtype=torch.bool)
    return listed.scatter(1, pre.topk(k, dim=1).indices, True)


def state(params: Parameters, adam: AdamState) -> dict[str, Tensor]:
    """Everything a step changes, by name."""
    groups = {"": params, "m.": adam.m, "v.": adam.v}
    return {k + name: t for k, group in groups.items() for name, t in group.tensors().items()}


def stretched(params: Parameters) -> Parameters:
    """The same with decoder rows of many lengths, the last of several 0."""
    factor = torch.linspace(0.2, 3.0, len(params.b_enc), dtype=params.W_dec.dtype)
    if len(factor) > 1:
        factor[-1] = 0.0
    return Parameters(**{**params.tensors(), "W_dec": params.W_dec * factor[:, None]})


def identity(d: int, dtype: torch.dtype = torch.float64) -> Parameters:
    """As many features as inputs, each its own: pre = x, and what passes is exactly rebuilt."""
    eye, zeros = torch.eye(d, dtype=dtype), torch.zeros(d, dtype=dtype)
    return Parameters(eye.clone(), zeros.clone(), eye.clone(), zeros.clone())


def leaves(params: Parameters, dtype: torch.dtype = torch.float64) -> Parameters:
    """A copy that autograd collects gradients for."""
    tensors = copied(params, dtype).tensors()
    return Parameters(**{name: t.detach().requires_grad_() for name, t in tensors.items()})
