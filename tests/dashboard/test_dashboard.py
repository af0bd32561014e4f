"""The dashboard over a real store that holds a made-up campaign."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_report import HOSTILE, made_up_data

from sae_ext.report import ReportData, build_report, campaign_facts, campaign_table
from sae_ext.store import Store, table_bytes

pytest.importorskip("streamlit", reason="streamlit is not installed")
from streamlit.testing.v1 import AppTest

from dashboard import reading

APP = str(Path(reading.__file__).with_name("app.py"))


def stored(url: str, data: ReportData, key: str = "c0ffee00c0ffee00") -> None:
    """Commit the three artefacts the dashboard reads."""
    store = Store.open(url, writable=True)

    def commit(kind: str, key: str, files: dict[str, bytes], **rest: dict) -> None:
        facts = {name: store.put(kind, key, name, content) for name, content in files.items()}
        store.commit(kind, key, config={}, files=facts, **{"inputs": {}, **rest})

    commit("saes", "5ae", {"history.parquet": table_bytes(data.history)})
    windows = table_bytes(data.windows, row_group_size=12)
    commit("features", "fea", {"windows.parquet": windows})
    campaign = {"campaign.parquet": table_bytes(campaign_table(data)), **build_report(data)}
    inputs = {"saes": "5ae", "features": "fea"}
    commit("campaigns", key, campaign, inputs=inputs, extra=campaign_facts(data))


def opened(url: str, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setenv("SPARSEMILL_STORE", url)
    return AppTest.from_file(APP, default_timeout=60).run()


def html(app: AppTest) -> str:
    return "".join(element.proto.body for element in app.get("html"))


def test_a_campaign_is_shown_with_its_curves_and_one_feature(tmp_path, monkeypatch):
    data = made_up_data()
    stored(str(tmp_path), data)
    app = opened(str(tmp_path), monkeypatch)
    assert not app.exception
    assert not app.error
    assert len(app.get("plotly_chart")) == 9
    scorecard = app.dataframe[0].value
    assert scorecard["Result"].tolist() == ["met", "met", "missed", "no verdict"]
    assert scorecard["Value"].tolist()[-1] == "not computed"
    assert html(app).count("<p>") == 12


def test_another_feature_brings_its_own_evidence(tmp_path, monkeypatch):
    data = made_up_data()
    stored(str(tmp_path), data)
    app = opened(str(tmp_path), monkeypatch)
    before = html(app)
    told = data.explanations["feature"].to_pylist()
    app.selectbox(key="feature").set_value(told[4]).run()
    assert not app.exception
    assert html(app) != before
    assert any(f"re\\.{told[4]}\\.0" in caption.value for caption in app.caption)


def test_a_feature_without_evidence_says_so(tmp_path, monkeypatch):
    stored(str(tmp_path), made_up_data())
    app = opened(str(tmp_path), monkeypatch)
    app.selectbox(key="feature").set_value(5).run()
    assert not app.exception
    texts = [element.value for element in app.markdown]
    assert "No evidence was stored for this feature." in texts
    assert "not explained" in texts


def test_text_from_the_corpus_is_escaped(tmp_path, monkeypatch):
    stored(str(tmp_path), made_up_data(hostile=True))
    app = opened(str(tmp_path), monkeypatch)
    assert not app.exception
    assert "&lt;img src=x" in html(app)
    assert "<img" not in html(app)
    assert HOSTILE not in "".join(e.value for e in [*app.title, *app.caption, *app.markdown])


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_store_without_campaigns_is_no_error(tmp_path, monkeypatch, folder):
    app = opened(str(tmp_path / folder), monkeypatch)
    assert not app.exception
    assert "No finished campaign" in app.info[0].value


def test_a_store_that_cannot_be_opened_is_one_line(monkeypatch):
    app = opened("nosuchprotocol://x", monkeypatch)
    assert not app.exception
    assert "cannot be opened" in app.error[0].value.replace("\\", "")


def test_evidence_is_read_from_the_features_own_row_groups(tmp_path):
    data = made_up_data(shown=6)
    stored(str(tmp_path), data)
    ids = data.explanations["feature"].to_pylist()
    with pq.ParquetFile(tmp_path / "features" / "fea" / "windows.parquet") as file:
        assert file.num_row_groups == 6
        assert [reading.row_groups_of(file, feature) for feature in ids] == [[n] for n in range(6)]
    rows = reading.evidence(str(tmp_path), "fea", ids[2])
    assert {row["feature"] for row in rows} == {ids[2]}
    assert [row["kind"] for row in rows] == ["top"] * 8 + ["sample"] * 4


def test_campaigns_of_one_name_are_told_apart(tmp_path):
    for key in ("aaaaaaaa0", "bbbbbbbb0"):
        stored(str(tmp_path), made_up_data(shown=2), key)
    titles = [campaign.title for campaign in reading.campaigns(str(tmp_path))]
    assert len(set(titles)) == 2


def test_the_campaign_table_has_one_row_per_feature_and_null_where_nothing_is_known():
    data = made_up_data(shown=4)
    table = campaign_table(data)
    assert table.num_rows == data.features.num_rows
    explained = pa.compute.sum(table["explainer_kind"].is_valid()).as_py()
    assert explained == 4
    by_id = {row["feature"]: row for row in table.to_pylist()}
    for score in data.scores.to_pylist():
        assert by_id[score["feature"]]["lift"] == score["lift"]
    assert by_id[5]["lift"] is None
