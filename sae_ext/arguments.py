"""What the public functions of `sae_ext.ops` ask of their arguments, and how they say no.

Kernels read raw memory: nothing reaches them that has not passed here. Each check raises `UserError`
with the argument's name and the remedy.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from sae_ext.errors import UserError
from sae_ext.parameters import AdamState, Parameters, SparseCode, Support


def check_params(params: Parameters) -> None:
    """Shapes that agree, one dtype, one device, rows without gaps: kernels read raw memory."""
    if params.W_dec.ndim != 2 or 0 in params.W_dec.shape:
        raise UserError(f"W_dec must be [d_sae, d_in], got shape {list(params.W_dec.shape)}")
    if params.W_dec.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"W_dec must be float32 or float64, got {params.W_dec.dtype}: convert the parameters"
        )
    check_like("", params, params)


def check_adam(adam: AdamState, params: Parameters) -> None:
    """Moments like the parameters, none in the memory of another; a count of steps."""
    check_like("adam.m.", adam.m, params)
    check_like("adam.v.", adam.v, params)
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, prefix + name)
        for prefix, group in (("", params), ("adam.m.", adam.m), ("adam.v.", adam.v))
        for name, tensor in group.tensors().items()
        if tensor.device.type != "meta"
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise UserError(f"{first} and {second} share memory: give each its own, with clone()")
    if adam.step < 0:
        raise UserError(f"adam.step must be 0 or more, got {adam.step}")


def check_like(prefix: str, group: Parameters, params: Parameters) -> None:
    """Shapes, dtype and device that W_dec of `params` asks for."""
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


def rows_of(x: Tensor, params: Parameters) -> Tensor:
    """x checked against the parameters, in their dtype, contiguous and detached."""
    check_rows(x, params)
    return x.detach().to(params.b_dec.dtype).contiguous()


def check_rows(x: Tensor, params: Parameters) -> None:
    """Rows of d_in floating-point numbers on the device of the parameters."""
    d_in = len(params.b_dec)
    if not isinstance(x, Tensor):
        raise UserError(f"x must be a torch tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] != d_in:
        raise UserError(f"x must be [rows, {d_in}], got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"x must be floating point, got {x.dtype}: convert it with x.float()")
    if x.device != params.b_dec.device:
        raise UserError(f"x is on {x.device} but the parameters are on {params.b_dec.device}")


def check_vector(name: str, vector: Tensor, axis: str, length: int, like: Tensor) -> None:
    """A floating-point vector of this length on the same device."""
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        found = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise UserError(f"{name} must be a floating-point tensor, got {found}: convert it")
    if vector.shape != (length,):
        raise UserError(f"{name} must be [{axis} = {length}], got shape {list(vector.shape)}")
    if vector.device != like.device:
        raise UserError(f"{name} is on {vector.device}, but the parameters are on {like.device}")


def weight_of(
    name: str, weight: Tensor | None, axis: str, length: int, like: Tensor
) -> Tensor | None:
    """A weight of the objective, of the right form, converted like x itself."""
    if weight is None:
        return None
    check_vector(name, weight, axis, length, like)
    return weight.detach().to(like.dtype).contiguous()


def check_weight_values(name: str, weight: Tensor | None) -> None:
    """Not negative, and finite."""
    if weight is None:
        return
    wrong = ~((weight >= 0) & (weight < math.inf))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise UserError(
            f"{name} must be 0 or more and finite everywhere, but {name}[{at}] is {weight[at]:g}"
        )


def check_clip(clip: float | None, params: Parameters) -> float | None:
    """The clip as the parameters' dtype has it; None where it is beyond all numbers of that."""
    if clip is None:
        return None
    check_number("clip", clip)
    dtype = params.b_dec.dtype
    if clip > torch.finfo(dtype).max:
        return None
    rounded = torch.tensor(clip, dtype=torch.float64, device="cpu").to(dtype).item()
    if not rounded > 0:
        raise UserError(f"clip must be positive in {dtype}, or None for no bound, got {clip}")
    return float(rounded)


def check_number(name: str, value: float) -> None:
    """A number of Python."""
    if not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number, got {type(value).__name__}")


def check_numbers(**numbers: float) -> None:
    """Not negative, and finite."""
    for name, value in numbers.items():
        check_number(name, value)
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be 0 or more and finite, got {value}")


def check_betas(**betas: float) -> None:
    """In [0, 1)."""
    for name, value in betas.items():
        check_number(name, value)
        if not 0 <= value < 1:
            raise UserError(f"{name} must lie in [0, 1), got {value}")


def check_index(name: str, index: Support | SparseCode, rows: int, params: Parameters) -> None:
    """The form of `row_ptr` and `col`, without a look at their numbers."""
    row_ptr, col = index[:2]
    if row_ptr.dtype != torch.int64 or col.dtype != torch.int32:
        raise UserError(
            f"{name} must hold row_ptr int64 and col int32, got {row_ptr.dtype} and {col.dtype}"
        )
    if not row_ptr.device == col.device == params.b_dec.device:
        raise UserError(f"{name} and parameters must be on one device, {params.b_dec.device}")
    if row_ptr.shape != (rows + 1,) or col.ndim != 1:
        raise UserError(
            f"{name} must hold row_ptr [{rows + 1}] and col [n], got {list(row_ptr.shape)} and "
            f"{list(col.shape)}"
        )


def check_places(name: str, index: Support | SparseCode, params: Parameters) -> None:
    """Entries that all lie inside, each listed once: kernels read where they point."""
    row_ptr, col = index[:2]
    if row_ptr[0] != 0 or row_ptr[-1] != len(col) or bool((row_ptr.diff() < 0).any()):
        raise UserError(f"{name}.row_ptr must rise from 0 to the number of entries, {len(col)}")
    d_sae = len(params.b_enc)
    if len(col) and not (col.min() >= 0 and col.max() < d_sae):
        raise UserError(f"{name}.col must lie in [0, {d_sae}), got {col.min()} to {col.max()}")
    if len(col) < 2:
        return
    rises = col.diff() > 0
    starts = row_ptr[1:-1]
    rises[starts[(starts > 0) & (starts < len(col))] - 1] = True
    if not bool(rises.all()):
        at = int((~rises).nonzero()[0]) + 1
        row = int(torch.searchsorted(row_ptr, at, right=True)) - 1
        raise UserError(
            f"{name}.col must ascend within each row, but does not in row {row} at entry {at}: "
            "sort it and drop repeated columns"
        )


def check_support(support: Support, params: Parameters) -> Support:
    """A support whose entries all lie inside."""
    check_places("support", support, params)
    return Support(*(t.contiguous() for t in support))


def check_code(code: SparseCode, params: Parameters) -> SparseCode:
    """A code whose entries all lie inside."""
    row_ptr, col, val = code
    if not val.is_floating_point() or val.shape != col.shape or val.device != col.device:
        raise UserError(
            f"code.val must be floating point [{len(col)}] on {col.device}, like code.col, got "
            f"{val.dtype} {list(val.shape)} on {val.device}"
        )
    check_index("code", code, max(len(row_ptr) - 1, 0), params)
    check_places("code", code, params)
    return SparseCode(
        row_ptr.contiguous(), col.contiguous(), val.detach().to(params.b_dec.dtype).contiguous()
    )
