"""Activations: for each unit of work its shard, the shard's provenance, its documents and what it came to.

`sae_ext.activations.shards` names the files; columns are those of `sae_ext.activations.harvest.provenance_table`
and `sae_ext.corpora.to_table`. Rows are in the order of the corpus, whoever made them and when.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from sae_ext.activations.harvest import Shard
from sae_ext.activations.shards import (
    contents,
    documents_file,
    provenance_file,
    shard_file,
    unit_file,
)
from sae_ext.artefacts import Stage
from sae_ext.config import HarvestConfig, to_dict
from sae_ext.corpora.config import CorpusConfig
from sae_ext.errors import CorruptArtefact, UserError
from sae_ext.hosts import AnyHost
from sae_ext.store import Manifest, Store

KIND = "activations"
_SUMS = ("sum", "sum_sq", "norm_sum")


def stages(corpus: CorpusConfig, host: AnyHost, harvest: HarvestConfig) -> list[Stage]:
    """What the host gives at each of its hooks, its own first.

    Takes the hashes of the corpus and of the host's weights into the keys, so both are read.

    Raises:
        UserError: the corpus or the host is not there.
    """
    inputs = {"corpus": host.documents_fingerprint(corpus), "host": host.fingerprint()}
    common = {"corpus": to_dict(corpus), "harvest": to_dict(harvest)}
    return [Stage(KIND, {**common, "host": to_dict(hook)}, inputs) for hook in host.hooks()]


def made(store: Store, key: str) -> set[int]:
    """Numbers of the units that are whole, committed or not."""
    names = set(store.names(KIND, key, ""))
    found = (int(n[5:-12]) for n in names if n.startswith("unit-"))
    return {n for n in found if {shard_file(n), provenance_file(n), documents_file(n)} <= names}


def put(store: Store, key: str, number: int, shard: Shard) -> None:
    """Write what a unit gives at one hook; the unit is there with the last of its files."""
    files = {
        documents_file(number): store.put_table(KIND, key, documents_file(number), shard.documents),
        provenance_file(number): store.put_table(KIND, key, provenance_file(number), shard.provenance),
        shard_file(number): store.put(KIND, key, shard_file(number), contents({"x": shard.x})),
    }  # fmt: skip
    rejected = Counter(
        reason.partition(":")[0]
        for reason in shard.documents["rejected"].to_pylist()
        if reason is not None
    )
    facts = {
        "files": files,
        "rows": len(shard.x),
        "d_in": shard.x.shape[1],
        "documents": shard.documents.num_rows,
        "rejected": dict(rejected),
    }
    sums = {name: torch.from_numpy(shard.sums[name]) for name in _SUMS}
    store.put(KIND, key, unit_file(number), contents(sums, {"facts": json.dumps(facts)}))


def commit(store: Store, stage: Stage, units: int, timings: Mapping[str, float]) -> Manifest:
    """Write the manifest, once every unit is made.

    Raises:
        UserError: no document of the corpus gave a row.
    """
    files: dict[str, dict[str, Any]] = {}
    rows: list[int] = []
    documents, rejected, d_in = 0, Counter[str](), 0
    total: dict[str, npt.NDArray[np.float64]] = {}
    names = [unit_file(number) for number in range(units)]
    for number, data in enumerate(store.read_all(KIND, stage.key, names)):
        facts, sums, own = _unit(store, stage.key, number, data)
        files |= {**facts["files"], unit_file(number): own}
        rows.append(facts["rows"])
        documents += facts["documents"]
        rejected.update(facts["rejected"])
        if not facts["rows"]:
            continue
        if d_in not in (0, facts["d_in"]):
            raise UserError(
                f"the host gives rows of width {d_in} and of {facts['d_in']}: hook a module whose output has one "
                "width"
            )
        d_in = facts["d_in"]
        total = {name: sums[name] + total.get(name, 0.0) for name in _SUMS}
    n = sum(rows)
    if n == 0:
        why = f" ({_counted(rejected)})" if rejected else ""
        raise UserError(f"corpus: none of {documents} documents gave a row{why}")
    mean = total["sum"] / n
    extra = {
        "d_in": d_in,
        "n_rows": n,
        "n_documents": documents,
        "rejected": dict(sorted(rejected.items())),
        "shard_rows": rows,
        "dtype": stage.config["harvest"]["dtype"],
        "mean": mean.tolist(),
        "variance": (total["sum_sq"] / n - np.square(mean)).tolist(),
        "mean_norm": float(total["norm_sum"][0] / n),
    }
    return stage.commit(store, files, extra, timings)


def told(manifest: Manifest) -> str:
    """Rows, documents and those rejected, in words."""
    extra = manifest.extra
    words = f"{extra['n_rows']:,} rows of {extra['n_documents']:,} documents"
    return f"{words} ({_counted(extra['rejected'])})" if extra["rejected"] else words


def _counted(rejected: Mapping[str, int]) -> str:
    each = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items()))
    return f"{sum(rejected.values()):,} rejected: {each}"


def _unit(
    store: Store, key: str, number: int, data: bytes
) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float64]], dict[str, Any]]:
    """What a unit has come to: facts, sums, and size and checksum of the file that says so."""
    name = unit_file(number)
    try:
        size = int.from_bytes(data[:8], "little")
        facts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["facts"])
        sums = {name: t.numpy() for name, t in load_tensors(data).items()}
    except (ValueError, KeyError, SafetensorError) as error:
        raise CorruptArtefact(
            f"{store.path(KIND, key, name)} cannot be read: delete that file and run the same command, which "
            "makes it again"
        ) from error
    return facts, sums, store.facts_of(data)


__all__ = ["KIND", "Collection", "commit", "made", "put", "stages", "told"]
