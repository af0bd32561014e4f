"""What each feature does, gathered in one streaming pass over the activations.

Every part below is a mergeable sum or sketch: shards can be visited by any worker in any order.
The reported quality (FVU, L0, dead, density) comes from the test documents alone; what a feature
fires on comes from all documents, with the split kept beside each piece of evidence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext.activations.reader import Activations
from sae_ext.config import AnalyseConfig
from sae_ext.evidence import Evidence, TokenTable
from sae_ext.metrics import ReconstructionSums
from sae_ext.model import SAE

HISTOGRAM_BINS = 64
HISTOGRAM_RANGE = (1e-2, 1e2)
"""Feature activations are binned by logarithm between these; outer values fall in the end bins."""
_BATCH = 4096


class FeatureSums:
    """Per-feature sums over rows: counts, moments, histogram, and firings by label."""

    def __init__(self, d_sae: int, n_labels: int) -> None:
        self.rows = 0
        self.fired = np.zeros(d_sae, dtype=np.int64)
        self.total = np.zeros(d_sae)
        self.maximum = np.zeros(d_sae, dtype=np.float32)
        self.histogram = np.zeros((d_sae, HISTOGRAM_BINS), dtype=np.int64)
        self.by_label = np.zeros((d_sae, n_labels), dtype=np.int64)

    def update(
        self,
        features: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int32],
    ) -> None:
        """Add the firing entries of some rows: feature, activation and the row's label, each [nnz]."""
        d_sae, n_labels = self.by_label.shape
        self.fired += np.bincount(features, minlength=d_sae)
        self.total += np.bincount(features, weights=values.astype(np.float64), minlength=d_sae)
        np.maximum.at(self.maximum, features, values)
        bins = np.digitize(values, histogram_edges()[1:-1])
        flat = features.astype(np.int64) * HISTOGRAM_BINS + bins
        self.histogram += np.bincount(flat, minlength=self.histogram.size).reshape(
            self.histogram.shape
        )
        flat = features.astype(np.int64) * n_labels + labels
        self.by_label += np.bincount(flat, minlength=self.by_label.size).reshape(
            self.by_label.shape
        )

    def merge(self, other: FeatureSums) -> None:
        """Add another partition's sums."""
        self.rows += other.rows
        self.fired += other.fired
        self.total += other.total
        np.maximum(self.maximum, other.maximum, out=self.maximum)
        self.histogram += other.histogram
        self.by_label += other.by_label


class ShardAnalysis:
    """All that is gathered from one or more shards: what crosses from a worker to the driver."""

    def __init__(self, config: AnalyseConfig, sae: SAE, n_labels: int) -> None:
        self.features = FeatureSums(sae.d_sae, n_labels)
        self.held_out = ReconstructionSums.of(sae)
        self.evidence = Evidence(config, sae.d_sae)

    def merge(self, other: ShardAnalysis) -> None:
        """Add another partition's findings."""
        self.features.merge(other.features)
        self.held_out.merge(other.held_out)
        self.evidence.merge(other.evidence)


def label_names(activations: Activations) -> list[str]:
    """The corpus' labels in sorted order; a row's label number is its place here."""
    return sorted(set(activations.documents["label"].to_pylist()))


def analyse_shard(
    activations: Activations, sae: SAE, config: AnalyseConfig, index: int
) -> ShardAnalysis:
    """Encode one shard and gather everything from it."""
    labels = label_names(activations)
    number = {name: i for i, name in enumerate(labels)}
    of_document = np.array(
        [number[x] for x in activations.documents["label"].to_pylist()], dtype=np.int32
    )
    found = ShardAnalysis(config, sae, len(labels))
    rows = np.arange(activations.offsets[index], activations.offsets[index + 1])
    owners = activations.documents_of(rows)
    is_test = activations.split_of_documents("test")[owners]
    provenance = activations.provenance(index)
    positions = provenance["position"].to_numpy()
    texts = provenance["token_text"].to_numpy()
    pointers: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    columns, values = [], []
    for start in range(0, len(rows), _BATCH):
        part = slice(start, start + _BATCH)
        x = activations.gather(rows[part])
        code = sae.encode(x)
        pointers.append(code.row_ptr[1:].numpy() + pointers[-1][-1])
        columns.append(code.col.numpy())
        values.append(code.val.numpy().astype(np.float32))
        if is_test[part].any():
            x_held = x[is_test[part]]
            held = sae.encode(x_held)
            found.held_out.update(sae.target(x_held), sae.decode(held), held, sae.clip)
    row_ptr, col, val = np.concatenate(pointers), np.concatenate(columns), np.concatenate(values)
    found.features.rows = len(rows)
    found.features.update(col, val, np.repeat(of_document[owners], np.diff(row_ptr)))
    tokens = TokenTable(doc=owners.astype(np.int64), position=positions, text=texts)
    found.evidence.update(row_ptr, col, val, tokens)
    return found


def histogram_edges() -> npt.NDArray[np.float64]:
    """Edges [HISTOGRAM_BINS + 1] of the activation histogram."""
    return np.geomspace(*HISTOGRAM_RANGE, HISTOGRAM_BINS + 1)


def feature_table(activations: Activations, sae: SAE, found: ShardAnalysis) -> pa.Table:
    """features.parquet, one row per feature.

    Columns: feature; density and density_heldout (fraction of all / of test rows in which it fires);
    mean_active and max (of its activations where it fires, null when it never does);
    decoder_encoder_cosine; top_label (the label with the largest share of its firings) and
    top_label_share (null when it never fires or documents have no labels); histogram (counts in
    log-spaced bins, see `histogram_edges`).
    """
    sums, n = found.features, max(found.features.rows, 1)
    fires = sums.fired > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.total / sums.fired
        shares = sums.by_label / sums.fired[:, None]
    labels = label_names(activations)
    top = sums.by_label.argmax(axis=1)
    labelled = fires & (labels != [""])
    share = np.where(fires, shares[np.arange(len(top)), top], 0.0)
    held_rows = found.held_out.rows
    density_heldout = found.held_out.fired / held_rows if held_rows else np.full(len(top), np.nan)
    return pa.table(
        {
            "feature": np.arange(len(top), dtype=np.int32),
            "density": sums.fired / n,
            "density_heldout": _nullable(density_heldout, np.full(len(top), held_rows > 0)),
            "mean_active": _nullable(mean.astype(np.float32), fires),
            "max": _nullable(sums.maximum, fires),
            "decoder_encoder_cosine": sae.encoder_decoder_cosine().float().numpy(),
            "top_label": pa.array(
                [labels[t] if ok else None for t, ok in zip(top, labelled, strict=True)]
            ),
            "top_label_share": _nullable(share.astype(np.float32), labelled),
            "histogram": pa.array(list(sums.histogram), pa.list_(pa.int64())),
        }
    )


def _nullable(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> pa.Array:
    return pa.array(values, mask=~valid)
