"""Whether ours computes what it should on this device: one step, and a training of 200 steps.

One step is compared with the reference in float64 at exactly the same numbers: everything that rounding
to bfloat16 could change is a bfloat16 already, and no feature has a bias, so that no rounding of a
pre-activation changes its sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.gpu.contenders import WAYS, constants, limits, own_step
from benchmarks.gpu.sizes import PRECISIONS
from benchmarks.gpu.timing import products
from benchmarks.records import Bar
from benchmarks.step.problem import Shape
from sae_ext import reference
from sae_ext.parameters import AdamState, Objective, Parameters, Update

SHAPES = (Shape(768, 1536, 300), Shape(100, 257, 37), Shape(33, 70, 5), Shape(2050, 300, 40))
"""In 16-byte pieces and not, more and fewer features than a block has threads."""

L1, LR, EPS = 0.5, 1e-3, 1e-3
"""eps is near the size of the gradients: Adam then divides by no number that is all rounding."""

STEP_ERROR = {"bfloat16": 5e-2, "tf32": 5e-3, "float32": 1e-4}
"""Relative, in norm, of each tensor's change."""

LOSS_ERROR = {"bfloat16": 1e-3, "tf32": 1e-4, "float32": 1e-5}
"""Relative. Errors of a hundred rows average out."""

CURVE_STEPS = 200
CURVE_ERROR = {"bfloat16": 2e-2, "tf32": 5e-3, "float32": 2e-3}
"""Relative, of the loss at any step. The curves part slowly: Adam's first steps are the signs of
gradients, and rounding turns some that are nearly 0."""


def steps(device: torch.device, failures: list[str]) -> None:
    """One step both ways in each precision, at several shapes; what is off is added to `failures`."""
    for shape in SHAPES:
        begin, x = _exact(shape, device)
        expected = _moved(begin, torch.float64)
        seen = reference.step(
            expected, AdamState.zeros(expected), x.double(), Objective(l1=L1), Update(LR, eps=EPS)
        )  # fmt: skip
        for precision in PRECISIONS:
            for way, values in WAYS.items():
                params = _moved(begin, torch.float32)
                with constants(**values):
                    step = own_step(device, precision)
                    step.restore({"sparse": way == "entries", "densities": []})
                    result = step(params, AdamState.zeros(params), x, l1=L1, lr=LR, eps=EPS)
                    loss, nnz = result.loss, result.nnz
                where = f"{shape}, {precision}, by {way}"
                if not abs(loss / seen.loss - 1) <= LOSS_ERROR[precision]:
                    failures.append(f"{where}: loss {loss:.7g}, the reference's is {seen.loss:.7g}")
                # Where a sum of products is all but 0 its sign is its order's.
                if not abs(nnz - seen.nnz) <= 1e-4 * seen.nnz:
                    failures.append(f"{where}: {nnz} entries, the reference has {seen.nnz}")
                for name, error in _errors(begin, params, expected):
                    if not error <= STEP_ERROR[precision]:
                        failures.append(f"{where}: the change of {name} is off by {error:.2g}")


def _errors(
    begin: Parameters, found: Parameters, expected: Parameters
) -> Iterator[tuple[str, float]]:
    for name, start in begin.tensors().items():
        change = expected.tensors()[name] - start
        error = (found.tensors()[name] - start - change).norm() / change.norm()
        yield name, error.item()


def _exact(shape: Shape, device: torch.device) -> tuple[Parameters, Tensor]:
    """Weights in float64 and a batch in float32 that bfloat16 has too, and their differences."""
    g = torch.Generator(device).manual_seed(shape.d_sae)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    def rounded(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16).double()

    def in_32nds(t: Tensor, most: float) -> Tensor:  # x - b_dec has 8 bits then
        return (32 * t.clamp(-most, most)).round() / 32

    d_in, d_sae, rows = shape
    W_dec = normal(d_sae, d_in)
    begin = Parameters(
        W_enc_rows=rounded(normal(d_sae, d_in) / d_in**0.5),
        b_enc=torch.zeros(d_sae, dtype=torch.float64, device=device),
        W_dec=rounded(W_dec / W_dec.norm(dim=1, keepdim=True)),
        b_dec=in_32nds(0.3 * normal(d_in), 0.9).double(),
    )
    return begin, in_32nds(normal(rows, d_in), 3.0)


def _moved(params: Parameters, dtype: torch.dtype) -> Parameters:
    return Parameters(**{name: t.to(dtype, copy=True) for name, t in params.tensors().items()})


def curve(device: torch.device, shape: Shape, file: Path) -> list[Bar]:
    """The loss over a training that goes from the dense phase to entries, against the reference's in
    float32; one bar per precision. Writes the losses to a file.
    """
    begin, batches = _planted(shape, device)
    objective, update = Objective(l1=0.5), Update(lr=2e-3)
    params = _moved(begin, torch.float32)
    adam = AdamState.zeros(params)
    with products("float32"):
        expected = [
            reference.step(params, adam, batches[i % len(batches)], objective, update).loss
            for i in range(CURVE_STEPS)
        ]
    found: dict[str, list[float]] = {"reference": expected}
    bars = []
    for precision in PRECISIONS:
        params, seen = _moved(begin, torch.float32), []
        adam, step = AdamState.zeros(params), own_step(device, precision)
        with constants(**limits(0.1, 0.15)):
            for i in range(CURVE_STEPS):
                x = batches[i % len(batches)]
                seen.append(step(params, adam, x, l1=objective.l1, lr=update.lr))
            found[precision] = [result.loss for result in seen]
        worst = max(abs(a / b - 1) for a, b in zip(found[precision], expected, strict=True))
        density = seen[-1].nnz / (shape.rows * shape.d_sae)
        what = (
            f"loss over {CURVE_STEPS} steps against the reference's, {shape}, {precision} "
            f"({expected[0]:.3g} to {expected[-1]:.3g}, in the end {100 * density:.1f} % active)"
        )
        bars.append(Bar(what, worst, "<=", CURVE_ERROR[precision]))
    file.unlink(missing_ok=True)
    for i in range(CURVE_STEPS):
        records.append(file, {"step": str(i + 1), **{name: f[i] for name, f in found.items()}})
    return bars


def _planted(shape: Shape, device: torch.device) -> tuple[Parameters, Tensor]:
    """A start as a training has it, and 16 batches of rows that are sums of a few directions."""
    d_in, d_sae, rows = shape
    g = torch.Generator(device).manual_seed(0)
    directions = torch.randn(d_in, d_in, generator=g, device=device) / d_in**0.5
    size = (16, rows, d_in)
    strength = torch.rand(size, generator=g, device=device)
    active = torch.rand(size, generator=g, device=device) < 8 / d_in
    x = (3 * strength * active) @ directions
    W_dec = torch.randn(d_sae, d_in, generator=g, device=device)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc, b_dec = torch.zeros(d_sae, device=device), x.mean((0, 1))
    return Parameters(W_dec.clone(), b_enc, W_dec, b_dec), x
