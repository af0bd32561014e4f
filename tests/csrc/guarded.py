"""Poisoned arrays between guard zones, and calls of the compiled kernels on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from sae_ext import _C

GUARD = 13
"""Elements on either side: odd, so that no array starts where registers would like it to."""
POISON = {
    torch.float32: math.nan,
    torch.float64: math.nan,
    torch.int32: -77,
    torch.int64: -77,
    torch.uint8: 177,
}
DTYPES = {torch.float32: _C.FLOAT32, torch.float64: _C.FLOAT64}

Role = Literal["out", "changed", "summed", "scratch"]


class Guarded:
    """Memory a kernel writes: poisoned, or holding what the kernel reads first.

    "out": every element is written. "changed": the same, over numbers that all change.
    "summed": added to. "scratch": its contents are nobody's business afterwards.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, role: Role = "out", align: int = 1
    ) -> None:
        size = math.prod(shape)
        self.role = role
        self.flat = torch.full((size + 2 * GUARD + align,), POISON[dtype], dtype=dtype)
        start = GUARD + -(self.flat.data_ptr() + GUARD * self.flat.itemsize) % align
        self.zones = self.flat[:start], self.flat[start + size :]
        self.inside = self.flat[start : start + size].view(shape)
        self.before: Tensor | None = None

    @classmethod
    def holding(cls, values: Tensor, role: Role = "changed") -> Guarded:
        """A copy of these values, to be changed in place."""
        array = cls(tuple(values.shape), values.dtype, role)
        array.inside.copy_(values)
        array.before = values.clone()
        return array

    def pointer(self) -> int:
        return self.inside.data_ptr()

    def untouched(self) -> bool:
        """Nothing has been written, neither inside nor beside."""
        self.checked()
        if self.before is not None:
            return torch.equal(self.inside, self.before)
        return bool(_poisoned(self.inside).all())

    def unwritten(self) -> Tensor:
        """True at the elements that a kernel should have written and did not."""
        if self.before is not None:
            return self.inside == self.before
        return _poisoned(self.inside)

    def checked(self) -> Tensor:
        """The array, once the zones are found untouched."""
        for zone in self.zones:
            assert bool(_poisoned(zone).all()), "written outside the array"
        return self.inside


def _poisoned(values: Tensor) -> Tensor:
    return values.isnan() if values.is_floating_point() else values == POISON[values.dtype]


def arrays(arguments: Any, path: str = "") -> Iterator[tuple[str, Guarded]]:
    """The guarded arrays among a call's arguments, by name; "out.1" is the second of a tuple."""
    if isinstance(arguments, Guarded):
        yield path, arguments
    elif isinstance(arguments, dict):
        for name, value in arguments.items():
            yield from arrays(value, name)
    elif isinstance(arguments, tuple):
        for i, value in enumerate(arguments):
            yield from arrays(value, f"{path}.{i}")


def raw(argument: Any) -> Any:
    """As the compiled module takes it: pointers, 0 for None."""
    if isinstance(argument, dict):
        return {name: raw(value) for name, value in argument.items()}
    if isinstance(argument, tuple):
        return tuple(raw(value) for value in argument)
    if isinstance(argument, Guarded):
        return argument.pointer()
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return argument.data_ptr()
    return 0 if argument is None else argument


def call(kernel: str, arguments: dict[str, Any]) -> int | None:
    """Call a kernel, then look at all guard zones; returns its code where it has one."""
    code: int | None = getattr(_C, kernel)(**raw(arguments))
    for _, array in arrays(arguments):
        array.checked()
    return code


def results(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a call has written, by name."""
    return {name: a.checked() for name, a in arrays(arguments) if a.role != "scratch"}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def code_out(rows: int, capacity: int, dtype: torch.dtype, first: int = 0) -> tuple[Any, ...]:
    """Where a kernel lists entries: row_ptr, col, val, capacity, counters."""
    row_ptr = Guarded((rows + 1,), torch.int64)
    row_ptr.inside[0] = first
    return (
        row_ptr,
        Guarded((capacity,), torch.int32),
        Guarded((capacity,), dtype),
        capacity,
        Guarded((4,), torch.int64),
    )
