"""Interpretation workers: explain and score a batch of features."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pyarrow as pa

from sae_ext.artefacts import interpretations
from sae_ext.config import CorpusConfig, InterpretConfig
from sae_ext.interpret.chat import KEY_VARIABLE
from sae_ext.interpret.run import interpret_features
from sae_ext.store import Store
from workers.events import Event, Update, streamed

REPLIES = "replies.sqlite"
"""Database of a chat server's replies, in the store's local state: no question is asked twice."""


class InterpretWorker:
    """Explains features of one analysis by one plan."""

    def __init__(
        self,
        store_url: str,
        features_key: str,
        config: InterpretConfig,
        corpus: CorpusConfig,
        plan: pa.Table,
        api_key: str | None,
    ) -> None:
        self.store_url = store_url
        self.features_key = features_key
        self.config = config
        self.corpus = corpus
        self.plan = plan
        self.api_key = api_key

    def interpret(self, key: str, index: int, batch: list[int]) -> Iterator[Event]:
        """Interpret one batch and put its tables in the store."""
        yield from streamed(self._interpret(key, index, batch))

    def _interpret(self, key: str, index: int, batch: list[int]) -> Generator[Update, None, None]:
        if self.api_key:  # on another node the driver's environment is not ours
            os.environ[KEY_VARIABLE] = self.api_key
        store = Store(self.store_url)
        found = interpret_features(
            batch,
            interpretations.evidence(store, self.features_key),
            self.plan,
            self.config,
            self.corpus,
            cache=store.state_dir() / REPLIES,
        )
        interpretations.put_part(store, key, index, found)
        yield Update(len(batch), len(batch))
