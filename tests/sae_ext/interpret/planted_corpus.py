"""A corpus with known structure and features that fire by known rules, as evidence on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ext.config import AnalyseConfig, CorpusConfig
from sae_ext.evidence import Evidence, TokenTable
from sae_ext.interpret import EvidenceReader

CORPUS = CorpusConfig(validation_percent=20, test_percent=20)
LENGTH = 128
VOCABULARY = 2000
TOPIC_WORDS = 40

SINGLE, TOKEN_SET, TOPIC, RANDOM, AFTER = 0, 1, 2, 3, 4
SINGLE_2, TOKEN_SET_2, TOPIC_2 = 5, 6, 7
DEAD, DENSE, RARE = 8, 9, 10
N_FEATURES = 11
SINGLES = {SINGLE: ["w40"], SINGLE_2: ["w45"]}
SETS = {
    TOKEN_SET: ["w90", "w100", "w110", "w120", "w130", "w140"],
    TOKEN_SET_2: ["w95", "w105", "w115", "w125", "w135", "w145"],
}
TOPICS = {TOPIC: 0, TOPIC_2: 1}
TRIGGER = "w20"


@dataclass(frozen=True)
class Planted:
    """Everything a test needs to know about the planted corpus."""

    reader: EvidenceReader
    tables: dict[str, pa.Table]
    firing_rate: np.ndarray
    words: np.ndarray
    """[documents, LENGTH] the texts."""
    fires: np.ndarray
    """[documents, LENGTH, N_FEATURES] the truth."""


def topic_words(topic: int) -> list[str]:
    return [f"topic{topic}_{i}" for i in range(TOPIC_WORDS)]


def rule(feature: int) -> Callable[[tuple[str, ...]], bool]:
    """Whether a feature fires in a window, as far as single tokens tell; never for the others."""
    words = {**SINGLES, **SETS, **{f: topic_words(t) for f, t in TOPICS.items()}}.get(feature, [])
    return lambda tokens: not set(words).isdisjoint(tokens)


def texts(n_documents: int, rng: np.random.Generator) -> np.ndarray:
    """Zipf words; every document has one of 8 topics, whose words make up a quarter of it."""
    weight = 1 / np.arange(1, VOCABULARY + 1)
    plain = np.array([f"w{i}" for i in range(VOCABULARY)])
    words = rng.choice(plain, (n_documents, LENGTH), p=weight / weight.sum()).astype(object)
    of_topic = np.array([topic_words(t) for t in range(8)], object)
    topic = rng.integers(0, 24, n_documents)  # two documents in three have none
    for d in np.flatnonzero(topic < 8):
        mixed = rng.random(LENGTH) < 0.25
        words[d, mixed] = rng.choice(of_topic[topic[d]], mixed.sum())
    return words


def firings(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    fires = np.zeros((*words.shape, N_FEATURES), bool)
    for feature, chosen in {**SINGLES, **SETS}.items():
        fires[..., feature] = np.isin(words.astype(str), chosen)
    for feature, topic in TOPICS.items():
        fires[..., feature] = np.isin(words.astype(str), topic_words(topic))
    fires[..., RANDOM] = rng.random(words.shape) < 0.01
    fires[:, 1:, AFTER] = words[:, :-1] == TRIGGER
    fires[..., DENSE] = rng.random(words.shape) < 0.6
    fires[:3, 5, RARE] = True
    return fires


def gather(words: np.ndarray, fires: np.ndarray, config: AnalyseConfig, seed: int = 0) -> Evidence:
    rng = np.random.default_rng(seed)
    flat = fires.reshape(-1, fires.shape[-1])
    row, col = np.nonzero(flat)
    evidence = Evidence(config, flat.shape[1])
    evidence.update(
        np.searchsorted(row, np.arange(len(flat) + 1)).astype(np.int64),
        col.astype(np.int32),
        (1 + rng.exponential(size=len(col))).astype(np.float32),
        TokenTable(
            doc=np.repeat(np.arange(len(words)), words.shape[1]),
            position=np.tile(np.arange(words.shape[1], dtype=np.int32), len(words)),
            text=words.reshape(-1),
        ),
    )
    return evidence


def documents(n: int, buckets: np.ndarray | None = None) -> pa.Table:
    buckets = np.arange(n) * 37 % 100 if buckets is None else buckets
    return pa.table(
        {"doc_id": [f"doc-{i}" for i in range(n)], "bucket": pa.array(buckets, pa.int16())}
    )


def write(tables: dict[str, pa.Table], folder: Path) -> EvidenceReader:
    pq.write_table(tables["windows"], folder / "windows.parquet", row_group_size=256)
    pq.write_table(tables["pool"], folder / "pool.parquet")
    return EvidenceReader(folder / "windows.parquet", folder / "pool.parquet")


def plant(folder: Path, n_documents: int = 1500, seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    words = texts(n_documents, rng)
    fires = firings(words, rng)
    found = gather(words, fires, AnalyseConfig(sample=160)).tables(documents(n_documents))
    tables = {"windows": found.windows, "pool": found.pool}
    rate = fires.reshape(-1, N_FEATURES).mean(0)
    return Planted(write(tables, folder), tables, rate, words, fires)
