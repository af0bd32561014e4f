"""The kernels' Python face: encode, decode and training, on whatever this machine offers.

    code = encode(x, params)                              # active features of each row, sparse

    step = Step()                                         # holds the workspaces; reuse it
    result = step(params, adam, x, l1=10.0, lr=1e-3)      # updates params and adam in place

    out = autoencode(x, params)                           # differentiable, for any loss and optimizer
    loss = (out.x_hat - x).square().sum(1).mean() + 10.0 * out.l1.mean()

The compiled code (csrc/) never forms a [B, d_sae] tensor once the SAE is sparse. Where it is missing,
or was built without what the tensors' device needs, `sae_ext.reference` computes the same numbers,
slower. The contract is in docs/kernels.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext import arguments, coding, native, reference, step_cpu, step_cuda
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

Backend = Literal["auto", "cpu", "cuda", "reference"]


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
    capability, memory_bytes), `driver_version`, `runtime_version` and the `reason` why tensors on a
    GPU would run on the reference, None where they need not.
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
    arguments.check_params(params)
    x = arguments.rows_of(x, params)
    clip = arguments.check_clip(clip, params)
    if len(x) == 0 or _choose("auto", x) == "reference":
        return reference.encode(x, params, clip)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        code, _ = coding.encode(native.Workspace(x.device), x - params.b_dec, params, clip)
    return SparseCode(code.row_ptr, code.col.clone(), code.val.abs())


@torch.no_grad()
def decode(code: SparseCode, params: Parameters) -> Tensor:
    """Reconstruction [B, d_in] of a code: x̂ = z W_dec + b_dec.

    Raises `UserError` for a code whose arrays do not fit together or point outside.
    """
    arguments.check_params(params)
    code = arguments.check_code(code, params)
    if len(code.row_ptr) == 1 or _choose("auto", code.val) == "reference":
        return reference.decode(code, params)
    with torch.cuda.device_of(code.val):  # type: ignore[no-untyped-call]
        return coding.decode(code, params)


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
    arguments.check_params(params)
    arguments.check_rows(x, params)
    clip = arguments.check_clip(clip, params)
    if len(x) == 0:
        raise UserError("x has no rows: autoencode needs at least one")
    if feature_weight is not None:
        arguments.check_vector(
            "feature_weight", feature_weight, "d_sae", len(params.b_enc), params.b_enc
        )
        feature_weight = feature_weight.to(params.b_enc.dtype)
    if support is not None:
        arguments.check_index("support", support, len(x), params)
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
        support = arguments.check_support(Support(support_ptr, support_col), params)
    if feature_weight is not None:
        feature_weight = feature_weight.contiguous()
    compute = reference if _choose("auto", x) == "reference" else coding
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
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
    compute = reference if _choose("auto", x) == "reference" else coding
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
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


_FRESH = {"sparse": False, "densities": []}
"""The state of a Step on a GPU before its first step."""


class Step:
    """One fused training step; keeps its workspaces between calls, so hold on to one instance.

    Threads follow `torch.get_num_threads()`. Not to be called from two threads at once.

    On a GPU a call queues the step and returns; what it returns has the fields of a `StepResult` (but is no
    tuple) and waits for the step when one is first looked at. With a `group` each call waits itself.
    Now and then a step finds its arrays too short; then it, and steps queued after it, change nothing at
    first and are done again later. So the parameters are only those after the last step once its result
    was looked at, or `wait` was called: do that before you save or change them, or hand them to another
    Step.

    Args:
        backend: "auto" takes the compiled kernels where they are built for the tensors' device; "cpu"
            and "cuda" insist on them; "reference" is plain PyTorch.
        precision: of matrix products and gathers on a GPU; weights, moments and sums keep the
            parameters' own. "float32" is true float32; "tf32" rounds what goes into products;
            "bfloat16" rounds that and what is gathered, and keeps a copy of the weights so (which does
            not notice writes through `.data`: change weights in place by other means). While a step is
            queued, torch's own setting for float32 products is changed, in all threads.
        capture: on a GPU, record the step as a CUDA graph and replay it: for small steps, whose kernels
            take less time than queueing them.
    """

    def __init__(
        self,
        backend: Backend = "auto",
        *,
        precision: step_cuda.Precision = "float32",
        capture: bool = False,
    ) -> None:
        if backend not in ("auto", "cpu", "cuda", "reference"):
            raise UserError(f"backend must be auto, cpu, cuda or reference, got {backend!r}")
        if precision not in ("float32", "tf32", "bfloat16"):
            raise UserError(f"precision must be float32, tf32 or bfloat16, got {precision!r}")
        if backend == "cpu" and native.MISSING is not None:
            raise UserError(
                f"backend 'cpu' is not built ({native.MISSING}): install a C++ compiler and run "
                "`make setup`, or use backend 'auto'"
            )
        if backend == "cuda" and (missing := native.cuda_missing()) is not None:
            raise UserError(f"backend 'cuda' cannot be used: {missing}; or use backend 'auto'")
        self._backend, self._precision, self._capture = backend, precision, capture
        self._spaces = native.Spaces()
        self._queue: step_cuda.Queue | None = None
        self._restored: dict[str, Any] = {}

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
        group: dist.ProcessGroup | None = None,
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
                torch.nn.utils.clip_grad_norm_'s. The norm must be known before anything moves: on the
                CPU gradients are then stored, on a GPU computed twice.
            support: the entries that may be active, where something other than the ReLU chooses
                them (TopK, BatchTopK, JumpReLU). The encoder is then computed for these alone.
            group: a torch.distributed process group whose members train one autoencoder, each with
                rows of its own: gradients are summed over all rows of all members (as tensors,
                which costs their memory), so parameters that are equal stay equal. What is returned
                is of all rows too.

        Raises:
            UserError: wrong arguments; before anything is changed.
            Diverged: the loss is not finite since a parameter is not; before anything is changed. On
                a GPU either may be raised by a later call, by a look at the result, or by `wait`.
        """
        arguments.check_params(params)
        arguments.check_adam(adam, params)
        clip = arguments.check_clip(clip, params)
        arguments.check_numbers(l1=l1, lr=lr, eps=eps, weight_decay=weight_decay)
        arguments.check_betas(beta1=beta1, beta2=beta2)
        if decoder_norm not in ("unit", "free"):
            raise UserError(f"decoder_norm must be unit or free, got {decoder_norm!r}")
        if max_grad_norm is not None:
            arguments.check_number("max_grad_norm", max_grad_norm)
            if not max_grad_norm > 0:
                raise UserError(f"max_grad_norm must be positive, or None, got {max_grad_norm}")
        x = arguments.rows_of(x, params)
        if len(x) == 0:
            raise UserError("x has no rows: a step needs at least one")
        objective = Objective(
            l1=l1,
            clip=clip,
            recon_weight=arguments.weight_of("recon_weight", recon_weight, "rows", len(x), x),
            l1_weight=arguments.weight_of("l1_weight", l1_weight, "rows", len(x), x),
            feature_weight=arguments.weight_of(
                "feature_weight", feature_weight, "d_sae", len(params.b_enc), x
            ),
            decoder_norm=decoder_norm,
        )
        update = Update(lr, beta1, beta2, eps, weight_decay, max_grad_norm, train_b_dec)
        if support is not None:
            arguments.check_index("support", support, len(x), params)

        def check(objective: Objective, support: Support | None) -> None:
            for name in ("recon_weight", "l1_weight", "feature_weight"):
                arguments.check_weight_values(name, getattr(objective, name))
            if support is not None:
                arguments.check_places("support", support, params)

        chosen = _choose(self._backend, x)
        if chosen != "cuda":
            check(objective, support)
        if support is not None:
            support = Support(*(t.contiguous() for t in support))
        if chosen == "cuda":
            return self._queued(params, adam, x, objective, update, support, group, check)
        if self._precision != "float32":
            raise UserError(
                f"precision {self._precision!r} needs the kernels on a GPU, but x is on {x.device} and runs "
                f"on {chosen}: use precision 'float32'"
            )
        if chosen == "reference":
            return reference.step(params, adam, x, objective, update, support, group)
        result = step_cpu.step(self._spaces, params, adam, x, objective, update, support, group)
        # Autograd cannot see kernels write: so a backward through the old values is refused.
        for tensors in (params, adam.m, adam.v):
            torch.autograd.graph.increment_version(tensors.tensors().values())
        return result

    def wait(self) -> None:
        """Until all steps queued on a GPU have run, and run to their end."""
        if self._queue is not None:
            self._queue.wait()

    def state(self) -> dict[str, Any]:
        """What a resumed run must `restore` to go on bitwise as this one would.

        On a GPU `sparse`, which way the last step went, and `densities`, shares of active entries in
        the last two steps; waits for all steps queued. Empty on the CPU, where nothing is needed.
        """
        return dict(self._restored) if self._queue is None else self._queue.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken; raises `UserError` for anything else."""
        if state and state.keys() != {"sparse", "densities"}:
            raise UserError(
                f"a Step's state holds 'sparse' and 'densities', got {sorted(state)}: pass what state() returned"
            )
        self._restored = dict(state)
        if self._queue is not None:
            self._queue.restore(state or _FRESH)

    def _queued(
        self,
        params: Parameters,
        adam: AdamState,
        x: Tensor,
        objective: Objective,
        update: Update,
        support: Support | None,
        group: dist.ProcessGroup | None,
        check: Callable[[Objective, Support | None], None],
    ) -> StepResult:
        if self._precision != "float32" and x.dtype != torch.float32:
            raise UserError(
                f"precision {self._precision!r} is for parameters in float32, got {x.dtype}: "
                "convert them, or use precision 'float32'"
            )
        if self._queue is not None and self._queue.device != x.device:
            self._queue.wait()
            self._queue = None
        if self._queue is None:
            self._queue = step_cuda.Queue(x.device, self._precision, capture=self._capture)
            self._queue.restore(self._restored or _FRESH)
            self._restored = {}
        queued = self._queue.step(params, adam, x, objective, update, support, group, check)
        return cast(StepResult, queued)


def _choose(backend: Backend, x: Tensor) -> str:
    """ "cpu", "cuda" or "reference"."""
    kind = x.device.type
    if backend in ("cpu", "cuda") and kind != backend:
        raise UserError(
            f"x is on {x.device}, which backend {backend!r} cannot read: use backend 'auto'"
        )
    if kind == "cuda" and backend != "reference":
        missing = native.cuda_missing(x.device)
        if missing is not None and backend == "cuda":
            raise UserError(f"backend 'cuda' cannot be used on {x.device}: {missing}")
        return "cuda" if missing is None else "reference"
    if backend == "reference" or kind != "cpu":
        return "reference"
    return "reference" if implementation() == "reference" else "cpu"


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
