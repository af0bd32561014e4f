"""The made-up autoencoder and batches that every contender of the step benchmark starts from.

x ~ N(0, I) and encoder columns ~ N(0, I / d_in), so each pre-activation is N(0, 1) before its bias,
and one bias for all features sets how many of them are active. Needs nothing but PyTorch, because
the peers' environment holds no Sparsemill.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BATCHES = 3  # different batches, taken in turn, so that no contender finds its rows in the cache


class Shape(NamedTuple):
    """Size of one training step."""

    d_in: int
    d_sae: int
    rows: int

    def __str__(self) -> str:
        return f"d_in {self.d_in}, d_sae {self.d_sae}, B {self.rows}"


class Settings(NamedTuple):
    """The numbers of a step; what a contender does not know of, it leaves."""

    l1: float
    lr: float
    eps: float
    clip: float
    """Upper bound of the activations; no peer has one."""


class Start(NamedTuple):
    """What a contender starts from: everything but the encoder's bias, which its L0 sets."""

    W_enc_rows: Tensor
    """[d_sae, d_in]"""
    W_dec: Tensor
    """[d_sae, d_in], rows of length 1."""
    b_dec: Tensor
    """[d_in], zeros."""
    x: Tensor
    """[BATCHES, B, d_in]"""

    @property
    def shape(self) -> Shape:
        """Size of the step."""
        d_sae, d_in = self.W_dec.shape
        return Shape(d_in, d_sae, self.x.shape[1])

    def b_enc(self, l0: float) -> Tensor:
        """[d_sae]: the bias under which `l0` features of a row are active on average."""
        d_sae = len(self.W_dec)
        return torch.full((d_sae,), NormalDist().inv_cdf(l0 / d_sae))

    def save(self, path: Path) -> None:
        """Write to a file for another process."""
        save_file(self._asdict(), path)

    @classmethod
    def load(cls, path: Path) -> Start:
        """Read what `save` wrote, into memory: a mapped page would count where it is first read."""
        return cls(**{name: t.clone() for name, t in load_file(path).items()})


def made_up(shape: Shape, seed: int = 0) -> Start:
    """Weights and batches of a shape, the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(shape.d_sae, shape.d_in, generator=g)
    return Start(
        W_enc_rows=torch.randn(shape.d_sae, shape.d_in, generator=g) / shape.d_in**0.5,
        W_dec=W_dec / W_dec.norm(dim=1, keepdim=True),
        b_dec=torch.zeros(shape.d_in),
        x=torch.randn(BATCHES, shape.rows, shape.d_in, generator=g),
    )
