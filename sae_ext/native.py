"""Calls into the compiled kernels: workspaces, chunks of rows, the order of a step.

Arguments are checked in `sae_ext.ops`; the contract of each kernel is in csrc/saek.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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

MISSING: str | None = None
"""Why the compiled module could not be imported; None where it was."""
try:
    from sae_ext import _C
except ImportError as error:
    MISSING = str(error)

_PRE_BYTES = 8 << 20  # pre-activations of one chunk of rows: small enough to stay in cache
_SCREEN_BYTES = 16 << 20  # rows that are screened together: in cache while all features pass by
_DENSE_BYTES = 64 << 20  # pre-activations of one chunk in the dense phase
_FIRST_L0 = 64  # active features per row that the first batch's arrays have room for
# Share of candidates up to which screening beats the matrix product, for wide rows; a candidate costs
# as much as this many multiplications beside its own d_in.
_CANDIDATES, _CANDIDATE_COST = 0.35, 400
_SCREEN_ROWS = 32, 8192  # fewer rows are not worth rounding the weights for, more need much scratch
_PROBE_ROWS = 64  # rows that tell whether a step is one for the dense phase
DENSE_ABOVE = 0.26
"""Share of active entries above which a step takes the dense path (docs/kernels.md has the curve)."""


def isa() -> str:
    """Instruction set in use; ValueError where SPARSEMILL_ISA asks for one that cannot run."""
    return _C.isa()


def build() -> dict[str, Any]:
    """How the module was built and what its CUDA runtime sees: keys `openmp` and `cuda`."""
    if MISSING is None:
        return {"openmp": _C.has_openmp(), "cuda": _C.cuda()}
    nothing = {"built": False, "devices": [], "driver_version": 0, "runtime_version": 0}
    return {"openmp": False, "cuda": {**nothing, "reason": "the compiled kernels are not built"}}


_Out = tuple[int, int, int, int, int]
"""Where a kernel lists entries: pointers to row_ptr, col and val, their length, and counters."""


class Workspace:
    """Named buffers that grow and stay, so that a step allocates nothing."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, over the buffer of this name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.dtype != dtype or len(flat) < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype)
        return flat[:size].view(shape)

    def zeros(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """The same, filled with zeros."""
        return self.get(name, dtype, *shape).zero_()

    def room(self, name: str) -> int:
        """Elements there are in the buffer of this name."""
        return len(self._flat[name]) if name in self._flat else 0

    def clear(self) -> None:
        """Give the memory back."""
        self._flat.clear()


class Spaces:
    """The workspaces of training: one that every step needs, one for the dense phase alone."""

    def __init__(self) -> None:
        self.always = Workspace()
        self.dense = Workspace()


class Listed(NamedTuple):
    """The active entries of a batch; one above the clip is held as -clip."""

    code: SparseCode
    saturated: int


class _Entries(NamedTuple):
    """The listed entries ordered by feature, rows ascending."""

    feature_ptr: Tensor
    row: Tensor
    z: Tensor
    dz: Tensor


@dataclass
class _Gradient:
    """What gradients are made of: entries, or in the dense phase the sums of outer products."""

    xc: Tensor
    """[B, d_in]"""
    grad: Tensor
    """dL/dx̂ [B, d_in]"""
    grad_b_enc: Tensor
    z_sum: Tensor
    """Σ_b r_b z_bj with the rows' weights r, [d_sae]."""
    entries: _Entries | None = None
    dW_enc: Tensor | None = None
    dW_dec: Tensor | None = None
    pull: Tensor | None = None
    """Multiples of W_dec,j in its gradient, from a penalty on its length, [d_sae]."""

    def pointers(self, W_dec: Tensor) -> tuple[Any, ...]:
        """As the kernels take it."""
        entries = (0, 0, 0, 0) if self.entries is None else tuple(map(_at, self.entries))
        d_sae, d_in = W_dec.shape
        parts = (self.grad, self.xc, self.dW_enc, self.dW_dec, self.grad_b_enc, self.pull, W_dec)
        return (entries, *map(_at, parts), d_in, d_sae)


class _Seen(NamedTuple):
    """What the forward half of a step saw; sums over rows."""

    squared_error: float
    l1: float
    loss: float
    nnz: int
    saturated: int
    fired: Tensor


class _Listing:
    """The code of a batch under way: arrays that grow while chunks of rows are listed."""

    def __init__(
        self, space: Workspace, xc: Tensor, params: Parameters, clip: float | None
    ) -> None:
        self._space, self._xc, self._params = space, xc, params
        self._clip = math.inf if clip is None else clip
        self._row_ptr = space.get("row_ptr", torch.int64, len(xc) + 1)
        self._row_ptr[0] = 0
        self._counters = torch.zeros(4, dtype=torch.int64)
        self._capacity = max(space.room("col"), len(xc) * min(len(params.b_enc), _FIRST_L0))
        self._saturated = 0

    def done(self) -> Listed:
        """The code over the workspace's memory."""
        n = int(self._row_ptr[-1])
        col, val = self._arrays()
        return Listed(SparseCode(self._row_ptr, col[:n], val[:n]), self._saturated)

    def screen(self, rows: slice) -> bool:
        """List these rows without a matrix product; False where that is not offered or would not pay."""
        d_sae, d_in = self._params.W_dec.shape
        count, threads = rows.stop - rows.start, torch.get_num_threads()
        if count < _SCREEN_ROWS[0] or self._xc.dtype != torch.float32 or isa() != "avx512vnni":
            return False
        scratch = self._space.get(
            "screen", torch.uint8,
            _C.screen_scratch(rows=count, d_in=d_in, d_sae=d_sae, threads=threads) + 64,
        )  # fmt: skip

        def call(out: _Out, capacity: int) -> int:
            return _C.screen(
                exec=_exec(self._xc), xc=_at(self._xc[rows]), W_enc=_at(self._params.W_enc_rows),
                b_enc=_at(self._params.b_enc), clip=self._clip, rows=count, d_in=d_in, d_sae=d_sae,
                limit=_CANDIDATES * d_in / (d_in + _CANDIDATE_COST), scratch=(_at(scratch) + 63) // 64 * 64,
                list_col=_at(self._space.get("list_col", torch.int32, capacity)),
                list_val=_at(self._space.get("list_val", self._xc.dtype, capacity)), out=out,
            )  # fmt: skip

        return self._append(rows, call) == _C.OK

    def multiply(self, rows: slice) -> None:
        """List these rows from their pre-activations."""
        count, d_sae = rows.stop - rows.start, len(self._params.b_enc)
        pre = self._space.get("pre", self._xc.dtype, count, d_sae)
        mask = self._space.get("mask", torch.int64, count, (d_sae + 63) // 64)
        torch.mm(self._xc[rows], self._params.W_enc, out=pre)

        def call(out: _Out, capacity: int) -> int:
            return _C.compact(
                exec=_exec(pre), pre=_at(pre), b_enc=_at(self._params.b_enc), clip=self._clip,
                rows=count, d_sae=d_sae, mask=_at(mask), out=out,
            )  # fmt: skip

        self._append(rows, call)

    def gather(self, support: Support) -> None:
        """List what is active on a given support."""
        rows, length = len(self._xc), len(support.col)
        self._capacity = max(self._capacity, length)

        def call(out: _Out, capacity: int) -> int:
            return _C.gather(
                exec=_exec(self._xc), support_ptr=_at(support.row_ptr), support_col=_at(support.col),
                xc=_at(self._xc), W_enc=_at(self._params.W_enc_rows), b_enc=_at(self._params.b_enc),
                clip=self._clip, rows=rows, d_in=self._xc.shape[1], support_length=length,
                scratch=_at(self._space.get("support", self._xc.dtype, length)), out=out,
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
                _at(self._row_ptr[rows.start :]), _at(col), _at(val), self._capacity, _at(self._counters)
            )  # fmt: skip
            code = call(out, self._capacity)
            if code != _C.OVERFLOW:
                break
            # Room for the rest of the batch too, if it is like the rows so far.
            needed, listed = int(self._counters[0]), int(self._row_ptr[rows.start])
            self._capacity = math.ceil(1.25 * needed * len(self._xc) / rows.stop)
            kept = col[:listed].clone(), val[:listed].clone()
            for new, old in zip(self._arrays(), kept, strict=True):
                new[:listed] = old
        if code == _C.OK:
            self._saturated += int(self._counters[1])
        return code


def encode(space: Workspace, xc: Tensor, params: Parameters, clip: float | None) -> Listed:
    """The active entries of xc = x - b_dec, [B, d_in]."""
    listed = _encode(space, xc, params, clip, densest=1.0)
    assert listed is not None
    return listed


def _encode(
    space: Workspace, xc: Tensor, params: Parameters, clip: float | None, densest: float
) -> Listed | None:
    """The same, or None where a sample of the rows has a larger share of active entries.

    How rows are listed depends on the rows and weights alone, so that a step done again, by a resumed
    run for one, is the same step.
    """
    listing = _Listing(space, xc, params, clip)
    screened = 0
    for rows in _chunks(0, xc, xc.shape[1], _SCREEN_BYTES, _SCREEN_ROWS[1]):
        if not listing.screen(rows):
            break
        screened = rows.stop
    if screened < len(xc) and densest < 1 and _density(space, xc, params) > densest:
        return None
    for rows in _chunks(screened, xc, len(params.b_enc), _PRE_BYTES):
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
    return _sum_rows(code, code.val, params.W_dec, params.b_dec)


def step(
    spaces: Spaces,
    params: Parameters,
    adam: AdamState,
    x: Tensor,
    objective: Objective,
    update: Update,
    support: Support | None,
) -> StepResult:
    """One training step in place; `adam.step` is counted up."""
    space = spaces.always
    xc = torch.sub(x, params.b_dec, out=space.get("xc", x.dtype, *x.shape))
    lengths = None
    price = objective.feature_weight
    if objective.decoder_norm == "free":
        lengths = row_norms(params.W_dec)
        price = lengths if price is None else lengths * price
    if support is not None:
        listed: Listed | None = gather(space, xc, params, objective.clip, support)
    else:
        listed = _encode(space, xc, params, objective.clip, densest=DENSE_ABOVE)
    if listed is None:
        seen, gradient = _dense(spaces, params, xc, objective, price)
    else:
        spaces.dense.clear()
        seen, gradient = _sparse(space, listed, params, xc, objective, price)
    if lengths is not None:
        pull = gradient.z_sum * (objective.l1 / len(x) / torch.where(lengths == 0, 1, lengths))
        if objective.feature_weight is not None:
            pull *= objective.feature_weight
        gradient.pull = torch.where(lengths == 0, 0, pull)
    check_finite(params, seen.loss)
    norm = _update(space, params, adam, gradient, update, unit_norm=lengths is None)
    return StepResult(
        seen.loss, seen.squared_error, seen.l1, seen.nnz, seen.saturated, seen.fired, norm
    )


def _sparse(
    space: Workspace,
    listed: Listed,
    params: Parameters,
    xc: Tensor,
    objective: Objective,
    price: Tensor | None,
) -> tuple[_Seen, _Gradient]:
    """Loss and gradients through the listed entries."""
    code, batch = listed.code, len(xc)
    grad = space.get("grad", xc.dtype, *xc.shape)
    dz = space.get("dz", xc.dtype, len(code.col))
    sums = space.get("sums", torch.float64, 4)
    _C.residual(
        exec=_exec(xc),
        code=_pointers(code, code.val),
        W_dec=_at(params.W_dec),
        xc=_at(xc),
        recon_weight=_at(objective.recon_weight),
        l1_weight=_at(objective.l1_weight),
        feature_weight=_at(price),
        recon_scale=2 / batch,
        l1_scale=objective.l1 / batch,
        d_in=xc.shape[1],
        row_sums=_at(space.get("row_sums", torch.float64, batch, 4)),
        grad=_at(grad),
        dz=_at(dz),
        sums=_at(sums),
    )
    entries, grad_b_enc, z_sum = _transpose(space, code, dz, objective.l1_weight, params)
    squared_error, l1, weighted_error, weighted_l1 = sums.tolist()
    loss = (weighted_error + objective.l1 * weighted_l1) / batch
    fired = entries.feature_ptr.diff()
    seen = _Seen(squared_error, l1, loss, len(code.col), listed.saturated, fired)
    return seen, _Gradient(xc, grad, grad_b_enc, z_sum, entries)


def _dense(
    spaces: Spaces,
    params: Parameters,
    xc: Tensor,
    objective: Objective,
    price: Tensor | None,
) -> tuple[_Seen, _Gradient]:
    """The same where so many entries are active that matrix products are faster: five of them."""
    (d_sae, d_in), batch, dtype, f64 = params.W_dec.shape, len(xc), xc.dtype, torch.float64
    grad, dense_space = spaces.always.get("grad", dtype, *xc.shape), spaces.dense
    fired = torch.zeros(d_sae, dtype=torch.int64)
    saturated = dense_space.zeros("saturated", torch.int64, 1)
    z_sum = dense_space.zeros("z_sum", f64, 2, d_sae)
    grad_b_enc = dense_space.zeros("grad_b_enc", f64, d_sae)
    sums = dense_space.zeros("sums", f64, 2)
    dW_enc = dense_space.get("dW_enc", dtype, d_sae, d_in)
    dW_dec = dense_space.get("dW_dec", dtype, d_sae, d_in)
    for rows in _chunks(0, xc, d_sae, _DENSE_BYTES):
        count = rows.stop - rows.start
        at = {"exec": _exec(xc), "rows": count}
        z, dz = (dense_space.get(name, dtype, count, d_sae) for name in ("z", "dz"))
        passes = dense_space.get("passes", torch.int64, count, (d_sae + 63) // 64)
        recon_weight, l1_weight = (
            None if w is None else w[rows] for w in (objective.recon_weight, objective.l1_weight)
        )
        torch.mm(xc[rows], params.W_enc, out=z)
        _C.dense_activate(
            **at, pre=_at(z), b_enc=_at(params.b_enc), clip=_bound(objective.clip),
            row_weight=_at(l1_weight), d_sae=d_sae, passes=_at(passes), fired=_at(fired),
            saturated=_at(saturated), z_sum=_at(z_sum),
        )  # fmt: skip
        torch.mm(z, params.W_dec, out=grad[rows])
        _C.dense_residual(
            **at, grad=_at(grad[rows]), xc=_at(xc[rows]), recon_weight=_at(recon_weight),
            recon_scale=2 / batch, d_in=d_in,
            row_sums=_at(dense_space.get("row_sums", f64, count)), sums=_at(sums),
        )  # fmt: skip
        torch.mm(grad[rows], params.W_dec.T, out=dz)
        _C.dense_mask(
            **at, dz=_at(dz), passes=_at(passes), l1_weight=_at(l1_weight), feature_weight=_at(price),
            l1_scale=objective.l1 / batch, d_sae=d_sae, grad_b_enc=_at(grad_b_enc),
        )  # fmt: skip
        for total, left, right in ((dW_dec, z, grad[rows]), (dW_enc, dz, xc[rows])):
            torch.addmm(total, left.T, right, beta=float(rows.start > 0), out=total)
    l1, weighted_l1 = (_total(row if price is None else row * price) for row in z_sum)
    squared_error, weighted_error = sums.tolist()
    loss = (weighted_error + objective.l1 * weighted_l1) / batch
    seen = _Seen(
        squared_error, l1, loss, int(fired.sum()), int(saturated), fired
    )  # whole numbers: their sums are exact in any order
    return seen, _Gradient(
        xc, grad, grad_b_enc.to(dtype), z_sum[1].to(dtype), dW_enc=dW_enc, dW_dec=dW_dec
    )


def _update(
    space: Workspace,
    params: Parameters,
    adam: AdamState,
    gradient: _Gradient,
    update: Update,
    *,
    unit_norm: bool,
) -> float | None:
    """Move all parameters and their moments; returns the gradients' norm where it is limited."""
    (d_sae, d_in), exec_ = params.W_dec.shape, _exec(gradient.xc)
    pointers = gradient.pointers(params.W_dec)
    scratch = space.get("scratch", gradient.xc.dtype, torch.get_num_threads(), 2, d_in)
    b_dec, norm, scale = None, None, None
    if update.train_b_dec:  # reads the encoder, so before that moves
        b_dec = b_dec_gradient(space, gradient.grad, gradient.grad_b_enc, params)
    if update.max_grad_norm is not None:
        squares = space.get("squares", torch.float64, d_sae)
        _C.feature_norms(exec=exec_, gradient=pointers, scratch=_at(scratch), out=_at(squares))
        own = 0.0 if b_dec is None else _total(b_dec.double().square())
        norm = math.sqrt(_total(squares) + own)
        # Worded so that a norm that is no number reaches all parameters, as it does in PyTorch.
        limited = update.max_grad_norm / (norm + 1e-6)
        scale = torch.tensor([1.0 if limited >= 1 else limited], dtype=torch.float64)
    adam.step += 1
    numbers = (
        update.lr, update.beta1, update.beta2, update.eps, update.weight_decay, _at(scale), adam.step
    )  # fmt: skip
    m, v = adam.m.tensors(), adam.v.tensors()
    moments = {name: (_at(p), _at(m[name]), _at(v[name])) for name, p in params.tensors().items()}
    _C.update_features(
        exec=exec_, gradient=pointers, adam=numbers, unit_norm=unit_norm, scratch=_at(scratch),
        W_enc=moments["W_enc_rows"], b_enc=moments["b_enc"], W_dec=moments["W_dec"],
    )  # fmt: skip
    if b_dec is not None:
        _C.update(exec=exec_, gradient=_at(b_dec), n=d_in, adam=numbers, parameter=moments["b_dec"])
    return norm


def autoencode(
    x: Tensor,
    params: Parameters,
    clip: float | None,
    feature_weight: Tensor | None,
    support: Support | None,
) -> tuple[Tensor, Tensor, Tensor, SparseCode]:
    """As `sae_ext.reference.autoencode`."""
    space, xc = Workspace(), x - params.b_dec
    listed = (
        encode(space, xc, params, clip)
        if support is None
        else gather(space, xc, params, clip, support)
    )
    code = SparseCode(*(t.clone() for t in listed.code))
    z, col = code.val.abs(), code.col.long()
    x_hat = decode(code._replace(val=z), params)
    activity = torch.zeros_like(params.b_enc).index_add_(0, col, z)
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
    space, exec_ = Workspace(), _exec(x)
    grad, grad_l1, grad_activity, grad_z = grads
    xc = x - params.b_dec
    dz = torch.empty_like(code.val)
    _C.dz(
        exec=exec_, code=_pointers(code, code.val), W_dec=_at(params.W_dec), grad=_at(grad),
        grad_l1=_at(grad_l1), feature_weight=_at(feature_weight), grad_activity=_at(grad_activity),
        grad_val=_at(grad_z), d_in=x.shape[1], dz=_at(dz),
    )  # fmt: skip
    grad_x = _sum_rows(code, dz, params.W_enc_rows, None) if of_x else x.new_empty(0)
    if not of_weights:
        # One for each: what an operator returns must not share memory.
        return grad_x, Parameters(*(x.new_empty(0) for _ in range(4))), x.new_empty(0)
    rows_l1 = torch.zeros(len(x), dtype=x.dtype) if grad_l1 is None else grad_l1
    entries, grad_b_enc, grad_feature_weight = _transpose(space, code, dz, rows_l1, params)
    if grad is None:
        grad = torch.zeros_like(x)
    gradient = _Gradient(xc, grad, grad_b_enc, grad_feature_weight, entries)
    out = Parameters(
        W_enc_rows=torch.empty_like(params.W_enc_rows),
        b_enc=grad_b_enc,
        W_dec=torch.empty_like(params.W_dec),
        b_dec=b_dec_gradient(space, grad, grad_b_enc, params),
    )
    _C.feature_gradients(
        exec=exec_, gradient=gradient.pointers(params.W_dec), dW_enc=_at(out.W_enc_rows),
        dW_dec=_at(out.W_dec),
    )  # fmt: skip
    return grad_x, out, grad_feature_weight


def row_norms(matrix: Tensor) -> Tensor:
    """Length of each row."""
    out = torch.empty(len(matrix), dtype=matrix.dtype)
    _C.row_norms(
        exec=_exec(matrix), matrix=_at(matrix), rows=len(matrix), d_in=matrix.shape[1], out=_at(out)
    )
    return out


def b_dec_gradient(
    space: Workspace, grad: Tensor, grad_b_enc: Tensor, params: Parameters
) -> Tensor:
    """Σ_b grad_b - grad_b_enc W_encᵀ, [d_in]."""
    (d_sae, d_in), out = params.W_dec.shape, torch.empty_like(params.b_dec)
    _C.b_dec_gradient(
        exec=_exec(grad), grad=_at(grad), grad_b_enc=_at(grad_b_enc), W_enc=_at(params.W_enc_rows),
        rows=len(grad), d_in=d_in, d_sae=d_sae,
        scratch=_at(space.get("b_dec_shares", torch.float64, _C.B_DEC_SHARES, d_in)), out=_at(out),
    )  # fmt: skip
    return out


def _transpose(
    space: Workspace, code: SparseCode, dz: Tensor, row_weight: Tensor | None, params: Parameters
) -> tuple[_Entries, Tensor, Tensor]:
    """The entries by feature, the gradient of b_enc, and Σ_b r_b z_bj."""
    nnz, d_sae = len(code.col), len(params.b_enc)
    entries = _Entries(
        space.get("feature_ptr", torch.int64, d_sae + 1),
        space.get("row", torch.int32, nnz),
        space.get("z_by_feature", dz.dtype, nnz),
        space.get("dz_by_feature", dz.dtype, nnz),
    )
    grad_b_enc, z_sum = torch.empty_like(params.b_enc), torch.empty_like(params.b_enc)
    _C.transpose(
        exec=_exec(dz), code=_pointers(code, code.val), dz=_at(dz), row_weight=_at(row_weight),
        d_sae=d_sae, counts=_at(space.get("counts", torch.int64, torch.get_num_threads(), d_sae)),
        entries=tuple(map(_at, entries)), grad_b_enc=_at(grad_b_enc), z_sum=_at(z_sum),
    )  # fmt: skip
    return entries, grad_b_enc, z_sum


def _sum_rows(code: SparseCode, weight: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_k weight[k] matrix[col[k]] + bias for each row of a code, [B, d_in]."""
    out = torch.empty(len(code.row_ptr) - 1, matrix.shape[1], dtype=matrix.dtype)
    _C.decode(
        exec=_exec(matrix), code=_pointers(code, weight), matrix=_at(matrix),
        bias=_at(bias), d_in=matrix.shape[1], out=_at(out),
    )  # fmt: skip
    return out


def _chunks(
    start: int, x: Tensor, width: int, limit: int, most: int | None = None
) -> Iterator[slice]:
    """Slices of x's rows from `start` on: `width` numbers each are `limit` bytes together."""
    size = max(32, limit // (width * x.element_size()))
    size = size if most is None else min(size, most)
    for begin in range(start, len(x), size):
        yield slice(begin, min(begin + size, len(x)))


def _total(values: Tensor) -> float:
    """A sum whose order no number of threads changes, as torch's own would."""
    return float(values.numpy().sum())


def _bound(clip: float | None) -> float:
    return math.inf if clip is None else clip


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _exec(tensor: Tensor) -> tuple[int, int]:
    """What every kernel is told: number format and threads."""
    dtype = _C.FLOAT32 if tensor.dtype == torch.float32 else _C.FLOAT64
    return dtype, torch.get_num_threads()


def _pointers(code: SparseCode, val: Tensor) -> tuple[int, int, int, int]:
    return _at(code.row_ptr), _at(code.col), _at(val), len(code.row_ptr) - 1
