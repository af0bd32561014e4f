"""Analysis workers: one pass over some shards each; their findings are merged by the driver."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from sae_ext.activations.reader import Activations
from sae_ext.analysis import ShardAnalysis, analyse_shard
from sae_ext.artefacts import saes
from sae_ext.config import AnalyseConfig
from sae_ext.store import Store
from workers.events import Event, Update, streamed


class AnalyseWorker:
    """Encodes shards with one SAE and gathers statistics and evidence."""

    def __init__(
        self, store_url: str, activations: str, sae: str, config: AnalyseConfig, threads: int
    ) -> None:
        store = Store(store_url)
        self.activations = Activations(store, activations)
        self.sae = saes.load(store, sae)
        self.config = config
        self.threads = threads

    def analyse(self, shards: list[int]) -> Iterator[Event]:
        """Gather everything from the given shards; the result is one `ShardAnalysis`."""
        yield from streamed(self._analyse(shards))

    def _analyse(self, shards: list[int]) -> Generator[Update, None, ShardAnalysis]:
        torch.set_num_threads(self.threads)
        found: ShardAnalysis | None = None
        for done, index in enumerate(shards, start=1):
            part = analyse_shard(self.activations, self.sae, self.config, index)
            if found is None:
                found = part
            else:
                found.merge(part)
            yield Update(done, len(shards))
        assert found is not None, "a job holds at least one shard"
        return found
