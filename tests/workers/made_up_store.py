"""Activations in a store without any model, for tests of the workers that read them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from sae_ext.activations.harvest import Plan, ShardData, Unit
from sae_ext.artefacts import Stage, activations
from sae_ext.config import CorpusConfig, HarvestConfig, HostConfig, to_dict
from sae_ext.corpora import Document
from sae_ext.store import Store

DOCUMENTS, ROWS, D_IN = 120, 10, 16


def made_up_activations(store: Store) -> str:
    """Commits rows that are each a sum of about two of 24 directions; their key."""
    rng = np.random.default_rng(7)
    directions = rng.standard_normal((24, D_IN))
    n = DOCUMENTS * ROWS
    z = np.where(rng.random((n, 24)) < 0.08, rng.uniform(1, 3, (n, 24)), 0)
    x = (z @ directions + 0.5).astype(np.float32)
    exact = x.astype(np.float64)
    sums = {
        "sum": exact.sum(axis=0),
        "sum_sq": np.square(exact).sum(axis=0),
        "norm_sum": np.linalg.norm(exact, axis=1).sum(keepdims=True),
    }
    documents = [Document(f"d{i}", f"text {i}", "") for i in range(DOCUMENTS)]
    position = np.tile(np.arange(ROWS, dtype=np.int32), DOCUMENTS)
    provenance = pa.table(
        {
            "doc_id": pa.array([f"d{i // ROWS}" for i in range(n)]),
            "position": position,
            "token_id": position,
            "token_text": pa.array([f"t{p}" for p in position.tolist()]),
        }
    )
    config = {
        "corpus": to_dict(CorpusConfig(source="made-up.jsonl")),
        "host": to_dict(HostConfig()),
        "harvest": to_dict(HarvestConfig(dtype="float32")),
    }
    stage = Stage(activations.KIND, config, {"corpus": "made up", "model": "made up"})
    unit = Unit(0, 0, DOCUMENTS, n)
    plan = Plan([ROWS] * DOCUMENTS, [unit])
    activations.put_documents(store, stage.key, documents, plan)
    activations.put_unit(store, stage.key, unit, ShardData(save({"x": x, **sums}), provenance))
    activations.commit(store, stage, plan, {})
    return stage.key
