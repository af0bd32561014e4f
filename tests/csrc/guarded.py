"""Poisoned arrays between guard zones, and how arguments that hold them are named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

GUARD = 13
"""Elements on either side. The sanitizers' tests have none, for zones of their own."""
POISON = {
    torch.float32: math.nan,
    torch.float64: math.nan,
    torch.bfloat16: math.nan,
    torch.int32: -77,
    torch.int64: -77,
    torch.uint8: 177,
}

Role = Literal["out", "changed", "scratch"]


class Guarded:
    """Memory a kernel writes: poisoned, or holding what the kernel reads first.

    "out": every element is written. "changed": its numbers are replaced or added to.
    "scratch": its contents are nobody's business afterwards.
    It starts at a multiple of `align` bytes, or by default where registers would not like it to.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, role: Role = "out", align: int = 1
    ) -> None:
        size = math.prod(shape)
        self.role = role
        # Tensors start at multiples of 64 bytes, and no room is left over behind the last zone.
        step = align // dtype.itemsize
        self.start = GUARD | 1 if align == 1 else -(-GUARD // step) * step
        self.flat = torch.full((self.start + size + GUARD,), POISON[dtype], dtype=dtype)
        self.zones = self.flat[: self.start], self.flat[self.start + size :]
        self.inside = self.flat[self.start : self.start + size].view(shape)
        self.remember()

    @classmethod
    def holding(cls, values: Tensor, role: Role = "changed", align: int = 1) -> Guarded:
        """A copy of these values, to be changed in place."""
        array = cls(tuple(values.shape), values.dtype, role, align)
        array.inside.copy_(values)
        array.remember()
        return array

    def remember(self) -> None:
        """What is here now is what `before` and `untouched` are about."""
        self.before = self.flat.clone()

    def held(self) -> Tensor:
        """What the array held before the call."""
        return self.before[self.start : self.start + self.inside.numel()].view(self.inside.shape)

    def untouched(self) -> bool:
        """Nothing has been written, neither inside nor beside."""
        return torch.equal(self.flat.view(torch.uint8), self.before.view(torch.uint8))

    def unwritten(self) -> Tensor:
        """True at the elements that still are poison."""
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
    for name, value in leaves(arguments, path):
        if isinstance(value, Guarded):
            yield name, value


def leaves(arguments: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a call's arguments by name."""
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            yield from leaves(value, name)
    elif isinstance(arguments, tuple):
        for i, value in enumerate(arguments):
            yield from leaves(value, f"{path}.{i}")
    else:
        yield path, arguments


def replaced(arguments: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The same arguments but for one."""
    name, *places = path.split(".")

    def inner(old: Any, rest: list[str]) -> Any:
        if not rest:
            return value
        at = int(rest[0])
        return (*old[:at], inner(old[at], rest[1:]), *old[at + 1 :])

    return {**arguments, name: inner(arguments[name], places)}


def results(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a call has written, by name."""
    return {name: a.checked() for name, a in arrays(arguments) if a.role != "scratch"}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def code_out(
    rows: int, capacity: int, dtype: torch.dtype, first: int = 0, align: int = 1
) -> tuple[Any, ...]:
    """Where a kernel lists entries: row_ptr, col, val, capacity, counters."""
    row_ptr = Guarded((rows + 1,), torch.int64)
    row_ptr.inside[0] = first
    return (
        row_ptr,
        Guarded((capacity,), torch.int32, align=align),
        Guarded((capacity,), dtype, align=align),
        capacity,
        Guarded.holding(torch.zeros(4, dtype=torch.int64)),
    )
