"""Judges: given an explanation, in which windows does the feature fire?

An answer is yes, no, or none; a judge that did not answer is never counted as having said no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sae_ext.interpret.chat import ChatClient, ChatFailed
from sae_ext.interpret.examples import Example
from sae_ext.interpret.explain import Explanation, keyword_score
from sae_ext.interpret.parse import REFUSED, parse_answers
from sae_ext.interpret.prompts import judge_messages

PER_CALL = 10
"""Windows in one request: enough to save calls, few enough for a small model to keep apart."""
REPLY_TOKENS = 512


@dataclass(frozen=True)
class Answer:
    """One answer to one example."""

    example_id: str
    yes: bool | None
    """Whether the judge says that the feature fires; None when there is no answer."""
    prob: float | None = None
    """Probability of yes, when the judge gives one."""
    parse_status: str = "rules"
    """How the answer was read, or why there is none."""
    attempt: int = 1
    """1, or 2 when it had to be asked for again."""


class Judge(Protocol):
    """Anything that answers examples; one answer for each, in their order."""

    kind: str
    model: str | None

    def ask(self, explanation: Explanation, examples: Sequence[Example]) -> list[Answer]:
        """Answer every example from the explanation alone."""


class KeywordJudge:
    """Says yes when a window's keywords weigh enough together; needs no language model."""

    kind = "rules:keyword"
    model: str | None = None

    def ask(self, explanation: Explanation, examples: Sequence[Example]) -> list[Answer]:
        """Yes or no for each example; no answers where the explanation has no keywords."""
        if explanation.keywords is None:
            return [Answer(e.example_id, None, parse_status="no_keywords") for e in examples]
        weights = dict(explanation.keywords)
        scores = [keyword_score(weights, e.window.tokens) for e in examples]
        bar = explanation.threshold
        return [
            Answer(e.example_id, score > 0 if bar is None else score >= bar)
            for e, score in zip(examples, scores, strict=True)
        ]


class ChatJudge:
    """Asks a language model, a few examples at a time, and asks once more for what is missing."""

    kind = "chat"

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self.model: str | None = client.model

    def ask(self, explanation: Explanation, examples: Sequence[Example]) -> list[Answer]:
        """Yes, no or nothing for each example."""
        if explanation.text is None:
            return unanswered(examples, "no_explanation")
        answers: list[Answer] = []
        for start in range(0, len(examples), PER_CALL):
            answers += self._ask_batch(explanation.text, examples[start : start + PER_CALL])
        return answers

    def _ask_batch(self, text: str, examples: Sequence[Example]) -> list[Answer]:
        found = {a.example_id: a for a in self._ask_once(text, examples, attempt=1)}
        missing = [e for e in examples if found[e.example_id].yes is None]
        if missing:
            found |= {a.example_id: a for a in self._ask_once(text, missing, attempt=2)}
        return [found[e.example_id] for e in examples]

    def _ask_once(self, text: str, examples: Sequence[Example], attempt: int) -> list[Answer]:
        try:
            # Twice the room the second time: the first reply may have been cut.
            reply = self._client.ask(
                judge_messages(text, examples), max_tokens=attempt * REPLY_TOKENS
            )
        except ChatFailed as error:
            return unanswered(examples, f"no reply: {error}", attempt)
        parsed = parse_answers(reply.content, [e.example_id for e in examples], reply.finish_reason)
        status = REFUSED if reply.refused and not parsed.values else parsed.status
        return [
            Answer(e.example_id, parsed.values.get(e.example_id), None, status, attempt)
            for e in examples
        ]


def unanswered(examples: Sequence[Example], why: str, attempt: int = 1) -> list[Answer]:
    """No answer to any of the examples."""
    return [Answer(e.example_id, None, None, why, attempt) for e in examples]
