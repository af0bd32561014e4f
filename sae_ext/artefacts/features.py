"""Features: what each one does, on all documents, and how well the SAE does on the held-out ones.

`features.parquet` (columns: `sae_ext.analysis.feature_table`), `windows.parquet` and `pool.parquet`
(columns: `sae_ext.evidence`). The manifest's `extra.held_out` holds the metrics on test documents.
"""

from __future__ import annotations

from sae_ext.activations.reader import Activations
from sae_ext.analysis import ShardAnalysis, feature_table
from sae_ext.artefacts import Stage
from sae_ext.config import AnalyseConfig, to_dict
from sae_ext.model import SAE
from sae_ext.store import Store, table_bytes

KIND = "features"
FEATURES, WINDOWS, POOL = "features.parquet", "windows.parquet", "pool.parquet"
WINDOW_ROWS_PER_GROUP = 4096
"""Small row groups, sorted by feature, so that a page can read one feature's evidence alone."""


def stage(config: AnalyseConfig, activations: str, sae: str) -> Stage:
    """The analysis of an SAE over the activations it was trained on."""
    return Stage(KIND, {"analyse": to_dict(config)}, {"activations": activations, "sae": sae})


def commit(
    store: Store, stage: Stage, activations: Activations, sae: SAE, found: ShardAnalysis
) -> None:
    """Write the tables and the manifest from what was gathered over all shards."""
    evidence = found.evidence.tables(activations.documents)
    tables = {
        FEATURES: table_bytes(feature_table(activations, sae, found)),
        WINDOWS: table_bytes(evidence.windows, row_group_size=WINDOW_ROWS_PER_GROUP),
        POOL: table_bytes(evidence.pool),
    }
    files = {name: store.put(KIND, stage.key, name, data) for name, data in tables.items()}
    stage.commit(
        store, files, {"held_out": found.held_out.metrics(), "n_rows": found.features.rows}
    )
