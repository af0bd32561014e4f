from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ext import corpora
from sae_ext.config import CorpusConfig
from sae_ext.corpora import STDLIB, Document
from sae_ext.errors import UserError


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return corpora.load(CorpusConfig())


def jsonl(tmp_path: Path, *lines: object) -> CorpusConfig:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return CorpusConfig(source=str(path))


# -- the standard library ------------------------------------------------------------------------


def test_the_standard_library_gives_thousands_of_labelled_documents_with_unique_ids(stdlib):
    assert len(stdlib) > 4000
    assert len({d.doc_id for d in stdlib}) == len(stdlib)
    assert all(d.text.strip() and d.label for d in stdlib)
    assert len({d.label for d in stdlib}) > 50


def test_a_documents_label_is_its_top_level_module(stdlib):
    assert all(d.doc_id.split(".")[0] == d.label for d in stdlib)
    assert {d.label for d in stdlib} <= set(sys.stdlib_module_names)


def test_a_document_is_the_docstring_of_the_thing_it_is_named_after(stdlib):
    texts = {d.doc_id: d.text for d in stdlib}
    assert texts["textwrap.dedent"].startswith("Remove any common leading whitespace")
    assert texts["json"].startswith("JSON (JavaScript Object Notation)")
    assert texts["collections.OrderedDict.move_to_end"].startswith("Move an existing element")


def test_private_names_and_test_suites_are_left_out(stdlib):
    for document in stdlib:
        parts = document.doc_id.split(".")
        assert not any(p.startswith("_") and not p.endswith("__") for p in parts)
        assert not {"test", "tests", "idlelib", "lib2to3"} & set(parts[:-1])


def test_the_standard_library_is_read_in_the_same_order_every_time(stdlib):
    assert corpora.load(CorpusConfig(limit=700)) == stdlib[:700]


def test_about_the_configured_share_is_held_out(stdlib):
    buckets = np.array([corpora.bucket(d.text) for d in stdlib])
    config = CorpusConfig(validation_percent=10, test_percent=20)
    shares = {name: mask.mean() for name, mask in corpora.split_masks(buckets, config).items()}
    # Three standard deviations of a share of 20 % among 4,000 documents are 1.9 %.
    assert shares["test"] == pytest.approx(0.2, abs=0.02)
    assert shares["validation"] == pytest.approx(0.1, abs=0.02)
    assert sum(shares.values()) == pytest.approx(1)


# -- a file of one's own -------------------------------------------------------------------------


def test_a_file_gives_its_rows_in_order_with_ids_and_labels(tmp_path):
    config = jsonl(
        tmp_path,
        {"text": "one", "id": "a", "label": "x"},
        "",
        {"text": "two"},
        {"text": "three", "id": 7, "label": 3},
        {"text": "four", "id": None, "label": None},
    )
    assert corpora.load(config) == [
        Document("a", "one", "x"),
        Document("2", "two", ""),
        Document("7", "three", "3"),
        Document("4", "four", ""),
    ]


def test_a_text_keeps_its_letters(tmp_path):
    text = "naïve – 数 \U0001f642\nsecond line"
    config = jsonl(tmp_path, json.dumps({"text": text}, ensure_ascii=False))
    assert corpora.load(config)[0].text == text


def test_a_limit_takes_the_first_documents(tmp_path):
    config = jsonl(tmp_path, *({"text": f"t{i}"} for i in range(5)))
    limited = CorpusConfig(source=config.source, limit=2)
    assert corpora.load(limited) == corpora.load(config)[:2]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"text": 3}',
        '{"text": "  "}',
        '{"text": null}',
        '{"texts": "a"}',
        '["text"]',
        '"text"',
        "3",
        r'{"text": "half a pair \ud83d"}',
        '{"text": "a"',
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line):
    config = jsonl(tmp_path, {"text": "fine"}, line)
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 2: expected an object with a"):
        corpora.load(config)


def test_a_file_in_another_encoding_is_named_by_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + '{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 2: expected"):
        corpora.load(CorpusConfig(source=str(path)))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_a_user_error(tmp_path, content):
    with pytest.raises(UserError, match="holds no documents"):
        corpora.load(jsonl(tmp_path, content))


@pytest.mark.parametrize("look", [corpora.load, corpora.fingerprint])
def test_a_source_that_is_not_there_or_of_another_kind_is_a_user_error(tmp_path, look):
    with pytest.raises(UserError, match=r"corpus\.source: the file .*none\.jsonl does not exist"):
        look(CorpusConfig(source=str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match=rf"'texts\.csv' is neither '{STDLIB}' nor a \.jsonl file"):
        look(CorpusConfig(source="texts.csv"))


def test_a_changed_file_has_another_fingerprint(tmp_path):
    before = corpora.fingerprint(jsonl(tmp_path, {"text": "one"}))
    assert corpora.fingerprint(jsonl(tmp_path, {"text": "one"})) == before
    assert corpora.fingerprint(jsonl(tmp_path, {"text": "two"})) != before


# -- the split -----------------------------------------------------------------------------------


@given(st.text())
def test_a_bucket_is_a_percentage_of_the_text_alone(text):
    assert 0 <= corpora.bucket(text) < 100
    assert corpora.bucket(text) == corpora.bucket(str(text))


def test_buckets_are_the_same_in_every_process_and_version():
    assert [corpora.bucket(t) for t in ("", "sparse", "mill")] == [
        int.from_bytes(bytes.fromhex(digest), "big") % 100
        for digest in ("e3b0c44298fc1c14", "d7af78c1f4c4a2de", "901fac08e3b464b1")
    ]


@given(
    st.lists(st.integers(0, 99)), st.lists(st.integers(0, 99)), st.integers(1, 40),
    st.integers(1, 40),
)  # fmt: skip
def test_adding_documents_moves_none_and_every_document_has_one_part(old, new, validation, test):
    config = CorpusConfig(validation_percent=validation, test_percent=test)
    before = corpora.split_masks(np.array(old, dtype=int), config)
    after = corpora.split_masks(np.array(old + new, dtype=int), config)
    for name, mask in before.items():
        assert (after[name][: len(old)] == mask).all()
    assert (sum(mask.astype(int) for mask in after.values()) == 1).all()


def test_the_table_of_documents_keeps_order_buckets_and_row_counts():
    documents = [Document("a", "same", "x"), Document("b", "other", ""), Document("c", "same", "")]
    table = corpora.to_table(documents, [3, 0, 5])
    assert table.column_names == ["doc_id", "text", "label", "bucket", "n_rows"]
    assert table["doc_id"].to_pylist() == ["a", "b", "c"]
    assert table["n_rows"].to_pylist() == [3, 0, 5]
    buckets = table["bucket"].to_pylist()
    assert buckets[0] == buckets[2] == corpora.bucket("same")
