"""Training rows straight from a host: computed as they are needed, mixed in a ring buffer, and nowhere kept.

    host, texts, harvest = Transformer(model="gpt2", layer=6), CorpusConfig(source="texts/"), HarvestConfig()
    stream = streamed(host, texts, harvest, here(host.open(), harvest))
    data = Streamed(Activations(store, key), stream, "texts/")
    fit(data, SAEConfig(d_sae=8192), TrainConfig(buffer=BufferConfig()), "runs/first")

Stored activations of the same host say how long rows are and where b_dec begins; their validation split judges.
A stream goes through the training documents of its corpus again and again, in the units of a harvest; what it
gives depends on the corpus, the host and the configuration alone, so that a training goes on from a checkpoint to
the same bytes.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_ext.activations.dataset import Batch, Dataset, Stream
from sae_ext.activations.harvest import finite, parts
from sae_ext.activations.order import Rows
from sae_ext.config import CorpusConfig, HarvestConfig
from sae_ext.corpora import Document, Rejected, Split, bucket_of, split_masks
from sae_ext.errors import Stopped, UserError
from sae_ext.hosts import Host, HostConfig

log = logging.getLogger("sae_ext.streaming")


class UnitRows(NamedTuple):
    """What a unit of a stream gives."""

    x: Tensor
    """[n, d_in] in the format of `HarvestConfig.dtype`; n may be 0."""
    rejected: dict[str, int]
    """Why documents gave no row, and how many."""


RowsOf = Callable[[Iterator[list[Document]]], Generator[UnitRows, None, None]]
"""Gives the rows of each unit of documents, in their order; may work ahead."""


class Streamed(Dataset):
    """Stored rows to begin and to judge by, and a stream to train on.

    Args:
        key: names what the stream is made of; a checkpoint fits a training with the same one alone.
    """

    def __init__(self, stored: Dataset, stream: Stream, key: str) -> None:
        self._stored = stored
        self.stream = stream
        self.key = f"{stored.key} {key}"
        self.d_in = stored.d_in

    def rows(self, split: Split) -> Rows:
        """Ascending numbers of a split's stored rows."""
        return self._stored.rows(split)

    def gather(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Stored rows in the given order, as float32 [len(rows), d_in]."""
        return self._stored.gather(rows)

    def column(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Refused: what is said of documents is not known of a row in the buffer.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"column {name!r} is wanted of rows that come as a stream, of which nothing more is known: store the "
            "activations to train on them"
        )

    def where(self, row: int) -> str:
        """Where a stored row lies, for messages."""
        return self._stored.where(row)


def streamed(
    host: HostConfig,
    corpus: CorpusConfig,
    harvest: HarvestConfig,
    rows_of: RowsOf,
    stop: Callable[[], bool] = lambda: False,
) -> Stream:
    """The endless stream of a corpus' training rows, a unit of the harvest a chunk. A row's number is its place in
    the chunk.

    Raises (where it is read):
        UserError: the corpus cannot be read, or gives not one row to train on.
        Stopped: `stop` said so while it looked for the place to begin at.
    """

    def chunks(first: int) -> Iterator[Batch]:
        passes: deque[int] = deque()

        def documents() -> Iterator[list[Document]]:
            for number, unit in _units(host, corpus, harvest, first, stop):
                passes.append(number)
                yield unit

        current, count, rejected = None, 0, Counter[str]()
        with closing(rows_of(documents())) as units:
            for found in units:
                number = passes.popleft()
                if current is not None and number != current:
                    why = "".join(f", {n:,} {reason}" for reason, n in sorted(rejected.items()))
                    if not (count or first):
                        raise UserError(f"stream: no document gives a row to train on{why}")
                    log.info("pass %d of the stream: %s rows%s", current + 1, f"{count:,}", why)
                    count, rejected = 0, Counter()
                current = number
                count += len(found.x)
                rejected.update(found.rejected)
                yield Batch(found.x, np.arange(len(found.x)))

    return chunks


def here(host: Host, harvest: HarvestConfig) -> RowsOf:
    """Units computed in this process, with a host that is open."""
    return lambda units: (unit_rows(host, unit, harvest) for unit in units)


def unit_rows(host: Host, documents: Sequence[Document], harvest: HarvestConfig) -> UnitRows:
    """The rows of a unit's documents at the host's first hook.

    Raises:
        UserError: an activation is NaN or infinite, where that is not to be passed over.
    """
    found = finite(documents, host.read(documents, getattr(torch, harvest.dtype))[0], harvest)
    reasons = Counter(reason.partition(":")[0] for reason in found.rejected.values())
    return UnitRows(found.x, dict(reasons))


def _units(
    host: HostConfig,
    corpus: CorpusConfig,
    harvest: HarvestConfig,
    first: int,
    stop: Callable[[], bool],
) -> Iterator[tuple[int, list[Document]]]:
    """Units that have training documents, without the others of theirs, and the number of the pass; from the
    first-th of them on."""
    number = count = 0
    while True:
        before = count
        for _, documents in parts(_read(host, corpus), harvest):
            if count < first and stop():
                raise Stopped("stopped on the way to where the stream was")
            good = [d for d in documents if isinstance(d, Document)]
            if not good:
                continue
            buckets = np.array([bucket_of(d, corpus) for d in good])
            keep = split_masks(buckets, corpus)["train"].tolist()
            unit = [d for d, kept in zip(good, keep, strict=True) if kept]
            if not unit:
                continue
            if count >= first:
                yield number, unit
            count += 1
        if count == before:
            raise UserError(
                "stream: the corpus holds no document to train on: give it more, or hold out fewer of them"
            )
        number += 1
        if (
            first > count
        ):  # how many there are is known now, so that no more passes are read in vain
            skipped = (first - count) // (count - before)
            number, count = number + skipped, count + skipped * (count - before)


def _read(host: HostConfig, corpus: CorpusConfig) -> Iterator[Document | Rejected]:
    try:
        yield from host.documents(corpus)
    except UserError as error:
        raise of_stream(error) from error


def of_stream(error: UserError) -> UserError:
    """What is wrong with a corpus, said of the section of a recipe where it stands."""
    return UserError(f"stream: {error}".replace("corpus.", "stream."))
