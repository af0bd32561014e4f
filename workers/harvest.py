"""Harvest workers: each holds the host once and makes shards."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Generator, Iterator, Sequence

import ray
import torch

from sae_ext.activations.harvest import Unit, harvest_unit
from sae_ext.artefacts import activations
from sae_ext.config import HarvestConfig
from sae_ext.corpora import Document, Rejected
from sae_ext.corpora.config import CorpusConfig
from sae_ext.hosts import AnyHost, Host
from sae_ext.store import Store
from workers.events import Event, Update, streamed

log = logging.getLogger("workers.harvest")


class HarvestWorker:
    """Makes activation shards with one copy of the host."""

    def __init__(
        self,
        store_url: str,
        corpus: CorpusConfig,
        host: AnyHost,
        harvest: HarvestConfig,
        threads: int,
    ) -> None:
        self.store = Store(store_url)
        self.corpus = corpus
        self.host_config = host
        self.harvest = harvest
        self.threads = threads
        self.host: Host | None = None

    def make(
        self, keys: Sequence[str | None], unit: Unit, documents: list[Document | Rejected]
    ) -> Iterator[Event]:
        """Compute a unit and put it into the store; the result is (rows, seconds computing, this worker's name).

        Args:
            keys: of the activations of each of the host's hooks; None where they have the unit already.
        """
        yield from streamed(self._make(keys, unit, documents))

    def _make(
        self, keys: Sequence[str | None], unit: Unit, documents: list[Document | Rejected]
    ) -> Generator[Update, None, tuple[int, float, str]]:
        torch.set_num_threads(self.threads)  # here: OpenMP keeps the number per thread
        if self.host is None:
            device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
            self.host = self.host_config.open(device)
            log.info("loaded %s", self.host_config.summary())
            yield Update(0, unit.size, "model loaded")
        started = time.perf_counter()
        shards = harvest_unit(self.host, documents, self.harvest, self.corpus)
        for key, shard in zip(keys, shards, strict=True):
            if key is not None:
                activations.put(self.store, key, unit.number, shard)
        name = f"{socket.gethostname()}-{os.getpid()}"
        return len(shards[0].x), time.perf_counter() - started, name
