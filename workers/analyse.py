"""Analysis workers: one pass over some shards each; their findings are merged by the driver."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from sae_ext.activations.reader import Activations
from sae_ext.analysis import ShardAnalysis, analyse_shard, label_names
from sae_ext.artefacts import saes
from sae_ext.config import AnalyseConfig
from sae_ext.store import Store
from workers.events import Event, Update, streamed


class AnalyseWorker:
    """Encodes shards with one SAE and gathers statistics and evidence."""

    def __init__(
        self, store_url: str, activations: str, sae: str, config: AnalyseConfig, threads: int
    ) -> None:
        self.store_url = store_url
        self.activations = activations
        self.sae = sae
        self.config = config
        self.threads = threads

    def analyse(self, shards: list[int]) -> Iterator[Event]:
        """Gather everything from the given shards; the result is one `ShardAnalysis`."""
        yield from streamed(self._analyse(shards))

    def _analyse(self, shards: list[int]) -> Generator[Update, None, ShardAnalysis]:
        torch.set_num_threads(self.threads)
        store = Store(self.store_url)
        source, sae = Activations(store, self.activations), saes.load(store, self.sae)
        found = ShardAnalysis(self.config, sae, len(label_names(source)))
        for done, index in enumerate(shards, start=1):
            found.merge(analyse_shard(source, sae, self.config, index))
            yield Update(done, len(shards))
        return found
