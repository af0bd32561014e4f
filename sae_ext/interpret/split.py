"""The split that keeps explaining and scoring apart: by document, and without near-duplicates.

Explanations are made from the documents the SAE was trained on and scored on validation and test
documents. A held-out window that repeats a passage shown to the explainer is removed: texts are
quoted, licensed and generated, so different documents share passages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sae_ext.config import CorpusConfig
from sae_ext.corpora import split_masks
from sae_ext.interpret.reader import Window

NGRAM = 8
"""Windows that share so many consecutive tokens are near-duplicates; shorter ones must be equal."""


def held_out(buckets: npt.NDArray[np.integer], corpus: CorpusConfig) -> npt.NDArray[np.bool_]:
    """For each document bucket, whether it is kept from the explainer (validation or test)."""
    return ~split_masks(buckets, corpus)["train"]


def divide(windows: Sequence[Window], corpus: CorpusConfig) -> tuple[list[Window], list[Window]]:
    """Windows the explainer may see, and windows that may score it."""
    buckets = np.array([w.bucket for w in windows], np.int16)
    kept = held_out(buckets, corpus)
    explain = [w for w, score in zip(windows, kept, strict=True) if not score]
    return explain, [w for w, score in zip(windows, kept, strict=True) if score]


class Passages:
    """Every run of `NGRAM` tokens of some windows, to recognise near-duplicates of them."""

    def __init__(self, windows: Iterable[Window]) -> None:
        self._known = {gram for window in windows for gram in _grams(window.tokens)}

    def __contains__(self, window: Window) -> bool:
        return any(gram in self._known for gram in _grams(window.tokens))


def distinct(windows: Iterable[Window]) -> list[Window]:
    """The windows without repetitions of an identical text; the first of each stays."""
    first: dict[tuple[str, ...], Window] = {}
    for window in windows:
        first.setdefault(window.tokens, window)
    return list(first.values())


def _grams(tokens: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [tokens[i : i + NGRAM] for i in range(max(1, len(tokens) - NGRAM + 1))]
