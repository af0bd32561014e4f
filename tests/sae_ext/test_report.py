"""The report: what is on the page, what may never be on it, and that missing stays missing."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_report import HOSTILE, made_up_data

from sae_ext.errors import UserError
from sae_ext.report import SCHEMAS, ReportData, browser, build_report, figures, words
from sae_ext.report.page import _json_for_html
from sae_ext.report.tokens import display, window_html

MB = 1_000_000


class Page(HTMLParser):
    """Elements, attributes and texts of a page as a browser's parser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._raw = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._raw = tag if tag in ("script", "style") else ""
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self.scripts.append(data)
        elif not self._raw:
            self.text.append(data)

    @property
    def embedded(self) -> dict:
        return json.loads(self.scripts[0])

    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def page_of(data: ReportData, **options: int) -> Page:
    return Page(build_report(data, **options)["report.html"].decode())


def empty(name: str) -> pa.Table:
    return SCHEMAS[name].empty_table()


def test_the_report_is_one_page_and_the_plotly_it_loads():
    files = build_report(made_up_data())
    assert set(files) == {"report.html", "plotly.min.js"}
    assert files["plotly.min.js"].startswith(b"/**\n* plotly.js")


def test_a_full_size_report_stays_small():
    page = build_report(made_up_data(n_features=3072, shown=200))["report.html"]
    assert len(page) < 3 * MB


def test_nothing_is_loaded_from_outside():
    page = build_report(made_up_data())["report.html"].decode()
    parsed = Page(page)
    outside = [link for link in parsed.links if not link.startswith("#")]
    assert outside == ["plotly.min.js"]
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest", page)


def test_text_from_outside_never_becomes_markup_or_script():
    harmless, hostile = page_of(made_up_data()), page_of(made_up_data(hostile=True))
    assert hostile.tags == harmless.tags
    assert hostile.handlers == []
    assert hostile.scripts[1:] == harmless.scripts[1:]
    # It is still shown, letter for letter.
    assert HOSTILE in hostile.words()
    tokens = {t for f in hostile.embedded["features"] for e in f["examples"] for t in e["raw"]}
    assert HOSTILE in tokens


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_embedded_json_round_trips_and_cannot_close_its_element(content):
    text = _json_for_html(content)
    assert "<" not in text
    assert json.loads(text) == content


@pytest.mark.parametrize("name", ["fvu", "mse", "cosine", "l0", "dead_fraction", "dense_fraction"])
@pytest.mark.parametrize("absent", [None, float("nan"), "left out"])
def test_a_number_that_was_not_measured_reads_not_computed(name, absent):
    summary = dict(made_up_data().summary)
    if absent == "left out":
        del summary[name]
    else:
        summary[name] = absent
    label = next(k for k, text in words.held_out_rows({name: 1.0}) if text != "not computed")
    assert f"{label} not computed" in page_of(made_up_data(summary=summary)).words()


def test_a_campaign_that_stopped_early_still_has_a_page_that_says_so():
    data = made_up_data(
        summary={},
        scorecard=[],
        interpretation={},
        trials=None,
        histogram_edges=None,
        **{name: empty(name) for name in ("history", "windows", "explanations", "scores")},
    )
    page = page_of(data)
    text = page.words()
    assert "the quality of the reconstruction was not computed" in text
    assert "No feature was explained." in text
    assert "No evidence was stored for any feature." in text
    assert set(page.embedded["figures"]["light"]) == {"density", "cosine"}
    assert "Tuning" not in text


def test_features_without_any_row_give_no_figures():
    tables = {name: empty(name) for name in SCHEMAS if name != "trials"}
    plain = {"recipe": {}, "keys": {}, "summary": {}, "interpretation": {}}
    bare = ReportData(name="bare", scorecard=[], **plain, **tables)
    assert page_of(bare).embedded["figures"]["light"] == {}


def test_both_appearances_hold_the_same_numbers():
    drawn = page_of(made_up_data()).embedded["figures"]
    assert set(drawn["light"]) == set(drawn["dark"])
    for name, light in drawn["light"].items():
        for one, other in zip(light["data"], drawn["dark"][name]["data"], strict=True):
            assert one["x"] == other["x"]
            assert one["y"] == other["y"]


@pytest.mark.parametrize(
    ("table", "column"),
    [("history", "fvu"), ("features", "density"), ("windows", "tokens"), ("scores", "lift")],
)
def test_a_missing_column_is_named(table, column):
    data = made_up_data()
    broken = getattr(data, table).drop_columns([column])
    with pytest.raises(UserError, match=f"table '{table}' has no column '{column}'"):
        build_report(made_up_data(**{table: broken}))


@pytest.mark.parametrize(
    ("table", "column"),
    [("history", "validation_fvu"), ("features", "top_label"), ("features", "histogram")],
)
def test_an_absent_optional_column_is_no_error(table, column):
    fewer = getattr(made_up_data(), table).drop_columns([column])
    assert build_report(made_up_data(**{table: fewer}))


def test_a_window_with_too_few_activations_is_named():
    windows = made_up_data(shown=2).windows.to_pylist()
    windows[3]["activations"] = windows[3]["activations"][:-1]
    broken = pa.Table.from_pylist(windows, SCHEMAS["windows"])
    with pytest.raises(UserError, match="row 3 has 32 tokens but 31 activations"):
        build_report(made_up_data(windows=broken))


@pytest.mark.parametrize("option", ["max_features", "examples"])
def test_limits_below_one_are_refused(option):
    with pytest.raises(UserError, match=f"{option} must be at least 1, got 0"):
        build_report(made_up_data(), **{option: 0})


@pytest.mark.parametrize("limit", [1, 2, 7, 24, 60])
def test_browsed_features_are_spread_from_best_to_worst_lift(limit):
    data = made_up_data(shown=24)
    chosen = browser.choose(data, limit)
    lift = dict(
        zip(data.scores["feature"].to_pylist(), data.scores["lift"].to_pylist(), strict=True)
    )
    unscored = set(data.windows["feature"].to_pylist()) - set(lift)
    assert len(chosen) == len(set(chosen)) == min(limit, 24)
    assert chosen[0] == max(lift, key=lift.__getitem__)
    scored = [lift[f] for f in chosen if f in lift]
    assert scored == sorted(scored, reverse=True)
    if limit > 1:
        assert chosen[-1] in unscored


def test_only_explained_features_are_browsed_where_there_are_any():
    data = made_up_data(shown=6)
    fewer = data.explanations.slice(0, 2)
    told = fewer["feature"].to_pylist()
    assert set(browser.choose(made_up_data(shown=6, explanations=fewer), 60)) == set(told)
    none = made_up_data(shown=6, explanations=empty("explanations"))
    assert len(browser.choose(none, 60)) == 6


@pytest.mark.parametrize(("examples", "top", "sample"), [(1, 1, 0), (8, 5, 3), (30, 8, 4)])
def test_examples_mix_the_strongest_with_random_firings(examples, top, sample):
    data = made_up_data(shown=2).completed()
    record = browser.describe(data, browser.choose(data, 1), examples)[0]
    kinds = Counter(example["kind"] for example in record["examples"])
    assert (kinds["top"], kinds["sample"]) == (top, sample)


def test_a_window_is_not_shown_twice():
    rows = made_up_data(shown=1).windows.to_pylist()
    rows.append({**rows[0], "kind": "sample", "rank": 9})
    data = made_up_data(shown=1, windows=pa.Table.from_pylist(rows, SCHEMAS["windows"]))
    record = browser.describe(data.completed(), browser.choose(data, 1), 30)[0]
    places = [(e["doc"], e["start"]) for e in record["examples"]]
    assert len(places) == len(set(places)) == 12


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["un", "##iform", "##ly"], "uniformly"),
        (["open", "(", "file", ")", "."], "open (file)."),
        (["##s", "end"], "s end"),
        (["##", "is", "a", "heading"], "## is a heading"),
        (["Ġthe", "Ġpath", "s", "Ċ"], " the paths↵"),
        (["▁Die", "▁Stra", "ße"], " Die Straße"),
        (["a", "\n", ""], "a ↵ ∅"),
        ([], ""),
    ],
)
def test_tokens_are_joined_as_they_were_written(tokens, shown):
    assert "".join(display(tokens)) == shown


def test_a_window_as_html_shades_by_activation_and_escapes():
    page = window_html(["a", HOSTILE, "b"], [0.0, 1.0, 4.0], scale=4.0)
    parsed = Page(page)
    assert parsed.tags == {"span": 3}
    assert HOSTILE in "".join(parsed.text)
    shades = [float(a) for a in re.findall(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", page)]
    assert len(shades) == 2
    assert shades[1] == pytest.approx(4 * shades[0], rel=0.01)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not computed"),
        (float("nan"), "not computed"),
        (0, "0"),
        (0.0, "0"),
        (1204224, "1,204,224"),
        (0.18341, "0.1834"),
        (31.416, "31.42"),
        (1.5e-6, "1.50 × 10⁻⁶"),
        (True, "yes"),
        ([0.1, None], "0.1000 to not computed"),
        ("x", "x"),
    ],
)
def test_values_are_shown_with_four_significant_digits(value, text):
    assert words.show(value) == text


@given(st.floats(min_value=1e-12, max_value=1))
def test_a_small_share_is_never_rounded_to_nothing(share):
    assert not words.percent(share).startswith("0 ")
    assert re.search(r"[1-9]", words.percent(share))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "a baseline without a language model"),
        (
            {"interpretation": {"explainer_kind": "llm", "model": "some-model"}},
            "explained by some-model; how well the explanations predict firing was not computed",
        ),
        (
            {"interpretation": {"median_lift": 0.01, "median_lift_ci": [-0.03, 0.04]}},
            "cannot be told from none",
        ),
        ({"interpretation": {"median_lift": -0.2}}, "worse than shuffled explanations"),
        ({"scorecard": [{"metric": "FVU", "value": 1, "ok": True}]}, "The one target was met."),
        ({}, "2 of 3 targets met; missed: Dead features."),
        ({}, "(no firing in 1,204,224 rows)"),
    ],
)
def test_the_opening_says_what_the_numbers_say(changes, sentence):
    assert sentence in words.opening(made_up_data(**changes))


def test_explanations_without_a_language_model_wear_a_badge():
    data = made_up_data(shown=4)
    assert page_of(data).words().count("no LLM") == 4
    rows = [{**r, "explainer_kind": "openai"} for r in data.explanations.to_pylist()]
    told = pa.Table.from_pylist(rows, SCHEMAS["explanations"])
    assert "no LLM" not in page_of(made_up_data(shown=4, explanations=told)).words()


def test_the_density_histogram_counts_every_feature_that_fired():
    features = made_up_data().features
    figure = figures.density_histogram(features, figures.LIGHT)
    drawn = sum(int(np.sum(trace.y)) for trace in figure.data)
    assert drawn == sum(d > 0 for d in features["density"].to_pylist())


def test_validation_points_are_drawn_only_where_they_were_measured():
    fvu = figures.training_figures(made_up_data().history, figures.LIGHT)["fvu"]
    assert [len(trace.x) for trace in fvu.data] == [121, 6]


def test_curves_of_a_training_without_fvu_or_penalty_but_with_further_terms_are_drawn():
    """As of an autoencoder with a target of its own, and an objective of other terms."""
    data = made_up_data()
    rows = [
        {**row, "fvu": None, "validation_fvu": None, "l1": 0.0, "auxk": None, "usage": 0.5}
        for row in data.history.to_pylist()
    ]
    schema = SCHEMAS["history"].append(pa.field("auxk", pa.float64()))
    history = pa.Table.from_pylist(rows, schema.append(pa.field("usage", pa.float64())))
    drawn = figures.training_figures(history, figures.LIGHT)
    assert set(drawn) == {"loss", "fvu", "l0", "dead_fraction", "l1", "lr"}
    assert not any(np.isfinite(np.asarray(t.y, dtype=float)).any() for t in drawn["fvu"].data)
    assert drawn["loss"].data == figures.training_figures(data.history, figures.LIGHT)["loss"].data
    assert build_report(made_up_data(history=history))


def test_a_curve_that_touches_zero_is_not_drawn_on_a_log_axis():
    rows = made_up_data().history.to_pylist()
    rows[5]["l0"] = 0.0
    history = pa.Table.from_pylist(rows, SCHEMAS["history"])
    drawn = figures.training_figures(history, figures.LIGHT)
    assert drawn["l0"].layout.yaxis.type != "log"
    assert drawn["fvu"].layout.yaxis.type == "log"


def test_long_tables_are_thinned_for_the_browser():
    count = 12_000
    scores = made_up_data().scores.to_pylist() * (count // 20)
    table = pa.Table.from_pylist(scores, SCHEMAS["scores"])
    points = figures.own_against_control(table, figures.LIGHT).data[0]
    assert len(points.x) == figures.POINTS
    history = pa.Table.from_pylist(made_up_data().history.to_pylist() * 100, SCHEMAS["history"])
    for figure in figures.training_figures(history, figures.LIGHT).values():
        assert all(len(trace.x) <= figures.POINTS for trace in figure.data)


def test_the_tuning_plot_marks_the_best_trial_and_leaves_out_failures():
    data = made_up_data()
    figure = figures.tuning_scatter(data.trials, 7, (16.0, 64.0), figures.LIGHT)
    named = {trace.name: trace for trace in figure.data}
    assert len(named["trial"].x) == 10
    assert named["best"].customdata[:, 0].tolist() == [7]
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].x1) == (16.0, 64.0)
    assert "1 without a result, not drawn." in page_of(data).words()


@pytest.mark.parametrize("edges", [None, np.geomspace(1e-2, 1e2, 5)])
def test_an_activation_histogram_is_cut_to_the_bins_in_use(edges):
    figure = figures.activation_histogram([0, 3, 2, 0], edges, figures.LIGHT)
    assert figure.data[0].y.tolist() == [3, 2]
    assert figures.activation_histogram([0, 0, 0, 0], edges, figures.LIGHT).data[0].y.sum() == 0


@pytest.mark.parametrize("name", figures.QUANTILES)
def test_l0_quantiles_are_drawn_only_when_all_are_known(name):
    summary = made_up_data().summary
    assert figures.l0_quantiles(summary, figures.LIGHT) is not None
    quantiles = {**summary["l0_quantiles"], name: None}
    assert figures.l0_quantiles({**summary, "l0_quantiles": quantiles}, figures.LIGHT) is None
