"""Evidence: the windows of text that show when a feature fires, gathered in one streaming pass.

Documents are cut into non-overlapping windows of token positions. Per feature two sets of firing
windows are kept: the strongest ones, and a uniform sample (the windows whose seeded hash is
smallest, a bottom-k sketch). One pool of random windows is shared by all features together with
the set of features that fire in each, so that a non-firing example is verified, not assumed.

    evidence = Evidence(config, n_features)
    evidence.update(row_ptr, col, val, tokens)      # once per shard
    evidence.merge(other)                           # what another process gathered
    tables = evidence.tables(documents)             # Parquet-ready

Every rule is a total order over windows named by (document, window), so neither the partition of
the documents into shards nor the order of merging can change the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext._sketch import (
    Float32,
    Int32,
    Int64,
    Sketch,
    compact,
    concatenate,
    empty_sketch,
    rank_in_run,
    runs,
    select,
    sketch_of_shard,
    take_pairs,
    take_windows,
)
from sae_ext.config import AnalyseConfig
from sae_ext.errors import UserError

PER_DOCUMENT = 2
"""Most windows of one document among the strongest windows of a feature."""


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one shard's rows. Whole documents, each contiguous and ordered by position."""

    doc: Int64
    """[n] index of the row's document in the table of documents."""
    position: Int32
    """[n] token position within the document."""
    text: npt.NDArray[Any]
    """[n] token text (an object or a str array)."""


@dataclass(frozen=True)
class EvidenceTables:
    """What the pass found, as tables.

    windows: one row per (feature, kind, rank), sorted so: written in small row groups, the evidence
    of one feature is read by decoding one or two of them. Columns: feature int32; kind "top"
    (strongest first) or "sample" (uniform); rank int32 within feature and kind; doc_id string; doc
    int64 (row in the table of documents); bucket int16 (0..99, decides the split); start int32
    (position of the first token); tokens list<string>; activations list<float32> (this feature's,
    0 where silent); max float32.

    pool: one row per window, in the order of the sketch. Columns: doc_id, doc, bucket, start,
    tokens as above; features list<int32> (every feature that fires somewhere in the window).
    """

    windows: pa.Table
    pool: pa.Table


class Evidence:
    """A mergeable, deterministic sketch of when each feature fires.

    Memory is bounded by n_features · (top_k + sample) windows plus the pool, whatever the size of
    the corpus. Objects pickle.

    Args:
        config: window length and how much to keep.
        n_features: number of features (d_sae); activations must refer to 0..n_features-1.
    """

    def __init__(self, config: AnalyseConfig, n_features: int) -> None:
        if config.window > 65536:
            raise UserError(f"window must be at most 65536 tokens, got {config.window}")
        self.config = config
        self.n_features = n_features
        self._sketch: Sketch | None = None
        self._docs: Int64 = np.zeros(0, np.int64)

    def update(self, row_ptr: Int64, col: Int32, val: Float32, tokens: TokenTable) -> None:
        """Add one shard.

        Args:
            row_ptr: [n + 1] where each row's entries begin in `col` and `val` (CSR).
            col: [nnz] feature of each entry.
            val: [nnz] activation of each entry; entries that are not positive count as silent.
            tokens: [n] the rows' tokens.

        Raises:
            UserError: arrays disagree in length, a feature is out of range, the rows of a document
                are not contiguous and ordered, or a document was seen before.
        """
        _check_shard(row_ptr, col, val, tokens, self.n_features)
        if len(tokens.doc) == 0:
            return
        docs = runs(tokens.doc)
        self._claim(tokens.doc[docs])
        fresh = sketch_of_shard(row_ptr, col, val, tokens, self.config, PER_DOCUMENT)
        self._absorb(compact(fresh, self.config))

    def merge(self, other: Evidence) -> None:
        """Add what `other` has gathered over other documents; `other` stays as it is.

        Raises:
            UserError: the two were made with different settings or share a document.
        """
        if (other.config, other.n_features) != (self.config, self.n_features):
            raise UserError(
                "evidence of different settings cannot be merged: use one config for all shards"
            )
        self._claim(other._docs)
        if other._sketch is not None:
            self._absorb(other._sketch)

    def tables(self, documents: pa.Table) -> EvidenceTables:
        """The evidence as tables.

        Args:
            documents: the corpus' documents in the order that `TokenTable.doc` counts; columns
                doc_id and bucket are read.

        Raises:
            UserError: the evidence refers to a document beyond the table.
        """
        sketch = self._sketch if self._sketch is not None else empty_sketch()
        if len(self._docs) and self._docs[-1] >= documents.num_rows:
            raise UserError(
                f"the evidence refers to document {self._docs[-1]}, but documents.parquet has "
                f"{documents.num_rows} rows: analyse again with the documents of this corpus"
            )
        return EvidenceTables(
            windows=_windows_table(sketch, self.config, documents),
            pool=_pool_table(sketch, documents),
        )

    def _claim(self, docs: Int64) -> None:
        docs = np.sort(docs)
        twice = np.intersect1d(self._docs, docs, assume_unique=True)
        if len(twice):
            raise UserError(
                f"document {twice[0]} was added twice: a document's rows must lie in one shard, "
                "and each shard be added once"
            )
        self._docs = np.sort(np.concatenate([self._docs, docs]))

    def _absorb(self, fresh: Sketch) -> None:
        if self._sketch is None:
            self._sketch = fresh
        else:
            self._sketch = compact(concatenate(self._sketch, fresh), self.config)


def _check_shard(
    row_ptr: Int64, col: Int32, val: Float32, tokens: TokenTable, n_features: int
) -> None:
    n = len(tokens.doc)
    if len(tokens.position) != n or len(tokens.text) != n or len(row_ptr) != n + 1:
        raise UserError(
            f"shard: {n} rows of tokens, but {len(tokens.position)} positions, {len(tokens.text)} "
            f"texts and {len(row_ptr) - 1} rows of activations: they must describe the same rows"
        )
    if len(col) != len(val) or row_ptr[0] != 0 or row_ptr[-1] != len(col):
        raise UserError(
            f"shard: row_ptr ends at {row_ptr[-1]}, but there are {len(col)} features and "
            f"{len(val)} activations: the three arrays of a CSR matrix must agree"
        )
    if len(col) and (col.min() < 0 or col.max() >= n_features):
        raise UserError(
            f"shard: features {col.min()}..{col.max()} are outside 0..{n_features - 1}: use "
            "activations of the same SAE"
        )
    same = tokens.doc[1:] == tokens.doc[:-1]
    backwards = np.flatnonzero(same & (tokens.position[1:] <= tokens.position[:-1]))
    if len(backwards):
        raise UserError(
            f"shard, row {backwards[0] + 1}: positions of document {tokens.doc[backwards[0]]} do "
            "not increase: order the rows of a document by position"
        )
    firsts = tokens.doc[runs(tokens.doc)]
    if len(np.unique(firsts)) != len(firsts):
        raise UserError("shard: the rows of a document are not contiguous: sort rows by document")


# -- to tables ---------------------------------------------------------------------------------


def _windows_table(sketch: Sketch, config: AnalyseConfig, documents: pa.Table) -> pa.Table:
    top, sample = select(sketch, config)
    feature = sketch.pairs.feature
    pair = np.concatenate([top, sample])
    sampled = np.repeat(np.array([0, 1], np.int32), [len(top), len(sample)])
    rank = np.concatenate([rank_in_run(feature[top]), rank_in_run(feature[sample])])
    order = np.lexsort((rank, sampled, feature[pair]))
    pair, sampled, rank = pair[order], sampled[order], rank[order]
    pairs = take_pairs(sketch.pairs, pair)
    common, ptr = _window_columns(sketch, pairs.window, documents)
    activations = np.zeros(ptr[-1], np.float32)
    activations[np.repeat(ptr[:-1], np.diff(pairs.ptr)) + pairs.offset] = pairs.value
    kind = pa.DictionaryArray.from_arrays(pa.array(sampled), pa.array(["top", "sample"]))
    return pa.table(
        {
            "feature": pa.array(pairs.feature, pa.int32()),
            "kind": kind.cast(pa.string()),
            "rank": pa.array(rank, pa.int32()),
            **common,
            "activations": pa.ListArray.from_arrays(
                pa.array(ptr, pa.int32()), pa.array(activations)
            ),
            "max": pa.array(pairs.max, pa.float32()),
        }
    )


def _pool_table(sketch: Sketch, documents: pa.Table) -> pa.Table:
    common, _ = _window_columns(sketch, sketch.pool.window, documents)
    features = pa.ListArray.from_arrays(
        pa.array(sketch.pool.ptr, pa.int32()), pa.array(sketch.pool.feature, pa.int32())
    )
    return pa.table({**common, "features": features})


def _window_columns(
    sketch: Sketch, window: Int32, documents: pa.Table
) -> tuple[dict[str, pa.Array], Int64]:
    windows = take_windows(sketch.windows, window.astype(np.int64))
    doc = pa.array(windows.doc, pa.int64())
    texts = sketch.vocabulary.take(pa.array(windows.token, pa.int32()))
    columns = {
        "doc_id": documents["doc_id"].combine_chunks().cast(pa.string()).take(doc),
        "doc": doc,
        "bucket": documents["bucket"].combine_chunks().cast(pa.int16()).take(doc),
        "start": pa.array(windows.start, pa.int32()),
        "tokens": pa.ListArray.from_arrays(pa.array(windows.ptr, pa.int32()), texts),
    }
    return columns, windows.ptr
