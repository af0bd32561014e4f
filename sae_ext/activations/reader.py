"""Reading activations back: memory-mapped shards, splits by document, seeded batches that resume."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from sae_ext import corpora
from sae_ext.config import CorpusConfig
from sae_ext.errors import CorruptArtefact
from sae_ext.store import Store


class Activations:
    """One activations artefact. Opening reads the manifest only; shards are mapped when touched."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.key = key
        self.manifest = store.manifest("activations", key)
        self.d_in: int = self.manifest.extra["d_in"]
        self.shard_rows: list[int] = self.manifest.extra["shard_rows"]
        self.offsets = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        self._mapped: dict[int, npt.NDArray[Any]] = {}

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
        shards = np.searchsorted(self.offsets, rows, side="right") - 1
        for index in np.unique(shards):
            here = shards == index
            out[here] = self.shard(int(index))[rows[here] - self.offsets[index]]
        return torch.from_numpy(out)

    def in_order(self, rows: npt.NDArray[np.int64], batch_rows: int) -> Iterator[Tensor]:
        """The given rows in batches, the last one shorter."""
        for start in range(0, len(rows), batch_rows):
            yield self.gather(rows[start : start + batch_rows])


class ShuffledRows:
    """Endless batches over rows: each epoch is one seeded uniform permutation, the tail is carried on.

    `cursor` (rows handed out so far) is all it takes to resume at the same batch.
    """

    def __init__(
        self, activations: Activations, rows: npt.NDArray[np.int64], batch_rows: int, seed: int
    ) -> None:
        self.activations = activations
        self.rows = rows
        self.batch_rows = batch_rows
        self.seed = seed
        self.cursor = 0
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = rows

    def next(self) -> Tensor:
        """The next batch, float32 [batch_rows, d_in]."""
        picked: list[npt.NDArray[np.int64]] = []
        wanted = self.batch_rows
        while wanted:
            epoch, position = divmod(self.cursor, len(self.rows))
            if epoch != self._epoch:
                generator = np.random.default_rng([self.seed, epoch])
                self._order, self._epoch = generator.permutation(self.rows), epoch
            part = self._order[position : position + wanted]
            picked.append(part)
            wanted -= len(part)
            self.cursor += len(part)
        return self.activations.gather(np.concatenate(picked))


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
