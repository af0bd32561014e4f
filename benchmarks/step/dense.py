"""The strongest dense training steps we know how to write in plain PyTorch, to be measured against.

Five products of [B, d_sae] matrices are the least a dense step needs: encoder, decoder, and one for
the gradients of z, W_dec and W_enc each; b_dec's gradient is a matrix-vector product. `WrittenOut`
does these and little else, `Compiled` lets inductor fuse what lies between them, `Autograd` is what
most people write. All end with the same projection, fused Adam and renormalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from benchmarks.step.problem import Settings
from sae_ext.parameters import AdamState, Parameters

_hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input


class _Dense:
    """What all have in common: the weights, and the update that gradients are followed by."""

    def __init__(self, params: Parameters, adam: AdamState, settings: Settings) -> None:
        self.params, self.adam, self.settings = params, adam, settings

    def parameters(self) -> dict[str, Tensor]:
        """The weights by name."""
        return self.params.tensors()

    def _update(self, gradient: Parameters) -> None:
        """Projection, Adam, rows of length 1; `gradient` is used up."""
        W_dec = self.params.W_dec
        along = torch.linalg.vecdot(gradient.W_dec, W_dec)
        gradient.W_dec.addcmul_(along[:, None], W_dec, value=-1)
        self.adam.step += 1
        groups = [
            list(group.tensors().values())
            for group in (self.params, gradient, self.adam.m, self.adam.v)
        ]
        torch._fused_adam_(
            *groups, [], [torch.tensor(float(self.adam.step))] * 4,
            lr=self.settings.lr, beta1=0.9, beta2=0.999, eps=self.settings.eps,
            weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))


class WrittenOut(_Dense):
    """Gradients by hand in buffers that stay, the batch whole or a chunk of rows at a time."""

    def __init__(
        self, params: Parameters, adam: AdamState, settings: Settings, chunk: int | None = None
    ) -> None:
        super().__init__(params, adam, settings)
        self._chunk = chunk
        self._buffers: tuple[Tensor, ...] = ()  # made by the first step: they are its memory
        self._gradient: Parameters | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[float, None]:
        """One step on x [B, d_in]; returns the loss."""
        p, s, rows = self.params, self.settings, len(x)
        chunk = min(rows, self._chunk or rows)
        if self._gradient is None:
            d_sae, d_in = p.W_dec.shape
            sizes = ((chunk, d_sae), (chunk, d_sae), (chunk, d_in), (chunk, d_in))
            self._buffers = tuple(torch.empty(size) for size in sizes)
            self._gradient = p.zeros_like()
        gradient = self._gradient
        penalty = torch.tensor([s.l1 / rows])
        squared_error = size = 0.0
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            z, dz, xc, g = (buffer[: len(x[part])] for buffer in self._buffers)
            beta = 0 if start == 0 else 1
            torch.sub(x[part], p.b_dec, out=xc)
            torch.addmm(p.b_enc, xc, p.W_enc, out=z)
            torch.nn.functional.hardtanh_(z, 0.0, s.clip)
            torch.addmm(xc, z, p.W_dec, beta=-1, out=g)
            squared_error += g.square().sum().item()
            size += z.sum().item()
            g *= 2 / rows
            gradient.W_dec.addmm_(z.T, g, beta=beta)
            torch.addmm(penalty, g, p.W_dec.T, out=dz)
            _hardtanh_backward(dz, z, 0.0, s.clip, grad_input=dz)
            gradient.W_enc_rows.addmm_(dz.T, xc, beta=beta)
            gradient.b_enc.mul_(beta).add_(dz.sum(0))
            gradient.b_dec.mul_(beta).add_(g.sum(0))
        gradient.b_dec.addmv_(p.W_enc, gradient.b_enc, alpha=-1)
        self._update(gradient)
        return (squared_error + s.l1 * size) / rows, None


class Compiled(_Dense):
    """The same gradients as one expression, fused by torch.compile."""

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[float, None]:
        """One step on x [B, d_in]; returns the loss."""
        loss, *gradient = _compiled_gradients(
            x, *self.params.tensors().values(), self.settings.l1, self.settings.clip
        )
        self._update(Parameters(*gradient))
        return loss.item(), None


class Autograd(_Dense):
    """The loss as an expression, its gradients from autograd; eager, or through torch.compile."""

    def __init__(
        self,
        params: Parameters,
        adam: AdamState,
        settings: Settings,
        loss: Callable[..., Tensor],
    ) -> None:
        super().__init__(params, adam, settings)
        self._loss = loss
        for tensor in params.tensors().values():
            tensor.requires_grad_()

    def __call__(self, x: Tensor) -> tuple[float, None]:
        """One step on x [B, d_in]; returns the loss."""
        weights = self.params.tensors()
        loss = self._loss(x, *weights.values(), self.settings.l1, self.settings.clip)
        loss.backward()
        with torch.no_grad():
            self._update(Parameters(**{name: t.grad for name, t in weights.items()}))
        for tensor in weights.values():
            tensor.grad = None
        return loss.item(), None


def loss_expression(
    x: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1: float,
    clip: float,
) -> Tensor:
    """mean_b ‖x̂_b - x_b‖² + l1 mean_b Σ_j z_bj"""
    z = hardtanh(torch.addmm(b_enc, x - b_dec, W_enc_rows.T), 0.0, clip)
    error = torch.addmm(b_dec, z, W_dec) - x
    return (error.square().sum() + l1 * z.sum()) / len(x)


def _gradients(
    x: Tensor,
    W_enc_rows: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1: float,
    clip: float,
) -> tuple[Tensor, ...]:
    """The loss and its gradients for the four tensors, in this order."""
    xc = x - b_dec
    pre = xc @ W_enc_rows.T + b_enc
    z = pre.clamp(0.0, clip)
    error = z @ W_dec - xc
    loss = (error.square().sum() + l1 * z.sum()) / len(x)
    g = error * (2 / len(x))
    dz = torch.where((pre > 0) & (pre <= clip), g @ W_dec.T + l1 / len(x), 0.0)
    d_b_enc = dz.sum(0)
    return loss, dz.T @ xc, d_b_enc, z.T @ g, g.sum(0) - d_b_enc @ W_enc_rows


_compiled_gradients = torch.compile(_gradients, dynamic=False)
compiled_loss = torch.compile(loss_expression, dynamic=False)
