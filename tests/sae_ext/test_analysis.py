from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from made_up_weights import dense, made_up

from sae_ext.activations.reader import Activations
from sae_ext.analysis import (
    HISTOGRAM_BINS,
    HISTOGRAM_RANGE,
    FeatureSums,
    ShardAnalysis,
    analyse_shard,
    feature_table,
    histogram_edges,
    label_names,
)
from sae_ext.architectures import ReLU
from sae_ext.config import AnalyseConfig, CorpusConfig
from sae_ext.metrics import evaluate
from sae_ext.model import SAE

D_SAE = 12
NEVER = 3
CONFIG = AnalyseConfig(window=4, top_k=5, sample=6, pool=40, seed=2)
COUNTS = [6, 9, 3, 12, 5, 7] * 6


@pytest.fixture(scope="module")
def sae() -> SAE:
    parameters = made_up(8, D_SAE, bias=-0.5)
    parameters.b_enc[NEVER] = -1e3
    return SAE(parameters, ReLU(clip=2.0))


@pytest.fixture(scope="module")
def put(tmp_path_factory, put_activations):
    """The same 252 rows in shards of so many documents, every third document of label b."""
    x = np.random.default_rng(0).standard_normal((sum(COUNTS), 8)).astype(np.float32)
    corpus = CorpusConfig(source="made-up.jsonl", validation_percent=20, test_percent=30)

    def put(documents_per_shard: int, labels: list[str] | None = None) -> Activations:
        labels = labels or ["b" if d % 3 == 0 else "a" for d in range(len(COUNTS))]
        return put_activations(
            tmp_path_factory.mktemp("rows"), x, COUNTS, labels=labels, corpus=corpus,
            documents_per_shard=documents_per_shard,
        )  # fmt: skip

    return put


@pytest.fixture(scope="module")
def activations(put) -> Activations:
    return put(7)


def parts_of(activations: Activations, sae: SAE) -> list[ShardAnalysis]:
    return [
        analyse_shard(activations, sae, CONFIG, index)
        for index in range(len(activations.shard_rows))
    ]


def merged(parts: list[ShardAnalysis]) -> ShardAnalysis:
    def merge(one: ShardAnalysis, two: ShardAnalysis) -> ShardAnalysis:
        one.merge(two)
        return one

    return reduce(merge, parts)


@pytest.fixture(scope="module")
def found(activations, sae) -> ShardAnalysis:
    return merged(parts_of(activations, sae))


@pytest.fixture(scope="module")
def table(activations, sae, found) -> dict[str, list]:
    return feature_table(activations, sae, found).to_pydict()


@pytest.fixture(scope="module")
def z(activations, sae) -> np.ndarray:
    """Activations of all rows and features [252, D_SAE], as a matrix."""
    x = activations.gather(np.arange(activations.n_rows)).double()
    p = sae.parameters
    return ((x - p.b_dec) @ p.W_enc + p.b_enc).relu().clamp(max=2.0).numpy()


# -- partitions ----------------------------------------------------------------------------------


def assert_same(one: ShardAnalysis, two: ShardAnalysis, activations: Activations) -> None:
    for name in ("rows", "fired", "histogram", "by_label", "maximum"):
        assert np.array_equal(getattr(one.features, name), getattr(two.features, name)), name
    np.testing.assert_allclose(one.features.total, two.features.total, rtol=1e-9)
    told, again = one.held_out.metrics(), two.held_out.metrics()
    assert told["l0_quantiles"] == again["l0_quantiles"]
    for name in ("n_rows", "fvu", "l0", "dead_fraction", "clip_rate", "cosine"):
        assert told[name] == pytest.approx(again[name], rel=1e-9)
    first, second = (s.evidence.tables(activations.documents) for s in (one, two))
    assert first.windows.equals(second.windows)
    assert first.pool.equals(second.pool)


@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 4, 3)])
def test_shards_may_be_merged_in_any_order(activations, sae, found, order):
    parts = parts_of(activations, sae)
    assert len(parts) == len(order)
    assert_same(merged([parts[i] for i in order]), found, activations)


@pytest.mark.parametrize("documents_per_shard", [1, 10, 36])
def test_the_partition_into_shards_does_not_matter(put, sae, found, documents_per_shard):
    other = put(documents_per_shard)
    assert len(other.shard_rows) == -(-36 // documents_per_shard)
    assert_same(merged(parts_of(other, sae)), found, other)


# -- statistics of a feature ---------------------------------------------------------------------


def test_there_is_a_row_for_every_feature(table):
    assert table["feature"] == list(range(D_SAE))


def test_densities_are_those_of_a_dense_computation(table, activations, z):
    np.testing.assert_allclose(table["density"], (z > 0).mean(axis=0), rtol=1e-12)
    held = z[activations.rows("test")]
    assert 0 < len(held) < len(z)
    np.testing.assert_allclose(table["density_heldout"], (held > 0).mean(axis=0), rtol=1e-12)


def test_mean_and_maximum_are_over_the_rows_where_it_fires(table, z):
    for feature in range(D_SAE):
        if feature != NEVER:
            active = z[z[:, feature] > 0, feature]
            assert table["mean_active"][feature] == pytest.approx(active.mean(), rel=1e-5)
            assert table["max"][feature] == pytest.approx(active.max(), rel=1e-6)


def test_what_a_silent_feature_does_is_missing_and_not_zero(table):
    assert table["density"][NEVER] == 0
    for name in ("mean_active", "max", "top_label", "top_label_share"):
        assert table[name][NEVER] is None
        assert sum(value is None for value in table[name]) == 1
    assert sum(table["histogram"][NEVER]) == 0


def test_histograms_count_every_firing_once(table, z):
    edges = histogram_edges()
    assert len(edges) == HISTOGRAM_BINS + 1
    assert (edges[0], edges[-1]) == pytest.approx(HISTOGRAM_RANGE)
    for feature in range(D_SAE):
        stored = z[z[:, feature] > 0, feature].astype(np.float32).astype(np.float64)
        active = np.clip(stored, *HISTOGRAM_RANGE)
        assert sum(table["histogram"][feature]) == len(active)
        assert table["histogram"][feature] == np.histogram(active, edges)[0].tolist()


@pytest.mark.parametrize(("value", "place"), [(1e-6, 0), (0.0101, 0), (99.0, 63), (1e9, 63)])
def test_values_beyond_the_histogram_fall_in_its_end_bins(value, place):
    sums = FeatureSums(2, 1)
    zero = np.zeros(1, np.int32)
    sums.update(zero + 1, np.array([value], np.float32), zero)
    expected = np.zeros((2, HISTOGRAM_BINS), int)
    expected[1, place] = 1
    assert (sums.histogram == expected).all()


def test_the_top_label_has_the_largest_share_of_the_firings(table, activations, z):
    labels = np.array(activations.documents["label"].to_pylist())[
        activations.documents_of(np.arange(activations.n_rows))
    ]
    for feature in range(D_SAE):
        if feature != NEVER:
            of_firing = labels[z[:, feature] > 0]
            shares = {name: (of_firing == name).mean() for name in ("a", "b")}
            top = table["top_label"][feature]
            assert shares[top] == max(shares.values())
            assert table["top_label_share"][feature] == pytest.approx(shares[top], rel=1e-6)


def test_without_labels_there_is_no_top_label(put, sae):
    activations = put(40, [""] * len(COUNTS))
    assert label_names(activations) == [""]
    table = feature_table(activations, sae, analyse_shard(activations, sae, CONFIG, 0))
    assert table["top_label"].null_count == table["top_label_share"].null_count == D_SAE


def test_labels_are_named_in_sorted_order(activations):
    assert label_names(activations) == ["a", "b"]


# -- quality -------------------------------------------------------------------------------------


def test_quality_is_that_of_the_test_documents_alone(activations, sae, found):
    rows = activations.rows("test")
    told = evaluate(sae, [activations.gather(rows)]).metrics()
    held = found.held_out.metrics()
    assert held["n_rows"] == len(rows)
    for name in ("fvu", "l0", "clip_rate", "dead_fraction", "relative_reconstruction_bias"):
        assert held[name] == pytest.approx(told[name], rel=1e-9)
    assert held["clip_rate"] > 0


def test_without_test_documents_quality_is_not_computed(tmp_path, put_activations, sae):
    x = np.ones((4, 8), np.float32)
    corpus = CorpusConfig(source="made-up.jsonl", test_percent=1)
    activations = put_activations(tmp_path, x, [4], texts=["sparse"], corpus=corpus)
    assert len(activations.rows("test")) == 0
    found = analyse_shard(activations, sae, CONFIG, 0)
    assert found.held_out.metrics() == {"n_rows": 0}
    table = feature_table(activations, sae, found)
    assert table["density_heldout"].null_count == D_SAE
    assert table["density"].null_count == 0


def test_evidence_comes_from_all_documents_and_holds_the_activations(activations, found, z):
    windows = found.evidence.tables(activations.documents).windows.to_pylist()
    assert {row["feature"] for row in windows} == set(range(D_SAE)) - {NEVER}
    first = np.concatenate([[0], np.cumsum(COUNTS)])
    for row in windows[::7]:
        start = first[row["doc"]] + row["start"]
        expected = z[start : start + len(row["tokens"]), row["feature"]]
        np.testing.assert_allclose(row["activations"], expected, rtol=1e-5)
        assert row["tokens"] == [f"t{row['start'] + i}" for i in range(len(row["tokens"]))]
    assert len({row["doc"] for row in windows}) > len(COUNTS) / 2


def test_a_shard_larger_than_a_batch_is_encoded_whole(tmp_path, put_activations, sae):
    n = 4096 + 500
    x = np.random.default_rng(1).standard_normal((n, 8)).astype(np.float32)
    activations = put_activations(tmp_path, x, [n], labels=["a"])
    found = analyse_shard(activations, sae, CONFIG, 0)
    code = dense(sae.encode(torch.from_numpy(x)), D_SAE)
    assert found.features.rows == n
    assert found.features.fired.tolist() == (code > 0).sum(dim=0).tolist()
