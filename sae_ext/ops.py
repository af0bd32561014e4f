"""The kernels' Python face: encode, decode, and one training step, on whatever this machine offers.

    code = encode(x, params)                              # active features of each row, sparse
    step = Step()                                         # holds the workspaces; reuse it
    result = step(params, adam, x, l1=10.0, lr=1e-3)      # updates params and adam in place

The matrix product of the encoder is torch's; what follows it is compiled code (csrc/), which never
forms a [B, d_sae] tensor. Where the compiled module is missing, or the tensors are not on the CPU,
`sae_ext.reference` computes the same numbers, slower. The contract is in docs/kernels.md.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any, Literal

import torch
from torch import Tensor

from sae_ext import native, reference
from sae_ext.errors import UserError
from sae_ext.reference import AdamState, Parameters, SparseCode, StepResult

_log = logging.getLogger("sae_ext")
_WARNED = "SPARSEMILL_WARNED_OF_MISSING_KERNELS"
if native.MISSING is not None and _WARNED not in os.environ:
    os.environ[_WARNED] = "1"  # worker processes inherit it: one warning for all of a run
    _log.warning(
        "the compiled kernels cannot be used (%s); the slower PyTorch reference takes their place: "
        "install a C++ compiler and run `make setup`",
        native.MISSING,
    )

Backend = Literal["auto", "cpu", "reference"]


def implementation() -> str:
    """What CPU tensors run on: "cpu-avx512", "cpu-avx2", "cpu-portable" or "reference".

    Raises `UserError` where the environment variable SPARSEMILL_ISA asks for an instruction set
    that this processor or build lacks.
    """
    if native.MISSING is not None:
        return "reference"
    try:
        return f"cpu-{native.isa()}"
    except ValueError as error:
        raise UserError(
            f"{error}: unset SPARSEMILL_ISA or set it to portable, avx2 or avx512"
        ) from error


def describe() -> dict[str, Any]:
    """The kernels on this machine, for a diagnosis.

    Keys: `implementation`; `threads` in use; `fallback_reason`, None unless the reference is used;
    `openmp`, whether the compiled loops use threads; `cuda`, with `built`, `devices` (name,
    capability, memory_bytes), `driver_version`, `runtime_version` and the `reason` there are none.
    """
    return {
        "implementation": implementation(),
        "threads": torch.get_num_threads(),
        "fallback_reason": native.MISSING,
        **native.build(),
    }


@torch.no_grad()
def encode(x: Tensor, params: Parameters, clip: float | None = None) -> SparseCode:
    """Active features of each row: z = min(relu((x - b_dec) W_enc + b_enc), clip).

    x is [B, d_in] of any float dtype and is converted to that of `params`; B may be 0. An entry is
    listed where the pre-activation is positive, or NaN. Raises `UserError` for wrong arguments.
    """
    _check_params(params)
    x = _rows(x, params)
    clip = _check_clip(clip)
    if len(x) == 0 or _choose("auto", x) == "reference":
        return reference.encode(x, params, clip)
    code, _ = native.compact(native.Workspace(), x - params.b_dec, params, clip)
    return SparseCode(code.row_ptr, code.col.clone(), code.val.abs())


@torch.no_grad()
def decode(code: SparseCode, params: Parameters) -> Tensor:
    """Reconstruction [B, d_in] of a code: x̂ = z W_dec + b_dec.

    Raises `UserError` for a code whose arrays do not fit together or point outside.
    """
    _check_params(params)
    code = _check_code(code, params)
    if len(code.row_ptr) == 1 or _choose("auto", code.val) == "reference":
        return reference.decode(code, params)
    return native.decode(code, params)


class Step:
    """One fused training step; keeps its workspaces between calls, so hold on to one instance.

    `backend`: "auto" takes the compiled kernels where they are built and the tensors are on the
    CPU; "cpu" insists on them; "reference" is plain PyTorch. Threads follow
    `torch.get_num_threads()`. Not to be called from two threads at once.
    """

    def __init__(self, backend: Backend = "auto") -> None:
        if backend not in ("auto", "cpu", "reference"):
            raise UserError(f"backend must be auto, cpu or reference, got {backend!r}")
        if backend == "cpu" and native.MISSING is not None:
            raise UserError(
                f"backend 'cpu' is not built ({native.MISSING}): install a C++ compiler and run "
                "`make setup`, or use backend 'auto'"
            )
        self._backend = backend
        self._workspace = native.Workspace()

    @torch.no_grad()
    def __call__(
        self,
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
        """Lower the loss on x [B, d_in] by one Adam update of `params` and `adam`, in place.

            mean_b w_b ‖x̂_b - x_b‖² + l1 · mean_b s_b Σ_j z_bj

        The decoder's gradient loses its part along each decoder row, and the rows end at length 1.
        w is `recon_weight`, s is `l1_weight`: [B], not negative, 1 where absent. A step is
        exact: the same as dense gradients and torch.optim.Adam. Raises `UserError` for wrong
        arguments, before anything is changed.
        """
        _check_params(params)
        _check_adam(adam, params)
        clip = _check_clip(clip)
        _check_constants(l1=l1, lr=lr, beta1=beta1, beta2=beta2, eps=eps)
        x = _rows(x, params)
        if len(x) == 0:
            raise UserError("x has no rows: a step needs at least one")
        w = _check_weight("recon_weight", recon_weight, x)
        s = _check_weight("l1_weight", l1_weight, x)
        if _choose(self._backend, x) == "reference":
            return reference.step(
                params, adam, x, l1=l1, lr=lr, clip=clip, beta1=beta1, beta2=beta2, eps=eps,
                recon_weight=w, l1_weight=s,
            )  # fmt: skip
        return native.step(
            self._workspace, params, adam, x, l1=l1, clip=clip,
            constants=native.Constants(lr, beta1, beta2, eps), recon_weight=w, l1_weight=s,
        )  # fmt: skip


def _choose(backend: Backend, x: Tensor) -> str:
    if backend == "cpu" and x.device.type != "cpu":
        raise UserError(f"x is on {x.device}, which backend 'cpu' cannot read: use backend 'auto'")
    if backend == "reference" or x.device.type != "cpu":
        return "reference"
    return implementation()


def _check_params(params: Parameters) -> None:
    """Shapes that agree, one dtype, one device, rows without gaps: kernels read raw memory."""
    if params.W_dec.ndim != 2 or 0 in params.W_dec.shape:
        raise UserError(f"W_dec must be [d_sae, d_in], got shape {list(params.W_dec.shape)}")
    if params.W_dec.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"W_dec must be float32 or float64, got {params.W_dec.dtype}: convert the parameters"
        )
    _check_like("", params, params)


def _check_adam(adam: AdamState, params: Parameters) -> None:
    _check_like("adam.m.", adam.m, params)
    _check_like("adam.v.", adam.v, params)
    if adam.step < 0:
        raise UserError(f"adam.step must be 0 or more, got {adam.step}")


def _check_like(prefix: str, group: Parameters, params: Parameters) -> None:
    model = params.W_dec
    d_sae, d_in = model.shape
    shapes = {
        "W_enc_rows": (d_sae, d_in),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    for name, tensor in group.tensors().items():
        if tensor.shape != shapes[name]:
            raise UserError(
                f"{prefix}{name} has shape {list(tensor.shape)}, but W_dec's {[d_sae, d_in]} asks "
                f"for {list(shapes[name])}"
            )
        if tensor.dtype != model.dtype or tensor.device != model.device:
            raise UserError(
                f"{prefix}{name} is {tensor.dtype} on {tensor.device}, but W_dec is {model.dtype} "
                f"on {model.device}: convert it"
            )
        if not tensor.is_contiguous():
            raise UserError(f"{prefix}{name} is not contiguous: pass {name}.contiguous()")


def _rows(x: Tensor, params: Parameters) -> Tensor:
    """x checked against the parameters, in their dtype, contiguous and detached."""
    d_in = len(params.b_dec)
    if x.ndim != 2 or x.shape[1] != d_in:
        raise UserError(f"x must be [rows, {d_in}], got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"x must be floating point, got {x.dtype}: convert it with x.float()")
    if x.device != params.b_dec.device:
        raise UserError(f"x is on {x.device} but the parameters are on {params.b_dec.device}")
    return x.detach().to(params.b_dec.dtype).contiguous()


def _check_weight(name: str, weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    if weight.shape != x.shape[:1]:
        raise UserError(f"{name} must be [{len(x)}], one per row, got {list(weight.shape)}")
    if weight.device != x.device:
        raise UserError(f"{name} is on {weight.device} but x is on {x.device}")
    if not bool((weight >= 0).all()):
        raise UserError(f"{name} must be 0 or more in every row; its least is {weight.min():g}")
    return weight.detach().to(x.dtype).contiguous()


def _check_clip(clip: float | None) -> float | None:
    if clip is not None and not clip > 0:
        raise UserError(f"clip must be positive, or None for no bound, got {clip}")
    return clip


def _check_constants(*, l1: float, lr: float, beta1: float, beta2: float, eps: float) -> None:
    for name, value in (("l1", l1), ("lr", lr), ("eps", eps)):
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be 0 or more and finite, got {value}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise UserError(f"{name} must lie in [0, 1), got {value}")


def _check_code(code: SparseCode, params: Parameters) -> SparseCode:
    """A code whose entries all lie inside: kernels read where it points."""
    row_ptr, col, val = code
    if row_ptr.dtype != torch.int64 or col.dtype != torch.int32 or not val.is_floating_point():
        raise UserError(
            "code must hold row_ptr int64, col int32 and val floating point, got "
            f"{row_ptr.dtype}, {col.dtype} and {val.dtype}"
        )
    if not row_ptr.device == col.device == val.device == params.b_dec.device:
        raise UserError(f"code and parameters must be on one device, {params.b_dec.device}")
    if row_ptr.ndim != 1 or len(row_ptr) == 0 or col.ndim != 1 or col.shape != val.shape:
        raise UserError("code must hold row_ptr [B + 1], col [nnz] and val [nnz]")
    if row_ptr[0] != 0 or row_ptr[-1] != len(col) or bool((row_ptr.diff() < 0).any()):
        raise UserError(f"code.row_ptr must rise from 0 to the number of entries, {len(col)}")
    d_sae = len(params.b_enc)
    if len(col) and not (col.min() >= 0 and col.max() < d_sae):
        raise UserError(f"code.col must lie in [0, {d_sae}), got {col.min()} to {col.max()}")
    return SparseCode(
        row_ptr.contiguous(), col.contiguous(), val.detach().to(params.b_dec.dtype).contiguous()
    )


__all__ = [
    "AdamState",
    "Backend",
    "Parameters",
    "SparseCode",
    "Step",
    "StepResult",
    "decode",
    "describe",
    "encode",
    "implementation",
]
