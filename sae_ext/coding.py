"""Codes of batches by the compiled kernels: encode, decode, and the halves of the differentiable operator.

Here the number of entries is known to Python at once: on a GPU each chunk of rows is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_ext import native
from sae_ext.native import Gradient, Run, Workspace, at, chunks
from sae_ext.parameters import Parameters, SparseCode, Support

if native.MISSING is None:
    from sae_ext import _C

_PRE_BYTES = 8 << 20  # pre-activations of one chunk of rows: small enough to stay in cache
_PRE_BYTES_CUDA = 256 << 20  # the same on a GPU, where each chunk is waited for
_SCREEN_BYTES = 16 << 20  # rows that are screened together: in cache while all features pass by
_FIRST_L0 = 64  # active features per row that the first batch's arrays have room for
# Share of candidates up to which screening beats the matrix product, for wide rows; a candidate costs
# as much as this many multiplications beside its own d_in.
_CANDIDATES, _CANDIDATE_COST = 0.35, 400
_SCREEN_ROWS = 32, 8192  # fewer rows are not worth rounding the weights for, more need much scratch
_PROBE_ROWS = 64  # rows that tell whether a step is one for the dense phase

_Out = tuple[int, int, int, int, int]
"""Where a kernel lists entries: pointers to row_ptr, col and val, their length, and counters."""


class Listed(NamedTuple):
    """The active entries of a batch; one above the clip is held as -clip."""

    code: SparseCode
    saturated: int


class _Listing:
    """The code of a batch under way: arrays that grow while chunks of rows are listed."""

    def __init__(
        self, space: Workspace, xc: Tensor, params: Parameters, clip: float | None
    ) -> None:
        self._space, self._xc, self._params = space, xc, params
        self._run = Run.on(xc)
        self._clip = native.bound(clip)
        self._row_ptr = space.get("row_ptr", torch.int64, len(xc) + 1)
        self._row_ptr[0] = 0
        self._counters = torch.zeros(4, dtype=torch.int64, device=xc.device)
        self._capacity = max(1, space.room("col"), len(xc) * min(len(params.b_enc), _FIRST_L0))

    def done(self) -> Listed:
        """The code over the workspace's memory."""
        n = int(self._row_ptr[-1])
        col, val = self._arrays()
        return Listed(SparseCode(self._row_ptr, col[:n], val[:n]), int(self._counters[1]))

    def screen(self, rows: slice) -> bool:
        """List these rows without a matrix product; False where that is not offered or would not pay."""
        d_sae, d_in = self._params.W_dec.shape
        count, threads = rows.stop - rows.start, torch.get_num_threads()
        if (
            count < _SCREEN_ROWS[0] or self._xc.dtype != torch.float32 or self._run.on_cuda
            or native.isa() != "avx512vnni"
        ):  # fmt: skip
            return False
        scratch = self._space.get(
            "screen", torch.uint8,
            _C.screen_scratch(rows=count, d_in=d_in, d_sae=d_sae, threads=threads) + 64,
        )  # fmt: skip

        def call(out: _Out, capacity: int) -> int:
            return _C.screen(
                exec=self._run.exec(), xc=at(self._xc[rows]), W_enc=at(self._params.W_enc_rows),
                b_enc=at(self._params.b_enc), clip=self._clip, rows=count, d_in=d_in, d_sae=d_sae,
                limit=_CANDIDATES * d_in / (d_in + _CANDIDATE_COST), scratch=(at(scratch) + 63) // 64 * 64,
                list_col=at(self._space.get("list_col", torch.int32, capacity)),
                list_val=at(self._space.get("list_val", self._xc.dtype, capacity)), out=out,
            )  # fmt: skip

        return self._append(rows, call) == _C.OK

    def multiply(self, rows: slice) -> None:
        """List these rows from their pre-activations."""
        count, d_sae = rows.stop - rows.start, len(self._params.b_enc)
        pre = self._space.get("pre", self._xc.dtype, count, d_sae)
        mask = self._space.get("mask", torch.int64, count, (d_sae + 63) // 64)
        counts = self._space.get("row_counts", torch.int32, count, 2)
        torch.mm(self._xc[rows], self._params.W_enc, out=pre)

        def call(out: _Out, capacity: int) -> int:
            return _C.compact(
                exec=self._run.exec(), pre=at(pre), b_enc=at(self._params.b_enc), clip=self._clip,
                rows=count, d_sae=d_sae, mask=at(mask), counts=at(counts), out=out,
            )  # fmt: skip

        self._append(rows, call)

    def gather(self, support: Support) -> None:
        """List what is active on a given support."""
        rows, length = len(self._xc), len(support.col)
        self._capacity = max(self._capacity, length)

        def call(out: _Out, capacity: int) -> int:
            return _C.gather(
                exec=self._run.exec(), support_ptr=at(support.row_ptr), support_col=at(support.col),
                xc=at(self._xc), W_enc=at(self._params.W_enc_rows), b_enc=at(self._params.b_enc),
                clip=self._clip, rows=rows, d_in=self._xc.shape[1], support_length=length,
                scratch=at(self._space.get("support", self._xc.dtype, length)),
                counts=at(self._space.get("row_counts", torch.int32, rows, 2)), out=out,
            )  # fmt: skip

        self._append(slice(0, rows), call)

    def _arrays(self) -> tuple[Tensor, Tensor]:
        get = self._space.get
        return get("col", torch.int32, self._capacity), get("val", self._xc.dtype, self._capacity)

    def _append(self, rows: slice, call: Callable[[_Out, int], int]) -> int:
        """Call a kernel until the arrays are long enough for what it lists."""
        while True:
            col, val = self._arrays()
            out = (
                at(self._row_ptr[rows.start :]), at(col), at(val), self._capacity, at(self._counters)
            )  # fmt: skip
            code = call(out, self._capacity)
            if not self._counters[3]:
                return code
            # Room for the rest of the batch too, if it is like the rows so far.
            needed, listed = int(self._counters[0]), int(self._row_ptr[rows.start])
            self._counters[3] = 0
            self._capacity = math.ceil(1.25 * needed * len(self._xc) / rows.stop)
            kept = col[:listed].clone(), val[:listed].clone()
            for new, old in zip(self._arrays(), kept, strict=True):
                new[:listed] = old


def encode(space: Workspace, xc: Tensor, params: Parameters, clip: float | None) -> Listed:
    """The active entries of xc = x - b_dec, [B, d_in]."""
    listed = encode_up_to(space, xc, params, clip, densest=1.0)
    assert listed is not None
    return listed


def encode_up_to(
    space: Workspace, xc: Tensor, params: Parameters, clip: float | None, densest: float
) -> Listed | None:
    """The same, or None where a sample of the rows has a larger share of active entries.

    How rows are listed depends on the rows and weights alone, so that a step done again, by a resumed
    run for one, is the same step.
    """
    listing = _Listing(space, xc, params, clip)
    screened = 0
    for rows in chunks(0, len(xc), xc[0].nbytes, _SCREEN_BYTES, most=_SCREEN_ROWS[1]):
        if not listing.screen(rows):
            break
        screened = rows.stop
    if screened < len(xc) and densest < 1 and _density(space, xc, params) > densest:
        return None
    limit = _PRE_BYTES_CUDA if xc.is_cuda else _PRE_BYTES
    for rows in chunks(screened, len(xc), len(params.b_enc) * xc.itemsize, limit):
        listing.multiply(rows)
    return listing.done()


def _density(space: Workspace, xc: Tensor, params: Parameters) -> float:
    """Share of active entries in some rows, evenly spread over the batch."""
    some = xc[:: -(-len(xc) // _PROBE_ROWS)].contiguous()
    pre = space.get("pre", xc.dtype, len(some), len(params.b_enc))
    torch.mm(some, params.W_enc, out=pre)
    return int(torch.count_nonzero(pre > -params.b_enc)) / pre.numel()


def gather(
    space: Workspace, xc: Tensor, params: Parameters, clip: float | None, support: Support
) -> Listed:
    """The active entries on a given support."""
    listing = _Listing(space, xc, params, clip)
    listing.gather(support)
    return listing.done()


def decode(code: SparseCode, params: Parameters) -> Tensor:
    """Reconstruction [B, d_in] of a code."""
    return native.sum_rows(code, code.val, params.W_dec, params.b_dec)


def autoencode(
    x: Tensor,
    params: Parameters,
    clip: float | None,
    feature_weight: Tensor | None,
    support: Support | None,
) -> tuple[Tensor, Tensor, Tensor, SparseCode]:
    """As `sae_ext.reference.autoencode`."""
    space, xc = Workspace(x.device), x - params.b_dec
    listed = (
        encode(space, xc, params, clip)
        if support is None
        else gather(space, xc, params, clip, support)
    )
    code = SparseCode(*(t.clone() for t in listed.code))
    z, col = code.val.abs(), code.col.long()
    x_hat = decode(code._replace(val=z), params)
    _, _, activity = native.transpose(Run.on(x), space, code, z, None, len(params.b_enc))
    priced = z if feature_weight is None else z * feature_weight[col]
    l1 = torch.segment_reduce(priced, "sum", offsets=code.row_ptr, initial=0.0)
    return x_hat, l1, activity, code


def autoencode_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    params: Parameters,
    code: SparseCode,
    feature_weight: Tensor | None,
    *,
    of_x: bool,
    of_weights: bool,
) -> tuple[Tensor, Parameters, Tensor]:
    """As `sae_ext.reference.autoencode_backward`."""
    space, run = Workspace(x.device), Run.on(x)
    grad, grad_l1, grad_activity, grad_z = grads
    xc = x - params.b_dec
    dz = torch.empty_like(code.val)
    _C.dz(
        exec=run.exec(), code=native.pointers(code, code.val), W_dec=at(params.W_dec), grad=at(grad),
        grad_l1=at(grad_l1), feature_weight=at(feature_weight), grad_activity=at(grad_activity),
        grad_val=at(grad_z), d_in=x.shape[1], dz=at(dz),
    )  # fmt: skip
    grad_x = native.sum_rows(code, dz, params.W_enc_rows, None) if of_x else x.new_empty(0)
    if not of_weights:
        # One for each: what an operator returns must not share memory.
        return grad_x, Parameters(*(x.new_empty(0) for _ in range(4))), x.new_empty(0)
    rows_l1 = x.new_zeros(len(x)) if grad_l1 is None else grad_l1
    entries, grad_b_enc, grad_feature_weight = native.transpose(
        run, space, code, dz, rows_l1, len(params.b_enc)
    )
    if grad is None:
        grad = torch.zeros_like(x)
    gradient = Gradient(xc, grad, grad_b_enc, grad_feature_weight, entries)
    out = Parameters(
        W_enc_rows=torch.empty_like(params.W_enc_rows),
        b_enc=grad_b_enc,
        W_dec=torch.empty_like(params.W_dec),
        b_dec=native.b_dec_gradient(run, space, grad, grad_b_enc, params.W_enc_rows),
    )
    _C.feature_gradients(
        exec=run.exec(), gradient=gradient.pointers(space, params.W_dec), dW_enc=at(out.W_enc_rows),
        dW_dec=at(out.W_dec),
    )  # fmt: skip
    return grad_x, out, grad_feature_weight
