"""The dashboard's one page: choose a campaign, see how it went, look at one feature's evidence.

Run it with `streamlit run dashboard/app.py`; SPARSEMILL_STORE names the store it opens with.
"""

from __future__ import annotations

import os
from typing import Any

import plotly.graph_objects as go
import pyarrow as pa
import streamlit as st

from dashboard import reading
from sae_ext.errors import UserError
from sae_ext.report import figures, words
from sae_ext.report.tokens import window_html

_TABLE = {
    "feature": "Id",
    "explanation": "Explanation",
    "status": "Status",
    "density": "Density",
    "balanced_accuracy": "Balanced accuracy",
    "control_balanced_accuracy": "Control",
    "lift": "Lift",
    "top_label": "Top label",
}
_EXAMPLES = 12

# Artefacts never change under their key, so what was read once stays true.
_table = st.cache_data(show_spinner=False, max_entries=4)(reading.table)
_history = st.cache_data(show_spinner=False, max_entries=4)(reading.history)


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Sparsemill", layout="wide")
    url = st.sidebar.text_input("Store", os.environ.get("SPARSEMILL_STORE", "store"))
    try:
        found = reading.campaigns(url)
        if not found:
            st.info(f"No finished campaign in the store {url}: run one, or name another store.")
            return
        campaign = st.sidebar.selectbox("Campaign", found, format_func=lambda c: c.title)
        _campaign(url, campaign)
    except UserError as error:
        st.error(_plain(str(error)))


def _campaign(url: str, campaign: reading.Campaign) -> None:
    facts = campaign.facts
    st.title(_plain(facts.get("name") or "unnamed"))
    st.caption(f"{campaign.created} · campaign `{campaign.key}`")
    table = _table(url, campaign.key)
    _scorecard(facts)
    st.header("Training")
    if "saes" in campaign.inputs:
        _training(_history(url, campaign.inputs["saes"]))
    else:
        st.write(words.MISSING)
    st.header("Features")
    _all_features(table)
    st.fragment(_one_feature)(url, campaign, table)  # another feature reruns this part alone
    st.sidebar.caption(f"Report: `{reading.report_page(url, campaign.key)}`")


def _scorecard(facts: dict[str, Any]) -> None:
    st.header("Scorecard")
    verdicts = {True: "met", False: "missed", None: "no verdict"}
    rows = [
        {
            "Measure": row["metric"],
            "Value": words.show(row["value"]),
            "Target": row.get("target") or "–",
            "Result": verdicts[row.get("ok")],
            "Note": row.get("note") or "",
        }
        for row in facts.get("scorecard") or []
    ]
    left, right = st.columns(2)
    if rows:
        left.dataframe(rows, hide_index=True)
    else:
        left.write(words.MISSING)
    held_out = words.held_out_rows(facts.get("summary") or {})
    right.dataframe(
        [{"On held-out documents": k, "Value": v} for k, v in held_out], hide_index=True
    )


def _training(history: pa.Table) -> None:
    if not history.num_rows:
        st.write(words.MISSING)
        return
    drawn = figures.training_figures(history, _palette())
    names = {"loss": "Loss", "fvu": "FVU", "l0": "L0", "dead_fraction": "Dead", "l1": "λ"}
    columns = st.columns(3)
    for place, (name, figure) in enumerate(drawn.items()):
        with columns[place % 3]:
            st.markdown(f"**{names.get(name, 'Learning rate')}**")
            _draw(figure, f"history-{name}")


def _all_features(table: pa.Table) -> None:
    left, right = st.columns(2)
    with left:
        st.markdown("**How often features fire**")
        _draw(figures.density_histogram(table, _palette()), "density")
    with right:
        st.markdown("**Lift over a shuffled explanation**")
        scored = table.filter(table["lift"].is_valid())
        if scored.num_rows:
            _draw(figures.lift_histogram(scored, _palette()), "lift")
        else:
            st.write(words.MISSING)
    st.dataframe(
        table.select(list(_TABLE)).rename_columns(list(_TABLE.values())),
        hide_index=True,
        height=320,
    )


def _one_feature(url: str, campaign: reading.Campaign, table: pa.Table) -> None:
    st.header("One feature")
    told = dict(zip(table["feature"].to_pylist(), table["explanation"].to_pylist(), strict=True))
    # Explained features first: they are what most people look for.
    ids = sorted(told, key=lambda feature: (told[feature] is None, feature))
    if not ids:
        st.write(words.MISSING)
        return
    feature = st.selectbox(
        "Feature",
        ids,
        format_func=lambda f: f"{f} · {told[f] or 'not explained'}",
        key="feature",
        help="Type an id or a word of the explanation.",
    )
    row = table.slice(table["feature"].to_pylist().index(feature), 1).to_pylist()[0]
    left, right = st.columns([2, 3])
    with left:
        _statistics(row, campaign.facts.get("histogram_edges"))
    with right:
        _examples(reading.evidence(url, campaign.inputs["features"], feature), row["max"])


def _statistics(row: dict[str, Any], edges: list[float] | None) -> None:
    if row["explanation"]:
        badge = "" if words.uses_language_model(row["explainer_kind"]) else " · no LLM"
        st.text(row["explanation"])
        st.caption(_plain(f"{row['explainer_kind']}{badge}"))
    else:
        st.write("not explained")
    st.dataframe(
        [
            {"": "status", "value": row["status"] or words.MISSING},
            {"": "density", "value": words.percent(row["density"])},
            {"": "mean when firing", "value": words.show(row["mean_active"])},
            {"": "largest activation", "value": words.show(row["max"])},
            {"": "balanced accuracy", "value": words.fixed(row["balanced_accuracy"])},
            {"": "shuffled control", "value": words.fixed(row["control_balanced_accuracy"])},
            {"": "lift", "value": words.signed(row["lift"])},
            {"": "answers read", "value": words.percent(row["coverage"])},
        ],
        hide_index=True,
    )
    if row["histogram"]:
        _draw(figures.activation_histogram(row["histogram"], edges, _palette()), "activations")


def _examples(rows: list[dict[str, Any]], strongest: float | None) -> None:
    if not rows:
        st.write("No evidence was stored for this feature.")
    for kind, title in (
        ("top", "Where it fires most"),
        ("sample", "Firing windows drawn at random"),
    ):
        chosen = [row for row in rows if row["kind"] == kind][:_EXAMPLES]
        if not chosen:
            continue
        st.markdown(f"**{title}**")
        scale = strongest or max(row["max"] for row in chosen)
        for row in chosen:
            end = row["start"] + len(row["tokens"]) - 1
            peak = words.show(row["max"])
            place = f"document {row['doc_id']} · tokens {row['start']}–{end} · largest {peak}"
            st.caption(_plain(place))
            st.html(f"<p>{window_html(row['tokens'], row['activations'], scale)}</p>")


def _draw(figure: go.Figure, key: str) -> None:
    st.plotly_chart(figure, key=key, theme=None, config={"displayModeBar": False})


def _palette() -> figures.Palette:
    return figures.DARK if st.context.theme.type == "dark" else figures.LIGHT


def _plain(text: str) -> str:
    """Text from outside with Markdown's signs made harmless."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|~$:" else c for c in text)


if __name__ == "__main__":
    main()
