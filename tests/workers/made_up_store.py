"""Activations in a store without any model, for tests of the workers that read them."""

from __future__ import annotations

import numpy as np
import torch

from sae_ext.activations.harvest import Shard, provenance_table, row_sums
from sae_ext.artefacts import Stage, activations
from sae_ext.config import CorpusConfig, HarvestConfig, to_dict
from sae_ext.corpora import Document, Harvested, to_table
from sae_ext.hosts import Found, Transformer
from sae_ext.hosts.base import placed
from sae_ext.store import Store

DOCUMENTS, ROWS, D_IN = 120, 10, 16


def made_up_activations(store: Store) -> str:
    """Commits rows that are each a sum of about two of 24 directions; their key."""
    rng = np.random.default_rng(7)
    directions = rng.standard_normal((24, D_IN))
    n = DOCUMENTS * ROWS
    z = np.where(rng.random((n, 24)) < 0.08, rng.uniform(1, 3, (n, 24)), 0)
    x = (z @ directions + 0.5).astype(np.float32)
    documents = [Document(f"d{i}", f"text {i}", "") for i in range(DOCUMENTS)]
    corpus, rows = CorpusConfig(source="made-up.jsonl"), torch.from_numpy(x)
    counts = np.full(DOCUMENTS, ROWS, dtype=np.int64)
    position = placed(counts)
    found = Found(rows, counts, position, position, [f"t{p}" for p in position.tolist()], {})
    config = {
        "corpus": to_dict(corpus),
        "host": to_dict(Transformer()),
        "harvest": to_dict(HarvestConfig(dtype="float32")),
    }
    stage = Stage(activations.KIND, config, {"corpus": "made up", "host": "made up"})
    table = to_table(documents, [Harvested(ROWS)] * DOCUMENTS, corpus)
    shard = Shard(rows, row_sums(rows), provenance_table(documents, found), table)
    activations.put(store, stage.key, 0, shard)
    activations.commit(store, stage, 1, {})
    return stage.key
