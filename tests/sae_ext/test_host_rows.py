"""Hosts that bring rows of their own: embeddings in files, and made-up rows with a known truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from sae_ext.corpora import Document, Rejected
from sae_ext.corpora.config import CorpusConfig
from sae_ext.errors import UserError
from sae_ext.hosts import Embeddings, Planted, Sine
from sae_ext.hosts.base import HostConfig

X = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)


def rows_of(host: HostConfig, corpus: CorpusConfig = CorpusConfig()) -> torch.Tensor:  # noqa: B008
    documents = [d for d in host.documents(corpus) if isinstance(d, Document)]
    (found,) = host.open().read(documents, torch.float32)
    assert found.counts.tolist() == [1] * len(documents)
    return found.x


# -- embeddings ------------------------------------------------------------------------------------


def written(folder: Path, kind: str) -> str:
    path = folder / f"rows.{kind}"
    if kind == "npy":
        np.save(path, X)
    elif kind == "safetensors":
        save_file({"embedding": torch.from_numpy(X), "other": torch.zeros(3)}, path)
    else:
        table = {
            "embedding": pa.array(X.tolist(), pa.list_(pa.float32())),
            "text": [f"text {i}" if i % 7 else None for i in range(50)],
            "title": [f"name {i}" for i in range(50)],
            "label": [f"class {i % 3}" for i in range(50)],
            "age": list(range(50)),
        }
        pq.write_table(pa.table(table), path, row_group_size=8)
    return str(path)


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_the_rows_of_a_file_are_documents_in_their_order(tmp_path, kind):
    host = Embeddings(file=written(tmp_path, kind))
    assert torch.equal(rows_of(host), torch.from_numpy(X))
    assert host.width() == 6
    documents = list(host.documents(CorpusConfig()))
    assert len({d.doc_id for d in documents}) == 50
    (some,) = host.open().read(documents[13:29], torch.float16)
    assert torch.equal(some.x, torch.from_numpy(X[13:29]).half())
    assert len(list(host.documents(CorpusConfig(limit=3)))) == 3


def test_a_parquet_file_describes_its_own_rows(tmp_path):
    host = Embeddings(file=written(tmp_path, "parquet"))
    corpus = CorpusConfig(id="title", columns=("age",))
    documents = list(host.documents(corpus))
    assert [d.text for d in documents[:3]] == ["", "text 1", "text 2"]
    assert documents[4].doc_id == "name 4"
    assert documents[4].label == "class 1"
    assert documents[4].columns["age"] == 4


def test_another_file_may_describe_the_rows(tmp_path):
    lines = [json.dumps({"id": f"d{i}", "label": str(i % 2)}) for i in range(50)]
    (tmp_path / "meta.jsonl").write_text("\n".join(lines))
    host = Embeddings(file=written(tmp_path, "npy"))
    corpus = CorpusConfig(source=str(tmp_path / "meta.jsonl"))
    documents = list(host.documents(corpus))
    assert (documents[3].doc_id, documents[3].label, documents[3].text) == ("d3", "1", "")
    assert torch.equal(rows_of(host, corpus), torch.from_numpy(X))
    assert host.documents_fingerprint(corpus) != host.documents_fingerprint(CorpusConfig())


def test_a_row_whose_description_is_bad_is_left_out_and_moves_no_other(tmp_path):
    lines = [json.dumps({"id": f"d{i}"}) for i in range(50)]
    (tmp_path / "meta.jsonl").write_text("\n".join([*lines[:7], "no json", *lines[8:]]))
    host = Embeddings(file=written(tmp_path, "npy"))
    corpus = CorpusConfig(source=str(tmp_path / "meta.jsonl"))
    assert sum(isinstance(d, Rejected) for d in host.documents(corpus)) == 1
    assert torch.equal(rows_of(host, corpus), torch.from_numpy(np.delete(X, 7, axis=0)))


def test_a_description_of_another_length_is_refused(tmp_path):
    (tmp_path / "meta.jsonl").write_text('{"id": "a"}\n' * 49)
    host = Embeddings(file=written(tmp_path, "npy"))
    with pytest.raises(UserError, match=r"meta\.jsonl describes 49 rows, but .*npy has 50"):
        list(host.documents(CorpusConfig(source=str(tmp_path / "meta.jsonl"))))


def test_lists_of_other_lengths_are_cut_or_filled_up_where_a_width_is_given(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"v": [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0, 7.0, 8.0]]}), path)
    found = rows_of(Embeddings(file=str(path), column="v", d_in=2))
    assert found.tolist() == [[1, 2], [4, 0], [5, 6]]
    with pytest.raises(
        UserError, match=r"row 2: 'v' holds 1 numbers, but row 1 has 3: set host\.d_in"
    ):
        rows_of(Embeddings(file=str(path), column="v"))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("none.npy", None, r"host\.file: the file .*none\.npy does not exist"),
        ("rows.csv", b"1,2", r"host\.file: .*rows\.csv is none of \.npy"),
        ("rows.npy", b"no array", r"rows\.npy is not a readable \.npy file"),
        ("rows.safetensors", b"no array", r"is not a readable \.safetensors file"),
        ("rows.parquet", b"no table", r"is not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named):
        Embeddings(file=str(tmp_path / name)).width()


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, kind):
    with pytest.raises(
        UserError, match=r"host\.column: .* has no .*'vectors': there are .*embedding"
    ):
        Embeddings(file=written(tmp_path, kind), column="vectors").width()


def test_what_is_no_matrix_of_numbers_is_refused(tmp_path):
    np.save(tmp_path / "flat.npy", X[0])
    np.save(tmp_path / "whole.npy", X.astype(int))
    for name in ("flat", "whole"):
        with pytest.raises(UserError, match=r"must hold rows of floating-point numbers"):
            Embeddings(file=str(tmp_path / f"{name}.npy")).width()
    with pytest.raises(UserError, match=r"'label' of .* is string, not a list"):
        Embeddings(file=written(tmp_path, "parquet"), column="label").width()


def test_a_fingerprint_is_that_of_the_file(tmp_path):
    host = Embeddings(file=written(tmp_path, "npy"))
    before = host.fingerprint()
    np.save(tmp_path / "rows.npy", X + 1)
    assert host.fingerprint() != before


# -- made up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [Sine(rows=3000), Planted(rows=3000, n_features=64, active=4)])
def test_any_part_of_the_rows_is_the_same_wherever_it_is_made(host):
    whole = rows_of(host)
    assert whole.shape == (3000, 64)
    documents = list(host.documents(CorpusConfig()))
    (part,) = host.open().read(documents[1000:2050], torch.float32)
    assert torch.equal(part.x, whole[1000:2050])
    other = type(host)(**{**vars(host), "seed": 1})
    assert not torch.allclose(rows_of(other), whole)


def test_sine_waves_have_the_frequencies_they_are_made_of():
    host = Sine(rows=400, d_in=128, waves=1, max_frequency=20)
    spectrum = torch.fft.rfft(rows_of(host)).abs()
    assert 0.8 < float((spectrum.argmax(dim=1) <= 21).float().mean()) <= 1
    assert len(spectrum.argmax(dim=1).unique()) > 15


@pytest.mark.parametrize("host", [Sine, Planted])
def test_noise_is_added_to_every_number(host):
    plain, noisy = (rows_of(host(rows=2000, noise=n)) for n in (0.0, 0.5))
    assert float((noisy - plain).std()) == pytest.approx(0.5, rel=0.02)


def test_planted_rows_are_sums_of_the_directions_with_the_strengths_that_are_told():
    host = Planted(rows=1024, n_features=96, d_in=32, active=5)
    z, D = host.strengths(0), host.directions()
    np.testing.assert_allclose(rows_of(host).numpy(), z @ D, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(D, axis=1), 1, rtol=1e-5)
    assert (z > 0).sum(axis=1).mean() == pytest.approx(5, rel=0.05)
    assert z[z > 0].min() >= 0.5


def presences(host: Planted, blocks: int = 30) -> np.ndarray:
    return np.concatenate([host.strengths(i) > 0 for i in range(blocks)])


def test_features_are_there_as_often_as_the_skew_says():
    host = Planted(n_features=20, active=3, skew=1.0)
    wanted = host.frequencies()
    assert wanted.sum() == pytest.approx(3)
    assert wanted[0] / wanted[9] == pytest.approx(10)
    np.testing.assert_allclose(presences(host).mean(axis=0), wanted, atol=0.01)


def test_features_of_a_group_come_together_and_none_more_often():
    alone, together = (
        presences(Planted(n_features=16, active=2, group=4, correlation=c)) for c in (0.0, 0.8)
    )
    np.testing.assert_allclose(together.mean(axis=0), alone.mean(axis=0), atol=0.01)
    found = np.corrcoef(together.T)
    same = np.kron(np.eye(4), np.ones((4, 4))) - np.eye(16) > 0
    assert found[same].min() > 0.4
    assert np.abs(found[(1 - same - np.eye(16)) > 0]).max() < 0.05
    assert np.abs(np.corrcoef(alone.T)[same]).max() < 0.05


@pytest.mark.parametrize(
    ("host", "fields", "named"),
    [
        (Sine, {"rows": 0}, "rows must be positive"),
        (Sine, {"max_frequency": 0.5}, "max_frequency must be 1 or more"),
        (Sine, {"noise": -1.0}, "noise must be 0 or more"),
        (Planted, {"n_features": 5, "active": 6.0}, "active is 6 of 5 features"),
        (Planted, {"n_features": 5, "active": 3.0, "skew": 3.0}, "lower active or skew"),
        (Planted, {"correlation": 1.5}, "correlation must lie in"),
    ],
)
def test_values_that_cannot_be_are_refused(host, fields, named):
    with pytest.raises(UserError, match=named):
        host(**fields)


def test_made_up_rows_take_no_corpus():
    with pytest.raises(UserError, match=r"corpus\.source is 'x\.jsonl', but a host of kind sine"):
        list(Sine().documents(CorpusConfig(source="x.jsonl")))
