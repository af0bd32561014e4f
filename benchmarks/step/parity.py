"""Whether every contender of the step benchmark computes what it should, before it is timed.

One step on the first batch against `sae_ext.reference` in float64 from the same start. Contenders
of our own must report its loss and change the weights as it does; peers must report its loss, at
this start, where the decoder has unit norm, the same for all conventions. (That 20 steps of ours
are 20 steps of the peers is shown by tests/external/test_step_parity.py.)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.step.problem import Settings, Start
from sae_ext import reference
from sae_ext.errors import UserError
from sae_ext.parameters import AdamState, Objective, Parameters, Update

SETTINGS = Settings(l1=1.0, lr=1e-3, eps=1e-3, clip=2.0)
"""eps is near the size of the gradients: Adam then divides by no number that is all rounding."""

LOSS_ERROR = 1e-5
"""Relative. Sums of a million float32 terms agree to 1e-6."""

CHANGE_ERROR = 1e-2
"""Relative, in norm, for each tensor. An entry whose pre-activation is 0 to within rounding may be
active in float32 alone, and brings its whole gradient. With half of all entries active that is one in
a million, an error of 2e-3; a wrong formula is off by far more than the bound."""


class Oracle:
    """What the reference makes of the first batch, in float64."""

    def __init__(self, start: Start, l0: float) -> None:
        self._x = start.x[0].double()
        self._l0 = l0
        self._begin = Parameters(
            *(t.double() for t in (start.W_enc_rows, start.b_enc(l0), start.W_dec, start.b_dec))
        )

    def check_step(self, name: str, loss: float | None, weights: Path, *, free: bool) -> None:
        """Raise `UserError` unless a contender of our own took the reference's step.

        Args:
            weights: the file with its weights after the step.
            free: whether it has the free decoder and the clipped gradient.
        """
        s = SETTINGS
        params = Parameters(**{k: t.clone() for k, t in self._begin.tensors().items()})
        seen = reference.step(
            params,
            AdamState.zeros(params),
            self._x,
            Objective(l1=s.l1, clip=s.clip, decoder_norm="free" if free else "unit"),
            Update(lr=s.lr, eps=s.eps, max_grad_norm=1.0 if free else None),
        )
        _check(name, "loss", loss, seen.loss, LOSS_ERROR)
        found = load_file(weights)
        for key, begin in self._begin.tensors().items():
            expected = params.tensors()[key] - begin
            error = torch.dist(found[key] - begin, expected) / expected.norm()
            if not error <= CHANGE_ERROR:
                raise UserError(f"{name}: the change of {key} is off by {error:.2g} of its norm")

    @torch.no_grad()
    def check_peer(self, name: str, loss: float | None) -> None:
        """Raise `UserError` unless a peer's loss is ours without a clip."""
        expected = reference.loss(self._x, self._begin, Objective(l1=SETTINGS.l1)).item()
        _check(name, "loss", loss, expected, LOSS_ERROR)

    @torch.no_grad()
    def check_topk(self, name: str, fvu: float | None) -> None:
        """Raise `UserError` unless a TopK peer explains as much variance as it should."""
        p = self._begin
        pre = (self._x - p.b_dec) @ p.W_enc + p.b_enc
        value, column = pre.relu().topk(round(self._l0), dim=1)
        z = torch.zeros_like(pre).scatter_(1, column, value)
        error = z @ p.W_dec + p.b_dec - self._x
        expected = (error.square().sum() / _spread(self._x)).item()
        _check(name, "fraction of variance unexplained", fvu, expected, LOSS_ERROR)


def _spread(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()


def _check(name: str, what: str, found: float | None, expected: float, limit: float) -> None:
    if found is None or not math.isclose(found, expected, rel_tol=limit):
        raise UserError(f"{name}: {what} is {found}, the reference's is {expected}")
