from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ext import corpora
from sae_ext.config import CorpusConfig, with_changes
from sae_ext.corpora import Document, Harvested, Rejected
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
        Document("1", "two", ""),
        Document("7", "three", "3"),
        Document("3", "four", ""),
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
    ("line", "reason"),
    [
        ("not json", "malformed"),
        ('{"text": 3}', "malformed"),
        ('{"text": "  "}', "empty"),
        ('{"text": null}', "empty"),
        ('{"texts": "a"}', "malformed"),
        ('["text"]', "malformed"),
        ('"text"', "malformed"),
        ("3", "malformed"),
        (r'{"text": "half a pair \ud83d"}', "encoding"),
        (r'{"text": "fine", "label": "\ud83d"}', "encoding"),
        ('{"text": "a"', "malformed"),
        ('{"text": "a", "weight": [1]}', "malformed"),
    ],
)
def test_a_row_that_is_no_document_is_recorded_by_file_and_line_and_left_out(
    tmp_path, line, reason
):
    config = jsonl(tmp_path, {"text": "fine", "weight": 1}, line, {"text": "too", "weight": None})
    config = with_changes(config, {"columns": ("weight",)})
    one, bad, two = corpora.read(config)
    assert (one.text, two.text) == ("fine", "too")
    assert isinstance(bad, Rejected)
    assert (bad.where, bad.reason) == (f"{config.source}, line 2", reason)
    assert [d.text for d in corpora.load(config)] == ["fine", "too"]


def test_a_line_in_another_encoding_is_recorded_with_its_first_wrong_byte(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + '{"text": "café"}\n'.encode("latin-1"))
    _, bad = corpora.read(CorpusConfig(source=str(path)))
    assert bad == Rejected(f"{path}, line 2", "encoding", "byte 13 is not UTF-8")


ROWS = [
    {"text": "one, with a comma", "id": "a", "label": "x", "weight": 0.5},
    {"text": 'two "quoted"\nand a second line', "id": "b", "label": "y", "weight": 2.0},
    {"text": "naïve – 数", "id": "c", "label": "", "weight": None},
]


def written(folder: Path, kind: str) -> Path:
    """The three rows as a file of that kind."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            out = csv.DictWriter(stream, ROWS[0], delimiter="," if kind == "csv" else "\t")
            out.writeheader()
            out.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_documents(tmp_path, kind):
    config = CorpusConfig(source=str(written(tmp_path, kind)), columns=("weight",))
    assert corpora.load(config) == [
        Document(r["id"], r["text"], r["label"], {"weight": r["weight"]}) for r in ROWS
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_fields_may_have_other_names(tmp_path, kind):
    config = CorpusConfig(
        source=str(written(tmp_path, kind)), text="label", id="weight", label="id"
    )
    found = corpora.load(config)
    assert [(d.text, d.label) for d in found] == [("x", "a"), ("y", "b")]
    assert [float(d.doc_id) for d in found] == [0.5, 2.0]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, kind):
    source = str(written(tmp_path, kind))
    with pytest.raises(UserError, match=r"no column 'body': set corpus\.text; there are text, id"):
        corpora.load(CorpusConfig(source=source, text="body"))
    with pytest.raises(UserError, match=r"no column 'age': set corpus\.columns; there are"):
        corpora.load(CorpusConfig(source=source, columns=("age",)))


def test_a_parquet_file_that_is_cut_short_is_refused(tmp_path):
    path = written(tmp_path, "parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        UserError, match=r"rows\.parquet is not a readable Parquet file .*cut short"
    ):
        corpora.load(CorpusConfig(source=str(path)))


def test_a_row_of_csv_with_too_many_values_or_another_encoding_is_recorded(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\nfine,a\none,two,three\ncaf\xe9,b\nalso fine,c\n")
    found = list(corpora.read(CorpusConfig(source=str(path))))
    assert [getattr(d, "text", None) for d in found] == ["fine", None, None, "also fine"]
    assert [d.reason for d in found if isinstance(d, Rejected)] == ["malformed", "encoding"]
    assert found[1].where == f"{path}, row 2"


@pytest.mark.parametrize(
    ("txt", "texts"),
    [
        ("file", ["one\ntwo\n\nthree", "four"]),
        ("paragraph", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
    ],
)
def test_a_folder_of_plain_texts_is_read_by_file_paragraph_or_line(tmp_path, txt, texts):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("four")
    (tmp_path / "README.md").write_text("is no text of the corpus")
    found = corpora.load(CorpusConfig(source=str(tmp_path), txt=txt))
    assert [d.text for d in found] == texts
    if txt == "file":
        assert [d.doc_id for d in found] == ["a.txt", "sub/b.txt"]
    assert len({d.doc_id for d in found}) == len(texts)


def test_a_pattern_names_several_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    found = corpora.load(CorpusConfig(source=str(tmp_path / "[ab].jsonl")))
    assert [(d.text, d.doc_id) for d in found] == [("a", "0"), ("b", "1")]


def test_a_json_file_that_is_no_list_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"rows\.json must hold a list of objects, got a dict"):
        corpora.load(CorpusConfig(source=str(path)))


def test_a_corpus_may_lie_wherever_fsspec_reads(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/texts/rows.jsonl", written(tmp_path, "jsonl").read_bytes())
    config = CorpusConfig(source="memory://texts/rows.jsonl", columns=("weight",))
    here = with_changes(config, {"source": str(tmp_path / "rows.jsonl")})
    assert corpora.load(config) == corpora.load(here)
    assert corpora.fingerprint(config) == corpora.fingerprint(here)


def test_a_data_set_of_the_package_datasets_is_read(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    written(folder, "parquet")
    config = CorpusConfig(source=f"datasets:{folder}", columns=("weight",))
    found = corpora.load(config)
    assert [(d.doc_id, d.text, d.label) for d in found] == [
        (r["id"], r["text"], r["label"]) for r in ROWS
    ]
    assert corpora.fingerprint(config) == corpora.fingerprint(config)
    with pytest.raises(
        UserError, match=r"has no column 'body': set corpus\.text; there are text, id"
    ):
        corpora.load(with_changes(config, {"text": "body"}))
    with pytest.raises(UserError, match=r"cannot be loaded .*dataset_split"):
        corpora.load(with_changes(config, {"dataset_split": "none"}))
    with pytest.raises(UserError, match=r"cannot be loaded .*name that file"):
        corpora.load(CorpusConfig(source="datasets:no/such-set"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_a_user_error(tmp_path, content):
    with pytest.raises(UserError, match="holds no documents"):
        corpora.load(jsonl(tmp_path, content))


@pytest.mark.parametrize("look", [corpora.load, corpora.fingerprint])
def test_a_source_that_is_not_there_or_of_another_kind_is_a_user_error(tmp_path, look):
    with pytest.raises(
        UserError, match=r"corpus\.source: there is no file .*none\.jsonl: name one"
    ):
        look(CorpusConfig(source=str(tmp_path / "none.jsonl")))
    (tmp_path / "texts.doc").touch()
    with pytest.raises(UserError, match=r"texts\.doc is none of \.txt, .*: convert it"):
        look(CorpusConfig(source=str(tmp_path / "texts.doc")))
    with pytest.raises(UserError, match=r"corpus\.source 'nowhere://x' cannot be looked at"):
        look(CorpusConfig(source="nowhere://x"))


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
    documents = [
        Document("a", "same", "x", {"weight": 1.0}),
        Rejected("rows.csv, row 2", "empty", "'text' is empty"),
        Document("b", "other", "", {"weight": None}),
        Document("c", "same", "", {"weight": 3}),
    ]
    fate = [Harvested(3), Harvested(0), Harvested(0, "no rows"), Harvested(5)]
    table = corpora.to_table(documents, fate, CorpusConfig(columns=("weight",)))
    assert table.column_names == [
        "doc_id", "text", "label", "weight", "bucket", "n_rows", "rejected",
    ]  # fmt: skip
    assert table["doc_id"].to_pylist() == ["a", "rows.csv, row 2", "b", "c"]
    assert table["n_rows"].to_pylist() == [3, 0, 0, 5]
    assert table["weight"].to_pylist() == [1.0, None, None, 3.0]
    assert table["rejected"].to_pylist() == [None, "empty: 'text' is empty", "no rows", None]
    buckets = table["bucket"].to_pylist()
    assert buckets[0] == buckets[3] == corpora.bucket("same")


def test_documents_may_be_held_out_by_what_they_have_in_common():
    def buckets(config: CorpusConfig) -> list[int]:
        documents = [
            Document(str(i), f"text {i}", f"class {i % 2}", {"person": f"p{i % 3}"})
            for i in range(12)
        ]
        table = corpora.to_table(documents, [Harvested(1)] * 12, config)
        return table["bucket"].to_pylist()

    config = CorpusConfig(columns=("person",))
    assert len(set(buckets(config))) > 6
    by_person = buckets(with_changes(config, {"split_by": "person"}))
    assert by_person == by_person[:3] * 4
    by_label = buckets(with_changes(config, {"split_by": "label"}))
    assert by_label == by_label[:2] * 6


def test_a_document_without_what_the_split_goes_by_is_refused():
    config = CorpusConfig(split_by="label")
    with pytest.raises(UserError, match=r"split_by: document 'b' has no value of 'label'"):
        corpora.to_table(
            [Document("a", "t", "x"), Document("b", "t", "")], [Harvested(1)] * 2, config
        )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"columns": ("text",)}, "columns cannot hold 'text'"),
        ({"columns": ("a", "a")}, "columns names one twice"),
        ({"split_by": "person"}, "split_by is 'person', which is neither"),
    ],
)
def test_columns_that_cannot_be_are_refused(fields, named):
    with pytest.raises(UserError, match=named):
        CorpusConfig(**fields)
