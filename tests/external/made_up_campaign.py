"""A whole campaign on made-up activations, without a model: what a peer is given to read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sae_ext.activations.harvest import Shard, provenance_table, row_sums
from sae_ext.activations.reader import Activations
from sae_ext.analysis import analyse_shard
from sae_ext.architectures import ReLU
from sae_ext.artefacts import Stage, activations, campaigns, features, interpretations, saes
from sae_ext.config import (
    AnalyseConfig,
    CorpusConfig,
    HarvestConfig,
    InterpretConfig,
    SAEConfig,
    TrainConfig,
    to_dict,
)
from sae_ext.corpora import Document, Harvested, to_table
from sae_ext.hosts import Found, Transformer
from sae_ext.hosts.base import placed
from sae_ext.interpret.run import interpret_features
from sae_ext.schedules import Schedule
from sae_ext.store import Store
from sae_ext.training.run import run_to_end
from sae_ext.training.terms import L1, ObjectiveConfig

MODEL = "made-up-model"

_DOCUMENTS, _ROWS_EACH, _D_IN, _DIRECTIONS = 120, 20, 16, 24
_CORPUS = CorpusConfig(source="made-up.jsonl", validation_percent=20, test_percent=30)
_SAE = SAEConfig(d_sae=48, architecture=ReLU(clip=20.0))
_TRAIN = TrainConfig(
    steps=120,
    batch_rows=256,
    lr=0.01,
    objective=ObjectiveConfig(l1=L1(weight=0.5, schedule=Schedule(warmup_steps=20))),
)
_ANALYSE = AnalyseConfig(window=10, pool=200)
_INTERPRET = InterpretConfig(features=5, positives=5, negatives=5)


def commit_campaign(store: Store) -> str:
    """Make every artefact of a small campaign; returns the campaign's key."""
    source = commit_activations(store)
    trained = saes.stage(_SAE, _TRAIN, source.key)
    run_to_end(saes.train_and_commit(store, [trained]))
    found = features.stage(_ANALYSE, source.key, trained.key)
    sae = saes.load(store, trained.key)
    features.commit(store, found, source, sae, analyse_shard(source, sae, _ANALYSE, 0))
    told = _interpretations(store, found.key, source)
    keys = {
        activations.KIND: source.key,
        saes.KIND: trained.key,
        features.KIND: found.key,
        interpretations.KIND: told.key,
    }
    campaign = campaigns.stage("made-up", {"sae": to_dict(_SAE), "train": to_dict(_TRAIN)}, keys)
    campaigns.commit(store, campaign)
    return campaign.key


def commit_activations(store: Store) -> Activations:
    """One shard of rows far from unit scale, each a sum of a few fixed directions."""
    rows = torch.from_numpy(_rows())
    documents = [Document(f"d{i}", f"text number {i}", "") for i in range(_DOCUMENTS)]
    counts = np.full(_DOCUMENTS, _ROWS_EACH, dtype=np.int64)
    position = placed(counts)
    found = Found(rows, counts, position, position, [f"t{p}" for p in position.tolist()], {})
    config = {
        "corpus": to_dict(_CORPUS),
        "host": to_dict(Transformer(model=MODEL)),
        "harvest": to_dict(HarvestConfig(dtype="float32")),
    }
    stage = Stage(activations.KIND, config, {"corpus": "made-up", "host": MODEL})
    table = to_table(documents, [Harvested(_ROWS_EACH)] * _DOCUMENTS, _CORPUS)
    shard = Shard(rows, row_sums(rows), provenance_table(documents, found), table)
    activations.put(store, stage.key, 0, shard)
    activations.commit(store, stage, 1, {})
    return Activations(store, stage.key)


def _rows() -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(3)
    directions = rng.standard_normal((_DIRECTIONS, _D_IN))
    fires = rng.random((_DOCUMENTS * _ROWS_EACH, _DIRECTIONS)) < 0.08
    z = np.where(fires, rng.uniform(1, 3, fires.shape), 0)
    noise = 0.05 * rng.standard_normal((len(z), _D_IN))
    return (40 * (z @ directions + noise + 0.5)).astype(np.float32)


def _interpretations(store: Store, features_key: str, source: Activations) -> Stage:
    stage = interpretations.stage(_INTERPRET, features_key)
    plan = interpretations.plan(store, stage, source)
    evidence = interpretations.evidence(store, features_key)
    batches = interpretations.batches(plan)
    for index, batch in enumerate(batches):
        told = interpret_features(batch, evidence, plan, _INTERPRET, source.corpus)
        interpretations.put_part(store, stage.key, index, told)
    interpretations.commit(store, stage, plan, len(batches))
    return stage
