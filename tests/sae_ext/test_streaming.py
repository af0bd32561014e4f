"""Training on rows that are computed as they are needed: the same as on stored ones, and nothing else is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

from sae_ext import corpora
from sae_ext.activations.harvest import harvest_unit, parts
from sae_ext.activations.reader import Activations
from sae_ext.activations.streaming import Streamed, UnitRows, here, streamed
from sae_ext.artefacts import Stage, activations, saes
from sae_ext.config import CorpusConfig, HarvestConfig, SAEConfig, TrainConfig, with_changes
from sae_ext.errors import Stopped, UserError
from sae_ext.hosts import Host, HostConfig, Planted
from sae_ext.hosts.transformer import TransformerHost
from sae_ext.schedules import Schedule
from sae_ext.store import Store
from sae_ext.training.config import BufferConfig
from sae_ext.training.run import run_to_end, train
from sae_ext.training.terms import L1, ObjectiveConfig

HOST = Planted(rows=3000, d_in=8, n_features=16, active=3.0)
HARVEST = HarvestConfig(unit_kb=1.0)
"""256 rows in a unit."""
SAE = SAEConfig(d_sae=24)
TRAIN = TrainConfig(
    steps=200, batch_rows=32, checkpoint_every=50, log_every=10,
    lr_schedule=Schedule(kind="linear", warmup_steps=10),
    objective=ObjectiveConfig(l1=L1(weight=1.0, schedule=Schedule(warmup_steps=20))),
    buffer=BufferConfig(rows=500, min_rows=400),
)  # fmt: skip
"""About three times through the training rows."""


def stored(store: Store, corpus: CorpusConfig = CorpusConfig()) -> str:  # noqa: B008
    """Harvest into a store; the key."""
    (stage,) = activations.stages(corpus, HOST, HARVEST)
    host = HOST.open()
    plan = list(parts(HOST.documents(corpus), HARVEST))
    for unit, documents in plan:
        (shard,) = harvest_unit(host, documents, HARVEST, corpus)
        activations.put(store, stage.key, unit.number, shard)
    activations.commit(store, stage, len(plan), {})
    return stage.key


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


def streaming(corpus: CorpusConfig = CorpusConfig()) -> saes.Streaming:  # noqa: B008
    return saes.Streaming(corpus, HOST.documents_fingerprint(corpus))


def chunks_of(corpus: CorpusConfig, first: int, count: int, host: HostConfig = HOST) -> list:
    stream = streamed(host, corpus, HARVEST, here(host.open(), HARVEST))
    return list(itertools.islice(stream(first), count))


# -- the stream ------------------------------------------------------------------------------------


def test_a_stream_gives_the_training_rows_of_its_corpus_in_order_again_and_again(store):
    data = Activations(store, stored(store))
    wanted = data.gather(data.rows("train")[:])
    a_pass = len(list(parts(HOST.documents(CorpusConfig()), HARVEST)))
    found = chunks_of(CorpusConfig(), 0, 2 * a_pass)
    rows = torch.cat([batch.x for batch in found])
    assert rows.dtype == torch.float16
    assert torch.equal(rows.float(), torch.cat([wanted, wanted]))
    assert [len(batch.x) for batch in found] == [len(batch.rows) for batch in found]


@pytest.mark.parametrize("first", [1, 11, 12, 13, 40])
def test_a_stream_begins_at_any_chunk(first):
    whole = chunks_of(CorpusConfig(), 0, first + 3)
    for one, other in zip(whole[first:], chunks_of(CorpusConfig(), first, 3), strict=True):
        assert torch.equal(one.x, other.x)


def test_documents_that_are_held_out_are_not_even_computed(tmp_path: Path, host: TransformerHost):
    texts = [f"the text number {i} is short" for i in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    corpus = CorpusConfig(source=str(path), validation_percent=30, test_percent=30)
    documents = corpora.load(corpus)
    buckets = np.array([corpora.bucket_of(d, corpus) for d in documents])
    keep = corpora.split_masks(buckets, corpus)["train"]
    train_texts = [t for t, kept in zip(texts, keep, strict=True) if kept]
    read: list[str] = []

    def rows_of(units):
        for unit in units:
            read.extend(d.text for d in unit)
            yield UnitRows(host.read(unit, torch.float32)[0].x, {})

    stream = streamed(host.config, corpus, HARVEST, rows_of)(0)
    while len(read) < len(train_texts):
        next(stream)
    assert read == train_texts
    assert 0 < len(train_texts) < 60


def test_a_stream_without_training_documents_or_rows_says_so(tmp_path: Path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "x"}')
    corpus = CorpusConfig(source=str(path), validation_percent=40, test_percent=40)
    held_out = next(t for t in map(str, range(100)) if corpora.bucket(t) < 80)
    path.write_text(json.dumps({"text": held_out}))

    class Texts(HostConfig):
        """Reads texts, of which none gives a row."""

    def nothing(units):
        return (UnitRows(torch.zeros(0, 4), {"empty": len(unit)}) for unit in units)

    with pytest.raises(UserError, match="holds no document to train on"):
        next(streamed(Texts(), corpus, HARVEST, nothing)(0))
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(20)))
    with pytest.raises(UserError, match=r"no document gives a row to train on, \d+ empty"):
        list(streamed(Texts(), corpus, HARVEST, nothing)(0))


def test_what_is_not_finite_is_refused_or_left_out(host: TransformerHost, tmp_path: Path):
    class Broken(Host):
        def read(self, documents, dtype):
            (found,) = host.read(documents, dtype)[:1]
            found.x[0, 0] = float("nan")
            return [found]

    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the text number {i}"}) for i in range(40)))
    corpus = CorpusConfig(source=str(path))
    refuse, drop = HarvestConfig(), HarvestConfig(not_finite="drop")
    with pytest.raises(UserError, match=r"not finite in float16.*harvest\.not_finite"):
        next(streamed(host.config, corpus, refuse, here(Broken(), refuse))(0))
    batch = next(streamed(host.config, corpus, drop, here(Broken(), drop))(0))
    assert batch.x.isfinite().all()
    assert len(batch.x)


# -- training on it --------------------------------------------------------------------------------


def trained(store: Store, key: str, config: TrainConfig, stream: saes.Streaming | None) -> Stage:
    stage = saes.stage(SAE, config, key, stream)
    run_to_end(saes.train_and_commit(store, [stage]))
    return stage


def test_a_streamed_training_equals_one_on_stored_rows_bit_for_bit(store):
    key = stored(store)
    one = trained(store, key, TRAIN, None)
    other = trained(store, key, TRAIN, streaming())
    assert one.key != other.key
    for name in ("sae_weights.safetensors", "history.parquet", "sparsity.safetensors"):
        assert store.read(saes.KIND, one.key, name) == store.read(saes.KIND, other.key, name)


def test_a_stream_may_be_far_longer_than_what_is_stored(store):
    key = stored(store, CorpusConfig(limit=300))
    stage = trained(store, key, TRAIN, streaming())
    manifest = store.manifest(saes.KIND, stage.key)
    assert manifest.config["stream"] == with_changes(CorpusConfig(), {}).__dict__ | {"columns": []}
    assert manifest.extra["validation"]["n_rows"] == len(Activations(store, key).rows("validation"))
    assert store.list(activations.KIND) == [key]  # of the stream nothing was stored


def test_other_documents_in_the_stream_mean_another_sae(store):
    key = stored(store)
    limited = streaming(CorpusConfig(limit=1000))
    assert saes.stage(SAE, TRAIN, key, streaming()).key != saes.stage(SAE, TRAIN, key, limited).key


@pytest.mark.parametrize("before", [3, 60, 130])
def test_a_streamed_training_goes_on_to_the_same_bytes(store, before):
    key = stored(store)
    data = Streamed(
        Activations(store, key),
        streamed(HOST, CorpusConfig(), HARVEST, here(HOST.open(), HARVEST)),
        "stream",
    )
    saved: list[bytes] = []
    whole = run_to_end(train(data, SAE, TRAIN))
    steps = itertools.count()
    with pytest.raises(Stopped):
        run_to_end(
            train(data, SAE, TRAIN, save_checkpoint=saved.append, stop=lambda: next(steps) > before)
        )
    again = run_to_end(train(data, SAE, TRAIN, load_checkpoint=lambda: saved[-1]))
    for name, tensor in whole.sae.parameters.tensors().items():
        assert torch.equal(tensor, again.sae.parameters.tensors()[name])
    assert whole.history.equals(again.history)


def test_a_stream_that_is_stopped_while_it_waits_leaves_a_checkpoint(store):
    key = stored(store)
    rows_of = here(HOST.open(), HARVEST)
    waiting = True

    def slow(units):
        for number, found in enumerate(rows_of(units)):
            if waiting and number == 10:
                raise Stopped("stopped while waiting")
            yield found

    stored_rows = Activations(store, key)
    saved: list[bytes] = []
    data = Streamed(stored_rows, streamed(HOST, CorpusConfig(), HARVEST, slow), "stream")
    with pytest.raises(Stopped):
        run_to_end(train(data, SAE, TRAIN, save_checkpoint=saved.append))
    waiting = False
    again = run_to_end(train(data, SAE, TRAIN, load_checkpoint=lambda: saved[-1]))
    whole = run_to_end(train(data, SAE, TRAIN))
    for name, tensor in whole.sae.parameters.tensors().items():
        assert torch.equal(tensor, again.sae.parameters.tensors()[name])


def test_units_without_a_row_are_passed_over(store):
    rows_of = here(HOST.open(), HARVEST)

    def some_empty(units):
        for number, found in enumerate(rows_of(units)):
            yield UnitRows(torch.zeros(0, 0), {"too long": 1}) if number % 3 == 0 else found

    data = Streamed(
        Activations(store, stored(store)), streamed(HOST, CorpusConfig(), HARVEST, some_empty), "s"
    )
    assert run_to_end(train(data, SAE, TRAIN)).steps == TRAIN.steps


def test_the_last_checkpoint_keeps_no_row_and_one_on_the_way_the_buffer(store):
    stream = streamed(HOST, CorpusConfig(), HARVEST, here(HOST.open(), HARVEST))
    data = Streamed(Activations(store, stored(store)), stream, "stream")
    saved: list[bytes] = []
    run_to_end(train(data, SAE, TRAIN, save_checkpoint=saved.append))
    names = [set(load_tensors(state)) for state in saved]
    assert "source.buffer.x" in names[0]
    assert not any(name.startswith("source.") for name in names[-1])
    again = run_to_end(train(data, SAE, TRAIN, load_checkpoint=lambda: saved[-1]))
    assert again.steps == TRAIN.steps


def test_a_stop_is_heard_on_the_way_to_where_the_stream_was():
    stream = streamed(HOST, CorpusConfig(), HARVEST, here(HOST.open(), HARVEST), lambda: True)
    with pytest.raises(Stopped, match="on the way"):
        next(stream(3))


def test_a_checkpoint_of_another_stream_is_refused(store):
    key = stored(store)
    stream = streamed(HOST, CorpusConfig(), HARVEST, here(HOST.open(), HARVEST))
    saved: list[bytes] = []
    one, other = (Streamed(Activations(store, key), stream, name) for name in ("one", "other"))
    run_to_end(train(one, SAE, TRAIN, save_checkpoint=saved.append))
    with pytest.raises(UserError, match="made by another configuration"):
        run_to_end(train(other, SAE, TRAIN, load_checkpoint=lambda: saved[-1]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"buffer": None}, r"give train\.buffer"),
        ({"objective.mse.row_weight": "weight"}, "MSE reads the column 'weight'"),
    ],
)
def test_what_a_stream_cannot_serve_is_refused_before_the_first_row(store, changes, told):
    def never(units):
        raise AssertionError

    data = Streamed(
        Activations(store, stored(store)), streamed(HOST, CorpusConfig(), HARVEST, never), "s"
    )
    with pytest.raises(UserError, match=told):
        run_to_end(train(data, SAE, with_changes(TRAIN, changes)))
    with pytest.raises(UserError, match="column 'label'"):
        data.column("label", data.rows("train")[:3])
