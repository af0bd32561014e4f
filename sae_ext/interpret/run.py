"""Explains and scores a batch of features: the one entry the workers call.

A plan (see `plan.make_plan`) fixes which features there are, their controls and, through the seed,
their examples, so that batches are independent and their tables can simply be concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from sae_ext.config import CorpusConfig, InterpretConfig
from sae_ext.errors import UserError
from sae_ext.interpret.chat import ChatClient, Patience
from sae_ext.interpret.examples import Example, Examples
from sae_ext.interpret.explain import ChatExplainer, Explainer, Explanation, LogOddsExplainer
from sae_ext.interpret.judge import Answer, ChatJudge, Judge, KeywordJudge
from sae_ext.interpret.prompts import TEMPLATE_VERSION
from sae_ext.interpret.reader import EvidenceReader
from sae_ext.interpret.score import OWN, SHUFFLED, TRIALS, scores

SCORER = "detection"
_T = TypeVar("_T")
_R = TypeVar("_R")

EXPLANATIONS = pa.schema(
    [
        ("feature", pa.int32()),
        ("explainer_kind", pa.string()),
        ("model", pa.string()),
        ("template_version", pa.int32()),
        ("text", pa.string()),
        ("status", pa.string()),
        ("keywords", pa.list_(pa.struct([("token", pa.string()), ("weight", pa.float32())]))),
        ("threshold", pa.float32()),
        ("pattern", pa.string()),
        ("confidence", pa.float32()),
        ("parse_status", pa.string()),
        ("prompt_sha", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)
"""One row per feature; fields as in `explain.Explanation`. prompt_sha: key in the reply cache."""


@dataclass(frozen=True)
class Interpretations:
    """The three tables of a batch, ordered by feature.

    Columns: `EXPLANATIONS`, `score.TRIALS`, `score.SCORES`.
    """

    explanations: pa.Table
    trials: pa.Table
    scores: pa.Table


def check_server(config: InterpretConfig, patience: Patience | None = None) -> None:
    """Make sure that the language model answers, before any work is planned around it.

    Raises:
        UserError: it does not; names base_url or model and the remedy. Rules need no server.
    """
    if config.backend == "openai":
        with _client(config, None, patience) as client:
            client.probe()


def interpret_features(
    features: Sequence[int],
    evidence: EvidenceReader,
    plan: pa.Table,
    config: InterpretConfig,
    corpus: CorpusConfig,
    *,
    cache: Path | None = None,
    parallel: int = 4,
    patience: Patience | None = None,
) -> Interpretations:
    """Explain some features and score the explanations, with the backend the config names.

    Args:
        features: the batch; every one must be chosen in the plan.
        evidence: the analysis.
        plan: the table of `plan.make_plan` over the same evidence, config and corpus.
        config: backend, number of examples, seed.
        corpus: the split of the documents.
        cache: database file of replies, shared by all batches on this machine (openai only).
        parallel: requests in flight at once (openai only).
        patience: the client's time-outs and tries (openai only).

    Raises:
        UserError: a feature is not in the plan, or the server is gone or refuses for good. A call
            that fails is no error: it lowers coverage.
    """
    with _backend(config, cache, patience) as (explainer, judge):
        workers = parallel if config.backend == "openai" else 1
        return interpret_with(
            features, evidence, plan, config, corpus, explainer, judge, parallel=workers
        )


def interpret_with(
    features: Sequence[int],
    evidence: EvidenceReader,
    plan: pa.Table,
    config: InterpretConfig,
    corpus: CorpusConfig,
    explainer: Explainer,
    judge: Judge,
    *,
    parallel: int = 1,
) -> Interpretations:
    """As `interpret_features`, with any explainer and judge."""
    control = _controls(plan, features)
    examples = Examples(evidence, config, corpus)
    # The reader is not for many threads: everything is read first, then asked at once.
    needed = sorted({*control, *(c for c in control.values() if c is not None)})
    seen = [examples.to_explain(feature) for feature in needed]
    asked = {feature: examples.to_score(feature) for feature in control}
    explanations = dict(zip(needed, _map(explainer.explain, seen, parallel), strict=True))
    sittings = [
        _Sitting(feature, role, whose, explanations[whose], asked[feature])
        for feature in sorted(control)
        for role, whose in ((OWN, feature), (SHUFFLED, control[feature]))
        if whose is not None
    ]
    answers = _map(lambda s: judge.ask(s.explanation, s.examples), sittings, parallel)
    rows = [
        row
        for sitting, given in zip(sittings, answers, strict=True)
        for row in _trials(sitting, given, explainer, judge)
    ]
    trials = pa.Table.from_pylist(rows, TRIALS)
    own = [_explanation_row(explanations[feature]) for feature in sorted(control)]
    return Interpretations(pa.Table.from_pylist(own, EXPLANATIONS), trials, scores(trials))


@dataclass(frozen=True)
class _Sitting:
    """One feature's examples put to the judge with one explanation."""

    feature: int
    role: str
    whose: int
    explanation: Explanation
    examples: list[Example]


def _trials(
    sitting: _Sitting, answers: list[Answer], explainer: Explainer, judge: Judge
) -> Iterator[dict[str, Any]]:
    for example, answer in zip(sitting.examples, answers, strict=True):
        yield {
            "feature": sitting.feature,
            "scorer": SCORER,
            "role": sitting.role,
            "explanation_of": sitting.whose,
            "explainer_kind": explainer.kind,
            "judge": judge.kind,
            "model": judge.model,
            "template_version": TEMPLATE_VERSION,
            "example_id": example.example_id,
            "doc_id": example.window.doc_id,
            "doc": example.window.doc,
            "start": example.window.start,
            "stratum": example.stratum,
            "truth": example.fires,
            "pred": answer.yes,
            "prob": answer.prob,
            "parse_status": answer.parse_status,
            "attempt": answer.attempt,
        }


def _explanation_row(explanation: Explanation) -> dict[str, Any]:
    keywords = explanation.keywords
    return {
        **vars(explanation),
        "explainer_kind": explanation.kind,
        "template_version": TEMPLATE_VERSION,
        "keywords": None
        if keywords is None
        else [{"token": token, "weight": weight} for token, weight in keywords],
    }


def _controls(plan: pa.Table, features: Sequence[int]) -> dict[int, int | None]:
    rows = {row["feature"]: row for row in plan.to_pylist()}
    for feature in features:
        if feature not in rows or not rows[feature]["chosen"]:
            raise UserError(
                f"feature {feature} is not chosen in the plan: interpret only features whose row "
                "of the plan says chosen"
            )
    return {feature: rows[feature]["control"] for feature in features}


def _map(function: Callable[[_T], _R], items: Iterable[_T], parallel: int) -> list[_R]:
    """The results in order; the first error drops what has not begun."""
    if parallel <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(parallel) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _backend(
    config: InterpretConfig, cache: Path | None, patience: Patience | None
) -> Iterator[tuple[Explainer, Judge]]:
    if config.backend == "rules":
        yield LogOddsExplainer(), KeywordJudge()
    else:
        with _client(config, cache, patience) as client:
            yield ChatExplainer(client), ChatJudge(client)


def _client(config: InterpretConfig, cache: Path | None, patience: Patience | None) -> ChatClient:
    if config.base_url is None or config.model is None:
        raise UserError("base_url and model are needed for backend 'openai': add both")
    return ChatClient(
        config.base_url, config.model, cache=cache, patience=patience, seed=config.seed
    )
