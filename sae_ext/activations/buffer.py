"""A ring buffer of rows: new ones replace the oldest, batches are drawn from what is there.

It mixes a stream whose neighbours are alike (tokens of one document) into batches that are not,
for training while activations are still being computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_ext.errors import CorruptArtefact, UserError


class RingBuffer:
    """The last `capacity` rows added.

    Args:
        capacity: rows it holds; their memory is taken at once, capacity · d_in numbers of `dtype`.
        device: where the rows lie, and where `sample` gives them.
        dtype: how rows are stored: float32, bfloat16 or float16.
        seed: decides, with the number of the draw, which rows `sample` takes.
    """

    def __init__(
        self,
        capacity: int,
        d_in: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if capacity < 1:
            raise UserError(f"the buffer's capacity must be at least 1 row, got {capacity}")
        self.capacity = capacity
        self.d_in = d_in
        self.seed = seed
        self.added = 0
        """Rows ever added, also those replaced since."""
        self._x = torch.empty(capacity, d_in, dtype=dtype, device=device)
        self._rows = np.empty(capacity, dtype=np.int64)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, x: Tensor, rows: npt.NDArray[np.int64]) -> None:
        """Put rows in, as if one by one: of more than `capacity` the last ones stay.

        Args:
            x: [n, d_in], any floating-point dtype, n may be 0.
            rows: [n], their numbers.

        Raises:
            UserError: shape or dtype do not fit, or a value is not finite as it would be stored.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in or rows.shape != (len(x),):
            raise UserError(
                f"the buffer takes rows of width {self.d_in} and a number for each, got "
                f"{list(x.shape)} and {list(rows.shape)}"
            )
        if not x.is_floating_point():
            raise UserError(
                f"the buffer takes floating-point rows, got {x.dtype}: convert them to float32"
            )
        stored = x.to(self._x)
        finite = torch.isfinite(stored).all(dim=1)
        if not finite.all():
            bad = int(finite.logical_not().nonzero()[0])
            raise UserError(
                f"row {rows[bad]} is not finite as {stored.dtype}: store the buffer as "
                "torch.float32, or leave the row out"
            )
        done = 0
        while done < len(x):
            at = (self.added + done) % self.capacity
            part = slice(done, done + self.capacity - at)
            n = len(stored[part])
            self._x[at : at + n] = stored[part]
            self._rows[at : at + n] = rows[part]
            done += n
        self.added += len(x)

    def sample(
        self, n: int, draw: int, part: slice = slice(None)
    ) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Draw n different places, uniformly and in random order, in O(n) work.

        The same seed, draw number and content give the same rows, so no generator's state is kept.

        Args:
            draw: number of the draw, 0 or more.
            part: of the n places drawn, those to give.

        Returns:
            Rows as float32 [n, d_in] on the buffer's device, and their numbers [n].

        Raises:
            UserError: the buffer is empty or holds fewer than n rows.
        """
        if n > len(self):
            raise UserError(
                f"{n:,} rows cannot be drawn from a buffer that is empty: add rows first"
                if self.added == 0
                else f"{n:,} rows cannot be drawn from a buffer that holds {len(self):,} of at "
                f"most {self.capacity:,}: draw fewer, or add rows first"
            )
        # Floyd's algorithm, or above 1/50 of the rows a partial shuffle: O(n) either way.
        places = np.random.default_rng([self.seed, draw]).choice(len(self), n, replace=False)[part]
        x = self._x[torch.from_numpy(places).to(self._x.device)]
        return x.float(), self._rows[places]

    def state(self) -> dict[str, Tensor]:
        """A copy of everything later draws depend on, in the memory of the CPU."""
        held = len(self)
        return {
            "x": self._x[:held].to("cpu", copy=True),
            "rows": torch.from_numpy(self._rows[:held].copy()),
            "added": torch.tensor(self.added),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; its rows and the draws are then bit for bit the same.

        Raises:
            CorruptArtefact: the state is of a buffer of another capacity, width or dtype.
        """
        x, rows, added = state["x"], state["rows"], int(state["added"])
        held = min(added, self.capacity)
        if x.shape != (held, self.d_in) or rows.shape != (held,) or x.dtype != self._x.dtype:
            raise CorruptArtefact(
                f"the saved buffer ({list(x.shape)}, {x.dtype}, after {added:,} rows) is not one of "
                f"{self.capacity:,} rows of width {self.d_in} in {self._x.dtype}: start anew without it"
            )
        self._x[:held] = x.to(self._x.device)
        self._rows[:held] = rows.numpy()
        self.added = added
