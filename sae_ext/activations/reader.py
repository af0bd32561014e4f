"""Reading activations back: memory-mapped shards, splits and labels by document."""

from __future__ import annotations

import json
import mmap
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from sae_ext import corpora
from sae_ext.activations.dataset import Dataset, and_more, is_missing
from sae_ext.config import CorpusConfig
from sae_ext.errors import CorruptArtefact, UserError
from sae_ext.store import Store


class Activations(Dataset):
    """One activations artefact. Opening reads the manifest only; shards are mapped when touched."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.key = key
        self.manifest = store.manifest("activations", key)
        self.d_in: int = self.manifest.extra["d_in"]
        self.shard_rows: list[int] = self.manifest.extra["shard_rows"]
        self.offsets = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        self._mapped: dict[int, npt.NDArray[Any]] = {}
        self._locks = [threading.Lock() for _ in self.shard_rows]

    @property
    def n_rows(self) -> int:
        """Number of rows in all shards."""
        return int(self.offsets[-1])

    @cached_property
    def documents(self) -> pa.Table:
        """The documents, see `corpora.to_table`."""
        return self.store.read_table("activations", self.key, "documents.parquet")

    @cached_property
    def corpus(self) -> CorpusConfig:
        """Configuration of the corpus, which fixes the split."""
        return CorpusConfig(**self.manifest.config["corpus"])

    @cached_property
    def document_of_row(self) -> npt.NDArray[np.int32]:
        """For each row, the index of its document."""
        counts = self.documents["n_rows"].to_numpy()
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def split_of_documents(self, split: corpora.Split) -> npt.NDArray[np.bool_]:
        """Which documents belong to a split."""
        return corpora.split_masks(self.documents["bucket"].to_numpy(), self.corpus)[split]

    def rows(self, split: corpora.Split) -> npt.NDArray[np.int64]:
        """Ascending global indices of the rows whose documents belong to a split."""
        return np.flatnonzero(self.split_of_documents(split)[self.document_of_row])

    def shard(self, index: int) -> npt.NDArray[Any]:
        """The rows [n, d_in] of one shard, memory-mapped; its checksum is compared on first use.

        Raises:
            CorruptArtefact: the file is missing, truncated or altered.
        """
        with self._locks[index]:  # of several readers only one checks it
            if index not in self._mapped:
                path = self.store.local("activations", self.key, shard_file(index), verify=True)
                self._mapped[index] = map_tensor(path, "x")
            return self._mapped[index]

    def provenance(self, index: int) -> pa.Table:
        """One line per row of a shard: doc_id, position, token_id, token_text."""
        return self.store.read_table("activations", self.key, provenance_file(index))

    def gather(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """The given global rows in the given order, as float32 [len(rows), d_in]."""
        out = np.empty((len(rows), self.d_in), dtype=np.float32)
        ascending = np.argsort(rows)  # a shard is read from front to back
        bounds = np.searchsorted(rows[ascending], self.offsets)
        if bounds[-1] - bounds[0] != len(rows):
            raise IndexError(f"rows are numbered 0 to {self.n_rows - 1}")
        for index in np.flatnonzero(np.diff(bounds)).tolist():
            places = ascending[bounds[index] : bounds[index + 1]]
            out[places] = self.shard(index)[rows[places] - self.offsets[index]]
        return torch.from_numpy(out)

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
        documents, place = np.unique(self.document_of_row[rows], return_inverse=True)
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


def shard_file(index: int) -> str:
    """Name of a shard's array file."""
    return f"shard-{index:05d}.safetensors"


def provenance_file(index: int) -> str:
    """Name of a shard's provenance table."""
    return f"shard-{index:05d}.parquet"


_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def map_tensor(path: Path, name: str) -> npt.NDArray[Any]:
    """One tensor of a safetensors file as a read-only array on the mapped file, nothing copied.

    Raises:
        CorruptArtefact: the file is not a readable safetensors file holding `name`.
    """
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        header_bytes = int.from_bytes(mapped[:8], "little")
        entry = json.loads(mapped[8 : 8 + header_bytes])[name]
        flat = np.frombuffer(
            mapped,
            dtype=_DTYPES[entry["dtype"]],
            count=int(np.prod(entry["shape"])),
            offset=8 + header_bytes + entry["data_offsets"][0],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(
            f"{path} is not a readable shard ({type(error).__name__}): delete that file and run the same "
            "command, which makes it again"
        ) from error
    return flat.reshape(entry["shape"])


def row_statistics(sums: list[dict[str, npt.NDArray[np.float64]]], n_rows: int) -> dict[str, Any]:
    """Mean, variance per input and mean norm over all rows, from the shards' float64 sums in order."""
    total = {
        name: np.sum([s[name] for s in sums], axis=0) for name in ("sum", "sum_sq", "norm_sum")
    }
    mean = total["sum"] / n_rows
    return {
        "mean": mean.tolist(),
        "variance": (total["sum_sq"] / n_rows - np.square(mean)).tolist(),
        "mean_norm": float(total["norm_sum"][0] / n_rows),
    }
