"""Calls into the compiled kernels: workspaces, chunks of rows, the order of a step.

Arguments are checked in `sae_ext.ops`; the contract of each kernel is in csrc/saek.h.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_ext.reference import AdamState, Parameters, SparseCode, StepResult

MISSING: str | None = None
"""Why the compiled module could not be imported; None where it was."""
try:
    from sae_ext import _C
except ImportError as error:
    MISSING = str(error)

_CHUNK_BYTES = 8 << 20  # pre-activations of one chunk of rows: small enough to stay in cache
_FIRST_L0 = 64  # active features per row that the first batch's arrays have room for


def isa() -> str:
    """Instruction set in use; ValueError where SPARSEMILL_ISA asks for one that cannot run."""
    return _C.isa()


def build() -> dict[str, Any]:
    """How the module was built and what its CUDA runtime sees: keys `openmp` and `cuda`."""
    if MISSING is None:
        return {"openmp": _C.has_openmp(), "cuda": _C.cuda()}
    nothing = {"built": False, "devices": [], "driver_version": 0, "runtime_version": 0}
    return {"openmp": False, "cuda": {**nothing, "reason": "the compiled kernels are not built"}}


class Constants(NamedTuple):
    """The numbers of one Adam update."""

    lr: float
    beta1: float
    beta2: float
    eps: float


class _Entries(NamedTuple):
    """The listed entries ordered by feature, rows ascending."""

    feature_ptr: Tensor
    row: Tensor
    z: Tensor
    dz: Tensor


class Workspace:
    """Named buffers that grow and are never given back, so that a step allocates nothing."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, over the buffer of this name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.dtype != dtype or len(flat) < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype)
        return flat[:size].view(shape)

    def list_arrays(self, dtype: torch.dtype, capacity: int, keep: int) -> tuple[Tensor, Tensor]:
        """The arrays `col` and `val`, at least `capacity` long, with their first `keep` entries."""
        col, val = self._flat.get("col"), self._flat.get("val")
        if col is None or val is None or val.dtype != dtype:
            keep = 0
        elif len(col) >= capacity:
            return col, val
        new = torch.empty(capacity, dtype=torch.int32), torch.empty(capacity, dtype=dtype)
        if keep and col is not None and val is not None:
            new[0][:keep], new[1][:keep] = col[:keep], val[:keep]
        self._flat["col"], self._flat["val"] = new
        return new


def compact(
    space: Workspace, xc: Tensor, params: Parameters, clip: float | None
) -> tuple[SparseCode, int]:
    """List the active entries of xc = x - b_dec, [B, d_in], chunk by chunk.

    Returns the code over the workspace's memory, in which an entry above the clip is held as -clip,
    and the number of such entries.
    """
    rows, d_sae = len(xc), len(params.b_enc)
    chunk = min(rows, max(32, _CHUNK_BYTES // (d_sae * xc.element_size())))
    pre = space.get("pre", xc.dtype, chunk, d_sae)
    mask = space.get("mask", torch.int64, chunk, (d_sae + 63) // 64)
    row_ptr = space.get("row_ptr", torch.int64, rows + 1)
    row_ptr[0] = 0
    col, val = space.list_arrays(xc.dtype, rows * min(d_sae, _FIRST_L0), keep=0)
    listed, saturated = 0, 0
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        torch.mm(xc[start:stop], params.W_enc, out=pre[: stop - start])
        needed = math.inf
        while needed > len(col):
            if needed < math.inf:
                # Room for the rest of the batch too, if it is like the rows so far.
                estimate = math.ceil(1.1 * needed * rows / stop)
                col, val = space.list_arrays(xc.dtype, estimate, keep=listed)
            needed, over = _C.compact(
                **_common(params),
                pre=pre.data_ptr(),
                b_enc=params.b_enc.data_ptr(),
                clip=math.inf if clip is None else clip,
                rows=stop - start,
                d_sae=d_sae,
                capacity=len(col),
                mask=mask.data_ptr(),
                row_ptr=row_ptr[start:].data_ptr(),
                col=col.data_ptr(),
                val=val.data_ptr(),
            )
        listed, saturated = int(needed), saturated + over
    return SparseCode(row_ptr, col[:listed], val[:listed]), saturated


def decode(code: SparseCode, params: Parameters) -> Tensor:
    """Reconstruction [B, d_in] of a code."""
    out = torch.empty(len(code.row_ptr) - 1, len(params.b_dec), dtype=params.b_dec.dtype)
    _C.decode(
        **_common(params),
        code=_pointers(code),
        W_dec=params.W_dec.data_ptr(),
        b_dec=params.b_dec.data_ptr(),
        d_in=out.shape[1],
        out=out.data_ptr(),
    )
    return out


def step(
    space: Workspace,
    params: Parameters,
    adam: AdamState,
    x: Tensor,
    *,
    l1: float,
    clip: float | None,
    constants: Constants,
    recon_weight: Tensor | None,
    l1_weight: Tensor | None,
) -> StepResult:
    """One training step in place; `adam.step` is counted up."""
    xc = torch.sub(x, params.b_dec, out=space.get("xc", x.dtype, *x.shape))
    code, saturated = compact(space, xc, params, clip)
    grad, dz = space.get("grad", x.dtype, *x.shape), space.get("dz", x.dtype, len(code.col))
    squared_error, size = _C.residual(
        **_common(params),
        code=_pointers(code),
        W_dec=params.W_dec.data_ptr(),
        xc=xc.data_ptr(),
        recon_weight=0 if recon_weight is None else recon_weight.data_ptr(),
        l1_weight=0 if l1_weight is None else l1_weight.data_ptr(),
        recon_scale=2 / len(x),
        l1_scale=l1 / len(x),
        d_in=x.shape[1],
        row_partials=space.get("row_partials", torch.float64, len(x), 2).data_ptr(),
        grad=grad.data_ptr(),
        dz=dz.data_ptr(),
    )
    entries, grad_b_enc = _transpose(space, code, dz, params)
    adam.step += 1
    _update(space, params, adam, constants, entries, xc, grad, grad_b_enc)
    fired = entries.feature_ptr.diff()
    return StepResult(squared_error, size, len(code.col), saturated, fired)


def _transpose(
    space: Workspace, code: SparseCode, dz: Tensor, params: Parameters
) -> tuple[_Entries, Tensor]:
    """The entries by feature, and the gradient of b_enc."""
    nnz, d_sae = len(code.col), len(params.b_enc)
    entries = _Entries(
        space.get("feature_ptr", torch.int64, d_sae + 1),
        space.get("row", torch.int32, nnz),
        space.get("z_by_feature", dz.dtype, nnz),
        space.get("dz_by_feature", dz.dtype, nnz),
    )
    grad_b_enc = space.get("grad_b_enc", dz.dtype, d_sae)
    _C.transpose(
        **_common(params),
        code=_pointers(code),
        dz=dz.data_ptr(),
        d_sae=d_sae,
        counts=space.get("counts", torch.int64, torch.get_num_threads(), d_sae).data_ptr(),
        feature_ptr=entries.feature_ptr.data_ptr(),
        row=entries.row.data_ptr(),
        z=entries.z.data_ptr(),
        dz_by_feature=entries.dz.data_ptr(),
        grad_b_enc=grad_b_enc.data_ptr(),
    )
    return entries, grad_b_enc


def _update(
    space: Workspace,
    params: Parameters,
    adam: AdamState,
    constants: Constants,
    entries: _Entries,
    xc: Tensor,
    grad: Tensor,
    grad_b_enc: Tensor,
) -> None:
    """All four parameters and their moments; b_dec first, since it reads the old encoder."""
    d_sae, d_in = params.W_dec.shape
    m, v = adam.m.tensors(), adam.v.tensors()
    moments = {
        name: (p.data_ptr(), m[name].data_ptr(), v[name].data_ptr())
        for name, p in params.tensors().items()
    }
    shared: dict[str, Any] = {
        **_common(params),
        "grad": grad.data_ptr(),
        "grad_b_enc": grad_b_enc.data_ptr(),
        "d_in": d_in,
        "d_sae": d_sae,
        "adam": (*constants, adam.step),
    }
    _C.update_b_dec(
        **shared, W_enc=params.W_enc_rows.data_ptr(), rows=len(grad), b_dec=moments["b_dec"]
    )
    _C.update_features(
        **shared,
        feature_ptr=entries.feature_ptr.data_ptr(),
        row=entries.row.data_ptr(),
        z=entries.z.data_ptr(),
        dz=entries.dz.data_ptr(),
        xc=xc.data_ptr(),
        scratch=space.get("scratch", xc.dtype, torch.get_num_threads(), 2, d_in).data_ptr(),
        W_enc=moments["W_enc_rows"],
        b_enc=moments["b_enc"],
        W_dec=moments["W_dec"],
    )


def _common(params: Parameters) -> dict[str, Any]:
    """What every kernel is told: number format and threads."""
    dtype = _C.FLOAT32 if params.b_dec.dtype == torch.float32 else _C.FLOAT64
    return {"dtype": dtype, "threads": torch.get_num_threads()}


def _pointers(code: SparseCode) -> tuple[int, int, int, int]:
    row_ptr, col, val = code
    return row_ptr.data_ptr(), col.data_ptr(), val.data_ptr(), len(row_ptr) - 1
