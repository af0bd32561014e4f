"""A real `transformers serve` with a tiny random model: it answers, and everything is garbage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from planted_corpus import CORPUS, SINGLE, SINGLE_2, Planted
from tiny_chat_server import needs_serving, tiny_chat_server

from sae_ext.config import InterpretConfig
from sae_ext.errors import UserError
from sae_ext.interpret import check_server, interpret_features, interpret_with, make_plan, summary
from sae_ext.interpret.chat import ChatClient
from sae_ext.interpret.explain import LogOddsExplainer
from sae_ext.interpret.judge import ChatJudge

pytestmark = [pytest.mark.slow, needs_serving]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InterpretConfig]:
    with tiny_chat_server(tmp_path_factory.mktemp("served")) as (base_url, model):
        yield InterpretConfig(
            backend="openai",
            base_url=base_url,
            model=model,
            positives=5,
            negatives=5,
            examples=4,
        )


def test_garbage_explanations_are_failures_without_a_score(served, planted: Planted, tmp_path):
    check_server(served)
    plan = make_plan(planted.firing_rate, planted.reader, served, CORPUS)
    result = interpret_features(
        [SINGLE, SINGLE_2], planted.reader, plan, served, CORPUS, cache=tmp_path / "replies.db"
    )
    assert set(result.explanations["status"].to_pylist()) == {"failed"}
    assert result.explanations["text"].null_count == 2
    found = summary(result.scores, plan)
    assert (found["coverage"], found["n_scored"], found["median_lift"]) == (0, 0, None)


def test_garbage_answers_lower_coverage_and_invent_no_score(served, planted: Planted, tmp_path):
    plan = make_plan(planted.firing_rate, planted.reader, served, CORPUS)
    with ChatClient(served.base_url, served.model, cache=tmp_path / "replies.db") as client:
        judge = ChatJudge(client)
        result = interpret_with(
            [SINGLE], planted.reader, plan, served, CORPUS, LogOddsExplainer(), judge
        )
        assert client.requests > 0
    row = result.scores.to_pylist()[0]
    assert row["coverage"] < 0.5
    assert row["n_failed"] == sum(
        t["pred"] is None and t["role"] == "own" for t in result.trials.to_pylist()
    )
    if row["coverage"] == 0:
        assert row["balanced_accuracy"] is row["lift"] is None


def test_a_model_the_server_does_not_have_is_an_error_of_the_user(served):
    with pytest.raises(UserError, match="nothing/here"):
        check_server(replace(served, model="nothing/here"))
