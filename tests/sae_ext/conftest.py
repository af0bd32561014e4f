"""A tiny corpus, the real encoder on it, activations with known structure, and a whole pipeline."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from sae_ext.activations.harvest import (
    Shard,
    harvest_unit,
    parts,
    provenance_table,
    row_sums,
)
from sae_ext.activations.reader import Activations
from sae_ext.analysis import analyse_shard
from sae_ext.architectures import ReLU
from sae_ext.artefacts import (
    Stage,
    activations,
    campaigns,
    features,
    interpretations,
    saes,
)
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
from sae_ext.hosts.transformer import TransformerHost
from sae_ext.interpret.run import interpret_features
from sae_ext.schedules import Schedule
from sae_ext.store import Store
from sae_ext.training.terms import L1, ObjectiveConfig

# How long an example takes says nothing where other programs share the cores.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

TOPICS = {
    "sea": "the ship sails over the cold sea while grey waves carry salt and foam to the shore",
    "kitchen": "cut the onion and fry it in butter then add flour milk and a little pepper",
    "law": "the court finds that the contract is void and orders the defendant to pay damages",
    "code": "the function returns a list of numbers and raises an error when the file is missing",
}


def exhaust(work: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    """What a generator yields, and what it returns at its end."""
    seen = []
    while True:
        try:
            seen.append(next(work))
        except StopIteration as stop:
            return seen, stop.value


@pytest.fixture(scope="session")
def run_to_end() -> Callable[[Generator[Any, None, Any]], tuple[list[Any], Any]]:
    return exhaust


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are computed faster alone than while threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def host() -> TransformerHost:
    """The real encoder, loaded once; for another layer, `TransformerHost(model, tokenizer, config)`."""
    return Transformer(layer=2, max_tokens=24).open()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 short texts on four topics, every one different."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rows = []
    for number in range(160):
        label = list(TOPICS)[number % len(TOPICS)]
        words = TOPICS[label].split()
        text = " ".join(rng.permutation(words)[: int(rng.integers(6, len(words)))])
        rows.append({"id": f"{label}-{number}", "text": f"{text} {number}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def put_activations() -> Callable[..., Activations]:
    """Commits given rows as an activations artefact, without any model."""

    def put(
        root: Path,
        x: np.ndarray,
        rows_of_document: list[int],
        *,
        documents_per_shard: int = 10,
        labels: list[str] | None = None,
        corpus: CorpusConfig | None = None,
        texts: list[str] | None = None,
    ) -> Activations:
        store = Store.open(str(root), writable=True)
        n = len(rows_of_document)
        texts = texts or [f"text number {i}" for i in range(n)]
        labels = labels or [""] * n
        documents = [Document(f"d{i}", texts[i], labels[i]) for i in range(n)]
        corpus = corpus or CorpusConfig(source="made-up.jsonl")
        config = {
            "corpus": to_dict(corpus),
            "host": to_dict(Transformer()),
            "harvest": to_dict(HarvestConfig(dtype=str(x.dtype))),
        }
        content = {"rows": str(zlib.crc32(x.tobytes())), "per_shard": str(documents_per_shard)}
        stage = Stage(activations.KIND, config, content)
        first, starts = 0, range(0, n, documents_per_shard)
        for number, start in enumerate(starts):
            counts = np.array(rows_of_document[start : start + documents_per_shard])
            rows = torch.from_numpy(np.ascontiguousarray(x[first : first + counts.sum()]))
            first += len(rows)
            position = placed(counts)
            names = [f"t{p}" for p in position.tolist()]
            found = Found(rows, counts, position, position, names, {})
            mine = documents[start : start + documents_per_shard]
            fate = [Harvested(c) for c in counts.tolist()]
            shard = Shard(
                rows, row_sums(rows), provenance_table(mine, found), to_table(mine, fate, corpus)
            )
            activations.put(store, stage.key, number, shard)
        activations.commit(store, stage, len(starts), {})
        return Activations(store, stage.key)

    return put


@pytest.fixture(scope="session")
def planted(
    tmp_path_factory: pytest.TempPathFactory, put_activations: Callable[..., Activations]
) -> Activations:
    """2,400 rows of width 16, each a sum of a few of 24 fixed directions around a common offset."""
    rng = np.random.default_rng(7)
    directions = rng.standard_normal((24, 16))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    z = np.where(rng.random((2400, 24)) < 0.08, rng.uniform(1, 3, (2400, 24)), 0)
    x = (z @ directions + 0.5 + 0.01 * rng.standard_normal((2400, 16))).astype(np.float32)
    root = tmp_path_factory.mktemp("planted")
    return put_activations(root, x, [12] * 200, documents_per_shard=50)


@dataclass(frozen=True)
class Configs:
    """Everything a tiny campaign is a function of."""

    corpus: CorpusConfig
    host: Transformer
    harvest: HarvestConfig
    sae: SAEConfig
    train: TrainConfig
    analyse: AnalyseConfig
    interpret: InterpretConfig


@dataclass(frozen=True)
class Pipeline:
    """A campaign carried out in this process: its store, its configs and the stage of each kind."""

    store: Store
    configs: Configs
    stages: dict[str, Stage]

    def key(self, kind: str) -> str:
        return self.stages[kind].key


def run_pipeline(root: Path, configs: Configs, host: TransformerHost) -> Pipeline:
    """Every stage, in order, as the workers and the driver would do it."""
    store = Store.open(str(root), writable=True)
    (first,) = activations.stages(configs.corpus, configs.host, configs.harvest)
    reading = TransformerHost(host.model, host.tokenizer, configs.host)
    plan = list(parts(configs.host.documents(configs.corpus), configs.harvest))
    for unit, documents in plan:
        (shard,) = harvest_unit(reading, documents, configs.harvest, configs.corpus)
        activations.put(store, first.key, unit.number, shard)
    activations.commit(store, first, len(plan), {"computing": 1.0})

    second = saes.stage(configs.sae, configs.train, first.key)
    exhaust(saes.train_and_commit(store, [second]))

    source, sae = Activations(store, first.key), saes.load(store, second.key)
    third = features.stage(configs.analyse, first.key, second.key)
    found = analyse_shard(source, sae, configs.analyse, 0)
    for index in range(1, len(source.shard_rows)):
        found.merge(analyse_shard(source, sae, configs.analyse, index))
    features.commit(store, third, source, sae, found)

    fourth = interpretations.stage(configs.interpret, third.key)
    table = interpretations.plan(store, fourth, source)
    evidence = interpretations.evidence(store, third.key)
    batches = interpretations.batches(table)
    for index, batch in enumerate(batches):
        told = interpret_features(batch, evidence, table, configs.interpret, configs.corpus)
        interpretations.put_part(store, fourth.key, index, told)
    interpretations.commit(store, fourth, table, len(batches))

    stages = {stage.kind: stage for stage in (first, second, third, fourth)}
    keys = {kind: stage.key for kind, stage in stages.items()}
    recipe = {name: to_dict(part) for name, part in vars(configs).items()}
    last = campaigns.stage("tiny", recipe, keys)
    campaigns.commit(store, last)
    return Pipeline(store, configs, stages | {last.kind: last})


@pytest.fixture(scope="session")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, host: TransformerHost
) -> Pipeline:
    configs = Configs(
        corpus=CorpusConfig(source=str(corpus_file), validation_percent=20, test_percent=30),
        host=Transformer(layer=2, max_tokens=24, batch_tokens=512),
        harvest=HarvestConfig(unit_kb=2),
        sae=SAEConfig(d_sae=64, architecture=ReLU(clip=30.0)),
        train=TrainConfig(
            steps=120,
            batch_rows=128,
            objective=ObjectiveConfig(l1=L1(weight=3.0, schedule=Schedule(warmup_steps=60))),
            lr=3e-3,
            checkpoint_every=60,
            log_every=20,
        ),
        analyse=AnalyseConfig(window=4, top_k=6, sample=48, pool=200),
        interpret=InterpretConfig(features=12, examples=6, positives=8, negatives=8),
    )
    return run_pipeline(tmp_path_factory.mktemp("store"), configs, host)


@pytest.fixture(scope="session")
def run_again() -> Callable[[Path, Configs, TransformerHost], Pipeline]:
    """The pipeline from nothing in another store."""
    return run_pipeline
