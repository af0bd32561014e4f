"""What is measured: the sizes on a GPU, and tiny ones for a trial run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.step.problem import BATCHES, Shape, Start
from sae_ext.parameters import AdamState, Parameters
from sae_ext.step_cuda import Precision

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "tf32", "float32")
ITEM_BYTES: Mapping[Precision, int] = {"bfloat16": 2, "tf32": 4, "float32": 4}
"""Of a number in products and gathers."""


@dataclass(frozen=True)
class Sizes:
    """All that differs between a measurement and a trial."""

    faster: Mapping[Shape, float]
    """The shapes, and how many times faster than compiled dense ours is to be in bfloat16."""
    l0s: tuple[int, ...]
    """Active features per row; the bars are about the first."""
    densities: tuple[float, ...]
    density_shape: Shape
    constant_shapes: tuple[Shape, ...]
    curve: Shape
    """Of the training whose loss is followed."""
    copy_bytes: int
    gather_bytes: tuple[int, ...]
    """Of the matrices that rows are gathered from, rising: some fit into the second-level cache."""
    gather_entries: int
    gather_d_in: int


FULL = Sizes(
    faster={
        Shape(768, 6144, 4096): 1.2,
        Shape(768, 24576, 4096): 2.0,
        Shape(2048, 16384, 8192): 1.6,
        Shape(4096, 65536, 8192): 2.5,
    },
    l0s=(64, 16, 256),
    densities=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    density_shape=Shape(768, 6144, 4096),
    constant_shapes=(Shape(768, 24576, 4096), Shape(4096, 65536, 8192)),
    curve=Shape(256, 2048, 1024),
    copy_bytes=2 << 30,
    gather_bytes=(8 << 20, 24 << 20, 64 << 20, 256 << 20, 1 << 30),
    gather_entries=1 << 19,
    gather_d_in=1024,
)

TRIAL = Sizes(
    faster={Shape(32, 128, 64): 1.0},
    l0s=(8, 16),
    densities=(0.01, 0.1, 0.5),
    density_shape=Shape(32, 128, 64),
    constant_shapes=(Shape(32, 128, 64),),
    curve=Shape(32, 128, 64),
    copy_bytes=1 << 20,
    gather_bytes=(1 << 16, 1 << 20),
    gather_entries=1 << 10,
    gather_d_in=64,
)


def made_up(shape: Shape, device: torch.device, seed: int = 0) -> Start:
    """As `benchmarks.step.problem.made_up`, drawn on the device: the largest has 10⁹ numbers."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    W_dec = normal(shape.d_sae, shape.d_in)
    return Start(
        W_enc_rows=normal(shape.d_sae, shape.d_in) / shape.d_in**0.5,
        W_dec=W_dec.div_(W_dec.norm(dim=1, keepdim=True)),
        b_dec=torch.zeros(shape.d_in, device=device),
        x=normal(BATCHES, shape.rows, shape.d_in),
    )


def weights(start: Start, l0: float) -> tuple[Parameters, AdamState]:
    """A contender's own weights and moments."""
    b_enc = start.b_enc(l0).to(start.x.device)
    params = Parameters(start.W_enc_rows.clone(), b_enc, start.W_dec.clone(), start.b_dec.clone())
    return params, AdamState.zeros(params)
