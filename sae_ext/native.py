"""Calls into the compiled kernels: workspaces, and the parts that every way of a step is made of.

`sae_ext.coding` lists entries, `sae_ext.step_cpu` and `sae_ext.step_cuda` put a step together. Arguments
are checked in `sae_ext.ops`; the contract of each kernel is in csrc/saek.h.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext.parameters import AdamState, Objective, Parameters, SparseCode, Update

MISSING: str | None = None
"""Why the compiled module could not be imported; None where it was."""
try:
    from sae_ext import _C
except ImportError as error:
    MISSING = str(error)

CAPABILITY = (8, 0)
"""The oldest GPU the kernels are built for."""


def isa() -> str:
    """Instruction set in use; ValueError where SPARSEMILL_ISA asks for one that cannot run."""
    return _C.isa()


def build() -> dict[str, Any]:
    """How the module was built and what its CUDA runtime sees: keys `openmp` and `cuda`."""
    if MISSING is None:
        return {"openmp": _C.has_openmp(), "cuda": {**_C.cuda(), "reason": cuda_missing()}}
    nothing = {"built": False, "devices": [], "driver_version": 0, "runtime_version": 0}
    return {"openmp": False, "cuda": {**nothing, "reason": "the compiled kernels are not built"}}


@functools.cache
def cuda_missing(device: torch.device | None = None) -> str | None:
    """Why a GPU (by default the first) cannot run the kernels, and the remedy; None where it can."""
    if MISSING is not None:
        return f"the compiled kernels are not built ({MISSING})"
    cuda = _C.cuda()
    if not cuda["built"]:
        return (
            "the kernels were built without CUDA: put nvcc on PATH and install again "
            "(pip install . -C cmake.define.SAEK_CUDA=ON says what is missing)"
        )
    driver, runtime = cuda["driver_version"], cuda["runtime_version"]
    if 0 < driver < runtime // 1000 * 1000:
        return (
            f"the driver supports CUDA {_version(driver)}, but the kernels were built with "
            f"{_version(runtime)}: update the driver, or build with an older toolkit"
        )
    if not cuda["devices"]:
        return str(cuda["reason"])
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU: install a build of it for CUDA"
    found = cuda["devices"][(device.index or 0) if device is not None else 0]
    if tuple(int(n) for n in found["capability"].split(".")) < CAPABILITY:
        return (
            f"{found['name']} has compute capability {found['capability']}, but the kernels need "
            f"{CAPABILITY[0]}.{CAPABILITY[1]} or newer: the PyTorch reference takes their place"
        )
    return None


def _version(number: int) -> str:
    """CUDA's number of a version, 13010, as people write it: 13.1."""
    return f"{number // 1000}.{number % 1000 // 10}"


class Workspace:
    """Named buffers on one device that grow and stay, so that a step allocates nothing."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._flat: dict[str, Tensor] = {}
        self.grown = 0
        """How often a buffer has been made or given back: addresses hold while this stays."""

    def get(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, over the buffer of this name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.dtype != dtype or len(flat) < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self._device)
            self.grown += 1
        return flat[:size].view(shape)

    def zeros(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """The same, filled with zeros."""
        return self.get(name, dtype, *shape).zero_()

    def room(self, name: str) -> int:
        """Elements there are in the buffer of this name."""
        return len(self._flat[name]) if name in self._flat else 0

    def clear(self) -> None:
        """Give the memory back."""
        if self._flat:
            self._flat.clear()
            self.grown += 1


class Spaces:
    """The workspaces of training: one that every step needs, one for the dense phase alone."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.always = Workspace(device)
        self.dense = Workspace(device)


@dataclass(frozen=True)
class Run:
    """How kernels are called: on which device, in which number formats, and unless what."""

    device: torch.device
    dtype: torch.dtype
    """Of parameters, values and sums."""
    matrix: torch.dtype
    """Of what products and gathers read: `dtype`, or bfloat16."""
    on_cuda: bool
    skip: Tensor | None = None
    """int64 [1] on the device: kernels do nothing where it is not 0."""

    @classmethod
    def on(cls, tensor: Tensor) -> Run:
        """Where and as what this tensor is, without a condition."""
        return cls(tensor.device, tensor.dtype, tensor.dtype, tensor.is_cuda)

    def exec(self, parts: int | None = None) -> tuple[int, int, int, int, int]:
        """What every kernel is told; `parts` of a sum over rows on CUDA, where the kernel has such."""
        dtype = _C.FLOAT64 if self.dtype == torch.float64 else _C.FLOAT32
        if self.matrix == torch.bfloat16:
            dtype = _C.BFLOAT16
        if not self.on_cuda:
            return _C.CPU, dtype, torch.get_num_threads(), 0, 0
        stream = 0
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
        return _C.CUDA, dtype, parts or 1, stream, at(self.skip)

    def parts(self, rows: int, each: int, most: int) -> int:
        """Into how many parts a sum over rows falls: threads, or on CUDA as many as have `each` rows."""
        if not self.on_cuda:
            return torch.get_num_threads()
        return max(1, min(rows // each, most))


class Entries(NamedTuple):
    """The listed entries ordered by feature, rows ascending."""

    feature_ptr: Tensor
    row: Tensor
    z: Tensor
    dz: Tensor
    long_lists: Tensor | None
    """On CUDA, which features have many entries."""


@dataclass
class Gradient:
    """What gradients are made of: entries, or in the dense phase the sums of outer products."""

    xc: Tensor
    """x - b_dec [B, d_in]"""
    grad: Tensor
    """dL/dx̂ [B, d_in]"""
    grad_b_enc: Tensor
    z_sum: Tensor
    """Σ_b r_b z_bj with the rows' weights r, [d_sae]."""
    entries: Entries | None = None
    dW_enc: Tensor | None = None
    dW_dec: Tensor | None = None
    pull: Tensor | None = None
    """Multiples of W_dec,j in its gradient, from a penalty on its length, [d_sae]."""

    def pointers(self, space: Workspace, W_dec: Tensor) -> tuple[Any, ...]:
        """As the kernels take it."""
        d_sae, d_in = W_dec.shape
        entries: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
        long_rows = None
        if self.entries is not None:
            long_lists = self.entries.long_lists
            slots = 0 if long_lists is None else len(long_lists) - 1
            entries = (*map(at, self.entries), slots)
            if slots:
                long_rows = space.get("long_rows", W_dec.dtype, slots, 2, d_in)
        parts = (self.grad, self.xc, self.dW_enc, self.dW_dec, self.grad_b_enc, self.pull, W_dec)
        return (entries, *map(at, (*parts, long_rows)), d_in, d_sae)


class Residual(NamedTuple):
    """What `residual` finds."""

    grad: Tensor
    """dL/dx̂ [B, d_in]"""
    dz: Tensor
    """dL/dpre of the listed entries."""


def residual(
    run: Run,
    space: Workspace,
    code: SparseCode,
    W_dec: Tensor,
    x: Tensor,
    b_dec: Tensor | None,
    objective: Objective,
    price: Tensor | None,
    batch: int,
    l1_scale: Tensor,
    sums: Tensor,
    *,
    shared_bytes: int = 0,
    halt: Tensor | None = None,
) -> Residual:
    """Reconstruct the rows and take the gradient; `sums` [4] gets the loss's parts.

    W_dec is in the run's matrix format, x is [B, d_in] or x - b_dec, `batch` what sums are divided by.
    """
    rows, d_in = x.shape
    grad = space.get("grad", run.matrix, rows, d_in)
    dz = space.get("dz", run.dtype, len(code.col))
    _C.residual(
        exec=run.exec(), code=pointers(code, code.val), W_dec=at(W_dec), x=at(x), b_dec=at(b_dec),
        recon_weight=at(objective.recon_weight), l1_weight=at(objective.l1_weight),
        feature_weight=at(price), recon_scale=2 / batch, l1_scale=at(l1_scale), d_in=d_in,
        shared_bytes=shared_bytes, halt=at(halt),
        row_sums=at(space.get("row_sums", torch.float64, rows, 4)), grad=at(grad), dz=at(dz),
        sums=at(sums),
    )  # fmt: skip
    return Residual(grad, dz)


def transpose(
    run: Run,
    space: Workspace,
    code: SparseCode,
    dz: Tensor,
    row_weight: Tensor | None,
    d_sae: int,
) -> tuple[Entries, Tensor, Tensor]:
    """The entries by feature, the gradient of b_enc, and Σ_b r_b z_bj."""
    nnz, rows, dtype = len(code.col), len(code.row_ptr) - 1, run.dtype
    parts = counts_rows = run.parts(rows, 32, 256)
    long_lists = None
    if run.on_cuda:
        counts_rows = (parts + 1) // 2 + 2
        slots = min(nnz // _C.LONG_LIST + 1, d_sae, 512)
        long_lists = space.get("long_lists", torch.int32, slots + 1)
    entries = Entries(
        space.get("feature_ptr", torch.int64, d_sae + 1),
        space.get("row", torch.int32, nnz),
        space.get("z_by_feature", dtype, nnz),
        space.get("dz_by_feature", dtype, nnz),
        long_lists,
    )
    grad_b_enc = torch.empty(d_sae, dtype=dtype, device=run.device)
    z_sum = torch.empty_like(grad_b_enc)
    _C.transpose(
        exec=run.exec(parts), code=pointers(code, code.val), dz=at(dz), row_weight=at(row_weight),
        d_sae=d_sae, counts=at(space.get("counts", torch.int64, counts_rows, d_sae)),
        entries=(*map(at, entries), 0 if long_lists is None else len(long_lists) - 1),
        grad_b_enc=at(grad_b_enc), z_sum=at(z_sum),
    )  # fmt: skip
    return entries, grad_b_enc, z_sum


class DenseSums:
    """What the dense phase adds up over chunks of rows."""

    def __init__(self, run: Run, space: Workspace, d_sae: int, d_in: int) -> None:
        f64, i64 = torch.float64, torch.int64
        self.fired = torch.zeros(d_sae, dtype=i64, device=run.device)
        self.saturated = space.zeros("saturated", i64, 1)
        self.z_sum = space.zeros("z_sum", f64, 2, d_sae)
        """Σ_b z_bj, and the same with the rows' weights of the penalty."""
        self.grad_b_enc = space.zeros("grad_b_enc", f64, d_sae)
        self.errors = space.zeros("errors", f64, 2)
        """Σ_b ‖e_b‖², and the same with the rows' weights of the reconstruction."""
        self.dW_enc = space.get("dW_enc", run.dtype, d_sae, d_in)
        self.dW_dec = space.get("dW_dec", run.dtype, d_sae, d_in)


def dense_chunk(
    run: Run,
    space: Workspace,
    total: DenseSums,
    params: Parameters,
    x: Tensor,
    b_dec: Tensor | None,
    xc: Tensor,
    grad: Tensor,
    objective: Objective,
    price: Tensor | None,
    batch: int,
    l1_scale: Tensor,
    rows: slice,
    *,
    W_enc_rows: Tensor,
    W_dec: Tensor,
    halt: Tensor | None = None,
) -> None:
    """Forward and backward of some rows by five matrix products; fills these rows of `grad`.

    W_enc_rows and W_dec are the weights in the run's matrix format; the rest is as for `residual`.
    """
    (d_sae, d_in), count, f64 = params.W_dec.shape, rows.stop - rows.start, torch.float64
    parts = run.parts(count, 64, 16)
    exec_ = run.exec(parts)
    z, dz = (space.get(name, run.matrix, count, d_sae) for name in ("z", "dz"))
    passes = space.get("passes", torch.int64, count, (d_sae + 63) // 64)
    scratch = space.get("scratch", f64, parts, 4, d_sae) if run.on_cuda else None
    w, s = (None if v is None else v[rows] for v in (objective.recon_weight, objective.l1_weight))
    torch.mm(xc[rows], W_enc_rows.T, out=z)
    _C.dense_activate(
        exec=exec_, rows=count, pre=at(z), b_enc=at(params.b_enc), clip=bound(objective.clip),
        row_weight=at(s), d_sae=d_sae, passes=at(passes), fired=at(total.fired),
        saturated=at(total.saturated), z_sum=at(total.z_sum), scratch=at(scratch),
    )  # fmt: skip
    torch.mm(z, W_dec, out=grad[rows])
    _C.dense_residual(
        exec=exec_, rows=count, grad=at(grad[rows]), x=at(x[rows]), b_dec=at(b_dec),
        recon_weight=at(w), recon_scale=2 / batch, d_in=d_in, halt=at(halt),
        row_sums=at(space.get("row_sums", f64, count)), sums=at(total.errors),
    )  # fmt: skip
    torch.mm(grad[rows], W_dec.T, out=dz)
    _C.dense_mask(
        exec=exec_, rows=count, dz=at(dz), passes=at(passes), l1_weight=at(s),
        feature_weight=at(price), l1_scale=at(l1_scale), d_sae=d_sae,
        grad_b_enc=at(total.grad_b_enc), scratch=at(scratch),
    )  # fmt: skip
    for sum_, left, right in ((total.dW_dec, z, grad[rows]), (total.dW_enc, dz, xc[rows])):
        _add_product(sum_, left.T, right, first=rows.start == 0)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total = left @ right, or total += left @ right, in the format of `total`."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=0.0 if first else 1.0, out=total)
    elif not left.is_cuda:  # only GPUs multiply 16-bit numbers into 32-bit sums
        _add_product(total, left.to(total.dtype), right.to(total.dtype), first=first)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


def set_pull(
    gradient: Gradient, objective: Objective, lengths: Tensor | None, l1_scale: Tensor
) -> None:
    """The penalty's pull on decoder rows of these lengths; none where `lengths` is None.

    A row of zeros is not pulled.
    """
    if lengths is None:
        return
    rate = l1_scale.to(lengths.dtype)
    pull = gradient.z_sum * (rate / torch.where(lengths == 0, 1, lengths))
    if objective.feature_weight is not None:
        pull *= objective.feature_weight
    gradient.pull = torch.where(lengths == 0, 0, pull)


def reduced(
    run: Run,
    space: Workspace,
    gradient: Gradient,
    params: Parameters,
    group: dist.ProcessGroup,
    also: list[Tensor],
) -> Gradient:
    """The gradient summed over the members of a process group, as tensors; `also` in place.

    What remains of the gradient's rows serves no purpose afterwards.
    """
    d_sae, d_in = params.W_dec.shape
    dW_enc = space.get("dW_enc", run.dtype, d_sae, d_in)
    dW_dec = space.get("dW_dec", run.dtype, d_sae, d_in)
    _C.feature_gradients(
        exec=run.exec(), gradient=gradient.pointers(space, params.W_dec), dW_enc=at(dW_enc),
        dW_dec=at(dW_dec),
    )  # fmt: skip
    for tensor in (dW_enc, dW_dec, gradient.grad_b_enc, *also):
        dist.all_reduce(tensor, group=group)
    return replace(gradient, entries=None, dW_enc=dW_enc, dW_dec=dW_dec, pull=None)


def squared_norms(
    run: Run, space: Workspace, gradient: Gradient, params: Parameters
) -> tuple[Tensor, Gradient]:
    """Squared length of each feature's gradients together, float64 [d_sae], and the gradient to go on with.

    On the CPU that is the same one as tensors: where many rows fire a feature, reading what was made is
    faster than making it again. On a GPU nothing is kept.
    """
    out = space.get("squares", torch.float64, len(params.b_enc))
    dW_enc, dW_dec = gradient.dW_enc, gradient.dW_dec
    if not run.on_cuda and gradient.entries is not None:
        dW_enc = space.get("dW_enc", run.dtype, *params.W_dec.shape)
        dW_dec = space.get("dW_dec", run.dtype, *params.W_dec.shape)
    _C.feature_norms(
        exec=run.exec(), gradient=gradient.pointers(space, params.W_dec), dW_enc=at(dW_enc),
        dW_dec=at(dW_dec), out=at(out),
    )  # fmt: skip
    if run.on_cuda:
        return out, gradient
    return out, replace(gradient, entries=None, dW_enc=dW_enc, dW_dec=dW_dec, pull=None)


def adam_numbers(update: Update, step: int) -> list[float]:
    """What one of Adam's updates is made of, as `saek_adam_numbers` has it; `step` counts from 1."""
    return [
        1 - update.lr * update.weight_decay,
        update.lr / (1 - update.beta1**step),
        update.beta1,
        update.beta2,
        1 / math.sqrt(1 - update.beta2**step),
        update.eps,
    ]


def move(
    run: Run,
    space: Workspace,
    params: Parameters,
    adam: AdamState,
    gradient: Gradient,
    b_dec_gradient: Tensor | None,
    numbers: Tensor,
    grad_scale: Tensor | None,
    *,
    unit_norm: bool,
    copies: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Move all parameters and their moments; b_dec only where its gradient is given.

    `numbers` are those of `adam_numbers`, `grad_scale` a factor on all gradients; `copies` get the
    new W_enc_rows and W_dec in the run's matrix format.
    """
    d_in = params.W_dec.shape[1]
    parts, scratch = run.exec()[2], None
    if not run.on_cuda:
        scratch = space.get("scratch", run.dtype, parts, 2, d_in)
    elif d_in * params.W_dec.itemsize > _C.SHARED_ROW:
        parts = min(len(params.b_enc), 1024)
        scratch = space.get("kept_rows", run.dtype, parts, d_in)
    m, v = adam.m.tensors(), adam.v.tensors()
    moments = {name: (at(p), at(m[name]), at(v[name])) for name, p in params.tensors().items()}
    _C.update_features(
        exec=run.exec(parts), gradient=gradient.pointers(space, params.W_dec),
        adam=(at(numbers), at(grad_scale)), unit_norm=unit_norm, scratch=at(scratch),
        W_enc=moments["W_enc_rows"], b_enc=moments["b_enc"], W_dec=moments["W_dec"],
        W_enc_copy=at(copies[0]), W_dec_copy=at(copies[1]),
    )  # fmt: skip
    if b_dec_gradient is not None:
        _C.update(
            exec=run.exec(), gradient=at(b_dec_gradient), n=d_in,
            adam=(at(numbers), at(grad_scale)), parameter=moments["b_dec"],
        )  # fmt: skip


def row_norms(matrix: Tensor, run: Run | None = None) -> Tensor:
    """Length of each row."""
    run = Run.on(matrix) if run is None else run
    out = torch.empty(len(matrix), dtype=matrix.dtype, device=matrix.device)
    _C.row_norms(
        exec=run.exec(), matrix=at(matrix), rows=len(matrix), d_in=matrix.shape[1], out=at(out)
    )
    return out


def b_dec_gradient(
    run: Run, space: Workspace, grad: Tensor, grad_b_enc: Tensor, W_enc_rows: Tensor
) -> Tensor:
    """Σ_b grad_b - grad_b_enc W_encᵀ, [d_in]; W_enc_rows is in the run's matrix format."""
    d_sae, d_in = W_enc_rows.shape
    out = torch.empty(d_in, dtype=run.dtype, device=run.device)
    _C.b_dec_gradient(
        exec=run.exec(), grad=at(grad), grad_b_enc=at(grad_b_enc), W_enc=at(W_enc_rows),
        rows=len(grad), d_in=d_in, d_sae=d_sae,
        scratch=at(space.get("b_dec_shares", torch.float64, _C.B_DEC_SHARES, d_in)), out=at(out),
    )  # fmt: skip
    return out


def sum_rows(code: SparseCode, weight: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_k weight[k] matrix[col[k]] + bias for each row of a code, [B, d_in]."""
    out = torch.empty(
        len(code.row_ptr) - 1, matrix.shape[1], dtype=matrix.dtype, device=matrix.device
    )
    _C.decode(
        exec=Run.on(matrix).exec(), code=pointers(code, weight), matrix=at(matrix),
        bias=at(bias), d_in=matrix.shape[1], out=at(out),
    )  # fmt: skip
    return out


def chunks(
    start: int,
    rows: int,
    row_bytes: int,
    limit: int,
    *,
    least: int = 32,
    each: int = 1,
    most: int | None = None,
) -> Iterator[slice]:
    """Slices of so many rows from `start` on, of `limit` bytes or `least` rows; a multiple of `each`."""
    size = max(least, limit // row_bytes // each * each)
    size = size if most is None else min(size, most)
    for begin in range(start, rows, size):
        yield slice(begin, min(begin + size, rows))


def bound(clip: float | None) -> float:
    """The clip as a number."""
    return math.inf if clip is None else clip


_NOWHERE = 64
"""The address of a tensor without numbers, for kernels that tell a missing one by 0; it is never read."""


def at(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr() or _NOWHERE


def pointers(code: SparseCode, val: Tensor) -> tuple[int, int, int, int]:
    """A code as the kernels take it."""
    return at(code.row_ptr), at(code.col), at(val), len(code.row_ptr) - 1
