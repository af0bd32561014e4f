"""What the explainer is shown and what the judge is asked, for one feature.

Everything here is a function of (seed, feature, evidence): the same whichever other features are
interpreted beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np

from sae_ext.config import CorpusConfig, InterpretConfig
from sae_ext.interpret.reader import EvidenceReader, Window
from sae_ext.interpret.split import Passages, distinct, divide, held_out

QUANTILES = 5
"""Equal-count classes of held-out firing windows by activation; positives come evenly from all."""
STRONG = 0.3
"""A token fires strongly when its activation exceeds this share of the window's largest."""
QUIET = 400
"""Random silent windows an explainer may calibrate itself on."""
TOP_TOKENS = 5
"""How many of the tokens a feature fires on most often make a non-firing window a hard one."""


@dataclass(frozen=True)
class FeatureEvidence:
    """What an explainer may see of one feature: windows of training documents only."""

    feature: int
    windows: tuple[Window, ...]
    """All firing windows, the strongest first."""
    shown: tuple[Window, ...]
    """The selection for a reader with little patience: strongest ones and a spread of the rest."""
    silent: tuple[Window, ...]
    """Windows in which the feature is verified not to fire, hard ones first."""
    background: Mapping[str, int]
    """Counts of tokens in random windows of training documents."""
    quiet: tuple[Window, ...] = ()
    """Random windows in which the feature is verified not to fire, for calibrating a rule."""


@dataclass(frozen=True)
class Example:
    """One question to the judge: does the feature fire in this window?"""

    example_id: str
    """Opaque name, the only one the judge sees."""
    window: Window
    stratum: str
    """Positives "q1" (weakest) to "q5"; negatives "random" or "hard"."""
    fires: bool
    """The truth; never shown to the judge."""


class Examples:
    """Chooses windows of any feature by fixed, seeded rules.

    Args:
        evidence: the analysis to draw from.
        config: how many windows of each sort, and the seed.
        corpus: the split of the documents.
    """

    def __init__(
        self, evidence: EvidenceReader, config: InterpretConfig, corpus: CorpusConfig
    ) -> None:
        self._evidence, self._config, self._corpus = evidence, config, corpus
        self._pool_held_out = held_out(evidence.pool.bucket, corpus)
        seen = [
            w
            for w, kept in zip(evidence.pool.windows, self._pool_held_out, strict=True)
            if not kept
        ]
        self._background: Mapping[str, int] = Counter(t for w in seen for t in w.tokens)

    def to_explain(self, feature: int) -> FeatureEvidence:
        """What the explainer sees."""
        found = self._evidence.feature(feature)
        top, _ = divide(found.top, self._corpus)
        sample, _ = divide(found.sample, self._corpus)
        windows, _ = divide(found.all, self._corpus)
        silent = self._silent(feature, held_out_side=False)
        hard, easy = _by_difficulty(silent, _top_tokens(windows))
        quota = max(3, self._config.examples // 3)
        return FeatureEvidence(
            feature=feature,
            windows=tuple(windows),
            shown=tuple(self._shown(feature, top, sample)),
            silent=tuple(distinct(hard + easy)[:quota]),
            background=self._background,
            quiet=tuple(silent[:QUIET]),
        )

    def to_score(self, feature: int) -> list[Example]:
        """What the judge is asked, in an order that says nothing. Empty if either class lacks."""
        found = self._evidence.feature(feature)
        seen, _ = divide(found.all, self._corpus)
        known = Passages(seen)
        _, fresh = divide(found.sample, self._corpus)
        positives = self._positives(feature, [w for w in distinct(fresh) if w not in known])
        taken = {w.tokens for w in fresh}
        silent = distinct(self._silent(feature, held_out_side=True))
        silent = [w for w in silent if w.tokens not in taken]
        chosen = positives + self._negatives(silent, _top_tokens(seen), known)
        if not positives or len(chosen) == len(positives):
            return []
        order = self._random(feature, "order").permutation(len(chosen))
        return [
            Example(f"e{number}", chosen[i][1], chosen[i][0], fires=chosen[i][0].startswith("q"))
            for number, i in enumerate(order, start=1)
        ]

    def _shown(self, feature: int, top: list[Window], sample: list[Window]) -> list[Window]:
        """Half the strongest windows, half from all strengths of the uniform sample."""
        strongest = distinct(top)[: -(-self._config.examples // 2)]
        names = {w.tokens for w in strongest}
        rest = [w for w in distinct(sample) if w.tokens not in names]
        spread = [w for _, w in self._spread(feature, rest, "shown")]
        return (strongest + spread)[: self._config.examples]

    def _positives(self, feature: int, windows: list[Window]) -> list[tuple[str, Window]]:
        return self._spread(feature, windows, "positives")[: self._config.positives]

    def _spread(self, feature: int, windows: list[Window], use: str) -> list[tuple[str, Window]]:
        """All windows with their quantile, one from each quantile in turn, strongest first."""
        ranked = sorted(windows, key=lambda w: (w.max, w.name))
        classes = []
        for number, part in enumerate(np.array_split(np.arange(len(ranked)), QUANTILES), start=1):
            order = self._random(feature, f"{use} q{number}").permutation(part)
            classes.append([(f"q{number}", ranked[i]) for i in order])
        turns = zip_longest(*reversed(classes))
        return [entry for turn in turns for entry in turn if entry is not None]

    def _negatives(
        self, silent: list[Window], tokens: frozenset[str], known: Passages
    ) -> list[tuple[str, Window]]:
        """Half hard ones where there are so many; the rest random, in the pool's seeded order."""
        n = self._config.negatives
        hard, _ = _by_difficulty(silent, tokens)
        hard = list(islice((w for w in hard if w not in known), n // 2))
        names = {w.name for w in hard}
        rest = (w for w in silent if w.name not in names and w not in known)
        return [("hard", w) for w in hard] + [("random", w) for w in islice(rest, n - len(hard))]

    def _silent(self, feature: int, *, held_out_side: bool) -> list[Window]:
        """Pool windows of one side in which the feature does not fire, in a seeded order."""
        pool = self._evidence.pool
        mask = pool.silent(feature) & (self._pool_held_out == held_out_side)
        order = self._random(feature, "silent").permutation(len(pool))
        return [pool.windows[i] for i in order if mask[i]]

    def _random(self, feature: int, use: str) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, feature, *use.encode()])


def strong_positions(window: Window) -> list[int]:
    """Indices of the tokens on which the feature fires strongly."""
    bar = STRONG * window.max
    return [i for i, value in enumerate(window.activations) if value > bar]


def _top_tokens(windows: Sequence[Window]) -> frozenset[str]:
    """The tokens at the peaks of the windows, the most frequent few."""
    peaks = Counter(
        w.tokens[max(range(len(w.tokens)), key=w.activations.__getitem__)] for w in windows
    )
    return frozenset(sorted(peaks, key=lambda token: (-peaks[token], token))[:TOP_TOKENS])


def _by_difficulty(
    silent: list[Window], tokens: frozenset[str]
) -> tuple[list[Window], list[Window]]:
    hard = [w for w in silent if tokens.intersection(w.tokens)]
    return hard, [w for w in silent if not tokens.intersection(w.tokens)]
