"""Explainers: from the windows in which a feature fires to words that say what it fires on.

`LogOddsExplainer` needs no language model: it is the baseline every other explainer has to beat,
and its kind says so. `ChatExplainer` asks one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sae_ext.interpret.chat import ChatClient, ChatFailed
from sae_ext.interpret.examples import FeatureEvidence, strong_positions
from sae_ext.interpret.parse import REFUSED, TRUNCATED, parse_object
from sae_ext.interpret.prompts import explain_messages

OK, NO_PATTERN, FAILED = "ok", "no_pattern", "failed"
MAX_KEYWORDS = 100
MIN_Z = 1.0
"""Weak keywords are worth keeping: each counts only by its weight."""
SHOWN_KEYWORDS = 8
"""Keywords in the text of an explanation; all of them are in the table."""
PRIOR = 0.01
"""Weight of the corpus' own token counts in the prior."""
REPLY_TOKENS = 512
_PATTERNS = frozenset({"token", "context", "topic", "position", "none"})


@dataclass(frozen=True)
class Explanation:
    """What a feature fires on, in words."""

    feature: int
    kind: str
    """Which explainer made it; "baseline:…" for those without a language model."""
    status: str
    """"ok", "no_pattern" (looked, found none) or "failed" (no explanation; text is None)."""
    text: str | None
    keywords: tuple[tuple[str, float], ...] | None = None
    """Tokens with weights (log odds), when the explanation is such a list."""
    threshold: float | None = None
    """Sum of the weights of a window's keywords from which on the feature is said to fire;
    any keyword is enough when absent."""
    pattern: str | None = None
    """"token", "context", "topic", "position" or "none", when the explainer says which."""
    confidence: float | None = None
    """The explainer's own, 0 to 1, when it gives one."""
    model: str | None = None
    parse_status: str | None = None
    """How a reply was read, see `parse`; None when nothing was asked."""
    prompt_sha: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Explainer(Protocol):
    """Anything that explains a feature; a feature it cannot explain is a result, not an error."""

    kind: str

    def explain(self, evidence: FeatureEvidence) -> Explanation:
        """Say what the feature fires on."""


class LogOddsExplainer:
    """Tokens on which the feature fires more often than chance, without a language model.

    Counts of tokens at strongly firing positions are compared with counts everywhere else by log
    odds under an informative Dirichlet prior; keywords are the tokens with z > 1, at most 100,
    weighted by their log odds. The sum that tells firing windows from silent ones best, among the
    training documents' windows, is the threshold.
    Source of the log odds: Monroe, Colaresi and Quinn (2008), "Fightin' Words", section 3.5.1.
    """

    kind = "baseline:logodds"

    def explain(self, evidence: FeatureEvidence) -> Explanation:
        """The keywords of one feature; status "no_pattern" when none stands out."""
        firing: Counter[str] = Counter()
        elsewhere: Counter[str] = Counter(evidence.background)
        for window in evidence.windows:
            strong = set(strong_positions(window))
            for i, token in enumerate(window.tokens):
                (firing if i in strong else elsewhere)[token] += 1
        odds = log_odds(firing, elsewhere)
        best = sorted(odds, key=lambda token: (-odds[token][1], token))[:MAX_KEYWORDS]
        weights = {token: odds[token][0] for token in best if odds[token][1] > MIN_Z}
        if not weights:
            return Explanation(evidence.feature, self.kind, NO_PATTERN, "no pattern", ())
        text = "fires on: " + ", ".join(list(weights)[:SHOWN_KEYWORDS])
        threshold = best_threshold(
            [keyword_score(weights, w.tokens) for w in evidence.windows],
            [keyword_score(weights, w.tokens) for w in evidence.quiet],
        )
        return Explanation(
            evidence.feature, self.kind, OK, text, tuple(weights.items()), threshold=threshold
        )


def keyword_score(weights: Mapping[str, float], tokens: Iterable[str]) -> float:
    """Sum of the weights of the distinct keywords among the tokens."""
    return math.fsum(weights[token] for token in weights.keys() & set(tokens))


def best_threshold(firing: Sequence[float], silent: Sequence[float]) -> float:
    """The firing score with the highest balanced accuracy when "at least that" means yes.

    Where no silent window is known, the smallest positive one: any keyword means yes.
    """
    candidates = sorted({score for score in firing if score > 0})
    if not candidates:
        return math.inf

    def advantage(threshold: float) -> float:
        hits = sum(score >= threshold for score in firing) / len(firing)
        alarms = sum(score >= threshold for score in silent) / max(len(silent), 1)
        return hits - alarms

    return max(candidates, key=advantage)


def log_odds(firing: Counter[str], elsewhere: Counter[str]) -> dict[str, tuple[float, float]]:
    """Each firing token's log odds against its log odds elsewhere, and their z-score.

    Args:
        firing: counts y at firing positions.
        elsewhere: counts at all other positions.

    Returns:
        δ = logit_firing - logit_elsewhere and z = δ / sqrt(1/(y_firing + α) + 1/(y_elsewhere + α)),
        with α = `PRIOR` · (both counts together) added to either side.
    """
    n_firing, n_elsewhere = firing.total(), elsewhere.total()
    prior = PRIOR * (n_firing + n_elsewhere)
    scores = {}
    for token, count in firing.items():
        alpha = PRIOR * (count + elsewhere[token])
        inside, outside = count + alpha, elsewhere[token] + alpha
        rest_inside, rest_outside = n_firing + prior - inside, n_elsewhere + prior - outside
        if rest_inside <= 0 or rest_outside <= 0:
            continue  # the only token there is: nothing to compare it with
        difference = math.log(inside / rest_inside) - math.log(outside / rest_outside)
        z = difference / math.sqrt(1 / inside + 1 / outside)
        scores[token] = (difference, z)
    return scores


class ChatExplainer:
    """Asks a language model what passages with marked tokens have in common."""

    kind = "chat"

    def __init__(self, client: ChatClient) -> None:
        self._client = client

    def explain(self, evidence: FeatureEvidence) -> Explanation:
        """One phrase on one feature; a cut reply is asked for once more with twice the room."""
        messages = explain_messages(evidence)
        model = self._client.model
        for room in (REPLY_TOKENS, 2 * REPLY_TOKENS):
            try:
                reply = self._client.ask(messages, max_tokens=room)
            except ChatFailed as error:
                return Explanation(
                    evidence.feature,
                    self.kind,
                    FAILED,
                    None,
                    model=model,
                    parse_status=f"no reply: {error}",
                )
            found, parse_status = parse_object(reply.content, "explanation", reply.finish_reason)
            if parse_status != TRUNCATED:
                break
        if found is None:
            text, status, found = None, FAILED, {}
            parse_status = REFUSED if reply.refused else parse_status
        else:
            text = " ".join(found["explanation"].split())
            status = NO_PATTERN if text.lower().rstrip(".") == "no pattern" else OK
        pattern = found.get("kind")
        return Explanation(
            feature=evidence.feature,
            kind=self.kind,
            status=status,
            text=text,
            pattern=pattern if isinstance(pattern, str) and pattern in _PATTERNS else None,
            confidence=_share(found.get("confidence")),
            model=model,
            parse_status=parse_status,
            prompt_sha=reply.key,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )


def _share(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    return None
