"""Reads evidence back: the windows of one feature, and the pool shared by all.

Opening costs the footer of one file and the whole of the (small) pool; a feature costs the row
groups it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ext.errors import CorruptArtefact


@dataclass(frozen=True)
class Window:
    """One window of one document, with the activations of the feature it was read for."""

    doc_id: str
    doc: int
    """Row in the table of documents; (doc, start) names a window."""
    bucket: int
    """Hash bucket 0..99 of the document, which decides its split."""
    start: int
    """Position of the first token."""
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """Per token, 0 where silent; empty for a window of the pool."""

    @property
    def name(self) -> tuple[int, int]:
        """What tells this window from any other: (doc, start)."""
        return self.doc, self.start

    @property
    def max(self) -> float:
        """Largest activation; 0 for a window of the pool."""
        return max(self.activations, default=0.0)


@dataclass(frozen=True)
class FeatureWindows:
    """The evidence of one feature: its strongest windows, and a uniform sample of all."""

    top: tuple[Window, ...]
    sample: tuple[Window, ...]

    @property
    def all(self) -> tuple[Window, ...]:
        """Both sets, each window once, strongest windows first."""
        return tuple({w.name: w for w in (*self.top, *self.sample)}.values())


class Pool:
    """Random windows shared by all features, with the features that fire in each."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.bucket: npt.NDArray[np.int16] = table["bucket"].to_numpy()
        features = table["features"].combine_chunks()
        self._fires: npt.NDArray[np.int32] = features.flatten().to_numpy()
        self._window = np.repeat(np.arange(len(features)), features.value_lengths().to_numpy())

    def __len__(self) -> int:
        return len(self.bucket)

    @cached_property
    def windows(self) -> list[Window]:
        """The windows in the order of the sketch, without activations."""
        columns = self._table.select(["doc_id", "doc", "bucket", "start", "tokens"]).to_pylist()
        return [
            Window(**{**row, "tokens": tuple(row["tokens"])}, activations=()) for row in columns
        ]

    def silent(self, feature: int) -> npt.NDArray[np.bool_]:
        """For each window, whether the feature is verified not to fire in it."""
        silent = np.ones(len(self), bool)
        silent[self._window[self._fires == feature]] = False
        return silent

    def count_firing(self, among: npt.NDArray[np.bool_], n_features: int) -> npt.NDArray[np.int64]:
        """For each feature, in how many of the windows marked by `among` it fires."""
        counts: npt.NDArray[np.int64] = np.bincount(
            self._fires[among[self._window]], minlength=n_features
        )
        return counts


class EvidenceReader:
    """The evidence of one analysis, from `windows.parquet` and `pool.parquet` on local disk.

    Raises:
        CorruptArtefact: a file is missing or is not such a table.
    """

    def __init__(self, windows: Path, pool: Path) -> None:
        self._path = windows
        self.pool = Pool(_parquet(pool).read())
        self._file = _parquet(windows)
        self._group = -1
        self._rows: pa.Table | None = None
        column = self._file.schema_arrow.names.index("feature")
        groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        bounds = [group.column(column).statistics for group in groups]
        self._first = np.array([b.min for b in bounds], np.int64)
        self._last = np.array([b.max for b in bounds], np.int64)

    def feature(self, feature: int) -> FeatureWindows:
        """The windows of one feature; both sets are empty for a feature that never fired."""
        groups = np.flatnonzero((self._first <= feature) & (feature <= self._last))
        rows = [row for group in groups for row in self._rows_of(int(group), feature)]
        kinds: dict[str, list[Window]] = {"top": [], "sample": []}
        for row in rows:
            kinds[row["kind"]].append(
                Window(
                    doc_id=row["doc_id"],
                    doc=row["doc"],
                    bucket=row["bucket"],
                    start=row["start"],
                    tokens=tuple(row["tokens"]),
                    activations=tuple(row["activations"]),
                )
            )
        return FeatureWindows(tuple(kinds["top"]), tuple(kinds["sample"]))

    def columns(self, *names: str) -> dict[str, npt.NDArray[Any]]:
        """Whole columns over all features, for counting; `tokens` and `activations` are large."""
        table = self._file.read(columns=list(names))
        return {name: table[name].to_numpy() for name in names}

    def _rows_of(self, group: int, feature: int) -> list[dict[str, Any]]:
        """Rows of a feature in one row group; the last group is kept, neighbours often share it."""
        if group != self._group or self._rows is None:
            self._rows, self._group = self._file.read_row_group(group), group
        of_row = self._rows["feature"].to_numpy()
        first, last = np.searchsorted(of_row, [feature, feature + 1])
        rows: list[dict[str, Any]] = self._rows.slice(first, last - first).to_pylist()
        return rows


def _parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise CorruptArtefact(
            f"{path} is missing or not a Parquet table: delete that file and run the analysis again"
        ) from error
