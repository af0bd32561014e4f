"""What the dashboard reads from the store: campaigns, their curves, and one feature's evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_ext.errors import UserError
from sae_ext.report import SCHEMAS
from sae_ext.report.data import complete
from sae_ext.store import Store


@dataclass(frozen=True)
class Campaign:
    """One campaign of a store; `facts` are those of `sae_ext.report.campaign_facts`."""

    key: str
    created: str
    inputs: dict[str, str]
    facts: dict[str, Any]

    @property
    def title(self) -> str:
        """Name, date and the start of the key, which tells apart campaigns of one name."""
        return f"{self.facts.get('name') or 'unnamed'} · {self.created[:10]} · {self.key[:8]}"


def campaigns(url: str) -> list[Campaign]:
    """The campaigns of a store, newest first.

    Raises:
        UserError: the store cannot be opened or a manifest cannot be read.
    """
    store = Store.open(url)
    manifests = [store.manifest("campaigns", key) for key in store.list("campaigns")]
    return [Campaign(m.key, m.created, m.inputs, m.extra) for m in manifests]


def table(url: str, key: str) -> pa.Table:
    """campaign.parquet, one row per feature: `sae_ext.report.campaign_table`."""
    return pq.read_table(Store.open(url).local("campaigns", key, "campaign.parquet"))


def history(url: str, sae: str) -> pa.Table:
    """The training curves of an SAE: `SCHEMAS["history"]`."""
    path = Store.open(url).local("saes", sae, "history.parquet")
    return complete("history", pq.read_table(path))


def report_page(url: str, key: str) -> str:
    """Where the campaign's report lies on this machine, its Plotly beside it."""
    store = Store.open(url)
    store.local("campaigns", key, "plotly.min.js")
    return str(store.local("campaigns", key, "report.html"))


def evidence(url: str, features: str, feature: int) -> list[dict[str, Any]]:
    """A feature's evidence windows, strongest first, read from its row groups alone.

    Args:
        url: the store.
        features: key of the `features` artefact.
        feature: id of the feature.

    Returns:
        Rows of `SCHEMAS["windows"]`.
    """
    with pq.ParquetFile(Store.open(url).local("features", features, "windows.parquet")) as file:
        found = file.read_row_groups(row_groups_of(file, feature), SCHEMAS["windows"].names)
    rows = found.filter(pc.equal(found["feature"], feature)).to_pylist()
    return sorted(rows, key=lambda row: (row["kind"] != "top", row["rank"]))


def row_groups_of(file: pq.ParquetFile, feature: int) -> list[int]:
    """Numbers of the row groups that may hold a feature, by the statistics of its column.

    Raises:
        UserError: the table has no feature column.
    """
    names = file.schema_arrow.names
    if "feature" not in names:
        raise UserError("windows.parquet has no column 'feature': analyse the campaign again")
    column = names.index("feature")
    groups = []
    for number in range(file.num_row_groups):
        bounds = file.metadata.row_group(number).column(column).statistics
        if bounds is None or not bounds.has_min_max or bounds.min <= feature <= bounds.max:
            groups.append(number)
    return groups
