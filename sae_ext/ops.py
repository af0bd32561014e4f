"""The kernels' Python face: encode, decode and training, on whatever this machine offers.

    code = encode(x, params)                              # active features of each row, sparse

    step = Step()                                         # holds the workspaces; reuse it
    result = step(params, adam, x, l1=10.0, lr=1e-3)      # updates params and adam in place

    out = autoencode(x, params)                           # differentiable, for any loss and optimizer
    loss = (out.x_hat - x).square().sum(1).mean() + 10.0 * out.l1.mean()

The compiled code (csrc/) never forms a [B, d_sae] tensor once the SAE is sparse. Where the compiled
module is missing, or the tensors are not on the CPU, `sae_ext.reference` computes the same numbers,
slower. The contract is in docs/kernels.md.
"""

from __future__ import annotations

import logging
import math
import os
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_ext import native, reference
from sae_ext.errors import UserError
from sae_ext.parameters import (
    AdamState,
    Objective,
    Parameters,
    SparseCode,
    StepResult,
    Support,
    Update,
)

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
    """What CPU tensors run on: "cpu-avx512vnni", "cpu-avx512", "cpu-avx2", "cpu-portable" or "reference".

    Raises `UserError` where the environment variable SPARSEMILL_ISA asks for an instruction set
    that this processor or build lacks.
    """
    if native.MISSING is not None:
        return "reference"
    try:
        return f"cpu-{native.isa()}"
    except ValueError as error:
        raise UserError(
            f"{error}: unset SPARSEMILL_ISA or set it to portable, avx2, avx512 or avx512vnni"
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
    clip = _check_clip(clip, params)
    if len(x) == 0 or _choose("auto", x) == "reference":
        return reference.encode(x, params, clip)
    code, _ = native.encode(native.Workspace(), x - params.b_dec, params, clip)
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


class Autoencoded(NamedTuple):
    """What a loss may be made of; gradients flow through all but the integers of the code."""

    x_hat: Tensor
    """Reconstruction [B, d_in]."""
    l1: Tensor
    """Σ_j p_j z_bj, [B]."""
    activity: Tensor
    """Σ_b z_bj, [d_sae]."""
    code: SparseCode
    """The active entries; `val` is z, [nnz]."""


def autoencode(
    x: Tensor,
    params: Parameters,
    *,
    clip: float | None = None,
    feature_weight: Tensor | None = None,
    support: Support | None = None,
) -> Autoencoded:
    """The autoencoder as a differentiable operator, for a loss and an optimizer of one's own.

    z = min(relu((x - b_dec) W_enc + b_enc), clip) and x̂ = z W_dec + b_dec, for x [B, d_in] of any
    float dtype (B >= 1), computed in that of `params`. Exact gradients, first order only, reach
    x, the four parameters and `feature_weight` (p [d_sae], 1 where absent) where they require one;
    they pass where 0 < pre <= clip. For an L1 weighted by the decoder's row lengths, pass
    `feature_weight=params.W_dec.norm(dim=1)`. With a `support` only its entries may be active.
    Works under torch.compile; since the number of active entries is not known beforehand,
    `fullgraph=True` needs `torch._dynamo.config.capture_dynamic_output_shape_ops = True`.
    Raises `UserError` for wrong arguments.
    """
    _check_params(params)
    _check_rows(x, params)
    clip = _check_clip(clip, params)
    if len(x) == 0:
        raise UserError("x has no rows: autoencode needs at least one")
    if feature_weight is not None:
        _check_vector("feature_weight", feature_weight, "d_sae", len(params.b_enc), params.b_enc)
        feature_weight = feature_weight.to(params.b_enc.dtype)
    if support is not None:
        _check_index("support", support, len(x), params)
    x_hat, l1, activity, row_ptr, col, val = torch.ops.sparsemill.autoencode(
        x.to(params.b_dec.dtype), params.W_enc_rows, params.b_enc, params.W_dec, params.b_dec,
        feature_weight, None if support is None else support.row_ptr,
        None if support is None else support.col, clip,
    )  # fmt: skip
    # The operator's val is -clip where pre > clip; there dz is 0 whatever the sign.
    return Autoencoded(x_hat, l1, activity, SparseCode(row_ptr, col, val.abs()))


@torch.library.custom_op("sparsemill::autoencode", mutates_args=())
def _autoencode(
    x: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_weight: Tensor | None,
    support_ptr: Tensor | None,
    support_col: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # No copies here, but a compiler may lay its tensors out anew.
    params = Parameters(*(t.contiguous() for t in (W_enc_rows, b_enc, W_dec, b_dec)))
    x, support = x.contiguous(), None
    if support_ptr is not None and support_col is not None:
        support = _check_support(Support(support_ptr, support_col), len(x), params)
    if feature_weight is not None:
        feature_weight = feature_weight.contiguous()
    compute = reference if _choose("auto", x) == "reference" else native
    x_hat, l1, activity, code = compute.autoencode(x, params, clip, feature_weight, support)
    return x_hat, l1, activity, *code


@_autoencode.register_fake
def _(
    x: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    feature_weight: Tensor | None,
    support_ptr: Tensor | None,
    support_col: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape),
        x.new_empty(len(x)),
        torch.empty_like(b_enc),
        x.new_empty(len(x) + 1, dtype=torch.int64),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(nnz),
    )


@torch.library.custom_op("sparsemill::autoencode_backward", mutates_args=())
def _autoencode_backward(
    grad_x_hat: Tensor | None,
    grad_l1: Tensor | None,
    grad_activity: Tensor | None,
    grad_val: Tensor | None,
    x: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    val: Tensor,
    feature_weight: Tensor | None,
    of_x: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Gradients may come as expanded views, which raw memory must not be read through.
    g_x_hat, g_l1, g_activity, g_val = (
        None if g is None else g.contiguous()
        for g in (grad_x_hat, grad_l1, grad_activity, grad_val)
    )
    if feature_weight is not None:
        feature_weight = feature_weight.contiguous()
    compute = reference if _choose("auto", x) == "reference" else native
    grad_x, grad, grad_feature_weight = compute.autoencode_backward(
        (g_x_hat, g_l1, g_activity, g_val), x.contiguous(),
        Parameters(*(t.contiguous() for t in (W_enc_rows, b_enc, W_dec, b_dec))),
        SparseCode(row_ptr, col, val), feature_weight,
        of_x=of_x, of_weights=of_weights,
    )  # fmt: skip
    return grad_x, grad.W_enc_rows, grad.b_enc, grad.W_dec, grad.b_dec, grad_feature_weight


@_autoencode_backward.register_fake
def _(
    grad_x_hat: Tensor | None,
    grad_l1: Tensor | None,
    grad_activity: Tensor | None,
    grad_val: Tensor | None,
    x: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    val: Tensor,
    feature_weight: Tensor | None,
    of_x: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = (W_enc_rows, b_enc, W_dec, b_dec, b_enc)
    none = (0,)
    return x.new_empty(x.shape if of_x else none), *(
        torch.empty_like(t) if of_weights else t.new_empty(none) for t in like
    )  # type: ignore[return-value]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc_rows, b_enc, W_dec, b_dec, feature_weight = inputs[:6]
    _, _, _, row_ptr, col, val = output
    ctx.mark_non_differentiable(row_ptr, col)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc_rows, b_enc, W_dec, b_dec, row_ptr, col, val, feature_weight)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x_hat, grad_l1, grad_activity, _, _, grad_val = grads
    wanted = ctx.needs_input_grad
    computed = torch.ops.sparsemill.autoencode_backward(
        grad_x_hat, grad_l1, grad_activity, grad_val, *ctx.saved_tensors, wanted[0], any(wanted[1:])
    )
    return *(g if w else None for g, w in zip(computed, wanted, strict=False)), None, None, None


torch.library.register_autograd(
    "sparsemill::autoencode", _backward, setup_context=_save_for_backward
)


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
        self._spaces = native.Spaces()

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
        weight_decay: float = 0.0,
        recon_weight: Tensor | None = None,
        l1_weight: Tensor | None = None,
        feature_weight: Tensor | None = None,
        decoder_norm: Literal["unit", "free"] = "unit",
        train_b_dec: bool = True,
        max_grad_norm: float | None = None,
        support: Support | None = None,
    ) -> StepResult:
        """Lower the loss on x [B, d_in] by one Adam update of `params` and `adam`, in place.

            mean_b w_b ‖x̂_b - x_b‖² + l1 · mean_b s_b Σ_j p_j n_j z_bj

        w is `recon_weight` [B], s is `l1_weight` [B], p is `feature_weight` [d_sae]: not negative, 1
        where absent. A step is exact: the same as dense gradients and torch.optim.AdamW, whose state
        `adam` is. x of any float dtype is converted to that of `params`.

        Args:
            clip: upper bound of z; None for none.
            weight_decay: decoupled, as AdamW's; 0 makes it Adam.
            decoder_norm: "unit" keeps decoder rows at length 1 (their gradient loses its part along
                the row), and n_j = 1; "free" lets them move, and n_j = ‖W_dec,j‖.
            train_b_dec: False leaves b_dec as it is.
            max_grad_norm: bound of the norm of all gradients together, as
                torch.nn.utils.clip_grad_norm_'s. The norm must be known before anything moves, so
                gradients are then computed twice (they are never stored).
            support: the entries that may be active, where something other than the ReLU chooses
                them (TopK, BatchTopK, JumpReLU). The encoder is then computed for these alone.

        Raises:
            UserError: wrong arguments; before anything is changed.
            Diverged: the loss is not finite since a parameter is not; before anything is changed.
        """
        _check_params(params)
        _check_adam(adam, params)
        clip = _check_clip(clip, params)
        _check_numbers(l1=l1, lr=lr, eps=eps, weight_decay=weight_decay)
        _check_betas(beta1=beta1, beta2=beta2)
        if decoder_norm not in ("unit", "free"):
            raise UserError(f"decoder_norm must be unit or free, got {decoder_norm!r}")
        if max_grad_norm is not None:
            _check_number("max_grad_norm", max_grad_norm)
            if not max_grad_norm > 0:
                raise UserError(f"max_grad_norm must be positive, or None, got {max_grad_norm}")
        x = _rows(x, params)
        if len(x) == 0:
            raise UserError("x has no rows: a step needs at least one")
        objective = Objective(
            l1=l1,
            clip=clip,
            recon_weight=_check_weight("recon_weight", recon_weight, "rows", len(x), x),
            l1_weight=_check_weight("l1_weight", l1_weight, "rows", len(x), x),
            feature_weight=_check_weight(
                "feature_weight", feature_weight, "d_sae", len(params.b_enc), x
            ),
            decoder_norm=decoder_norm,
        )
        update = Update(lr, beta1, beta2, eps, weight_decay, max_grad_norm, train_b_dec)
        if support is not None:
            _check_index("support", support, len(x), params)
            support = _check_support(support, len(x), params)
        if _choose(self._backend, x) == "reference":
            return reference.step(params, adam, x, objective, update, support)
        result = native.step(self._spaces, params, adam, x, objective, update, support)
        # Autograd cannot see kernels write: so a backward through the old values is refused.
        for group in (params, adam.m, adam.v):
            torch.autograd.graph.increment_version(group.tensors().values())
        return result


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
    _check_rows(x, params)
    return x.detach().to(params.b_dec.dtype).contiguous()


def _check_rows(x: Tensor, params: Parameters) -> None:
    d_in = len(params.b_dec)
    if not isinstance(x, Tensor):
        raise UserError(f"x must be a torch tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] != d_in:
        raise UserError(f"x must be [rows, {d_in}], got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"x must be floating point, got {x.dtype}: convert it with x.float()")
    if x.device != params.b_dec.device:
        raise UserError(f"x is on {x.device} but the parameters are on {params.b_dec.device}")


def _check_vector(name: str, vector: Tensor, axis: str, length: int, like: Tensor) -> None:
    """A floating-point vector of this length on the same device."""
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        found = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise UserError(f"{name} must be a floating-point tensor, got {found}: convert it")
    if vector.shape != (length,):
        raise UserError(f"{name} must be [{axis} = {length}], got shape {list(vector.shape)}")
    if vector.device != like.device:
        raise UserError(f"{name} is on {vector.device}, but the parameters are on {like.device}")


def _check_weight(
    name: str, weight: Tensor | None, axis: str, length: int, like: Tensor
) -> Tensor | None:
    """A weight of the objective, converted like x itself, not negative and finite."""
    if weight is None:
        return None
    _check_vector(name, weight, axis, length, like)
    weight = weight.detach().to(like.dtype).contiguous()
    wrong = ~((weight >= 0) & (weight < math.inf))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise UserError(
            f"{name} must be 0 or more and finite everywhere, but {name}[{at}] is {weight[at]:g}"
        )
    return weight


def _check_clip(clip: float | None, params: Parameters) -> float | None:
    """The clip as the parameters' dtype has it; None where it is beyond all numbers of that."""
    if clip is None:
        return None
    _check_number("clip", clip)
    dtype = params.b_dec.dtype
    if clip > torch.finfo(dtype).max:
        return None
    rounded = torch.tensor(clip, dtype=torch.float64).to(dtype).item()
    if not rounded > 0:
        raise UserError(f"clip must be positive in {dtype}, or None for no bound, got {clip}")
    return float(rounded)


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number, got {type(value).__name__}")


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        _check_number(name, value)
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be 0 or more and finite, got {value}")


def _check_betas(**betas: float) -> None:
    for name, value in betas.items():
        _check_number(name, value)
        if not 0 <= value < 1:
            raise UserError(f"{name} must lie in [0, 1), got {value}")


def _check_index(name: str, index: Support | SparseCode, rows: int, params: Parameters) -> None:
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


def _check_places(name: str, index: Support | SparseCode, params: Parameters) -> None:
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


def _check_support(support: Support, rows: int, params: Parameters) -> Support:
    """A support whose entries all lie inside."""
    _check_places("support", support, params)
    return Support(*(t.contiguous() for t in support))


def _check_code(code: SparseCode, params: Parameters) -> SparseCode:
    """A code whose entries all lie inside."""
    row_ptr, col, val = code
    if not val.is_floating_point() or val.shape != col.shape or val.device != col.device:
        raise UserError(
            f"code.val must be floating point [{len(col)}] on {col.device}, like code.col, got "
            f"{val.dtype} {list(val.shape)} on {val.device}"
        )
    _check_index("code", code, max(len(row_ptr) - 1, 0), params)
    _check_places("code", code, params)
    return SparseCode(
        row_ptr.contiguous(), col.contiguous(), val.detach().to(params.b_dec.dtype).contiguous()
    )


__all__ = [
    "AdamState",
    "Autoencoded",
    "Backend",
    "Parameters",
    "SparseCode",
    "Step",
    "StepResult",
    "Support",
    "autoencode",
    "decode",
    "describe",
    "encode",
    "implementation",
]
