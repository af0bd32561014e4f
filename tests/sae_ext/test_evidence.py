from __future__ import annotations

import pickle
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ext.config import AnalyseConfig
from sae_ext.errors import UserError
from sae_ext.evidence import PER_DOCUMENT, Evidence, TokenTable

N_FEATURES = 5
SMALL = AnalyseConfig(window=4, top_k=3, sample=4, pool=5, seed=1)


def corpus(seed: int, n_documents: int = 12, ties: bool = True):
    """Documents as (words, dense activations); few words and values, so that there are ties."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n_documents):
        n = int(rng.integers(1, 14))
        value = rng.integers(1, 4, (n, N_FEATURES)) if ties else rng.random((n, N_FEATURES)) + 0.1
        fires = rng.random((n, N_FEATURES)) < [0.9, 0.4, 0.1, 0.02, 0.0]
        made.append(
            (
                rng.choice(["a", "b", "##c"], n, p=[0.8, 0.15, 0.05]),
                np.where(fires, value, 0).astype(np.float32),
            )
        )
    return made


def documents(n: int) -> pa.Table:
    buckets = pa.array(np.arange(n) * 7 % 100, pa.int16())
    return pa.table({"doc_id": [f"d{i}" for i in range(n)], "bucket": buckets})


def shard(made, docs) -> tuple[np.ndarray, np.ndarray, np.ndarray, TokenTable]:
    """The rows of some documents, as CSR."""
    words = [made[d][0] for d in docs]
    dense = np.concatenate([made[d][1] for d in docs])
    row, col = np.nonzero(dense)
    row_ptr = np.searchsorted(row, np.arange(len(dense) + 1)).astype(np.int64)
    tokens = TokenTable(
        doc=np.repeat(np.array(docs, np.int64), [len(w) for w in words]),
        position=np.concatenate([np.arange(len(w), dtype=np.int32) for w in words]),
        text=np.concatenate(words).astype(object),
    )
    return row_ptr, col.astype(np.int32), dense[row, col], tokens


def evidence_of(made, docs, config=SMALL) -> Evidence:
    evidence = Evidence(config, N_FEATURES)
    evidence.update(*shard(made, docs))
    return evidence


def tables_of(evidence: Evidence, n: int) -> tuple[pa.Table, pa.Table]:
    tables = evidence.tables(documents(n))
    return tables.windows, tables.pool


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    owners=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    order=st.permutations(range(5)),
    by_update=st.booleans(),
)
def test_partition_and_order_of_the_documents_do_not_change_the_evidence(
    seed, owners, order, by_update
):
    made = corpus(seed)
    whole = tables_of(evidence_of(made, range(12)), 12)
    parts = [[d for d in range(12) if owners[d] == part] for part in order]
    pieces = Evidence(SMALL, N_FEATURES)
    for part in filter(None, parts):
        if by_update:
            pieces.update(*shard(made, part[::-1]))
        else:
            pieces.merge(pickle.loads(pickle.dumps(evidence_of(made, part))))
    windows, pool = tables_of(pieces, 12)
    assert windows.equals(whole[0])
    assert pool.equals(whole[1])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), split=st.integers(1, 11), again=st.integers(1, 11))
def test_merging_is_associative(seed, split, again):
    made = corpus(seed)
    low, high = sorted((split, again))
    parts = [p for p in (range(low), range(low, high), range(high, 12)) if len(p)]
    left = Evidence(SMALL, N_FEATURES)
    for part in parts:
        left.merge(evidence_of(made, part))
    right = Evidence(SMALL, N_FEATURES)
    for part in reversed(parts):
        inner = evidence_of(made, part)
        inner.merge(right)
        right = inner
    assert tables_of(left, 12)[0].equals(tables_of(right, 12)[0])


def by_hand(made, feature: int, config: AnalyseConfig):
    """The strongest windows of a feature by the documented rules, in plain Python."""
    found = []
    for doc, (words, dense) in enumerate(made):
        own = []
        for start in range(0, len(words), config.window):
            part = slice(start, start + config.window)
            peak = dense[part, feature].max()
            if peak > 0:
                own.append((-peak, doc, start, tuple(words[part])))
        found += sorted(own)[:PER_DOCUMENT]
    kept = {}
    for entry in sorted(found):
        kept.setdefault(entry[3], entry)
    return sorted(kept.values())[: config.top_k]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_top_windows_are_those_found_by_hand(seed, ties):
    made = corpus(seed, ties=ties)
    rows = tables_of(evidence_of(made, range(12)), 12)[0].to_pylist()
    for feature in range(N_FEATURES):
        top = [r for r in rows if r["feature"] == feature and r["kind"] == "top"]
        found = [(-np.float32(r["max"]), r["doc"], r["start"], tuple(r["tokens"])) for r in top]
        assert found == by_hand(made, feature, SMALL)
        assert [r["rank"] for r in top] == list(range(len(top)))


def test_a_document_gives_at_most_two_of_the_strongest_windows():
    words = np.array([f"t{i}" for i in range(40)])
    strong, weak = np.full((40, N_FEATURES), 9.0), np.full((40, N_FEATURES), 1.0)
    made = [(words, strong.astype(np.float32)), (words[::-1], weak.astype(np.float32))]
    rows = tables_of(evidence_of(made, [0, 1]), 2)[0].to_pylist()
    top = [(r["doc"], r["start"]) for r in rows if r["kind"] == "top" and r["feature"] == 0]
    assert top == [(0, 0), (0, 4), (1, 0)]


def test_each_row_holds_its_windows_tokens_and_this_features_activations():
    made = corpus(3)
    windows, _ = tables_of(evidence_of(made, range(12)), 12)
    assert windows.num_rows > 20
    for row in windows.to_pylist():
        words, dense = made[row["doc"]]
        part = slice(row["start"], row["start"] + SMALL.window)
        assert row["start"] % SMALL.window == 0
        assert row["tokens"] == list(words[part])
        assert row["activations"] == dense[part, row["feature"]].tolist()
        assert row["max"] == max(row["activations"]) > 0
        assert (row["doc_id"], row["bucket"]) == (f"d{row['doc']}", row["doc"] * 7 % 100)


def test_the_pool_lists_exactly_the_features_that_fire():
    made = corpus(4)
    _, pool = tables_of(evidence_of(made, range(12)), 12)
    assert pool.num_rows == SMALL.pool
    for row in pool.to_pylist():
        dense = made[row["doc"]][1][row["start"] : row["start"] + SMALL.window]
        assert row["features"] == np.flatnonzero(dense.any(0)).tolist()


def test_the_pool_keeps_windows_in_which_nothing_fires():
    made = [(np.array(["x", "y"]), np.zeros((2, N_FEATURES), np.float32))]
    windows, pool = tables_of(evidence_of(made, [0]), 1)
    assert windows.num_rows == 0
    assert pool["features"].to_pylist() == [[]]


def test_the_sample_is_uniform_over_firing_windows():
    n, config = 200, AnalyseConfig(window=4, sample=20)
    made = [(np.array([f"t{d}"]), np.ones((1, N_FEATURES), np.float32) * (d + 1)) for d in range(n)]
    drawn: dict[int, int] = defaultdict(int)
    for seed in range(60):
        evidence = evidence_of(made, range(n), AnalyseConfig(window=4, sample=20, seed=seed))
        rows = tables_of(evidence, n)[0].to_pylist()
        for row in rows:
            if row["feature"] == 0 and row["kind"] == "sample":
                drawn[row["doc"]] += 1
    assert sum(drawn.values()) == 60 * config.sample
    weak, strong = (sum(drawn[d] for d in half) for half in (range(100), range(100, 200)))
    assert abs(weak - strong) < 4 * np.sqrt(1200 * 0.9)  # four standard errors
    assert len(drawn) > 190


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"window": 6}, "windows"),
        ({"top_k": 2}, "windows"),
        ({"sample": 2}, "windows"),
        ({"pool": 2}, "pool"),
        ({"seed": 2}, "pool"),
    ],
)
def test_every_setting_changes_the_evidence(change, differs):
    made = corpus(5)
    changed = AnalyseConfig(**{**vars(SMALL), **change})
    before = evidence_of(made, range(12)).tables(documents(12))
    after = evidence_of(made, range(12), changed).tables(documents(12))
    assert not getattr(before, differs).equals(getattr(after, differs))


def test_positions_that_do_not_begin_at_zero_keep_their_numbers():
    evidence = Evidence(SMALL, 1)
    tokens = TokenTable(
        np.zeros(3, np.int64), np.array([3, 4, 5], np.int32), np.array(["a", "b", "c"])
    )
    evidence.update(
        np.array([0, 1, 2, 3]), np.zeros(3, np.int32), np.array([1, 2, 3], np.float32), tokens
    )
    rows = [r for r in tables_of(evidence, 1)[0].to_pylist() if r["kind"] == "top"]
    assert [(r["start"], r["tokens"]) for r in rows] == [(4, ["b", "c"]), (3, ["a"])]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_entries_that_are_not_positive_count_as_silent(value):
    evidence = Evidence(SMALL, 1)
    tokens = TokenTable(np.zeros(1, np.int64), np.zeros(1, np.int32), np.array(["a"]))
    evidence.update(np.array([0, 1]), np.zeros(1, np.int32), np.array([value], np.float32), tokens)
    windows, pool = tables_of(evidence, 1)
    assert windows.num_rows == 0
    assert pool["features"].to_pylist() == [[]]


def test_nothing_gathered_gives_empty_tables_with_the_same_columns():
    empty = tables_of(Evidence(SMALL, 3), 0)
    full = tables_of(evidence_of(corpus(0), range(12)), 12)
    assert [t.num_rows for t in empty] == [0, 0]
    assert [t.schema for t in empty] == [t.schema for t in full]


def test_tables_survive_parquet(tmp_path):
    windows, pool = tables_of(evidence_of(corpus(6), range(12)), 12)
    for name, table in (("windows", windows), ("pool", pool)):
        pq.write_table(table, tmp_path / name, row_group_size=16)
        assert pq.read_table(tmp_path / name).equals(table)
    assert windows["feature"].to_pylist() == sorted(windows["feature"].to_pylist())


def test_memory_is_bounded_whatever_the_size_of_the_corpus():
    def size(n: int) -> int:
        evidence = Evidence(SMALL, N_FEATURES)
        for first in range(0, n, 50):
            made = dict(enumerate(corpus(first, 50), start=first))
            evidence.update(*shard(made, range(first, first + 50)))
        evidence._docs = evidence._docs[:0]  # the list of documents is 8 bytes each, by design
        return len(pickle.dumps(evidence))

    assert size(1000) < 1.5 * size(100)


def broken(**changes):
    row_ptr, col, val, tokens = shard(corpus(0), [0, 1])
    parts = {"row_ptr": row_ptr, "col": col, "val": val, **vars(tokens)} | changes
    table = TokenTable(parts["doc"], parts["position"], parts["text"])
    return parts["row_ptr"], parts["col"], parts["val"], table


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: {"position": d.position[:-1]}, "must describe the same rows"),
        (lambda d: {"row_ptr": np.zeros(3, np.int64)}, "must describe the same rows"),
        (lambda d: {"val": np.zeros(1, np.float32)}, "CSR"),
        (
            lambda d: {"col": np.full(len(shard(corpus(0), [0, 1])[1]), 9, np.int32)},
            r"outside 0\.\.4",
        ),
        (
            lambda d: {"position": d.position[::-1].copy()},
            "positions of document 0 do not increase",
        ),
        (lambda d: {"doc": np.arange(len(d.doc)) % 2}, "not contiguous"),
    ],
)
def test_bad_shards_are_refused_with_the_reason(make, message):
    evidence = Evidence(SMALL, N_FEATURES)
    tokens = shard(corpus(0), [0, 1])[3]
    with pytest.raises(UserError, match=message):
        evidence.update(*broken(**make(tokens)))


def test_a_document_added_twice_is_refused():
    made = corpus(0)
    evidence = evidence_of(made, [0, 1])
    with pytest.raises(UserError, match="document 1 was added twice"):
        evidence.update(*shard(made, [1, 2]))
    with pytest.raises(UserError, match="document 0 was added twice"):
        evidence.merge(evidence_of(made, [0]))


def test_evidence_of_other_settings_or_another_corpus_is_refused():
    made = corpus(0)
    evidence = evidence_of(made, range(12))
    with pytest.raises(UserError, match="different settings"):
        evidence.merge(Evidence(AnalyseConfig(), N_FEATURES))
    with pytest.raises(UserError, match=r"documents\.parquet has 5 rows"):
        evidence.tables(documents(5))
