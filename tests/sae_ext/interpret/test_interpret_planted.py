from __future__ import annotations

import numpy as np
import pytest
from planted_corpus import (
    AFTER,
    CORPUS,
    DEAD,
    DENSE,
    RANDOM,
    RARE,
    SETS,
    SINGLE,
    SINGLE_2,
    SINGLES,
    TOKEN_SET,
    TOKEN_SET_2,
    TOPIC,
    TOPIC_2,
    Planted,
    topic_words,
)

from sae_ext.config import InterpretConfig
from sae_ext.errors import UserError
from sae_ext.interpret import interpret_features, make_plan, scores, summary

CONFIG = InterpretConfig(positives=50, negatives=50)
TOKEN_FEATURES = [SINGLE, TOKEN_SET, TOPIC, SINGLE_2, TOKEN_SET_2, TOPIC_2]


@pytest.fixture(scope="module")
def plan(planted: Planted):
    return make_plan(planted.firing_rate, planted.reader, CONFIG, CORPUS)


@pytest.fixture(scope="module")
def result(planted: Planted, plan):
    chosen = plan.filter(plan["chosen"])["feature"].to_pylist()
    return interpret_features(chosen, planted.reader, plan, CONFIG, CORPUS)


def score_of(result, feature: int) -> dict:
    return next(row for row in result.scores.to_pylist() if row["feature"] == feature)


@pytest.mark.parametrize("feature", TOKEN_FEATURES)
def test_features_decided_by_tokens_are_explained_perfectly_by_keywords(result, feature):
    assert score_of(result, feature)["balanced_accuracy"] >= 0.97


@pytest.mark.parametrize("feature", [RANDOM, AFTER])
def test_features_that_no_keyword_explains_score_at_chance(result, feature):
    assert 0.35 <= score_of(result, feature)["balanced_accuracy"] <= 0.6


@pytest.mark.parametrize("feature", TOKEN_FEATURES)
def test_another_features_explanation_scores_at_chance(result, feature):
    row = score_of(result, feature)
    assert row["control_feature"] != feature
    assert 0.35 <= row["control_balanced_accuracy"] <= 0.65
    assert row["lift"] == pytest.approx(row["balanced_accuracy"] - row["control_balanced_accuracy"])


@pytest.mark.parametrize(
    ("feature", "words"),
    [*SINGLES.items(), *SETS.items(), (TOPIC, topic_words(0)), (TOPIC_2, topic_words(1))],
)
def test_the_keywords_are_the_planted_ones(result, feature, words):
    row = next(r for r in result.explanations.to_pylist() if r["feature"] == feature)
    found = [keyword["token"] for keyword in row["keywords"]]
    assert set(found) <= set(words)
    assert len(found) >= 0.7 * len(words)
    assert row["explainer_kind"] == "baseline:logodds"


def test_every_feature_has_a_status_and_only_ok_ones_are_chosen(plan):
    status = dict(zip(plan["feature"].to_pylist(), plan["status"].to_pylist(), strict=True))
    assert status[DEAD] == "dead"
    assert status[DENSE] == "dense"
    assert status[RARE] == "too_rare"
    assert all(status[f] == "ok" for f in [*TOKEN_FEATURES, RANDOM, AFTER])
    assert all((row["status"] == "ok") == row["chosen"] for row in plan.to_pylist())


def test_controls_are_other_chosen_features_each_used_once(plan):
    rows = [row for row in plan.to_pylist() if row["chosen"]]
    assert sorted(row["control"] for row in rows) == sorted(row["feature"] for row in rows)
    assert all(row["control"] != row["feature"] for row in rows)


def test_the_choice_is_seeded_and_a_prefix_of_a_larger_choice(planted):
    def choice(n: int, seed: int) -> set[int]:
        config = InterpretConfig(features=n, seed=seed)
        table = make_plan(planted.firing_rate, planted.reader, config, CORPUS)
        return set(table.filter(table["chosen"])["feature"].to_pylist())

    assert choice(3, 0) == choice(3, 0)
    assert choice(3, 0) < choice(6, 0)
    assert len({frozenset(choice(3, seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize("batches", [[[SINGLE, TOPIC], [RANDOM]], [[RANDOM, TOPIC, SINGLE]]])
def test_results_do_not_depend_on_batching(planted, plan, result, batches):
    for batch in batches:
        part = interpret_features(batch, planted.reader, plan, CONFIG, CORPUS)
        for name in ("explanations", "trials", "scores"):
            whole = getattr(result, name).to_pylist()
            expected = [row for row in whole if row["feature"] in batch]
            assert getattr(part, name).to_pylist() == expected


def test_scores_can_be_recomputed_from_the_stored_trials(result):
    assert scores(result.trials).equals(result.scores)


def test_summary_counts_statuses_and_states_the_lift_with_its_interval(plan, result):
    found = summary(result.scores, plan)
    assert found["status"] == {"dead": 1, "dense": 1, "ok": 8, "too_rare": 1}
    assert (found["n_features"], found["n_scored"], found["coverage"]) == (8, 8, 1.0)
    low, high = found["median_lift_ci"]
    assert low <= found["median_lift"] == np.median(result.scores["lift"].to_numpy()) <= high
    assert found["median_lift"] > 0.3
    assert found["explainer_kind"] == "baseline:logodds"
    assert found["model"] is None


def test_a_feature_outside_the_plan_is_refused(planted, plan):
    with pytest.raises(UserError, match=f"feature {DEAD} is not chosen"):
        interpret_features([DEAD], planted.reader, plan, CONFIG, CORPUS)
