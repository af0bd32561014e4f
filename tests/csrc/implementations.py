"""The implementations of csrc/saek.h that the tests compare, and calls of their functions.

"cpu": the processor's own kernels. "simt": the CUDA kernels, compiled for the CPU (see simt/).
"cuda": the CUDA kernels on a device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which
from types import ModuleType
from typing import Any

import pytest
import simt
import torch
from guarded import Guarded, leaves
from torch import Tensor

from sae_ext import _C

DTYPES = {
    torch.float32: _C.FLOAT32,
    torch.float64: _C.FLOAT64,
    torch.bfloat16: _C.BFLOAT16,
}
NOWHERE = 4096
"""Where an array of no elements is: not nowhere at all, and not to be read."""


@dataclass(frozen=True)
class Kernels:
    """One of them."""

    name: str
    module: ModuleType

    @property
    def queued(self) -> bool:
        """Whether these are the CUDA kernels."""
        return self.name != "cpu"

    def begin(self, order: int) -> None:
        """Have the shim let threads run in the order that goes with this number."""
        if self.name == "simt":
            simt.seed(self.module.__file__, order)

    def exec(
        self, dtype: torch.dtype, threads: int = 2, skip: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Where a function runs; on CUDA on the default stream."""
        return (_C.CUDA if self.queued else _C.CPU, DTYPES[dtype], threads, None, skip)

    def call(self, kernel: str, arguments: dict[str, Any]) -> int | None:
        """Call a function, then look at all guard zones; returns its code where it has one."""
        found = [value for _, value in leaves(arguments)]
        guarded = [value for value in found if isinstance(value, Guarded)]
        for array in guarded:
            array.remember()
        memory = OnDevice() if self.name == "cuda" else OnHost()
        try:
            code: int | None = getattr(self.module, kernel)(**_raw(arguments, memory))
        finally:
            memory.bring_back(guarded)
        for array in guarded:
            array.checked()
        return code


class OnHost:
    """Memory as it is."""

    def at(self, tensor: Tensor) -> int:
        return tensor.data_ptr()

    def bring_back(self, arrays: list[Guarded]) -> None:
        pass


class OnDevice:
    """Copies on the device, of whole storages: guard zones, and places that two arguments share."""

    def __init__(self) -> None:
        self.copies: dict[int, Tensor] = {}

    def at(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.copies:
            self.copies[storage.data_ptr()] = _bytes_of(tensor).cuda()
        within = tensor.data_ptr() - storage.data_ptr()
        return self.copies[storage.data_ptr()].data_ptr() + within

    def bring_back(self, arrays: list[Guarded]) -> None:
        torch.cuda.synchronize()
        for array in arrays:
            copy = self.copies.get(array.flat.data_ptr())
            if copy is not None:
                _bytes_of(array.flat).copy_(copy)


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _raw(argument: Any, memory: OnHost | OnDevice) -> Any:
    """As the compiled module takes it: pointers, 0 for None."""
    if isinstance(argument, dict):
        return {name: _raw(value, memory) for name, value in argument.items()}
    if isinstance(argument, tuple):
        return tuple(_raw(value, memory) for value in argument)
    if isinstance(argument, Guarded):
        argument = argument.inside
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return memory.at(argument) if argument.numel() > 0 else NOWHERE
    return 0 if argument is None else argument


CPU = Kernels("cpu", _C)


@cache
def implementation(name: str) -> Kernels:
    """By name; a test that asks for what is not to be had here is skipped."""
    if name == "cpu":
        return CPU
    if name == "simt":
        if which("g++") is None:
            pytest.skip("g++ is needed to compile the CUDA kernels for the CPU")
        # Other tests have these run on a changed or a sanitized one.
        given = os.environ.get("SAEK_SIMT_MODULE")
        return Kernels(name, simt.load(Path(given) if given else simt.build()))
    if not _C.cuda()["built"]:
        pytest.skip("the kernels are built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return Kernels(name, _C)
