"""The steps that are timed: ours, and the strongest dense ones in plain PyTorch.

A contender queues a step and returns; its loss is waited for when asked for. Dense steps in bfloat16 are
what mixed precision is in PyTorch: autocast products over float32 weights. tf32 is set from outside
(`timing.products`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu.sizes import weights
from benchmarks.step.dense import loss_expression
from benchmarks.step.measure import SETTINGS
from benchmarks.step.problem import Start
from sae_ext import step_cuda
from sae_ext.ops import Step
from sae_ext.step_cuda import Precision

OURS, OURS_CAPTURED = "ours", "ours captured"
EAGER, COMPILED, COMPILED_CAPTURED = "dense eager", "dense compiled", "dense compiled captured"
OWN = (OURS, OURS_CAPTURED)
DENSE = (EAGER, COMPILED, COMPILED_CAPTURED)

# A graph for each shape and precision; beyond its own limit PyTorch would go on uncompiled and say little.
torch._dynamo.config.recompile_limit = 64


class Contender(Protocol):
    """Weights with an optimizer, and the step that moves them."""

    warm_ups: int
    """Steps until all is compiled, recorded and allocated."""

    def __call__(self, x: Tensor) -> None:
        """Queue one step on x [B, d_in]."""

    def loss(self) -> float:
        """The last step's loss, waited for."""


def own_step(device: torch.device, precision: Precision, *, capture: bool = False) -> Step:
    """Ours; on the CPU, whose only precision stands for all, in a trial."""
    if device.type != "cuda":
        return Step()
    return Step("cuda", precision=precision, capture=capture)


class Ours:
    """`Step`."""

    warm_ups = 8  # two graphs are recorded, each when it comes again; arrays find their length

    def __init__(
        self, start: Start, l0: float, precision: Precision, *, capture: bool = False
    ) -> None:
        self._params, self._adam = weights(start, l0)
        self._step = own_step(start.x.device, precision, capture=capture)
        self._seen: Any = None

    def __call__(self, x: Tensor) -> None:
        """Queue one step."""
        s = SETTINGS
        self._seen = self._step(
            self._params, self._adam, x, l1=s.l1, lr=s.lr, eps=s.eps, clip=s.clip
        )

    def loss(self) -> float:
        """The last step's."""
        return float(self._seen.loss)

    def nnz(self) -> int:
        """Active entries of the last step, waited for."""
        return int(self._seen.nnz)


class _Dense:
    """Weights, PyTorch's fused Adam, and the decoder's rows of length 1."""

    warm_ups = 3

    def __init__(self, start: Start, l0: float, precision: Precision) -> None:
        self._params, adam = weights(start, l0)
        self._bf16 = precision == "bfloat16"
        tensors = list(self._params.tensors().values())
        for tensor in tensors:
            tensor.requires_grad_()
        self._optimizer = torch.optim.Adam(
            tensors, lr=SETTINGS.lr, eps=SETTINGS.eps, fused=True, capturable=start.x.is_cuda
        )
        adam.give_to(self._optimizer, self._params)
        self._loss: Tensor | None = None

    def loss(self) -> float:
        """The last step's."""
        assert self._loss is not None
        return self._loss.item()


class Eager(_Dense):
    """What most people write: a loss, autograd, and the three lines that keep rows at length 1."""

    def __call__(self, x: Tensor) -> None:
        """Queue one step."""
        params = self._params
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bf16):
            loss = loss_expression(x, *params.tensors().values(), SETTINGS.l1, SETTINGS.clip)
        loss.backward()
        with torch.no_grad():
            grad = params.W_dec.grad
            assert grad is not None
            grad -= (grad * params.W_dec).sum(1, keepdim=True) * params.W_dec
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            params.W_dec /= params.W_dec.norm(dim=1, keepdim=True)
        self._loss = loss.detach()


class Compiled(_Dense):
    """The same with the gradients and their projection as one compiled expression."""

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        """Queue one step."""
        tensors = list(self._params.tensors().values())
        self._loss, *gradient = _compiled_gradients(
            x, *tensors, SETTINGS.l1, SETTINGS.clip, self._bf16
        )
        for tensor, grad in zip(tensors, gradient, strict=True):
            tensor.grad = grad
        self._optimizer.step()
        self._optimizer.zero_grad()
        _compiled_renormalise(self._params.W_dec)


def _gradients(
    x: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1: float,
    clip: float,
    bf16: bool,
) -> tuple[Tensor, ...]:
    """The loss and its gradients for the four tensors, the decoder's without its part along each row."""
    xc = x - b_dec
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        pre = xc @ W_enc_rows.T + b_enc
        z = pre.clamp(0.0, clip)
        error = z @ W_dec - xc
        g = error * (2 / len(x))
        dz = torch.where((pre > 0) & (pre <= clip), g @ W_dec.T + l1 / len(x), 0.0)
        dW_enc, dW_dec = (dz.T @ xc).float(), (z.T @ g).float()
    loss = (error.square().sum() + l1 * z.sum()) / len(x)
    d_b_enc = dz.sum(0, dtype=torch.float32)
    dW_dec = dW_dec - (dW_dec * W_dec).sum(1, keepdim=True) * W_dec
    return loss, dW_enc, d_b_enc, dW_dec, g.sum(0) - d_b_enc @ W_enc_rows


def _renormalise(W_dec: Tensor) -> None:
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))


_compiled_gradients = torch.compile(_gradients, dynamic=False)
_compiled_renormalise = torch.compile(_renormalise, dynamic=False)


class CompiledCaptured:
    """The compiled step as one CUDA graph, so that small steps do not wait for Python."""

    warm_ups = 3

    def __init__(self, start: Start, l0: float, precision: Precision) -> None:
        self._step = Compiled(start, l0, precision)
        self._x = start.x[0].clone()
        before = torch.cuda.Stream()
        before.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(before):
            for _ in range(self._step.warm_ups):
                self._step(self._x)
        torch.cuda.current_stream().wait_stream(before)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step(self._x)

    def __call__(self, x: Tensor) -> None:
        """Queue one step."""
        self._x.copy_(x)
        self._graph.replay()

    def loss(self) -> float:
        """The last step's."""
        return self._step.loss()


Builder = Callable[[Start, float, Precision], Contender]

BUILDERS: Mapping[str, Builder] = {
    OURS: Ours,
    OURS_CAPTURED: lambda start, l0, precision: Ours(start, l0, precision, capture=True),
    EAGER: Eager,
    COMPILED: Compiled,
    COMPILED_CAPTURED: CompiledCaptured,
}


@contextlib.contextmanager
def constants(**values: Any) -> Iterator[None]:
    """Other values of constants of `step_cuda`, by name, for a while."""
    before = {name: getattr(step_cuda, name) for name in values}
    for name, value in values.items():
        setattr(step_cuda, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(step_cuda, name, value)


def limits(below: float, above: float) -> dict[str, Any]:
    """Constants under which steps list entries below a density and are dense again above another."""
    precisions = step_cuda._SPARSE_BELOW
    return {
        "_SPARSE_BELOW": dict.fromkeys(precisions, below),
        "_DENSE_ABOVE": dict.fromkeys(precisions, above),
    }


WAYS = {"entries": limits(2.0, 2.0), "dense": limits(-1.0, -1.0)}
"""Constants under which all steps take one way."""
