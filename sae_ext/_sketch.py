"""The sketch behind evidence: what is kept of the firing windows, and how two sketches join.

A sketch is four tables that refer to each other by index: the token vocabulary, the windows of
text, the pairs (feature, window that it fires in) and the pool of random windows. It is built from
one shard, joined with the sketch of other documents, and cut down to what can still be selected.
`sae_ext.evidence` is the public face and writes the tables that a person reads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext.config import AnalyseConfig

if TYPE_CHECKING:
    from sae_ext.evidence import TokenTable

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Windows:
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
class Pairs:
    """One row per (feature, window that it fires in), sorted so; activations ragged by `ptr`."""

    feature: Int32
    window: Int32
    max: Float32
    strong: Bool  # among the strongest few of its document, so may become a top window
    ptr: Int64
    offset: npt.NDArray[np.uint16]
    value: Float32


@dataclass(frozen=True)
class Pool:
    """Random windows and, ragged by `ptr`, the features that fire in each."""

    window: Int32
    ptr: Int64
    feature: Int32


@dataclass(frozen=True)
class Sketch:
    """All that is kept: four tables that refer to each other by index."""

    vocabulary: pa.Array
    windows: Windows
    pairs: Pairs
    pool: Pool


# -- from a shard to a sketch ------------------------------------------------------------------


def empty_sketch() -> Sketch:
    """A sketch of no document at all."""
    none: dict[str, Any] = {"i8": np.zeros(0, np.int64), "i4": np.zeros(0, np.int32)}
    u8, f4, start = np.zeros(0, np.uint64), np.zeros(0, np.float32), np.zeros(1, np.int64)
    return Sketch(
        pa.array([], pa.string()),
        Windows(none["i8"], none["i4"], none["i4"], u8, u8, start, none["i4"]),
        Pairs(none["i4"], none["i4"], f4, np.zeros(0, bool), start, np.zeros(0, np.uint16), f4),
        Pool(none["i4"], start, none["i4"]),
    )


def sketch_of_shard(
    row_ptr: Int64,
    col: Int32,
    val: Float32,
    tokens: TokenTable,
    config: AnalyseConfig,
    per_document: int,
) -> Sketch:
    """Every window and pair of one shard.

    Args:
        row_ptr: [n + 1] where each row's entries begin in `col` and `val` (CSR).
        col: [nnz] feature of each entry.
        val: [nnz] activation of each entry.
        tokens: [n] the rows' tokens, checked.
        config: window length, pool size and seed.
        per_document: most windows of one document that may be among a feature's strongest.
    """
    encoded = pa.array(tokens.text, pa.string()).dictionary_encode()
    code = np.asarray(encoded.indices, dtype=np.int32)
    index = (tokens.position // config.window).astype(np.int32)
    new = np.ones(len(code), bool)
    new[1:] = (tokens.doc[1:] != tokens.doc[:-1]) | (index[1:] != index[:-1])
    first = np.flatnonzero(new)
    window_of_row = np.cumsum(new, dtype=np.int32) - 1
    offset_of_row = np.arange(len(code)) - first[window_of_row]
    windows = Windows(
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
    pairs = replace(pairs, strong=_strongest_of_document(pairs, windows, per_document))
    return Sketch(encoded.dictionary, windows, pairs, _pool_of_shard(windows, pairs, config.pool))


def _pairs_of_shard(
    row_ptr: Int64, col: Int32, val: Float32, window_of_row: Int32, offset_of_row: Int64
) -> Pairs:
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
    return Pairs(
        feature=feature[first].astype(np.int32),
        window=window[first],
        max=np.maximum.reduceat(value, first) if len(first) else value,
        strong=np.ones(len(first), bool),
        ptr=np.append(first, len(feature)).astype(np.int64),
        offset=offset_of_row[row[order]].astype(np.uint16),
        value=value,
    )


def _strongest_of_document(pairs: Pairs, windows: Windows, count: int) -> Bool:
    """Which pairs are among the `count` strongest of their feature in their document.

    Settled here, where the document is whole: a later selection sees only what was kept of it.
    """
    doc = windows.doc[pairs.window]
    new = np.ones(len(doc), bool)
    new[1:] = (pairs.feature[1:] != pairs.feature[:-1]) | (doc[1:] != doc[:-1])
    group = np.cumsum(new)
    order = np.argsort(_weakness(group, pairs.max), kind="stable")
    strong = np.zeros(len(doc), bool)
    strong[order[rank_in_run(group[order]) < count]] = True
    return strong


def _pool_of_shard(windows: Windows, pairs: Pairs, size: int) -> Pool:
    chosen = np.sort(np.argsort(_rarity_rank(windows))[:size])
    wanted = np.zeros(len(windows), bool)
    wanted[chosen] = True
    inside = np.flatnonzero(wanted[pairs.window])
    inside = inside[np.argsort(pairs.window[inside], kind="stable")]
    count = np.bincount(pairs.window[inside], minlength=len(windows))[chosen]
    return Pool(chosen.astype(np.int32), _ptr(count), pairs.feature[inside])


# -- selection ---------------------------------------------------------------------------------


def select(sketch: Sketch, config: AnalyseConfig) -> tuple[Int64, Int64]:
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
    top = order[rank_in_run(pairs.feature[order]) < config.top_k]

    order = np.argsort(
        (_u64(pairs.feature) << np.uint64(32)) | _u64(_rarity_rank(windows)[pairs.window])
    )
    sample = order[rank_in_run(pairs.feature[order]) < config.sample]
    return top, sample


def compact(sketch: Sketch, config: AnalyseConfig) -> Sketch:
    """Drop every pair, pool window and token that no selection can need any more."""
    top, sample = select(sketch, config)
    pairs = take_pairs(sketch.pairs, np.union1d(top, sample))
    pool = sketch.pool
    rank = _rarity_rank(sketch.windows)
    pool = _take_pool(pool, np.argsort(rank[pool.window])[: config.pool])
    return _drop_unused(replace(sketch, pairs=pairs, pool=pool))


def _weakness(group: npt.NDArray[Any], strength: Float32) -> UInt64:
    """A key that sorts by (group, strength descending): positive floats sort as their bits do."""
    bits = np.ascontiguousarray(strength, np.float32).view(np.uint32)
    return (_u64(group) << np.uint64(32)) | _u64(np.uint32(0xFFFFFFFF) - bits)


def _rarity_rank(windows: Windows) -> Int32:
    """Rank of each window by (hash, doc, index); windows are sorted by the last two already."""
    rank = np.empty(len(windows), np.int32)
    rank[np.argsort(windows.rarity, kind="stable")] = np.arange(len(windows), dtype=np.int32)
    return rank


# -- rearranging -------------------------------------------------------------------------------


def concatenate(a: Sketch, b: Sketch) -> Sketch:
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
    pairs = take_pairs(pairs, _order_of_pairs(pairs))
    pool = replace(pool, window=place[pool.window])
    return Sketch(encoded.dictionary, take_windows(windows, order), pairs, pool)


def _join(a: Any, b: Any, **changed: Any) -> Any:
    """Concatenate two tables of one kind field by field, shifting the second's `ptr`."""
    a = replace(a, **changed)
    joined = {name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in vars(a)}
    joined["ptr"] = np.concatenate([a.ptr, a.ptr[-1] + b.ptr[1:]])
    return type(a)(**joined)


def _sort_windows(windows: Windows, pairs: Pairs) -> tuple[Windows, Pairs]:
    order = np.lexsort((windows.index, windows.doc))
    if (order == np.arange(len(order))).all():
        return windows, pairs
    pairs = replace(pairs, window=_inverse(order)[pairs.window])
    return take_windows(windows, order), take_pairs(pairs, _order_of_pairs(pairs))


def _order_of_pairs(pairs: Pairs) -> Int64:
    key = (_u64(pairs.feature) << np.uint64(32)) | _u64(pairs.window)
    return np.argsort(key, kind="stable")


def _drop_unused(sketch: Sketch) -> Sketch:
    used = np.union1d(sketch.pairs.window, sketch.pool.window).astype(np.int64)
    windows = take_windows(sketch.windows, used)
    place = np.zeros(len(sketch.windows), np.int32)
    place[used] = np.arange(len(used), dtype=np.int32)
    code, token = np.unique(windows.token, return_inverse=True)
    return Sketch(
        vocabulary=sketch.vocabulary.take(pa.array(code)),
        windows=replace(windows, token=token.astype(np.int32)),
        pairs=replace(sketch.pairs, window=place[sketch.pairs.window]),
        pool=replace(sketch.pool, window=place[sketch.pool.window]),
    )


def take_windows(windows: Windows, order: Int64) -> Windows:
    """The windows `order`, in that order; a window may be taken more than once."""
    ptr, inner = _take_ragged(windows.ptr, order)
    taken = {k: getattr(windows, k)[order] for k in ("doc", "index", "start", "rarity", "text")}
    return Windows(**taken, ptr=ptr, token=windows.token[inner])


def take_pairs(pairs: Pairs, order: Int64) -> Pairs:
    """The pairs `order`, in that order, with their activations."""
    ptr, inner = _take_ragged(pairs.ptr, order)
    taken = {k: getattr(pairs, k)[order] for k in ("feature", "window", "max", "strong")}
    return Pairs(**taken, ptr=ptr, offset=pairs.offset[inner], value=pairs.value[inner])


def _take_pool(pool: Pool, order: Int64) -> Pool:
    ptr, inner = _take_ragged(pool.ptr, order)
    return Pool(pool.window[order], ptr, pool.feature[inner])


def _take_ragged(ptr: Int64, order: Int64) -> tuple[Int64, Int64]:
    """Row pointers after picking rows `order`, and the index of each inner element picked."""
    length = np.diff(ptr)[order]
    taken = _ptr(length)
    inner = np.arange(taken[-1]) + np.repeat(ptr[order] - taken[:-1], length)
    return taken, inner


# -- small arithmetic --------------------------------------------------------------------------


def runs(values: npt.NDArray[Any]) -> Int64:
    """Where each run of equal values begins."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return np.flatnonzero(new)


def rank_in_run(values: npt.NDArray[Any]) -> Int64:
    """Position of each element within its run of equal values: [a a b b b] to [0 1 0 1 2]."""
    first = runs(values)
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
