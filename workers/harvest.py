"""Harvest workers: each holds the host model once and makes shards."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator

import torch

from sae_ext.activations.harvest import Unit, harvest_unit
from sae_ext.artefacts.activations import put_unit
from sae_ext.config import HarvestConfig, HostConfig
from sae_ext.corpora import Document
from sae_ext.host import Host
from sae_ext.store import Store
from workers.events import Event, Update, streamed

log = logging.getLogger("workers.harvest")


class HarvestWorker:
    """Makes activation shards with one copy of the host model."""

    def __init__(
        self, store_url: str, host: HostConfig, harvest: HarvestConfig, threads: int
    ) -> None:
        self.store = Store(store_url)
        self.host_config = host
        self.harvest_config = harvest
        self.threads = threads
        self.host: Host | None = None

    def make(self, key: str, unit: Unit, documents: list[Document]) -> Iterator[Event]:
        """Compute one shard and put it in the store; the result is (rows, seconds computing)."""
        yield from streamed(self._make(key, unit, documents))

    def _make(
        self, key: str, unit: Unit, documents: list[Document]
    ) -> Generator[Update, None, tuple[int, float]]:
        torch.set_num_threads(self.threads)  # here: OpenMP keeps the number per thread
        if self.host is None:
            self.host = Host.load(self.host_config)
            log.info("loaded %s", self.host_config.model)
            yield Update(0, unit.rows, "model loaded")
        started = time.perf_counter()
        data = harvest_unit(self.host, documents, self.harvest_config)
        put_unit(self.store, key, unit, data)
        return unit.rows, time.perf_counter() - started
