"""Reading activations back: memory-mapped shards, splits and labels by document."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from sae_ext import corpora
from sae_ext.activations.dataset import Dataset, and_more, is_missing
from sae_ext.activations.order import Rows
from sae_ext.activations.shards import documents_file, map_tensor, provenance_file, shard_file
from sae_ext.corpora.config import CorpusConfig
from sae_ext.errors import UserError
from sae_ext.fields import from_dict
from sae_ext.store import Store

_OPEN = 256
"""Shards that are mapped at once."""
_CHECKED_BYTES = 64e9


class Activations(Dataset):
    """One activations artefact. Opening reads the manifest only; shards are mapped when touched."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.key = key
        self.manifest = store.manifest("activations", key)
        self.d_in: int = self.manifest.extra["d_in"]
        self.shard_rows: list[int] = self.manifest.extra["shard_rows"]
        self.offsets = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        self._mapped: OrderedDict[int, Tensor] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self._locks = [threading.Lock() for _ in range(min(len(self.shard_rows), _OPEN))]
        size = sum(f["bytes"] for f in self.manifest.files.values())
        self._checks = size <= _CHECKED_BYTES

    @property
    def n_rows(self) -> int:
        """Number of rows in all shards."""
        return int(self.offsets[-1])

    @cached_property
    def documents(self) -> pa.Table:
        """The documents, see `corpora.to_table`."""
        return self._documents()

    def _documents(self, columns: list[str] | None = None) -> pa.Table:
        names = [documents_file(i) for i in range(len(self.shard_rows))]
        tables = list(self.store.read_tables("activations", self.key, names, columns))
        for name in tables[0].column_names:
            kinds = {t.schema.field(name).type for t in tables} - {pa.null()}
            if len(kinds) > 1:  # texts in some shards, numbers alone in others
                tables = [
                    t.set_column(t.column_names.index(name), name, t[name].cast(pa.string()))
                    for t in tables
                ]
        return pa.concat_tables(tables, promote_options="default")

    @cached_property
    def _sizes(self) -> pa.Table:
        """Bucket and number of rows of each document."""
        return self._documents(["bucket", "n_rows"])

    @cached_property
    def corpus(self) -> CorpusConfig:
        """Configuration of the corpus, which fixes the split."""
        return from_dict(CorpusConfig, self.manifest.config["corpus"])

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """The first row of each document, and behind them the number of all rows."""
        counts = self._sizes["n_rows"].to_numpy().astype(np.int64)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def documents_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """For each of the given rows, the index of its document."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def split_of_documents(self, split: corpora.Split) -> npt.NDArray[np.bool_]:
        """Which documents belong to a split."""
        return corpora.split_masks(self._sizes["bucket"].to_numpy(), self.corpus)[split]

    def rows(self, split: corpora.Split) -> Rows:
        """Ascending global indices of the rows whose documents belong to a split."""
        mine = self.split_of_documents(split)
        return Rows(self._starts[:-1][mine], np.diff(self._starts)[mine])

    def shard(self, index: int) -> Tensor:
        """The rows [n, d_in] of one shard as stored, memory-mapped. Its checksum is compared on first use, unless
        there is so much that all of it would have to be read before training: `sparsemill store verify` does.

        Raises:
            CorruptArtefact: the file is missing, truncated or altered.
        """
        with self._lock:
            if index in self._mapped:
                self._mapped.move_to_end(index)
                return self._mapped[index]
        with self._locks[index % len(self._locks)]:  # of several readers only one checks it
            with self._lock:
                if index in self._mapped:
                    return self._mapped[index]
            check = self._checks and index not in self._checked
            path = self.store.local("activations", self.key, shard_file(index), verify=check)
            found = map_tensor(path, "x")
            with self._lock:
                self._checked.add(index)
                self._mapped[index] = found
                if len(self._mapped) > _OPEN:  # each takes a file descriptor
                    self._mapped.popitem(last=False)
            return found

    def provenance(self, index: int) -> pa.Table:
        """One line per row of a shard: doc_id, position, token_id, token_text."""
        return self.store.read_table("activations", self.key, provenance_file(index))

    def gather(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """The given global rows in the given order, as float32 [len(rows), d_in]."""
        order = np.argsort(rows)  # a shard is read from front to back
        ascending = rows[order]
        bounds = np.searchsorted(ascending, self.offsets)
        if bounds[-1] - bounds[0] != len(rows):
            raise IndexError(f"rows are numbered 0 to {self.n_rows - 1}")
        out = torch.empty(len(rows), self.d_in)
        touched = np.flatnonzero(np.diff(bounds)).tolist()
        if (rows[1:] - rows[:-1] == 1).all():  # as they are stored: nothing need be looked up
            for index in touched:
                start, stop = (int(b) for b in bounds[index : index + 2])
                first = int(rows[start] - self.offsets[index])
                out[start:stop] = self.shard(index)[first : first + stop - start]
            return out
        found = torch.empty(len(rows), self.d_in, dtype=self.shard(touched[0]).dtype)
        for index in touched:
            start, stop = (int(b) for b in bounds[index : index + 2])
            here = torch.from_numpy(ascending[start:stop] - self.offsets[index])
            torch.index_select(self.shard(index), 0, here, out=found[start:stop])
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return found.index_select(0, torch.from_numpy(place)).float()

    def column(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A column of the documents, such as "label", for the given rows.

        Raises:
            UserError: there is no such column, or the document of one of the rows has no value.
        """
        if name not in self.documents.column_names:
            raise UserError(
                f"the documents of activations/{self.key} have no column {name!r}: choose from "
                f"{', '.join(self.documents.column_names)}"
            )
        documents, place = np.unique(self.documents_of(rows), return_inverse=True)
        values: npt.NDArray[Any] = self.documents[name].take(documents).to_numpy()
        missing = documents[is_missing(values)]
        if len(missing):
            first = self.documents["doc_id"][int(missing[0])].as_py()
            raise UserError(
                f"column {name!r} of activations/{self.key} has no value for document {first!r}"
                f"{and_more(len(missing))}: give every document of the corpus one"
            )
        return values[place]

    def where(self, row: int) -> str:
        """The shard's file in the store and the row in it, counted from 0."""
        index = int(np.searchsorted(self.offsets, row, side="right")) - 1
        path = self.store.path("activations", self.key, shard_file(index))
        return f"{path}, row {row - self.offsets[index]}"
