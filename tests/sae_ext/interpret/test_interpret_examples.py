from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from planted_corpus import (
    AFTER,
    CORPUS,
    LENGTH,
    N_FEATURES,
    RANDOM,
    SINGLE,
    TOKEN_SET,
    TOPIC,
    Planted,
    documents,
    gather,
    write,
)

from sae_ext.config import AnalyseConfig, CorpusConfig, InterpretConfig
from sae_ext.errors import CorruptArtefact, UserError
from sae_ext.interpret import EvidenceReader, Window, make_plan, survey
from sae_ext.interpret.examples import Examples
from sae_ext.interpret.split import NGRAM, Passages, distinct

CONFIG = InterpretConfig(positives=20, negatives=20)
FEATURES = [SINGLE, TOKEN_SET, TOPIC, RANDOM, AFTER]
HELD_OUT = CORPUS.test_percent + CORPUS.validation_percent


@pytest.fixture(scope="module")
def examples(planted: Planted) -> Examples:
    return Examples(planted.reader, CONFIG, CORPUS)


@pytest.mark.parametrize("feature", FEATURES)
def test_explainer_and_judge_share_no_document(examples, feature):
    seen = examples.to_explain(feature)
    asked = examples.to_score(feature)
    shown = [*seen.windows, *seen.shown, *seen.silent]
    assert len(seen.shown) == CONFIG.examples
    assert {w.doc for w in shown}.isdisjoint(e.window.doc for e in asked)
    assert all(w.bucket >= HELD_OUT for w in shown)
    assert all(e.window.bucket < HELD_OUT for e in asked)


@pytest.mark.parametrize("feature", FEATURES)
def test_truth_is_verified_against_what_was_planted(planted, examples, feature):
    asked = examples.to_score(feature)
    assert sum(e.fires for e in asked) == CONFIG.positives
    assert sum(not e.fires for e in asked) == CONFIG.negatives
    for example in asked:
        w = example.window
        part = planted.fires[w.doc, w.start : w.start + len(w.tokens), feature]
        assert part.any() == example.fires
        assert list(w.tokens) == planted.words[w.doc, w.start : w.start + len(w.tokens)].tolist()
    for window in examples.to_explain(feature).silent:
        assert not planted.fires[window.doc, window.start : window.start + 32, feature].any()


@pytest.mark.parametrize("feature", FEATURES)
def test_positives_come_evenly_from_all_quantiles_of_activation(examples, feature):
    strata = [e.stratum for e in examples.to_score(feature) if e.fires]
    assert {q: strata.count(q) for q in sorted(set(strata))} == {f"q{i}": 4 for i in range(1, 6)}
    strength = {
        q: [e.window.max for e in examples.to_score(feature) if e.stratum == q] for q in strata
    }
    assert max(strength["q1"]) <= min(strength["q5"])


def test_half_the_negatives_hold_a_top_token_where_there_are_such(examples):
    hard = [e for e in examples.to_score(RANDOM) if e.stratum == "hard"]
    assert len(hard) == CONFIG.negatives // 2
    # A window with the token fires, so no hard negative can exist.
    assert all(e.stratum == "random" for e in examples.to_score(SINGLE) if not e.fires)


def test_ids_and_order_say_nothing_about_the_truth(examples):
    asked = examples.to_score(SINGLE)
    assert [e.example_id for e in asked] == [f"e{i}" for i in range(1, len(asked) + 1)]
    truth = [e.fires for e in asked]
    assert truth not in (sorted(truth), sorted(truth, reverse=True))


def test_examples_depend_on_the_seed_and_on_nothing_else(planted, examples):
    again = Examples(planted.reader, CONFIG, CORPUS)
    other = Examples(planted.reader, replace(CONFIG, seed=1), CORPUS)
    assert again.to_score(TOPIC) == examples.to_score(TOPIC)
    assert again.to_explain(TOPIC) == examples.to_explain(TOPIC)
    assert other.to_score(TOPIC) != examples.to_score(TOPIC)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"examples": 5}, lambda x: len(x.to_explain(RANDOM).shown)),
        ({"positives": 5}, lambda x: sum(e.fires for e in x.to_score(RANDOM))),
        ({"negatives": 5}, lambda x: sum(not e.fires for e in x.to_score(RANDOM))),
    ],
)
def test_the_config_decides_how_many_windows(planted, change, count):
    assert count(Examples(planted.reader, replace(CONFIG, **change), CORPUS)) == 5


def copied_across_the_split(folder, share: int) -> tuple[EvidenceReader, np.ndarray]:
    """Feature 0 fires in every first window; held-out documents copy `share` tokens of others."""
    rng = np.random.default_rng(0)
    n = 100
    words = rng.integers(0, 10_000, (n, LENGTH)).astype(str).astype(object)
    buckets = np.arange(n)
    words[:HELD_OUT, 4 : 4 + share] = words[-HELD_OUT:, 10 : 10 + share]
    fires = np.zeros((n, LENGTH, 2), bool)
    fires[:, 8, 0] = True
    found = gather(words, fires, AnalyseConfig(sample=n)).tables(documents(n, buckets))
    reader = write({"windows": found.windows, "pool": found.pool}, folder)
    return reader, fires.reshape(-1, 2).mean(0)


@pytest.mark.parametrize(("share", "kept"), [(NGRAM - 1, True), (NGRAM, False)])
def test_held_out_windows_that_repeat_a_shown_passage_are_removed(tmp_path, share, kept):
    reader, rate = copied_across_the_split(tmp_path, share)
    examples = Examples(reader, CONFIG, CORPUS)
    assert bool(examples.to_score(0)) == kept
    status = make_plan(rate, reader, CONFIG, CORPUS)["status"].to_pylist()
    assert status == ["ok" if kept else "too_rare", "dead"]


def test_a_text_that_fires_elsewhere_is_never_a_negative(tmp_path):
    n = 100
    words = np.full((n, 32), "same", object)
    words[1::4] = np.arange(25 * 32).reshape(25, 32).astype(str)
    fires = np.zeros((n, 32, 1), bool)
    fires[::2, 3] = True  # so every other copy of one text, and none of the distinct ones
    buckets = np.where(np.arange(n) < 4, 90, 0)
    found = gather(words, fires, AnalyseConfig()).tables(documents(n, buckets))
    reader = write({"windows": found.windows, "pool": found.pool}, tmp_path)
    examples = Examples(reader, CONFIG, CORPUS)
    assert examples.to_score(0) == []  # the only firing text was shown to the explainer
    words[:4] = "other"
    found = gather(words, fires, AnalyseConfig()).tables(documents(n, buckets))
    reader = write({"windows": found.windows, "pool": found.pool}, tmp_path)
    asked = Examples(reader, CONFIG, CORPUS).to_score(0)
    assert [set(e.window.tokens) for e in asked if e.fires] == [{"same"}]
    assert len(asked) == 1 + CONFIG.negatives
    assert not any("same" in e.window.tokens for e in asked if not e.fires)


def window(*tokens: str, doc: int = 0) -> Window:
    return Window("d", doc, 0, 0, tokens, ())


def test_windows_shorter_than_a_passage_are_duplicates_only_when_equal():
    known = Passages([window("a", "b", "c")])
    assert window("a", "b", "c", doc=1) in known
    assert window("a", "b") not in known
    assert window("a", "b", "c", "d") not in known


def test_of_identical_texts_the_first_stays_in_its_place():
    first, second, twin = window("a"), window("b"), window("a", doc=7)
    assert distinct([first, second, twin]) == [first, second]


@pytest.mark.parametrize("corpus", [CorpusConfig(), CorpusConfig(test_percent=40)])
def test_survey_counts_firing_windows_on_either_side(planted, corpus):
    table = survey(planted.firing_rate, planted.reader, corpus).to_pylist()
    bar = corpus.test_percent + corpus.validation_percent
    sample = planted.tables["windows"].to_pylist()
    for row in table:
        own = [r for r in sample if r["feature"] == row["feature"] and r["kind"] == "sample"]
        assert row["n_score"] == sum(r["bucket"] < bar for r in own)
        assert row["n_explain"] == sum(r["bucket"] >= bar for r in own)


def test_a_feature_that_fires_in_every_window_is_dense_though_few_rows_fire(tmp_path):
    words = np.full((200, LENGTH), "x", object)
    fires = np.zeros((200, LENGTH, 1), bool)
    fires[:, ::32] = True
    found = gather(words, fires, AnalyseConfig()).tables(documents(200))
    reader = write({"windows": found.windows, "pool": found.pool}, tmp_path)
    assert survey(np.array([1 / 32]), reader, CORPUS)["status"].to_pylist() == ["dense"]


def test_reader_finds_the_rows_of_each_feature_across_row_groups(planted):
    rows = planted.tables["windows"].to_pylist()
    for feature in range(N_FEATURES):
        found = planted.reader.feature(feature)
        for kind, windows in (("top", found.top), ("sample", found.sample)):
            own = [r for r in rows if r["feature"] == feature and r["kind"] == kind]
            assert [(w.doc, w.start, list(w.activations)) for w in windows] == [
                (r["doc"], r["start"], r["activations"]) for r in own
            ]
        assert len({w.name for w in found.all}) == len(found.all)


def test_files_that_are_no_evidence_are_refused(tmp_path):
    (tmp_path / "pool.parquet").write_bytes(b"not a table")
    with pytest.raises(CorruptArtefact, match=r"pool\.parquet"):
        EvidenceReader(tmp_path / "windows.parquet", tmp_path / "pool.parquet")


def test_statistics_of_another_sae_are_refused(planted):
    with pytest.raises(UserError, match="firing rates of 3 features"):
        survey(np.ones(3), planted.reader, CORPUS)


def test_survey_returns_a_row_for_every_feature(planted):
    table = survey(planted.firing_rate, planted.reader, CORPUS)
    assert table["feature"].equals(pa.chunked_array([pa.array(range(N_FEATURES), pa.int32())]))
