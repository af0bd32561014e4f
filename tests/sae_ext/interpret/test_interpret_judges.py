from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_corpus import (
    CORPUS,
    SINGLE,
    SINGLE_2,
    TOKEN_SET,
    TOKEN_SET_2,
    TOPIC,
    TOPIC_2,
    Planted,
    rule,
)

from sae_ext.config import InterpretConfig
from sae_ext.errors import UserError
from sae_ext.interpret import TRIALS, Window, interpret_with, make_plan, scores, summary
from sae_ext.interpret.examples import Example, FeatureEvidence
from sae_ext.interpret.explain import Explanation, LogOddsExplainer, best_threshold
from sae_ext.interpret.judge import Answer, KeywordJudge
from sae_ext.interpret.score import Confusion, auroc, confusion, median_interval

CONFIG = InterpretConfig(positives=50, negatives=50)
FEATURES = [SINGLE, SINGLE_2, TOKEN_SET, TOKEN_SET_2, TOPIC, TOPIC_2]


class RuleJudge:
    """Knows the planted rule; errs at known rates, drops answers, and says how sure it is."""

    kind = "test:rule"
    model = "planted"

    def __init__(self, tpr: float, tnr: float, dropped: float) -> None:
        self._rates = {True: tpr, False: tnr}
        self._dropped = dropped
        self._rng = np.random.default_rng(0)

    def ask(self, explanation: Explanation, examples: Sequence[Example]) -> list[Answer]:
        return [self._answer(rule(explanation.feature), example) for example in examples]

    def _answer(self, fires, example: Example) -> Answer:
        if self._rng.random() < self._dropped:
            return Answer(example.example_id, None, parse_status="failed")
        truth = fires(example.window.tokens)
        yes = truth if self._rng.random() < self._rates[truth] else not truth
        return Answer(example.example_id, yes, prob=0.9 if yes else 0.1)


def run(planted: Planted, judge: RuleJudge):
    plan = make_plan(planted.firing_rate, planted.reader, CONFIG, CORPUS)
    explainer = LogOddsExplainer()
    found = interpret_with(FEATURES, planted.reader, plan, CONFIG, CORPUS, explainer, judge)
    return found, plan


def test_a_perfect_judge_scores_one_with_its_own_and_half_with_another_explanation(planted):
    found, _ = run(planted, RuleJudge(1, 1, 0))
    for row in found.scores.to_pylist():
        assert (row["balanced_accuracy"], row["f1"], row["coverage"], row["auroc"]) == (1, 1, 1, 1)
        assert row["brier"] == pytest.approx(0.01)
        assert row["recall_by_quantile"] == [1.0] * 5
        assert row["fpr_random"] == 0
    controls = found.scores["control_balanced_accuracy"].to_pylist()
    assert 0.4 < np.mean([c for c in controls if c is not None]) < 0.6


def test_a_noisy_judge_is_measured_at_its_true_rates(planted):
    found, plan = run(planted, RuleJudge(0.9, 0.8, 0.2))
    own = found.trials.filter(pa.compute.equal(found.trials["role"], "own"))
    n = own.num_rows
    counts = confusion(own["truth"].to_pylist(), own["pred"].to_pylist())
    error = np.sqrt((0.9 * 0.1 + 0.8 * 0.2) / (n / 2 * 0.8) / 4)
    assert counts.balanced_accuracy == pytest.approx(0.85, abs=2 * error)
    assert counts.tp / (counts.tp + counts.fn) == pytest.approx(0.9, abs=4 * error)
    assert counts.tn / (counts.tn + counts.fp) == pytest.approx(0.8, abs=4 * error)
    coverage = summary(found.scores, plan)["coverage"]
    assert coverage == pytest.approx(0.8, abs=2 * np.sqrt(0.16 / n))
    assert coverage == 1 - sum(found.scores["n_failed"].to_pylist()) / n
    for row in found.scores.to_pylist():
        assert row["balanced_accuracy_floor"] < row["balanced_accuracy"]
        assert row["ci_low"] < row["balanced_accuracy"] < row["ci_high"]


def test_a_judge_that_never_answers_gives_no_number(planted):
    found, plan = run(planted, RuleJudge(1, 1, 1))
    for row in found.scores.to_pylist():
        assert row["coverage"] == 0
        assert row["n_failed"] == row["n_pos"] + row["n_neg"] > 0
        for name in ("balanced_accuracy", "f1", "auroc", "brier", "lift", "fpr_random", "ci_low"):
            assert row[name] is None
    total = summary(found.scores, plan)
    assert (total["coverage"], total["n_scored"]) == (0, 0)
    assert (
        total["median_lift"] is total["median_lift_ci"] is total["mean_balanced_accuracy"] is None
    )
    assert total["weighted_balanced_accuracy"] is None


@pytest.mark.parametrize("answer", [True, False])
def test_a_judge_that_always_says_the_same_scores_one_half(planted, answer):
    rates = (1, 0) if answer else (0, 1)
    found, _ = run(planted, RuleJudge(*rates, 0))
    assert found.scores["balanced_accuracy"].to_pylist() == [0.5] * len(FEATURES)


def example(*tokens: str) -> Example:
    return Example("e1", Window("d", 0, 0, 0, tokens, ()), "random", fires=False)


@pytest.mark.parametrize(
    ("keywords", "answer"),
    [((("cat", 3.0),), True), ((("ca", 3.0),), False), ((), False), (None, None)],
)
def test_keyword_judge_answers_from_whole_tokens_or_not_at_all(keywords, answer):
    explanation = Explanation(0, "k", "ok", "text", keywords)
    assert KeywordJudge().ask(explanation, [example("a", "cat")])[0].yes is answer


def firing(tokens: tuple[str, ...], activations: tuple[float, ...]) -> Window:
    return Window("d", 0, 50, 0, tokens, activations)


def test_log_odds_prefer_the_token_under_the_peak_to_its_company():
    windows = [firing(("the", "cat", "sat"), (0.1, 1.0, 0.2))] * 10
    background = {"the": 500, "sat": 100, "cat": 2, "dog": 300}
    seen = FeatureEvidence(0, tuple(windows), (), (), background)
    found = LogOddsExplainer().explain(seen)
    assert [token for token, _ in found.keywords] == ["cat"]
    assert found.text == "fires on: cat"


def test_log_odds_without_a_pattern_say_so():
    windows = [firing(("the", "a"), (1.0, 1.0))] * 3
    found = LogOddsExplainer().explain(
        FeatureEvidence(0, tuple(windows), (), (), {"the": 9, "a": 9})
    )
    assert (found.status, found.text, found.keywords) == ("no_pattern", "no pattern", ())


@pytest.mark.parametrize(
    ("tokens", "answer"), [("cat", False), ("dog", True), ("cat dog", True), ("cat bird", True)]
)
def test_keywords_must_weigh_enough_together(tokens, answer):
    weights = (("cat", 1.0), ("bird", 1.0), ("dog", 2.0))
    explanation = Explanation(0, "k", "ok", "text", weights, threshold=2.0)
    assert KeywordJudge().ask(explanation, [example(*tokens.split())])[0].yes is answer


def test_the_threshold_tells_firing_windows_from_silent_ones():
    assert best_threshold([1.0, 5.0, 6.0], [0.0, 1.0, 1.0, 2.0]) == 5.0


def test_without_a_silent_window_any_keyword_is_enough():
    assert best_threshold([0.0, 2.0, 3.0], []) == 2.0


def test_a_corpus_of_one_token_has_no_keywords():
    found = LogOddsExplainer().explain(
        FeatureEvidence(0, (firing(("a",), (1.0,)),), (), (), {"a": 5})
    )
    assert found.status == "no_pattern"


@given(
    truth=st.lists(st.booleans(), min_size=2, max_size=30),
    seed=st.integers(0, 1000),
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(truth, seed):
    value = np.random.default_rng(seed).integers(0, 4, len(truth)) / 3
    positive = [v for v, t in zip(value, truth, strict=True) if t]
    negative = [v for v, t in zip(value, truth, strict=True) if not t]
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auroc(truth, value.tolist()) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_confusion_leaves_missing_answers_out():
    counts = confusion([True, True, True, False, False], [True, False, None, False, None])
    assert counts == Confusion(tp=1, fp=0, tn=1, fn=1)
    assert counts.balanced_accuracy == 0.75
    assert counts.f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "counts", [Confusion(0, 1, 1, 0), Confusion(1, 0, 0, 1), Confusion(0, 0, 0, 0)]
)
def test_one_class_alone_has_no_score(counts):
    assert counts.balanced_accuracy is counts.f1 is counts.interval is None


def test_a_perfect_score_on_few_windows_has_a_wide_interval():
    low, high = Confusion(5, 0, 5, 0).interval
    assert low < 0.9 < high <= 1
    assert Confusion(500, 0, 500, 0).interval[0] > 0.99


def test_the_interval_of_the_median_covers_it_about_as_often_as_it_claims():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        low, high = median_interval(rng.normal(0.2, 0.1, 40), seed)
        hits += low <= 0.2 <= high
    assert hits >= 52  # 95 % of 60 is 57; three standard errors below is 52
    assert median_interval(np.array([0.3])) is None


@pytest.mark.parametrize(
    ("control", "coverage", "lift"),
    [
        ([True, False], 1.0, 0.0),
        ([False, True], 1.0, 1.0),
        ([None, False], 0.5, None),
        ([], None, None),
    ],
)
def test_without_an_answered_control_there_is_no_lift(control, coverage, lift):
    def trial(role: str, truth: bool, pred: bool | None) -> dict:
        return {"feature": 7, "scorer": "s", "role": role, "truth": truth, "pred": pred}

    own = [trial("own", True, True), trial("own", False, False)]
    shuffled = [trial("shuffled", t, p) for t, p in zip([True, False], control, strict=False)]
    rows = scores(pa.Table.from_pylist(own + shuffled, TRIALS)).to_pylist()
    assert [(row["balanced_accuracy"], row["control_coverage"]) for row in rows] == [(1, coverage)]
    assert rows[0]["lift"] == (None if lift is None else pytest.approx(lift))


def test_scores_of_two_judges_are_not_averaged(planted):
    found, plan = run(planted, RuleJudge(1, 1, 0))
    other = found.scores.set_column(
        found.scores.column_names.index("judge"), "judge", pa.array(["x"] * found.scores.num_rows)
    )
    with pytest.raises(UserError, match="2 different explainers or judges"):
        summary(pa.concat_tables([found.scores, other]), plan)
