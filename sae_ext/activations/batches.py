"""Batches to train on: endless, in an order fixed by a seed, and resumable at any moment.

`EpochRows` takes every row once per epoch, in a uniformly random order. `BufferedRows` draws from a
ring buffer that a stream feeds meanwhile, for rows that come in their own order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_ext.activations.buffer import RingBuffer
from sae_ext.activations.dataset import Batch, Dataset, Stream
from sae_ext.activations.order import Rows, Shuffled
from sae_ext.errors import UserError


class BatchSource(ABC):
    """Endless batches; a context manager that closes itself."""

    @abstractmethod
    def next(self) -> Batch:
        """The next batch; what fails in a thread that reads ahead is raised here.

        After an error the next call tries the same batch again.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What it takes to go on behind the last batch handed out; read ahead does not count."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on behind the batch after which the state was taken."""

    @abstractmethod
    def close(self) -> None:
        """End the threads, after what they are just reading; another `next` would start them again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EpochRows(BatchSource):
    """Each epoch is one random order of the rows, by (seed, epoch); the tail is carried on.

    The order is a function (`sae_ext.activations.order`), so any number of rows takes the same memory.

    Args:
        rows: numbers of the rows to take.
        readers: threads that gather batches ahead, at most readers + 1 of them; with 0 all is done
            in the thread that calls `next`. The batches are the same.
        share: (rank, members): of each batch only the rank-th of `members` contiguous parts is
            gathered. Parts differ by at most one row, and their states are equal.

    Raises:
        UserError: there are no rows, or a number is out of range.
    """

    def __init__(
        self,
        data: Dataset,
        rows: Rows,
        batch_rows: int,
        seed: int,
        *,
        readers: int = 1,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if len(rows) == 0:
            raise UserError("there are no rows to draw batches from: give the split some")
        if readers < 0:
            raise UserError(f"readers must be 0 or more, got {readers}")
        self.data = data
        self.all_rows = rows
        self.batch_rows = batch_rows
        self.seed = seed
        self._part = _part(share, batch_rows)
        self._readers = readers
        self._handed_out = 0
        self._picked = 0  # rows whose batches are handed out or read ahead
        self._ahead: deque[Future[Batch]] = deque()
        self._order: tuple[int, Shuffled] | None = None  # of an epoch
        self._gathering: ThreadPoolExecutor | None = None

    def next(self) -> Batch:
        """The next batch, this member's part of `batch_rows` rows."""
        try:
            batch = self._read_ahead() if self._readers else self._gather(self._pick())
        except BaseException:
            self._rewind()
            raise
        self._handed_out += self.batch_rows
        return batch

    def state(self) -> dict[str, Tensor]:
        """The cursor: rows handed out so far, to all members together."""
        return {"cursor": torch.tensor(self._handed_out)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on at a cursor."""
        self._handed_out = int(state["cursor"])
        self._rewind()

    def close(self) -> None:
        """End the threads, after what they are just reading; another `next` would start them again."""
        self._rewind()
        if self._gathering is not None:
            self._gathering.shutdown(cancel_futures=True)
        self._gathering = None

    def _rewind(self) -> None:
        """Forget what was read ahead."""
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()
        self._picked = self._handed_out

    def _read_ahead(self) -> Batch:
        """The next batch, with the ones after it on the way."""
        if self._gathering is None:
            self._gathering = ThreadPoolExecutor(self._readers, "read-batch")
        while len(self._ahead) <= self._readers:
            self._ahead.append(self._gathering.submit(self._gather, self._pick()))
        return self._ahead.popleft().result()

    def _gather(self, rows: npt.NDArray[np.int64]) -> Batch:
        return Batch(self.data.gather(rows), rows)

    def _pick(self) -> npt.NDArray[np.int64]:
        """The row numbers of this member's part of the next batch to read."""
        picked: list[npt.NDArray[np.int64]] = []
        wanted = self.batch_rows
        while wanted:
            epoch, position = divmod(self._picked, len(self.all_rows))
            stop = min(position + wanted, len(self.all_rows))
            places = self._order_of(epoch).at(np.arange(position, stop))
            picked.append(self.all_rows[places])
            wanted -= len(places)
            self._picked += len(places)
        return np.concatenate(picked)[self._part]

    def _order_of(self, epoch: int) -> Shuffled:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Shuffled(len(self.all_rows), [self.seed, epoch])
        return self._order[1]


class BufferedRows(BatchSource):
    """Batches drawn from a ring buffer, fed from a stream while training goes on.

    Before draw k (from 0) the buffer has taken in min_rows + fresh · batch_rows · k rows, or all
    there are. Rows of a batch are different places of the buffer; the stream may hold a row twice.
    The next chunk is read in a thread meanwhile. Every member reads the whole stream.

    Args:
        buffer: empty; its seed fixes the draws.
        min_rows: nothing is drawn before so many rows are in the buffer.
        fresh: rows taken in per row trained on: 1 uses each about once, 0.25 about four times.
        share: see `EpochRows`.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        stream: Stream,
        buffer: RingBuffer,
        batch_rows: int,
        *,
        min_rows: int,
        fresh: float = 1.0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if not batch_rows <= min_rows <= buffer.capacity:
            raise UserError(
                f"min_rows must lie between batch_rows ({batch_rows:,}) and the buffer's capacity "
                f"({buffer.capacity:,}), got {min_rows:,}"
            )
        if not fresh > 0:
            raise UserError(f"fresh must be above 0, got {fresh}")
        self.stream = stream
        self.buffer = buffer
        self.batch_rows = batch_rows
        self.min_rows = min_rows
        self.fresh = fresh
        self._part = _part(share, batch_rows)
        self._draw = 0
        self._chunk = 0  # number of the first chunk not yet used up, and the rows used of it
        self._place = 0
        self._reader: _ChunkReader | None = None

    def next(self) -> Batch:
        """The next batch, this member's part of `batch_rows` rows, on the buffer's device.

        Raises:
            UserError: the stream ended before `min_rows` rows.
        """
        self._feed(self.min_rows + int(self.fresh * self.batch_rows * self._draw))
        if len(self.buffer) < self.min_rows:
            raise UserError(
                f"the stream ended after {self.buffer.added:,} rows, before the min_rows "
                f"({self.min_rows:,}) from which batches are drawn: lower min_rows, or give more rows"
            )
        batch = Batch(*self.buffer.sample(self.batch_rows, self._draw, self._part))
        self._draw += 1
        return batch

    def state(self) -> dict[str, Tensor]:
        """The buffer, the place in the stream and the number of the next draw."""
        place = {"draw": self._draw, "chunk": self._chunk, "place": self._place}
        return {name: torch.tensor(number) for name, number in place.items()} | {
            f"buffer.{name}": value for name, value in self.buffer.state().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on behind the batch after which the state was taken.

        Raises:
            CorruptArtefact: the state is of another buffer.
        """
        self.close()
        prefix = "buffer."
        self.buffer.restore(
            {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}
        )
        self._draw, self._chunk, self._place = (
            int(state[name]) for name in ("draw", "chunk", "place")
        )

    def close(self) -> None:
        """End the stream, after the chunk that is just read; `next` begins it again where it was."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _feed(self, target: int) -> None:
        """Take rows in until `target` were added in all, or the stream ends."""
        while self.buffer.added < target:
            self._reader = self._reader or _ChunkReader(self.stream(self._chunk))
            try:
                chunk = self._reader.current()
            except BaseException:
                self.close()
                raise
            if chunk is None:
                return
            stop = min(len(chunk.rows), self._place + target - self.buffer.added)
            if stop > self._place:  # a chunk without rows may not even have a width
                self.buffer.add(chunk.x[self._place : stop], chunk.rows[self._place : stop])
            self._place = stop
            if stop == len(chunk.rows):
                self._reader.drop()
                self._chunk, self._place = self._chunk + 1, 0


class _ChunkReader:
    """A stream's chunks, the one after the current read meanwhile in a thread."""

    def __init__(self, chunks: Iterator[Batch]) -> None:
        self._chunks = chunks
        self._pool = ThreadPoolExecutor(1, "read-chunk")
        self._current: Batch | None = None
        self._following = self._read()

    def current(self) -> Batch | None:
        """The chunk not yet dropped; None when there are no more."""
        if self._current is None:
            self._current = self._following.result()
            if self._current is not None:
                self._following = self._read()
        return self._current

    def drop(self) -> None:
        """Turn to the following chunk."""
        self._current = None

    def close(self) -> None:
        """End the thread, then the stream."""
        self._pool.shutdown(cancel_futures=True)
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    def _read(self) -> Future[Batch | None]:
        return self._pool.submit(next, self._chunks, None)


def in_stored_order(data: Dataset, rows: Rows, chunk_rows: int) -> Stream:
    """The given rows as an endless stream: epoch after epoch in the given order, in chunks.

    The last chunk of an epoch is shorter. Give ascending rows, so that the files are read in order.

    Raises:
        UserError: there are no rows, or `chunk_rows` is below 1.
    """
    if len(rows) == 0:
        raise UserError("there are no rows to stream: give the split some")
    if chunk_rows < 1:
        raise UserError(f"chunk_rows must be at least 1, got {chunk_rows}")
    starts = range(0, len(rows), chunk_rows)

    def chunks(first: int) -> Iterator[Batch]:
        number = first
        while True:
            start = starts[number % len(starts)]
            here = rows[start : start + chunk_rows]
            yield Batch(data.gather(here), here)
            number += 1

    return chunks


def _part(share: tuple[int, int], batch_rows: int) -> slice:
    """The part of a batch that falls to a member."""
    rank, members = share
    if not 0 <= rank < members:
        raise UserError(f"share must be (rank, members) with 0 <= rank < members, got {share}")
    if batch_rows < members:
        raise UserError(
            f"batch_rows must be at least 1 for each of {members} members, got {batch_rows}"
        )
    return slice(batch_rows * rank // members, batch_rows * (rank + 1) // members)
