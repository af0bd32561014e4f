"""The child process with our step, the dense ones and the floor: see `benchmarks.step.process`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.step import dense
from benchmarks.step.problem import Settings, Start
from benchmarks.step.process import Builder, Contender, serve
from sae_ext.ops import Step
from sae_ext.parameters import AdamState, Parameters

CHUNK_BYTES = (
    32 << 20
)  # of one [rows, d_sae] buffer: of 4 to 64 MB the least that is as fast as any


class _Ours:
    """`Step`, with the unit-norm decoder or with the free one and a clipped gradient."""

    def __init__(self, start: Start, l0: float, settings: Settings, *, free: bool) -> None:
        self.params, self.adam = _weights(start, l0)
        self._step = Step()
        self._settings = settings
        self._semantics = {"decoder_norm": "free", "max_grad_norm": 1.0} if free else {}

    def __call__(self, x: Tensor) -> tuple[float, int]:
        s = self._settings
        seen = self._step(
            self.params, self.adam, x, l1=s.l1, lr=s.lr, eps=s.eps, clip=s.clip, **self._semantics
        )
        return seen.loss, seen.nnz

    def parameters(self) -> dict[str, Tensor]:
        return self.params.tensors()


class _EncoderProduct:
    """The one dense product that is left: x W_enc in float32."""

    def __init__(self, start: Start, l0: float, settings: Settings) -> None:
        self._W_enc_rows = start.W_enc_rows
        self._pre = torch.empty(start.shape.rows, start.shape.d_sae)

    def __call__(self, x: Tensor) -> tuple[None, None]:
        torch.mm(x, self._W_enc_rows.T, out=self._pre)
        return None, None

    def parameters(self) -> dict[str, Tensor]:
        return {"W_enc_rows": self._W_enc_rows}


class _AdamTraffic:
    """Weights and moments read and written once, as any Adam must."""

    def __init__(self, start: Start, l0: float, settings: Settings) -> None:
        self._params, adam = _weights(start, l0)
        groups = (self._params, adam.m, adam.v)
        self._tensors = [t for group in groups for t in group.tensors().values()]

    def __call__(self, x: Tensor) -> tuple[None, None]:
        torch._foreach_add_(self._tensors, 0.0)
        return None, None

    def parameters(self) -> dict[str, Tensor]:
        return self._params.tensors()


def _weights(start: Start, l0: float) -> tuple[Parameters, AdamState]:
    params = Parameters(
        start.W_enc_rows.clone(), start.b_enc(l0), start.W_dec.clone(), start.b_dec.clone()
    )
    return params, AdamState.zeros(params)


def _whole(start: Start, l0: float, settings: Settings) -> Contender:
    return dense.WrittenOut(*_weights(start, l0), settings)


def _chunked(start: Start, l0: float, settings: Settings) -> Contender:
    chunk = CHUNK_BYTES // (4 * start.shape.d_sae)
    return dense.WrittenOut(*_weights(start, l0), settings, chunk)


def _compiled(start: Start, l0: float, settings: Settings) -> Contender:
    return dense.Compiled(*_weights(start, l0), settings)


def _autograd(start: Start, l0: float, settings: Settings) -> Contender:
    return dense.Autograd(*_weights(start, l0), settings, dense.loss_expression)


def _compiled_autograd(start: Start, l0: float, settings: Settings) -> Contender:
    return dense.Autograd(*_weights(start, l0), settings, dense.compiled_loss)


BUILDERS: dict[str, Builder] = {
    "ours": partial(_Ours, free=False),
    "ours free": partial(_Ours, free=True),
    "dense whole": _whole,
    "dense chunked": _chunked,
    "dense compiled": _compiled,
    "autograd": _autograd,
    "autograd compiled": _compiled_autograd,
    "encoder product": _EncoderProduct,
    "Adam traffic": _AdamTraffic,
}

if __name__ == "__main__":
    serve(BUILDERS)
