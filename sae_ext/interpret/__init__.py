"""Interpretation: words for features, and a test of the words on text nobody has shown them.

    evidence ─► plan ─► explain ─► judge ─► scores ─► summary

`make_plan` gives every feature a status, chooses some and fixes what each is compared with;
`interpret_features` explains and scores any batch of the chosen ones; `summary` adds it all up.
An explainer sees training documents only, a judge only others; silent examples are verified; every
answer is kept; and an answer that could not be read is missing, never a no.
"""

from __future__ import annotations

from sae_ext.interpret.plan import make_plan, survey
from sae_ext.interpret.reader import EvidenceReader, FeatureWindows, Window
from sae_ext.interpret.run import (
    EXPLANATIONS,
    Interpretations,
    check_server,
    interpret_features,
    interpret_with,
)
from sae_ext.interpret.score import SCORES, TRIALS, scores, summary

__all__ = [
    "EXPLANATIONS",
    "SCORES",
    "TRIALS",
    "EvidenceReader",
    "FeatureWindows",
    "Interpretations",
    "Window",
    "check_server",
    "interpret_features",
    "interpret_with",
    "make_plan",
    "scores",
    "summary",
    "survey",
]
