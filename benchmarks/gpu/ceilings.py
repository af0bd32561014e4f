"""What the device allows: copies, matrix products and gathers of rows; and the floor these set to a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.sizes import ITEM_BYTES, PRECISIONS, Sizes
from benchmarks.gpu.timing import products, time_calls
from benchmarks.step.problem import BATCHES, Shape
from sae_ext import native, step_cuda
from sae_ext.parameters import SparseCode
from sae_ext.step_cuda import Precision


@dataclass
class Ceilings:
    """Measured rates; bytes are counted where they are read and where they are written."""

    copy: float | None = None
    """Bytes a second."""
    whole: dict[tuple[Shape, Precision], float] = field(default_factory=dict)
    """The encoder's product, operations a second."""
    chunked: dict[tuple[Shape, Precision], float] = field(default_factory=dict)
    """The same in the chunks of rows that a step takes."""
    gathers: dict[int, float] = field(default_factory=dict)
    """Bytes of a matrix: bytes a second of rows gathered from it."""

    def floor_ms(self, shape: Shape, precision: Precision, nnz: float) -> float | None:
        """The least time of a step with so many entries, whichever way it takes.

        By entries: the encoder's product; each entry's decoder row gathered once, and once its row of
        the gradient and of x. Dense: five products. Both: weights and moments read and written.
        """
        key = (shape, precision)
        if self.copy is None or key not in self.whole or not self.gathers:
            return None
        d_in, d_sae, rows = shape
        item = ITEM_BYTES[precision]
        product = 2 * rows * d_in * d_sae / max(self.whole[key], self.chunked.get(key, 0.0))
        copies = 2 if precision == "bfloat16" else 0  # the weights once more, written
        update = 2 * d_in * d_sae * (24 + copies) / self.copy
        gathered = nnz * d_in * item
        gathers = gathered / self._gather(d_sae * d_in * item)
        gathers += 2 * gathered / self._gather(rows * d_in * item)
        return 1000 * (min(product + gathers, 5 * product) + update)

    def _gather(self, matrix_bytes: int) -> float:
        """The rate at the next larger matrix that was measured."""
        size = next((size for size in self.gathers if size >= matrix_bytes), max(self.gathers))
        return self.gathers[size]

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        if self.copy is not None:
            yield f"copy on the device {self.copy / 1e9:.0f} GB/s (read and written)"
        rates = ", ".join(f"{size >> 20} MB {r / 1e9:.0f}" for size, r in self.gathers.items())
        yield f"rows gathered, GB/s by size of the matrix: {rates}"
        for shape in dict.fromkeys(shape for shape, _ in self.whole):
            parts = (
                f"{p} {self.whole[shape, p] / 1e12:.0f} ({self.chunked.get((shape, p), 0) / 1e12:.0f})"
                for p in PRECISIONS
                if (shape, p) in self.whole
            )
            yield f"encoder product, TFLOP/s whole (in chunks), {shape}: {', '.join(parts)}"


def measure_copy(device: torch.device, sizes: Sizes, found: Ceilings) -> None:
    """From one part of the device's memory to another."""
    source = torch.randn(sizes.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    ms = time_calls(device, lambda i: target.copy_(source)).median_ms
    found.copy = 2 * sizes.copy_bytes / (ms / 1000)


def measure_gathers(device: torch.device, sizes: Sizes, found: Ceilings) -> None:
    """Sums of rows by our own kernel, at random places."""
    rows, each = sizes.gather_entries // 64, 64
    g = torch.Generator(device).manual_seed(0)
    row_ptr = torch.arange(0, rows * each + 1, each, device=device)
    weight = torch.randn(rows * each, generator=g, device=device)
    for size in sizes.gather_bytes:
        count = size // (4 * sizes.gather_d_in)
        matrix = torch.randn(count, sizes.gather_d_in, generator=g, device=device)
        cols = torch.randint(count, (BATCHES, rows * each), generator=g, device=device)
        codes = [SparseCode(row_ptr, col.int(), weight) for col in cols]

        def call(i: int, codes: list[SparseCode] = codes, matrix: Tensor = matrix) -> Tensor:
            return native.sum_rows(codes[i % BATCHES], weight, matrix, None)

        ms = time_calls(device, call).median_ms
        found.gathers[size] = rows * each * sizes.gather_d_in * 4 / (ms / 1000)


def measure_product(
    device: torch.device, shape: Shape, precision: Precision, found: Ceilings
) -> None:
    """The encoder's product, whole and in chunks."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    d_in, d_sae, rows = shape
    x = torch.randn(BATCHES, rows, d_in, device=device).to(dtype)
    W = torch.randn(d_sae, d_in, device=device).to(dtype)
    chunks = list(native.chunks(0, rows, d_sae * x.itemsize, step_cuda._PRE_BYTES))
    out = torch.empty(rows, d_sae, dtype=dtype, device=device)

    def whole(i: int) -> None:
        torch.mm(x[i % BATCHES], W.T, out=out)

    def chunked(i: int) -> None:
        for part in chunks:
            torch.mm(x[i % BATCHES][part], W.T, out=out[: part.stop - part.start])

    flop = 2 * rows * d_in * d_sae
    with products(precision):
        found.whole[shape, precision] = flop / (time_calls(device, whole).median_ms / 1000)
        found.chunked[shape, precision] = flop / (time_calls(device, chunked).median_ms / 1000)
