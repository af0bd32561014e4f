from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import load as load_tensors

from sae_ext import corpora
from sae_ext.activations import reader
from sae_ext.activations.harvest import Shard, provenance_table, row_sums
from sae_ext.activations.reader import Activations
from sae_ext.activations.shards import contents, map_tensor, provenance_file, shard_file
from sae_ext.artefacts import Stage
from sae_ext.artefacts import activations as activations_of
from sae_ext.config import CorpusConfig, HarvestConfig, to_dict
from sae_ext.corpora import Document
from sae_ext.errors import CorruptArtefact, UserError
from sae_ext.hosts import Found, Transformer
from sae_ext.hosts.base import placed
from sae_ext.store import Store

COUNTS = [3, 0, 5, 1, 4, 2, 6, 7, 2]


@pytest.fixture
def made(tmp_path, put_activations):
    """30 rows [30, 4] of 9 documents in 3 shards, with the array they hold."""
    x = np.random.default_rng(0).standard_normal((sum(COUNTS), 4)).astype(np.float16)
    return x, put_activations(tmp_path, x, COUNTS, documents_per_shard=3)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, put_activations) -> Activations:
    """100 rows of width 1, each holding its own number."""
    x = np.arange(100, dtype=np.float32)[:, None]
    return put_activations(tmp_path_factory.mktemp("n"), x, [10] * 10, documents_per_shard=3)


# -- rows ----------------------------------------------------------------------------------------


def test_the_shards_one_after_another_are_the_rows(made):
    x, activations = made
    assert activations.shard_rows == [8, 7, 15]
    assert (activations.n_rows, activations.d_in) == (30, 4)
    assert (torch.cat([activations.shard(i) for i in range(3)]).numpy() == x).all()


@given(st.lists(st.integers(0, 99), max_size=40))
@settings(max_examples=40)
def test_gathered_rows_come_in_the_order_asked_for(numbered, rows):
    found = numbered.gather(np.array(rows, dtype=np.int64))
    assert found.dtype == torch.float32
    assert found.shape == (len(rows), 1)
    assert found.flatten().tolist() == rows


def test_half_precision_rows_are_gathered_as_float32_without_loss(made):
    x, activations = made
    order = np.random.default_rng(1).permutation(30)
    found = activations.gather(order)
    assert found.dtype == torch.float32
    assert (found.numpy() == x[order].astype(np.float32)).all()


def test_there_are_no_rows_before_the_first_and_behind_the_last(made):
    _, activations = made
    for row in (-1, 30):
        with pytest.raises(IndexError, match="0 to 29"):
            activations.gather(np.array([3, row]))


def test_rows_can_be_gathered_by_many_threads_at_once_and_a_shard_is_checked_once(
    made, monkeypatch
):
    x, activations = made
    checked = []
    local = activations.store.local

    def slow(*arguments, **options):
        checked.append(arguments[-1])
        time.sleep(0.01)
        return local(*arguments, **options)

    monkeypatch.setattr(activations.store, "local", slow)
    orders = [np.random.default_rng(i).permutation(30) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for order, found in zip(orders, pool.map(activations.gather, orders), strict=True):
            assert (found.numpy() == x[order].astype(np.float32)).all()
    assert sorted(checked) == [shard_file(i) for i in range(3)]


def test_no_more_shards_are_mapped_at_once_than_there_may_be_files(
    tmp_path, put_activations, monkeypatch
):
    monkeypatch.setattr(reader, "_OPEN", 3)
    x = np.arange(40, dtype=np.float32)[:, None]
    activations = put_activations(tmp_path, x, [1] * 40, documents_per_shard=4)
    order = np.random.default_rng(0).permutation(40)
    for _ in range(3):
        assert activations.gather(order).flatten().tolist() == order.tolist()
        assert len(activations._mapped) == 3
    assert activations._checked == set(range(10))


def test_checksums_of_more_than_could_be_read_first_are_left_to_verify(made, monkeypatch):
    _, activations = made
    path = Path(activations.store.path("activations", activations.key, shard_file(0)))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    monkeypatch.setattr(reader, "_CHECKED_BYTES", 10.0)
    assert len(Activations(activations.store, activations.key).gather(np.arange(8))) == 8
    assert activations.store.wrong("activations", activations.key, shard_file(0)) is not None


def test_a_message_can_name_the_file_and_the_row_in_it(made):
    _, activations = made
    places = {0: (0, 0), 7: (0, 7), 8: (1, 0), 14: (1, 6), 29: (2, 14)}
    for row, (shard, inside) in places.items():
        path = activations.store.path("activations", activations.key, shard_file(shard))
        assert activations.where(row) == f"{path}, row {inside}"


# -- columns -------------------------------------------------------------------------------------


def test_a_row_has_the_label_of_its_document(tmp_path, put_activations):
    labels = [f"topic {i % 3}" for i in range(9)]
    x = np.zeros((30, 1), np.float32)
    activations = put_activations(tmp_path, x, COUNTS, documents_per_shard=3, labels=labels)
    expected = np.repeat(labels, COUNTS)
    for rows in (np.arange(30), np.array([29, 3, 3, 0]), np.arange(0)):
        assert activations.column("label", rows).tolist() == expected[rows].tolist()
    assert activations.column("n_rows", np.array([0, 3])).tolist() == [3, 5]
    assert activations.column("n_rows", np.array([0])).dtype == np.int32


def test_a_missing_label_is_refused_only_where_it_is_asked_for(tmp_path, put_activations):
    labels = ["a", "a", "", "b", "", "b", "", "a", "a"]
    x = np.zeros((30, 1), np.float32)
    activations = put_activations(tmp_path, x, COUNTS, documents_per_shard=3, labels=labels)
    labelled = np.flatnonzero(np.repeat(labels, COUNTS) != "")
    assert set(activations.column("label", labelled)) == {"a", "b"}
    told = (
        "'label' of activations/.* has no value for document 'd2' and 2 more: give every document"
    )
    with pytest.raises(UserError, match=told):
        activations.column("label", np.arange(30))
    with pytest.raises(UserError, match="no value for document 'd6': give"):
        activations.column("label", np.array([15, 16, 20]))


def test_a_column_that_is_not_there_is_refused_with_those_that_are(made):
    _, activations = made
    told = "have no column 'topic': choose from doc_id, text, label, bucket, n_rows, rejected"
    with pytest.raises(UserError, match=told):
        activations.column("topic", np.arange(3))


# -- rows by split and their statistics ----------------------------------------------------------


def test_rows_in_order_come_in_batches_with_a_shorter_last_one(made):
    x, activations = made
    batches = list(activations.in_order(np.arange(30), 8))
    assert [len(b) for b in batches] == [8, 8, 8, 6]
    assert (torch.cat(batches).numpy() == x.astype(np.float32)).all()


def test_every_row_belongs_to_its_document(made):
    _, activations = made
    owners = activations.documents_of(np.arange(30))
    assert owners.tolist() == np.repeat(range(9), COUNTS).tolist()
    names = [name for i in range(3) for name in activations.provenance(i)["doc_id"].to_pylist()]
    assert names == [f"d{d}" for d in owners]


def test_what_is_written_to_a_mapped_shard_reaches_no_file(made):
    x, activations = made
    activations.shard(0)[0, 0] = 1
    again = Activations(activations.store, activations.key)
    assert float(again.shard(0)[0, 0]) == x[0, 0] != 1


def test_bfloat16_rows_are_gathered_as_they_were_stored(tmp_path):
    x = torch.randn(20, 3).bfloat16()
    path = tmp_path / "shard.safetensors"
    path.write_bytes(b"".join(contents({"x": x})))
    assert torch.equal(map_tensor(path, "x"), x)
    assert torch.equal(load_tensors(path.read_bytes())["x"], x)


def test_the_splits_share_the_rows_out_by_document(tmp_path, put_activations):
    corpus = CorpusConfig(source="made-up.jsonl", validation_percent=30, test_percent=30)
    x = np.zeros((200, 1), np.float32)
    activations = put_activations(tmp_path, x, [4] * 50, corpus=corpus)
    rows = {split: activations.rows(split) for split in ("train", "validation", "test")}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(200))
    for split, indices in rows.items():
        assert len(indices) > 0
        buckets = [corpora.bucket(f"text number {row // 4}") for row in indices]
        low, high = {"test": (0, 30), "validation": (30, 60), "train": (60, 100)}[split]
        assert all(low <= b < high for b in buckets)


def test_the_manifest_holds_the_statistics_of_all_rows(made):
    x, activations = made
    exact, told = x.astype(np.float64), activations.manifest.extra
    np.testing.assert_allclose(told["mean"], exact.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(told["variance"], exact.var(axis=0), rtol=1e-10)
    assert told["mean_norm"] == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=1e-12)


def test_statistics_do_not_depend_on_how_the_rows_are_shared_out(tmp_path, put_activations):
    x = (np.random.default_rng(2).standard_normal((30, 3)) + 5).astype(np.float32)
    found = [
        put_activations(tmp_path / str(n), x, COUNTS, documents_per_shard=n).manifest.extra
        for n in (1, 4, 9)
    ]
    for name in ("mean", "variance", "mean_norm"):
        for other in found[1:]:
            np.testing.assert_allclose(other[name], found[0][name], rtol=1e-12)


def test_a_column_may_hold_texts_in_some_shards_and_numbers_or_nothing_in_others(tmp_path):
    store = Store.open(str(tmp_path), writable=True)
    corpus = CorpusConfig(source="x.jsonl", columns=("answer",))
    config = {"corpus": to_dict(corpus), "host": to_dict(Transformer())}
    config["harvest"] = to_dict(HarvestConfig(dtype="float32"))
    stage = Stage("activations", config, {})
    answers = [[None], [1.5], ["seven"]]
    for number, answer in enumerate(answers):
        rows = torch.zeros(1, 2)
        documents = [Document(f"d{number}", f"text {number}", "", {"answer": answer[0]})]
        counts = np.ones(1, np.int64)
        found = Found(rows, counts, placed(counts), None, None, {})
        shard = Shard(
            rows, row_sums(rows), provenance_table(documents, found),
            corpora.to_table(documents, [corpora.Harvested(1)], corpus),
        )  # fmt: skip
        activations_of.put(store, stage.key, number, shard)
    activations_of.commit(store, stage, 3, {})
    table = Activations(store, stage.key).documents
    assert table["answer"].to_pylist() == [None, "1.5", "seven"]


# -- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_corrupt_when_it_is_first_read(made, damage):
    _, activations = made
    path = Path(activations.store.path("activations", activations.key, shard_file(1)))
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-7] if damage == "truncated" else data[:-1] + b"\x7f")
    assert len(activations.gather(np.arange(8))) == 8
    with pytest.raises(CorruptArtefact, match=r"shard-00001\.safetensors .*delete that file"):
        activations.gather(np.arange(8, 9))


def test_a_damaged_provenance_table_is_corrupt(made):
    _, activations = made
    path = Path(activations.store.path("activations", activations.key, provenance_file(0)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptArtefact, match=r"shard-00000\.parquet is not a readable table"):
        activations.provenance(0)


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05",
        b"\xff" * 40,
        with_header([]),
        with_header(3),
        with_header({"x": {}}),
        with_header({"x": []}),
        with_header({"y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        with_header({"x": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}) + bytes(4),
        with_header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}) + bytes(4),
        save({"x": np.ones((6, 2), np.float32)})[:-1],
    ],
    ids=["empty", "cut header", "noise", "list", "number", "no facts", "facts a list",
         "other tensor", "other type", "too short", "cut data"],
)  # fmt: skip
def test_a_file_that_is_no_shard_is_corrupt(tmp_path, content):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptArtefact, match=r"shard\.safetensors is not a readable shard"):
        map_tensor(path, "x")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_tensor_is_mapped_as_it_was_saved(tmp_path, dtype):
    x = np.random.default_rng(0).standard_normal((7, 3)).astype(dtype)
    path = tmp_path / "t.safetensors"
    path.write_bytes(save({"before": np.zeros(5, dtype), "x": x, "z": np.ones(2, dtype)}))
    found = map_tensor(path, "x").numpy()
    assert found.dtype == dtype
    assert (found == x).all()


def test_an_empty_shard_is_mapped_too(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"".join(contents({"x": torch.zeros(0, 4)})))
    assert map_tensor(path, "x").shape == (0, 4)


def test_activations_that_are_not_there_are_a_user_error(made):
    _, activations = made
    with pytest.raises(UserError, match="activations/none is not in the store"):
        Activations(activations.store, "none")
