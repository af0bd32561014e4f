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

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext.config import AnalyseConfig
from sae_ext.errors import UserError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

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


@dataclass(frozen=True)
class _Windows:
    """Windows sorted by (doc, index); tokens are codes into a vocabulary, ragged by `ptr`."""

    doc: Int64
    index: Int32
    start: Int32
    rarity: UInt64  # seeded hash of (doc, index): the smallest ones form the samples
    text: UInt64  # hash of the token texts, equal for identical windows
    ptr: Int64
    token: Int32

    def __len__(self) -> int:
        return len(self.doc)


@dataclass(frozen=True)
class _Pairs:
    """One row per (feature, window that it fires in), sorted so; activations ragged by `ptr`."""

    feature: Int32
    window: Int32
    max: Float32
    strong: Bool  # among the `PER_DOCUMENT` strongest of its document, so may become a top window
    ptr: Int64
    offset: npt.NDArray[np.uint16]
    value: Float32


@dataclass(frozen=True)
class _Pool:
    """Random windows and, ragged by `ptr`, the features that fire in each."""

    window: Int32
    ptr: Int64
    feature: Int32


@dataclass(frozen=True)
class _Sketch:
    """All that is kept: four tables that refer to each other by index."""

    vocabulary: pa.Array
    windows: _Windows
    pairs: _Pairs
    pool: _Pool


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
        self._sketch: _Sketch | None = None
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
        docs = _runs(tokens.doc)
        self._claim(tokens.doc[docs])
        fresh = self._compact(_sketch_of_shard(row_ptr, col, val, tokens, self.config))
        self._absorb(fresh)

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
        sketch = self._sketch if self._sketch is not None else _empty_sketch()
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

    def _absorb(self, fresh: _Sketch) -> None:
        if self._sketch is None:
            self._sketch = fresh
        else:
            self._sketch = self._compact(_concatenate(self._sketch, fresh))

    def _compact(self, sketch: _Sketch) -> _Sketch:
        """Drop every pair, pool window and token that no selection can need any more."""
        top, sample = _select(sketch, self.config)
        pairs = _take_pairs(sketch.pairs, np.union1d(top, sample))
        pool = sketch.pool
        rank = _rarity_rank(sketch.windows)
        pool = _take_pool(pool, np.argsort(rank[pool.window])[: self.config.pool])
        return _drop_unused(replace(sketch, pairs=pairs, pool=pool))


# -- from a shard to a sketch ------------------------------------------------------------------


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
    firsts = tokens.doc[_runs(tokens.doc)]
    if len(np.unique(firsts)) != len(firsts):
        raise UserError("shard: the rows of a document are not contiguous: sort rows by document")


def _sketch_of_shard(
    row_ptr: Int64, col: Int32, val: Float32, tokens: TokenTable, config: AnalyseConfig
) -> _Sketch:
    encoded = pa.array(tokens.text, pa.string()).dictionary_encode()
    code = np.asarray(encoded.indices, dtype=np.int32)
    index = (tokens.position // config.window).astype(np.int32)
    new = np.ones(len(code), bool)
    new[1:] = (tokens.doc[1:] != tokens.doc[:-1]) | (index[1:] != index[:-1])
    first = np.flatnonzero(new)
    window_of_row = np.cumsum(new, dtype=np.int32) - 1
    offset_of_row = np.arange(len(code)) - first[window_of_row]
    windows = _Windows(
        doc=tokens.doc[first].astype(np.int64),
        index=index[first],
        start=tokens.position[first].astype(np.int32),
        rarity=_mix(
            _mix(tokens.doc[first].astype(np.uint64) + _seed(config.seed)) + _u64(index[first])
        ),
        text=_text_hash(encoded.dictionary, code, first, offset_of_row),
        ptr=np.append(first, len(code)).astype(np.int64),
        token=code,
    )
    pairs = _pairs_of_shard(row_ptr, col, val, window_of_row, offset_of_row)
    windows, pairs = _sort_windows(windows, pairs)
    pairs = replace(pairs, strong=_strongest_of_document(pairs, windows))
    return _Sketch(encoded.dictionary, windows, pairs, _pool_of_shard(windows, pairs, config.pool))


def _pairs_of_shard(
    row_ptr: Int64, col: Int32, val: Float32, window_of_row: Int32, offset_of_row: Int64
) -> _Pairs:
    row = np.repeat(np.arange(len(window_of_row)), np.diff(row_ptr))
    if not (val > 0).all():
        fires = val > 0
        row, col, val = row[fires], col[fires], val[fires]
    # Rows come in window order, so a stable sort by feature alone orders by (feature, window);
    # 16-bit keys get numpy's linear-time radix sort.
    narrow = col.astype(np.uint16) if len(col) and col.max() < 65536 else col
    order = np.argsort(narrow, kind="stable")
    feature, window = col[order], window_of_row[row[order]]
    new = np.ones(len(feature), bool)
    new[1:] = (feature[1:] != feature[:-1]) | (window[1:] != window[:-1])
    first = np.flatnonzero(new)
    value = val[order].astype(np.float32)
    return _Pairs(
        feature=feature[first].astype(np.int32),
        window=window[first],
        max=np.maximum.reduceat(value, first) if len(first) else value,
        strong=np.ones(len(first), bool),
        ptr=np.append(first, len(feature)).astype(np.int64),
        offset=offset_of_row[row[order]].astype(np.uint16),
        value=value,
    )


def _strongest_of_document(pairs: _Pairs, windows: _Windows) -> Bool:
    """Which pairs are among the strongest of their feature in their document.

    Settled here, where the document is whole: a later selection sees only what was kept of it.
    """
    doc = windows.doc[pairs.window]
    new = np.ones(len(doc), bool)
    new[1:] = (pairs.feature[1:] != pairs.feature[:-1]) | (doc[1:] != doc[:-1])
    group = np.cumsum(new)
    order = np.argsort(_weakness(group, pairs.max), kind="stable")
    strong = np.zeros(len(doc), bool)
    strong[order[_rank_in_run(group[order]) < PER_DOCUMENT]] = True
    return strong


def _pool_of_shard(windows: _Windows, pairs: _Pairs, size: int) -> _Pool:
    chosen = np.sort(np.argsort(_rarity_rank(windows))[:size])
    wanted = np.zeros(len(windows), bool)
    wanted[chosen] = True
    inside = np.flatnonzero(wanted[pairs.window])
    inside = inside[np.argsort(pairs.window[inside], kind="stable")]
    count = np.bincount(pairs.window[inside], minlength=len(windows))[chosen]
    return _Pool(chosen.astype(np.int32), _ptr(count), pairs.feature[inside])


# -- selection ---------------------------------------------------------------------------------


def _select(sketch: _Sketch, config: AnalyseConfig) -> tuple[Int64, Int64]:
    """Indices of the top pairs and of the sampled pairs, each ordered by (feature, rank).

    Strength orders by (max descending, doc, window); of windows with identical text only the
    strongest counts. Any pair that another one displaces is displaced by K better ones or by its
    twin, and both stay, so selecting again after a merge gives what one pass would have given.
    """
    pairs, windows = sketch.pairs, sketch.windows
    order = np.flatnonzero(pairs.strong)
    order = order[np.argsort(_weakness(pairs.feature, pairs.max)[order], kind="stable")]
    text = windows.text[pairs.window[order]] ^ _mix(_u64(pairs.feature[order]))
    order = order[np.sort(np.unique(text, return_index=True)[1])]
    top = order[_rank_in_run(pairs.feature[order]) < config.top_k]

    order = np.argsort(
        (_u64(pairs.feature) << np.uint64(32)) | _u64(_rarity_rank(windows)[pairs.window])
    )
    sample = order[_rank_in_run(pairs.feature[order]) < config.sample]
    return top, sample


def _weakness(group: npt.NDArray[Any], strength: Float32) -> UInt64:
    """A key that sorts by (group, strength descending): positive floats sort as their bits do."""
    bits = np.ascontiguousarray(strength, np.float32).view(np.uint32)
    return (_u64(group) << np.uint64(32)) | _u64(np.uint32(0xFFFFFFFF) - bits)


def _rarity_rank(windows: _Windows) -> Int32:
    """Rank of each window by (hash, doc, index); windows are sorted by the last two already."""
    rank = np.empty(len(windows), np.int32)
    rank[np.argsort(windows.rarity, kind="stable")] = np.arange(len(windows), dtype=np.int32)
    return rank


# -- rearranging -------------------------------------------------------------------------------


def _concatenate(a: _Sketch, b: _Sketch) -> _Sketch:
    """Two sketches over different documents as one, sorted again."""
    encoded = pa.chunked_array([a.vocabulary, b.vocabulary]).combine_chunks().dictionary_encode()
    recode = np.asarray(encoded.indices, dtype=np.int32)
    codes = (recode[a.windows.token], recode[len(a.vocabulary) + b.windows.token])
    shift = np.int32(len(a.windows))
    windows = _join(a.windows, replace(b.windows, token=codes[1]), token=codes[0])
    pairs = _join(a.pairs, replace(b.pairs, window=b.pairs.window + shift))
    pool = _join(a.pool, replace(b.pool, window=b.pool.window + shift))
    order = np.lexsort((windows.index, windows.doc))
    place = _inverse(order)
    pairs = replace(pairs, window=place[pairs.window])
    pairs = _take_pairs(pairs, _order_of_pairs(pairs))
    pool = replace(pool, window=place[pool.window])
    return _Sketch(encoded.dictionary, _take_windows(windows, order), pairs, pool)


def _join(a: Any, b: Any, **changed: Any) -> Any:
    """Concatenate two tables of one kind field by field, shifting the second's `ptr`."""
    a = replace(a, **changed)
    joined = {name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in vars(a)}
    joined["ptr"] = np.concatenate([a.ptr, a.ptr[-1] + b.ptr[1:]])
    return type(a)(**joined)


def _sort_windows(windows: _Windows, pairs: _Pairs) -> tuple[_Windows, _Pairs]:
    order = np.lexsort((windows.index, windows.doc))
    if (order == np.arange(len(order))).all():
        return windows, pairs
    pairs = replace(pairs, window=_inverse(order)[pairs.window])
    return _take_windows(windows, order), _take_pairs(pairs, _order_of_pairs(pairs))


def _order_of_pairs(pairs: _Pairs) -> Int64:
    key = (_u64(pairs.feature) << np.uint64(32)) | _u64(pairs.window)
    return np.argsort(key, kind="stable")


def _drop_unused(sketch: _Sketch) -> _Sketch:
    used = np.union1d(sketch.pairs.window, sketch.pool.window).astype(np.int64)
    windows = _take_windows(sketch.windows, used)
    place = np.zeros(len(sketch.windows), np.int32)
    place[used] = np.arange(len(used), dtype=np.int32)
    code, token = np.unique(windows.token, return_inverse=True)
    return _Sketch(
        vocabulary=sketch.vocabulary.take(pa.array(code)),
        windows=replace(windows, token=token.astype(np.int32)),
        pairs=replace(sketch.pairs, window=place[sketch.pairs.window]),
        pool=replace(sketch.pool, window=place[sketch.pool.window]),
    )


def _take_windows(windows: _Windows, order: Int64) -> _Windows:
    ptr, inner = _take_ragged(windows.ptr, order)
    taken = {k: getattr(windows, k)[order] for k in ("doc", "index", "start", "rarity", "text")}
    return _Windows(**taken, ptr=ptr, token=windows.token[inner])


def _take_pairs(pairs: _Pairs, order: Int64) -> _Pairs:
    ptr, inner = _take_ragged(pairs.ptr, order)
    taken = {k: getattr(pairs, k)[order] for k in ("feature", "window", "max", "strong")}
    return _Pairs(**taken, ptr=ptr, offset=pairs.offset[inner], value=pairs.value[inner])


def _take_pool(pool: _Pool, order: Int64) -> _Pool:
    ptr, inner = _take_ragged(pool.ptr, order)
    return _Pool(pool.window[order], ptr, pool.feature[inner])


def _take_ragged(ptr: Int64, order: Int64) -> tuple[Int64, Int64]:
    """Row pointers after picking rows `order`, and the index of each inner element picked."""
    length = np.diff(ptr)[order]
    taken = _ptr(length)
    inner = np.arange(taken[-1]) + np.repeat(ptr[order] - taken[:-1], length)
    return taken, inner


# -- to tables ---------------------------------------------------------------------------------


def _windows_table(sketch: _Sketch, config: AnalyseConfig, documents: pa.Table) -> pa.Table:
    top, sample = _select(sketch, config)
    feature = sketch.pairs.feature
    pair = np.concatenate([top, sample])
    sampled = np.repeat(np.array([0, 1], np.int32), [len(top), len(sample)])
    rank = np.concatenate([_rank_in_run(feature[top]), _rank_in_run(feature[sample])])
    order = np.lexsort((rank, sampled, feature[pair]))
    pair, sampled, rank = pair[order], sampled[order], rank[order]
    pairs = _take_pairs(sketch.pairs, pair)
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


def _pool_table(sketch: _Sketch, documents: pa.Table) -> pa.Table:
    common, _ = _window_columns(sketch, sketch.pool.window, documents)
    features = pa.ListArray.from_arrays(
        pa.array(sketch.pool.ptr, pa.int32()), pa.array(sketch.pool.feature, pa.int32())
    )
    return pa.table({**common, "features": features})


def _window_columns(
    sketch: _Sketch, window: Int32, documents: pa.Table
) -> tuple[dict[str, pa.Array], Int64]:
    windows = _take_windows(sketch.windows, window.astype(np.int64))
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


def _empty_sketch() -> _Sketch:
    none: dict[str, Any] = {"i8": np.zeros(0, np.int64), "i4": np.zeros(0, np.int32)}
    u8, f4, start = np.zeros(0, np.uint64), np.zeros(0, np.float32), np.zeros(1, np.int64)
    return _Sketch(
        pa.array([], pa.string()),
        _Windows(none["i8"], none["i4"], none["i4"], u8, u8, start, none["i4"]),
        _Pairs(none["i4"], none["i4"], f4, np.zeros(0, bool), start, np.zeros(0, np.uint16), f4),
        _Pool(none["i4"], start, none["i4"]),
    )


# -- small arithmetic --------------------------------------------------------------------------


def _runs(values: npt.NDArray[Any]) -> Int64:
    """Where each run of equal values begins."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return np.flatnonzero(new)


def _rank_in_run(values: npt.NDArray[Any]) -> Int64:
    """Position of each element within its run of equal values: [a a b b b] to [0 1 0 1 2]."""
    first = _runs(values)
    rank: Int64 = np.arange(len(values)) - np.repeat(first, np.diff(np.append(first, len(values))))
    return rank


def _ptr(length: npt.NDArray[Any]) -> Int64:
    ptr = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length, out=ptr[1:])
    return ptr


def _inverse(order: Int64) -> Int32:
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return place


def _u64(values: npt.NDArray[Any]) -> UInt64:
    return values.astype(np.uint64)


def _seed(seed: int) -> np.uint64:
    return np.uint64(
        int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big")
    )


def _mix(x: UInt64) -> UInt64:
    """The splitmix64 finaliser: every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _text_hash(vocabulary: pa.Array, code: Int32, first: Int64, offset: Int64) -> UInt64:
    """One hash per window over its token texts in order."""
    digests = b"".join(
        hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for t in vocabulary.to_pylist()
    )
    token = np.frombuffer(digests, np.uint64)[code]
    return np.add.reduceat(_mix(token + _mix(_u64(offset))), first)
