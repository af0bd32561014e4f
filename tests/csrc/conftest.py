"""What the tests of the kernels run on: each implementation that is to be had here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from implementations import Kernels

NAMES = ("cpu", "simt", "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return prepared(request.param)


@pytest.fixture(
    params=[(n, d) for n in NAMES for d in DTYPES if n != "cpu" or d != torch.bfloat16],
    ids=lambda offer: f"{offer[0]}-{offer[1]}".replace("torch.", ""),
)
def offer(request: pytest.FixtureRequest) -> tuple[Kernels, torch.dtype]:
    """An implementation and a format of matrices that it takes."""
    name, dtype = request.param
    return prepared(name), dtype


@pytest.fixture(params=NAMES[1:])
def cuda_kernels(request: pytest.FixtureRequest) -> Kernels:
    return prepared(request.param)


@pytest.fixture(
    params=[(n, d) for n in NAMES[1:] for d in DTYPES],
    ids=lambda offer: f"{offer[0]}-{offer[1]}".replace("torch.", ""),
)
def cuda_offer(request: pytest.FixtureRequest) -> tuple[Kernels, torch.dtype]:
    name, dtype = request.param
    return prepared(name), dtype


def prepared(name: str) -> Kernels:
    # Here, because it needs the compiled module, and not every test does.
    from implementations import implementation

    kernels = implementation(name)
    kernels.begin(0)  # the same order of threads, whichever tests have run before
    return kernels
