"""Activations: `documents.parquet`, and per shard `shard-NNNNN.safetensors` and its provenance.

See `sae_ext.corpora.to_table` and `sae_ext.activations.harvest.harvest_unit` for the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors.numpy import load as load_arrays

from sae_ext import corpora, host
from sae_ext.activations.harvest import Plan, ShardData, Unit
from sae_ext.activations.reader import provenance_file, row_statistics, shard_file
from sae_ext.artefacts import Stage
from sae_ext.config import CorpusConfig, HarvestConfig, HostConfig, to_dict
from sae_ext.store import Store

KIND = "activations"
DOCUMENTS = "documents.parquet"


def stage(corpus: CorpusConfig, host_config: HostConfig, harvest: HarvestConfig) -> Stage:
    """Takes the hashes of the corpus' files and of the model's into the key, so both are read.

    Raises:
        UserError: the corpus or the model is not there.
    """
    config = {"corpus": to_dict(corpus), "host": to_dict(host_config), "harvest": to_dict(harvest)}
    model = host.fingerprint(host.resolve(host_config.model))
    return Stage(KIND, config, {"corpus": corpora.fingerprint(corpus), "model": model})


def missing_units(store: Store, key: str, plan: Plan) -> list[Unit]:
    """Units whose two files are not both in the store yet."""
    return [
        unit
        for unit in plan.units
        if not all(
            store.has_file(KIND, key, name)
            for name in (shard_file(unit.number), provenance_file(unit.number))
        )
    ]


def put_documents(
    store: Store, key: str, documents: Sequence[corpora.Document], plan: Plan
) -> None:
    """Write the table of documents."""
    store.put_table(KIND, key, DOCUMENTS, corpora.to_table(list(documents), plan.rows))


def put_unit(store: Store, key: str, unit: Unit, data: ShardData) -> None:
    """Write one shard and its provenance; either file is whole or absent."""
    store.put_table(KIND, key, provenance_file(unit.number), data.provenance)
    store.put(KIND, key, shard_file(unit.number), data.activations)


def commit(store: Store, stage: Stage, plan: Plan, timings: Mapping[str, float]) -> None:
    """Write the manifest, once every shard is there."""
    files = {DOCUMENTS: store.facts(KIND, stage.key, DOCUMENTS)}
    sums, d_in = [], 0
    for unit in plan.units:
        for name in (shard_file(unit.number), provenance_file(unit.number)):
            files[name] = store.facts(KIND, stage.key, name)
        arrays = load_arrays(store.read(KIND, stage.key, shard_file(unit.number)))
        d_in = int(arrays["x"].shape[1])
        sums.append({name: arrays[name] for name in ("sum", "sum_sq", "norm_sum")})
    rows = sum(plan.rows)
    extra = {
        "d_in": d_in,
        "n_rows": rows,
        "n_documents": len(plan.rows),
        "shard_rows": [unit.rows for unit in plan.units],
        "dtype": stage.config["harvest"]["dtype"],
        **row_statistics(sums, rows),
    }
    stage.commit(store, files, extra, timings)
