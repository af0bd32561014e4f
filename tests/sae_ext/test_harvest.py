from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from sae_ext import corpora
from sae_ext.activations.harvest import harvest_unit, length_buckets, plan
from sae_ext.config import CorpusConfig, HarvestConfig, HostConfig
from sae_ext.corpora import Document
from sae_ext.errors import UserError
from sae_ext.host import Host

D_IN = 384


@pytest.fixture(scope="module")
def documents(corpus_file: Path) -> list[Document]:
    return corpora.load(CorpusConfig(source=str(corpus_file), limit=40))


def rows_of(host: Host, documents: list[Document], config: HarvestConfig) -> np.ndarray:
    return load(harvest_unit(host, documents, config).activations)["x"]


def cut(host: Host, documents: list[Document], **values: object):
    config = HarvestConfig(**values)
    return plan(documents, host.tokenizer, host.config, config, D_IN)


# -- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_mb", [0.02, 0.1, 256.0])
def test_the_shards_hold_every_document_once_and_in_order(host, documents, shard_mb):
    rows, units = cut(host, documents, shard_mb=shard_mb)
    covered = [d for unit in units for d in range(unit.start, unit.stop)]
    assert covered == list(range(len(documents)))
    assert [unit.number for unit in units] == list(range(len(units)))
    for unit in units:
        assert unit.rows == sum(rows[unit.start : unit.stop]) > 0


@pytest.mark.parametrize(("dtype", "width"), [("float16", 2), ("float32", 4)])
def test_a_shard_is_as_full_as_its_size_allows(host, documents, dtype, width):
    limit = 0.1 * 2**20 / (D_IN * width)
    rows, units = cut(host, documents, shard_mb=0.1, dtype=dtype)
    assert len(units) > 1
    assert all(unit.rows <= limit for unit in units)
    for unit, following in pairwise(units):
        assert unit.rows + rows[following.start] > limit


def test_a_document_larger_than_a_shard_has_one_to_itself(host, documents):
    _, units = cut(host, documents, shard_mb=1e-6)
    assert [unit.stop - unit.start for unit in units] == [1] * len(documents)


def test_the_plan_counts_the_rows_that_are_made(host, documents):
    rows, _ = cut(host, documents)
    counted = [len(rows_of(host, [d], HarvestConfig())) for d in documents[:5]]
    assert rows[:5] == counted


def test_a_document_without_a_token_has_no_row(host):
    documents = [
        Document("a", "sea", ""),
        Document("nothing", "\u200b", ""),
        Document("b", "ship and sea", ""),
    ]
    rows, units = cut(host, documents)
    assert rows == [1, 0, 3]
    assert [unit.rows for unit in units] == [4]
    provenance = harvest_unit(host, documents, HarvestConfig()).provenance
    assert provenance["doc_id"].to_pylist() == ["a", "b", "b", "b"]


def test_documents_without_a_token_at_the_end_belong_to_the_last_shard(host):
    documents = [Document("a", "ship and sea", ""), Document("nothing", "\u200b", "")]
    _, units = cut(host, documents, shard_mb=1e-6)
    assert [(unit.start, unit.stop, unit.rows) for unit in units] == [(0, 2, 3)]


def test_a_corpus_without_a_single_token_is_a_user_error(host):
    with pytest.raises(UserError, match="no document has a single token"):
        cut(host, [Document("nothing", "\u200b", "")])


# -- one shard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 4])
def test_rows_are_the_models_hidden_states_of_the_same_tokens(host, documents, layer):
    at_layer = Host(host.model, host.tokenizer, HostConfig(layer=layer, max_tokens=24))
    data = harvest_unit(at_layer, documents, HarvestConfig(dtype="float32"))
    stored, provenance = load(data.activations)["x"], data.provenance.to_pylist()
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
        np.testing.assert_allclose(stored[first : first + len(ids)], full.numpy(), atol=1e-4)
        first += len(ids)
    assert len(stored) == data.provenance.num_rows


def test_float16_rows_are_the_float32_rows_rounded(host, documents):
    exact = rows_of(host, documents, HarvestConfig(dtype="float32"))
    half = rows_of(host, documents, HarvestConfig(dtype="float16"))
    assert (exact.dtype, half.dtype) == (np.float32, np.float16)
    assert (half == exact.astype(np.float16)).all()


def test_special_tokens_are_dropped_or_kept_by_the_option(host, documents):
    dropped = harvest_unit(host, documents, HarvestConfig())
    kept = harvest_unit(host, documents, HarvestConfig(drop_special_tokens=False))
    texts = np.array(kept.provenance["token_text"].to_pylist())
    special = np.isin(texts, ["[CLS]", "[SEP]"])
    assert special.sum() == 2 * len(documents)
    assert texts[~special].tolist() == dropped.provenance["token_text"].to_pylist()
    x = load(kept.activations)["x"]
    assert (x[~special] == load(dropped.activations)["x"]).all()
    assert (cut(host, documents, drop_special_tokens=False).rows) == [
        n + 2 for n in cut(host, documents).rows
    ]


@pytest.mark.parametrize("batch_tokens", [1, 60, 1000])
def test_the_company_of_a_document_does_not_change_its_rows(host, documents, batch_tokens):
    together = rows_of(host, documents, HarvestConfig(dtype="float32"))
    config = HarvestConfig(dtype="float32", batch_tokens=batch_tokens)
    assert np.abs(rows_of(host, documents, config) - together).max() < 1e-3
    turned = rows_of(host, documents[::-1], config)
    counts = cut(host, documents).rows
    first, last = counts[0], counts[-1]
    assert np.abs(turned[-first:] - together[:first]).max() < 1e-3
    assert np.abs(turned[:last] - together[-last:]).max() < 1e-3


def test_larger_batches_of_tokens_need_fewer_passes_through_the_model(host, documents):
    def passes(batch_tokens: int) -> int:
        texts: list[int] = []
        watching = host.model.register_forward_pre_hook(
            lambda _, args, named: texts.append(len(named["input_ids"])), with_kwargs=True
        )
        try:
            harvest_unit(host, documents, HarvestConfig(batch_tokens=batch_tokens))
        finally:
            watching.remove()
        assert sum(texts) == len(documents)
        return len(texts)

    assert passes(1) == len(documents) > passes(200) > passes(100_000) == 1


def test_a_long_document_is_cut_after_max_tokens(host):
    text = "the ship sails over the cold sea while grey waves carry salt"
    short = Host(host.model, host.tokenizer, HostConfig(layer=2, max_tokens=5))
    data = harvest_unit(short, [Document("a", text, "")], HarvestConfig())
    assert data.provenance["token_text"].to_pylist() == ["the", "ship", "sails", "over", "the"]
    rows = plan(
        [Document("a", text, "")], short.tokenizer, short.config, HarvestConfig(), D_IN
    ).rows
    assert rows == [5] == [len(load(data.activations)["x"])]


def test_the_sums_in_a_shard_are_those_of_its_rows(host, documents):
    arrays = load(harvest_unit(host, documents, HarvestConfig()).activations)
    x = arrays["x"].astype(np.float64)
    np.testing.assert_allclose(arrays["sum"], x.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(arrays["sum_sq"], (x * x).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(arrays["norm_sum"], [np.linalg.norm(x, axis=1).sum()], rtol=1e-12)


def test_the_same_shard_has_the_same_bytes(host, documents):
    config = HarvestConfig(batch_tokens=200)
    first, second = (harvest_unit(host, documents, config) for _ in range(2))
    assert first.activations == second.activations
    assert first.provenance.equals(second.provenance)


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1e6, "float16"), (float("nan"), "float32"), (float("inf"), "float16")]
)
def test_an_activation_that_is_not_finite_is_a_user_error_that_names_the_document(
    host, documents, factor, dtype
):
    """One word is given an embedding that no longer fits; the blocks are left out (layer 0)."""
    at_embedding = Host(host.model, host.tokenizer, HostConfig(layer=0, max_tokens=24))
    word = host.tokenizer.convert_tokens_to_ids("zebra")
    company = [*documents[:7], Document("the-one", "a zebra by the sea", ""), *documents[7:]]
    weight = host.model.embeddings.LayerNorm.weight
    if factor == 1e6:
        saved, target = weight.clone(), weight
    else:
        target = host.model.embeddings.word_embeddings.weight[word]
        saved = target.clone()
    try:
        with torch.no_grad():
            target.mul_(factor)
        expected = documents[0].doc_id if factor == 1e6 else "the-one"
        with pytest.raises(UserError, match=rf"^document '{expected}': .* not finite in {dtype}"):
            harvest_unit(at_embedding, company, HarvestConfig(dtype=dtype))
    finally:
        with torch.no_grad():
            target.copy_(saved)


# -- batches -------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 200))
def test_batches_hold_every_document_once_and_keep_to_their_size(lengths, batch_tokens):
    batches = length_buckets(lengths, batch_tokens)
    assert sorted(d for batch in batches for d in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[d] for d in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens
        assert lengths[batch[0]] == longest
    order = [lengths[d] for batch in batches for d in batch]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 60), min_size=2, max_size=80), st.integers(1, 200))
def test_no_two_neighbouring_batches_would_fit_in_one(lengths, batch_tokens):
    batches = length_buckets(lengths, batch_tokens)
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > batch_tokens
