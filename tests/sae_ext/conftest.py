"""A tiny corpus, the real encoder on it, activations with known structure, and a whole pipeline."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import settings
from safetensors.numpy import save

from sae_ext import corpora
from sae_ext.activations.harvest import Plan, ShardData, Unit, harvest_unit
from sae_ext.activations.harvest import plan as make_plan
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
    HostConfig,
    InterpretConfig,
    SAEConfig,
    TrainConfig,
    to_dict,
)
from sae_ext.corpora import Document
from sae_ext.host import Host, load_tokenizer, resolve, width
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
def host() -> Host:
    """The real encoder, loaded once; for another layer, `Host(model, tokenizer, config)`."""
    return Host.load(HostConfig(layer=2, max_tokens=24))


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


def row_sums(x: np.ndarray) -> dict[str, np.ndarray]:
    exact = x.astype(np.float64)
    return {
        "sum": exact.sum(axis=0),
        "sum_sq": np.square(exact).sum(axis=0),
        "norm_sum": np.linalg.norm(exact, axis=1).sum(keepdims=True),
    }


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
        config = {
            "corpus": vars(corpus or CorpusConfig(source="made-up.jsonl")),
            "host": vars(HostConfig()),
            "harvest": vars(HarvestConfig(dtype=str(x.dtype))),
        }
        content = {"rows": str(zlib.crc32(x.tobytes())), "per_shard": str(documents_per_shard)}
        stage = Stage(activations.KIND, config, content)
        units: list[Unit] = []
        for start in range(0, n, documents_per_shard):
            stop = min(start + documents_per_shard, n)
            units.append(Unit(len(units), start, stop, sum(rows_of_document[start:stop])))
        plan = Plan(list(rows_of_document), units)
        activations.put_documents(store, stage.key, documents, plan)
        first = 0
        for unit in units:
            part = x[first : first + unit.rows]
            first += unit.rows
            counts = rows_of_document[unit.start : unit.stop]
            position = np.concatenate([np.arange(c, dtype=np.int32) for c in counts])
            names = np.repeat([f"d{i}" for i in range(unit.start, unit.stop)], counts)
            provenance = pa.table(
                {
                    "doc_id": pa.array(names.tolist(), pa.string()),
                    "position": position,
                    "token_id": position,
                    "token_text": pa.array([f"t{p}" for p in position.tolist()], pa.string()),
                }
            )
            data = ShardData(save({"x": np.ascontiguousarray(part), **row_sums(part)}), provenance)
            activations.put_unit(store, stage.key, unit, data)
        activations.commit(store, stage, plan, {})
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
    host: HostConfig
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


def run_pipeline(root: Path, configs: Configs, host: Host) -> Pipeline:
    """Every stage, in order, as the workers and the driver would do it."""
    store = Store.open(str(root), writable=True)
    folder = resolve(configs.host.model)
    documents = corpora.load(configs.corpus)
    first = activations.stage(configs.corpus, configs.host, configs.harvest)
    d_in = width(folder, configs.host.layer)
    plan = make_plan(documents, load_tokenizer(folder), configs.host, configs.harvest, d_in)
    activations.put_documents(store, first.key, documents, plan)
    reading = Host(host.model, host.tokenizer, configs.host)
    for unit in activations.missing_units(store, first.key, plan):
        data = harvest_unit(reading, documents[unit.start : unit.stop], configs.harvest)
        activations.put_unit(store, first.key, unit, data)
    activations.commit(store, first, plan, {"computing": 1.0})

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
def pipeline(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, host: Host) -> Pipeline:
    configs = Configs(
        corpus=CorpusConfig(source=str(corpus_file), validation_percent=20, test_percent=30),
        host=HostConfig(layer=2, max_tokens=24),
        harvest=HarvestConfig(shard_mb=0.4, batch_tokens=512),
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
def run_again() -> Callable[[Path, Configs, Host], Pipeline]:
    """The pipeline from nothing in another store."""
    return run_pipeline
