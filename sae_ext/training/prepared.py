"""What is done before the first step of a training: checkpoints are read, and the data is looked at.

All of it is shared by the autoencoders that are trained in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext.activations.batches import BatchSource, BufferedRows, EpochRows, in_stored_order
from sae_ext.activations.buffer import RingBuffer
from sae_ext.activations.dataset import Dataset
from sae_ext.activations.order import Rows
from sae_ext.activations.statistics import DataStatistics, data_statistics, geometric_median
from sae_ext.config import TrainConfig, to_dict
from sae_ext.errors import UserError
from sae_ext.metrics import ROUNDING
from sae_ext.training import checkpoint
from sae_ext.training.job import Job, Place

_COLUMN_ROWS = 1_000_000  # values of a column looked at together
_CHUNK_ROWS = 4096  # rows a ring buffer's stream reads at a time


class State(NamedTuple):
    """A checkpoint as it was loaded; of several workers the first one's, so that all go on from the same."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def of(cls, data: Dataset, job: Job, place: Place) -> State | None:
        """The one to go on from; None to start."""
        saved = job.load_checkpoint() if place.share[0] == 0 else None
        if place.group is not None:
            saved = _from_first(saved, place)
        if saved is None:
            return None
        return cls(*checkpoint.from_bytes(saved, identity_of(data, job)))


class Prepared(NamedTuple):
    """What the runs on one dataset share."""

    data: Dataset
    train_rows: Rows
    validation_rows: Rows
    statistics: DataStatistics
    centres: dict[str, Tensor]
    """Where b_dec may begin, raw units, float64 [d_in]."""
    classes: dict[str, list[str]]
    """Values in the training split of every column of classes that is read."""
    columns: dict[str, str]
    """"class" or "number" for every column that is read."""

    @classmethod
    def of(
        cls,
        data: Dataset,
        jobs: Sequence[Job],
        states: Sequence[State | None],
        tick: Callable[[], None],
    ) -> Prepared:
        """Look at all of the data that the configurations ask for, before the first step."""
        for job in jobs:
            if job.sae.d_in not in (None, data.d_in):
                raise UserError(
                    f"sae.d_in is {job.sae.d_in}, but the activations have width {data.d_in}: correct it or "
                    "leave it out"
                )
        rows = {split: data.rows(split) for split in ("train", "validation")}
        for split, numbers in rows.items():
            if len(numbers) == 0:
                raise UserError(
                    f"the {split} split has no rows: give the corpus more documents, or a larger "
                    "corpus.validation_percent"
                )
        columns: dict[str, str] = {}
        for job in jobs:
            for reader in (job.sae.architecture, *job.config.objective.terms().values()):
                for name, kind in reader.columns().items():
                    if columns.setdefault(name, kind) != kind:
                        raise UserError(
                            f"column {name!r} is asked for as numbers and as classes: name another one"
                        )
        classes = {
            name: _values_of(data, name, rows["train"])
            for name, kind in columns.items()
            if kind == "class"
        }
        for job in jobs:
            for term in job.config.objective.terms().values():
                term.check_classes(classes)
        for name, wanted in columns.items():
            if wanted == "number":
                _check_weights(data, name, rows["train"])
        statistics = _known_statistics(states)
        if statistics is None:
            statistics = data_statistics(data, rows["train"], tick)
        if statistics.variance <= ROUNDING * statistics.mean_norm**2:
            raise UserError("the train split's rows are all alike: give the corpus more documents")
        mean = torch.from_numpy(statistics.mean)
        centres = {"mean": mean, "zero": torch.zeros_like(mean)}
        # One that goes on has its b_dec already.
        new = [job for job, state in zip(jobs, states, strict=True) if state is None]
        if any(job.sae.b_dec == "geometric_median" for job in new):
            seed = jobs[0].config.order_seed
            median = geometric_median(data, rows["train"], seed=seed, tick=tick)
            centres["geometric_median"] = torch.from_numpy(median)
        return cls(data, rows["train"], rows["validation"], statistics, centres, classes, columns)

    def values(self, rows: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, Tensor]:
        """The columns' values for some rows: float32 numbers, or places in `classes` (-1 for unknown)."""
        found = {}
        for name in names:
            given = self.data.column(name, rows)
            if self.columns[name] == "number":
                found[name] = torch.from_numpy(given.astype(np.float32))
                continue
            given = given.astype(str)
            known = np.asarray(self.classes[name])
            places = np.minimum(np.searchsorted(known, given), len(known) - 1)
            found[name] = torch.from_numpy(np.where(known[places] == given, places, -1))
        return found


def source_of(data: Dataset, prepared: Prepared, config: TrainConfig, place: Place) -> BatchSource:
    """Batches of the training split, in a shuffled order or through a ring buffer, or of a stream."""
    rows, buffer = prepared.train_rows, config.buffer
    if buffer is None:
        return EpochRows(
            data,
            rows,
            config.batch_rows,
            config.order_seed,
            readers=place.readers,
            share=place.share,
        )
    ring = RingBuffer(
        buffer.rows, data.d_in,
        device=place.device, dtype=getattr(torch, buffer.dtype), seed=config.order_seed,
    )  # fmt: skip
    stream = data.stream or in_stored_order(data, rows, _CHUNK_ROWS)
    return BufferedRows(
        stream, ring, config.batch_rows,
        min_rows=buffer.min_rows, fresh=buffer.fresh, share=place.share,
    )  # fmt: skip


def identity_of(data: Dataset, job: Job) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return {
        "sae": {n: v for n, v in to_dict(job.sae).items() if n != "d_in"},
        "begins_from": job.sae.architecture.begins_from(),
        "train": to_dict(job.config),
        "data": data.key,
    }


def _known_statistics(states: Sequence[State | None]) -> DataStatistics | None:
    """As they were when a run that goes on began: then every row has been looked at."""
    for state in states:
        if state is not None:
            try:
                mean, mean_norm, variance = state.facts["statistics"]
                return DataStatistics(np.array(mean, dtype=np.float64), mean_norm, variance)
            except (KeyError, TypeError, ValueError) as error:
                raise checkpoint.unreadable(error) from error
    return None


def _values_of(data: Dataset, column: str, rows: Rows) -> list[str]:
    """The different values of a column, as texts; a part of the rows at a time, which are many."""
    found: set[str] = set()
    for start in range(0, len(rows), _COLUMN_ROWS):
        found |= set(
            np.unique(data.column(column, rows[start : start + _COLUMN_ROWS]).astype(str)).tolist()
        )
    return sorted(found)


def _check_weights(data: Dataset, column: str, rows: Rows) -> None:
    """Row weights are numbers, none of them negative or infinite."""
    for start in range(0, len(rows), _COLUMN_ROWS):
        here = rows[start : start + _COLUMN_ROWS]
        given = data.column(column, here)
        if given.dtype.kind not in "iufb":
            raise UserError(f"column {column!r} holds texts, but weights are wanted: give numbers")
        with np.errstate(over="ignore"):
            weights = given.astype(np.float32)
        bad = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
        if len(bad):
            raise UserError(
                f"column {column!r} holds {given[bad[0]]} for {data.where(int(here[bad[0]]))}: weights must be "
                "finite and 0 or more"
            )


def _from_first(content: bytes | None, place: Place) -> bytes | None:
    """The first worker's bytes, for all."""
    length = torch.tensor(-1 if content is None else len(content), device=place.device)
    dist.broadcast(length, group_src=0, group=place.group)
    if int(length) < 0:
        return None
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if content is not None:
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    buffer = buffer.to(place.device)
    dist.broadcast(buffer, group_src=0, group=place.group)
    return buffer.cpu().numpy().tobytes()
