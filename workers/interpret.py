"""Interpretation workers: explain and score a batch of features."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pyarrow as pa

from sae_ext.artefacts import interpretations
from sae_ext.config import CorpusConfig, InterpretConfig
from sae_ext.interpret.run import interpret_features
from sae_ext.store import Store
from workers.events import Event, Update, streamed


class InterpretWorker:
    """Holds the evidence of one analysis and the plan."""

    def __init__(
        self,
        store_url: str,
        features_key: str,
        config: InterpretConfig,
        corpus: CorpusConfig,
        plan: pa.Table,
        replies: Path,
    ) -> None:
        self.store = Store(store_url)
        self.evidence = interpretations.evidence(self.store, features_key)
        self.config = config
        self.corpus = corpus
        self.plan = plan
        self.replies = replies

    def interpret(self, key: str, index: int, batch: list[int]) -> Iterator[Event]:
        """Interpret one batch and put its tables in the store."""
        yield from streamed(self._interpret(key, index, batch))

    def _interpret(self, key: str, index: int, batch: list[int]) -> Generator[Update, None, None]:
        found = interpret_features(
            batch, self.evidence, self.plan, self.config, self.corpus, cache=self.replies
        )
        interpretations.put_part(self.store, key, index, found)
        yield Update(len(batch), len(batch))
