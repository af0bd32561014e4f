"""How a corpus is cut into units, and what a unit gives."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_ext import corpora
from sae_ext.activations.harvest import Shard, harvest_unit, parts, row_sums, size_of, units
from sae_ext.activations.reader import Activations
from sae_ext.activations.shards import (
    contents,
    documents_file,
    provenance_file,
    shard_file,
    unit_file,
)
from sae_ext.artefacts import Stage, activations
from sae_ext.config import CorpusConfig, HarvestConfig, to_dict
from sae_ext.corpora import Document, Rejected
from sae_ext.errors import UserError
from sae_ext.hosts import Transformer
from sae_ext.hosts.transformer import TransformerHost
from sae_ext.store import Store

CORPUS = CorpusConfig(source="made-up.jsonl")


@pytest.fixture(scope="module")
def documents(corpus_file: Path) -> list[Document]:
    return corpora.load(CorpusConfig(source=str(corpus_file), limit=40))


def made(
    host: TransformerHost, documents: list[Document | Rejected], dtype: str = "float32", **host_: object
) -> Shard:  # fmt: skip
    config = Transformer(**{"layer": 2, "max_tokens": 24, **host_})
    reading = TransformerHost(host.model, host.tokenizer, config)
    (shard,) = harvest_unit(reading, documents, HarvestConfig(dtype=dtype), CORPUS)
    return shard


# -- units ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3000), max_size=60), st.sampled_from([0.001, 0.5, 1.0, 4.0, 1000.0]))
def test_units_hold_every_document_once_and_in_order_and_are_as_full_as_they_may(sizes, unit_kb):
    limit = unit_kb * 1024
    found = list(units(sizes, HarvestConfig(unit_kb=unit_kb)))
    assert [u.number for u in found] == list(range(len(found)))
    covered = [d for u in found for d in range(u.start, u.stop)]
    assert covered == list(range(len(sizes) if sum(sizes) else 0))
    for unit, following in itertools.pairwise(found):
        assert unit.size == sum(sizes[unit.start : unit.stop]) > 0
        assert unit.size + sizes[following.start] > limit
    for unit in found:
        first = next(d for d in range(unit.start, unit.stop) if sizes[d])
        assert unit.size <= max(limit, sizes[first])


def test_the_documents_of_a_unit_come_with_it(documents):
    config = HarvestConfig(unit_kb=0.5)
    everything = [*documents[:7], Rejected("here", "empty", "nothing"), *documents[7:]]
    plan = list(units(map(size_of, everything), config))
    found = list(parts(iter(everything), config))
    assert [unit for unit, _ in found] == plan
    assert len(plan) > 3
    assert [d for _, mine in found for d in mine] == everything
    assert all(mine == everything[unit.start : unit.stop] for unit, mine in found)


def test_what_comes_behind_a_corpus_changes_none_of_the_units_before(documents):
    config = HarvestConfig(unit_kb=0.5)
    plan = list(units(map(size_of, documents), config))
    fewer = list(units(map(size_of, documents[:-3]), config))
    assert len(fewer) > 1
    assert fewer[:-1] == plan[: len(fewer) - 1]


def test_a_text_is_measured_by_its_bytes_and_a_row_without_one_as_a_token():
    assert size_of(Document("a", "数", "")) == 3
    assert size_of(Document("a", "", "")) == 4
    assert size_of(Rejected("here", "empty", "")) == 0


def test_a_hundred_thousand_shards_are_planned_in_little_memory():
    """3.3 billion tokens of English, at the default a shard of 256 MB each where activations are 4096 wide."""
    import tracemalloc

    rng = random.Random(0)

    def sizes() -> Iterator[int]:
        total = 0
        while total < 100_000 * 128 * 1024:
            size = rng.randrange(20_000, 100_000)
            total += size
            yield size

    tracemalloc.start()
    count = rows = 0
    for unit in units(sizes(), HarvestConfig()):
        count, rows = count + 1, rows + unit.size // 4
        assert unit.size <= 128 * 1024
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count > 100_000
    assert rows > 3.2e9
    assert most < 1 << 20


# -- what a unit gives -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 4])
def test_rows_are_the_models_hidden_states_of_the_same_tokens(host, documents, layer):
    shard = made(host, documents, layer=layer)
    provenance = shard.provenance.to_pylist()
    first = 0
    for document in documents[:6]:
        tokens = host.tokenizer(document.text, return_tensors="pt")
        with torch.inference_mode():
            full = host.model(**tokens, output_hidden_states=True).hidden_states[layer][0, 1:-1]
        ids = tokens["input_ids"][0, 1:-1].tolist()
        here = provenance[first : first + len(ids)]
        assert [line["token_id"] for line in here] == ids
        assert [line["position"] for line in here] == list(range(len(ids)))
        assert {line["doc_id"] for line in here} == {document.doc_id}
        assert [line["token_text"] for line in here] == host.tokenizer.convert_ids_to_tokens(ids)
        torch.testing.assert_close(shard.x[first : first + len(ids)], full, atol=1e-4, rtol=0)
        first += len(ids)
    assert len(shard.x) == shard.provenance.num_rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shorter_formats_hold_the_same_rows_rounded(host, documents, dtype):
    exact, short = made(host, documents), made(host, documents, dtype)
    assert short.x.dtype == getattr(torch, dtype)
    assert torch.equal(short.x, exact.x.to(short.x.dtype))


def test_the_documents_of_a_unit_are_kept_with_their_numbers_of_rows(host):
    documents = [
        Document("a", "sea", "x"),
        Rejected("texts.txt, line 2", "encoding", "byte 3 is not UTF-8"),
        Document("nothing", "\u200b", ""),
        Document("b", "ship and sea", ""),
    ]
    shard = made(host, documents)
    table = shard.documents.to_pydict()
    assert table["doc_id"] == ["a", "texts.txt, line 2", "nothing", "b"]
    assert table["n_rows"] == [1, 0, 0, 3]
    assert table["rejected"] == [None, "encoding: byte 3 is not UTF-8", "no rows", None]
    assert table["label"] == ["x", "", "", ""]
    assert shard.provenance["doc_id"].to_pylist() == ["a", "b", "b", "b"]


@pytest.mark.parametrize("batch_tokens", [1, 60, 1000])
def test_the_company_of_a_document_does_not_change_its_rows(host, documents, batch_tokens):
    together = made(host, documents).x
    assert (made(host, documents, batch_tokens=batch_tokens).x - together).abs().max() < 1e-3
    turned = made(host, documents[::-1], batch_tokens=batch_tokens)
    last, first = turned.documents["n_rows"].to_pylist()[:: len(documents) - 1]
    assert (turned.x[-first:] - together[:first]).abs().max() < 1e-3
    assert (turned.x[:last] - together[-last:]).abs().max() < 1e-3


def test_the_sums_are_those_of_the_rows(host, documents):
    shard = made(host, documents, "float16")
    x = shard.x.double().numpy()
    np.testing.assert_allclose(shard.sums["sum"], x.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(shard.sums["sum_sq"], (x * x).sum(axis=0), rtol=1e-12)
    wanted = [np.linalg.norm(x, axis=1).sum()]
    np.testing.assert_allclose(shard.sums["norm_sum"], wanted, rtol=1e-12)
    many = torch.from_numpy(np.random.default_rng(0).standard_normal((20_000, 3)))
    np.testing.assert_allclose(row_sums(many)["sum"], many.sum(dim=0).numpy(), rtol=1e-9)


def test_the_same_unit_gives_the_same(host, documents):
    first, second = (made(host, documents, batch_tokens=200) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.provenance.equals(second.provenance)
    assert first.documents.equals(second.documents)


def with_a_bad_word(
    host: TransformerHost, documents: list[Document], factor: float
) -> Iterator[list]:
    """One word is given an embedding that no longer fits; the blocks are left out (layer 0)."""
    word = host.tokenizer.convert_tokens_to_ids("zebra")
    target = host.model.embeddings.word_embeddings.weight[word]
    saved = target.clone()
    try:
        with torch.no_grad():
            target.mul_(factor)
        yield [*documents[:7], Document("the-one", "a zebra by the sea", ""), *documents[7:]]
    finally:
        with torch.no_grad():
            target.copy_(saved)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_with_its_document(host, documents, factor):
    for company in with_a_bad_word(host, documents, factor):
        with pytest.raises(
            UserError,
            match=r"^document 'the-one': activations are not finite .* \(not finite: \d of 5 rows\): .*drop",
        ):
            made(host, company, layer=0)


def test_rows_that_the_stored_format_cannot_hold_are_refused(host, documents):
    weight = host.model.embeddings.LayerNorm.weight
    saved = weight.clone()
    try:
        with torch.no_grad():
            weight.mul_(1e6)
        named = rf"^document '{documents[0].doc_id}' and 39 more documents: .* float16 .*bfloat16"
        with pytest.raises(UserError, match=named):
            made(host, documents, "float16", layer=0)
        assert bool(made(host, documents, "bfloat16", layer=0).x.isfinite().all())
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_documents_with_rows_that_are_not_finite_can_be_left_out_and_are_recorded(host, documents):
    reading = TransformerHost(host.model, host.tokenizer, Transformer(layer=0, max_tokens=24))
    config = HarvestConfig(dtype="float32", not_finite="drop")
    (plain,) = harvest_unit(reading, documents, config, CORPUS)
    for company in with_a_bad_word(host, documents, float("nan")):
        (shard,) = harvest_unit(reading, company, config, CORPUS)
    assert torch.allclose(shard.x, plain.x, atol=1e-5)
    assert shard.provenance.equals(plain.provenance)
    fate = {
        d["doc_id"]: (d["n_rows"], d["rejected"])
        for d in shard.documents.to_pylist()
        if d["rejected"] is not None
    }
    ((name, (rows, why)),) = fate.items()
    assert (name, rows) == ("the-one", 0)
    assert why.startswith("not finite: ")


def test_a_corpus_is_read_into_units_with_what_cannot_be_read(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"text {i}", "id": f"d{i}"}) for i in range(6)]
    path.write_text("\n".join([*lines[:2], "no json", *lines[2:]]))
    config = CorpusConfig(source=str(path))
    found = list(parts(corpora.read(config), HarvestConfig(unit_kb=0.02)))
    assert len(found) == 2
    names = [d.where if isinstance(d, Rejected) else d.doc_id for _, ds in found for d in ds]
    assert names == ["d0", "d1", f"{path}, line 3", "d2", "d3", "d4", "d5"]


def test_a_hundred_thousand_units_are_committed_and_opened_in_bounded_memory(tmp_path):
    """All but the rows: what each unit came to, the manifest over 400,000 files, and a reader of it."""
    count = 100_000
    store = Store.open(str(tmp_path), writable=True)
    parts = {"corpus": CORPUS, "host": Transformer(), "harvest": HarvestConfig()}
    stage = Stage("activations", {name: to_dict(part) for name, part in parts.items()}, {})
    folder = Path(store.path("activations", stage.key))
    folder.mkdir(parents=True)
    sums = {"sum": torch.ones(4), "sum_sq": torch.full((4,), 2.0), "norm_sum": torch.ones(1)}
    sums = {name: value.double() for name, value in sums.items()}
    facts = {"rows": 32_000, "d_in": 4, "documents": 60, "rejected": {}}
    for number in range(count):
        files = {
            name(number): {"sha256": f"{number:064x}", "bytes": 1}
            for name in (shard_file, provenance_file, documents_file)
        }
        told = json.dumps({**facts, "files": files})
        (folder / unit_file(number)).write_bytes(b"".join(contents(sums, {"facts": told})))
    before = psutil.Process().memory_info().rss
    began = time.monotonic()
    activations.commit(store, stage, count, {})
    data = Activations(store, stage.key)
    seconds = time.monotonic() - began
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    shutil.rmtree(folder)
    assert data.n_rows == count * 32_000
    assert len(data.manifest.files) == 4 * count
    assert data.where(count * 32_000 - 1).endswith("shard-99999.safetensors, row 31999")
    assert grown < 1000, "MiB"
    assert seconds < 120
