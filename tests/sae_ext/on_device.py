"""Where tests run the CUDA kernels: on a GPU, or compiled for the CPU ("simulated")."""

from __future__ import annotations

from functools import cache
from shutil import which
from types import ModuleType
from typing import Any

import pytest
import torch

from sae_ext import coding, native, ops, step_cuda

_missing = native.cuda_missing()
DEVICES = [
    pytest.param("simulated", marks=pytest.mark.skipif(which("g++") is None, reason="no g++")),
    pytest.param("cuda", marks=pytest.mark.skipif(_missing is not None, reason=str(_missing))),
]


@cache
def _simulated() -> ModuleType:
    import simt

    return simt.load(simt.build())


def simulation() -> list[tuple[Any, str, Any]]:
    """What to replace, as objects, names and values, so that CPU tensors take the CUDA kernels.

    Streams, events and the recording of graphs are what is not gone through then.
    """
    choose = ops._choose

    def chosen(backend: ops.Backend, x: torch.Tensor) -> str:
        return choose(backend, x) if backend == "reference" else "cuda"

    def on(x: torch.Tensor) -> native.Run:
        return native.Run(x.device, x.dtype, x.dtype, True)

    return [
        *((module, "_C", _simulated()) for module in (native, coding, step_cuda)),
        (native.Run, "on", on),
        (native, "cuda_missing", lambda device=None: None),
        (ops, "_choose", chosen),
    ]
