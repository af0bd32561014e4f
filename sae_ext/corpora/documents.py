"""What a document is, what becomes of one that cannot be read, and which split it belongs to.

Split: a hash of the document's text (or of another column, so that whole groups stay together) gives a bucket
0..99; buckets below `test_percent` are test, the next `validation_percent` validation, the rest training. Equal
texts always land in the same part, and adding documents never moves one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext.corpora.config import CorpusConfig
from sae_ext.errors import UserError

Split = Literal["train", "validation", "test"]
Value = str | float | int | bool | None

OWN_COLUMNS = ("doc_id", "text", "label", "bucket", "n_rows", "rejected")
"""Columns every table of documents has; those a corpus adds have other names."""

ENCODING, MALFORMED, EMPTY = "encoding", "malformed", "empty"
NO_ROWS, TOO_LONG, NO_ANSWER, NOT_FINITE = "no rows", "too long", "no answer", "not finite"
"""Why a document is rejected: the first three when it is read, the others when its rows are computed."""


class Document(NamedTuple):
    """One text, or one thing with a row of its own. `label` groups documents; empty when unknown."""

    doc_id: str
    text: str
    label: str
    columns: Mapping[str, Value] = {}
    """What else the corpus says of it."""


class Rejected(NamedTuple):
    """A place in a corpus that gives no document: recorded, and not fatal."""

    where: str
    """File and line or row, counted from 1."""
    reason: str
    """One of the words above."""
    detail: str
    """What was found there."""


class Harvested(NamedTuple):
    """What became of a document: its number of rows, or why it has none."""

    n_rows: int
    rejected: str | None = None


def bucket(text: str) -> int:
    """The hash bucket 0..99 of a text, which decides its split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def bucket_of(document: Document, config: CorpusConfig) -> int:
    """The bucket of a document: that of its text, its name where it has no text, or of `split_by`.

    Raises:
        UserError: the document has no value of `split_by`.
    """
    if config.split_by is None:
        return bucket(document.text or document.doc_id)
    value = document.label if config.split_by == "label" else document.columns[config.split_by]
    if value is None or value == "":
        raise UserError(
            f"corpus.split_by: document {document.doc_id!r} has no value of {config.split_by!r}: give every "
            "document one, or leave split_by out"
        )
    return bucket(str(value))


def split_masks(
    buckets: npt.NDArray[np.integer], config: CorpusConfig
) -> dict[Split, npt.NDArray[np.bool_]]:
    """For each split, which of the documents with these buckets belong to it."""
    test = buckets < config.test_percent
    validation = ~test & (buckets < config.test_percent + config.validation_percent)
    return {"train": ~test & ~validation, "validation": validation, "test": test}


def to_table(
    documents: Sequence[Document | Rejected], found: Sequence[Harvested], config: CorpusConfig
) -> pa.Table:
    """The documents as stored beside the activations, those that were rejected among them.

    Columns: doc_id (the place, where no document could be read), text, label, the corpus' further columns,
    bucket (0..99, see `bucket_of`), n_rows (activation rows of the document; a document's rows are contiguous and
    documents follow each other in table order), rejected (why it has none; null where it has).
    """
    whole = [
        Document(d.where, "", "", dict.fromkeys(config.columns)) if isinstance(d, Rejected) else d
        for d in documents
    ]
    reasons = [
        f"{d.reason}: {d.detail}" if isinstance(d, Rejected) else h.rejected
        for d, h in zip(documents, found, strict=True)
    ]
    buckets = [
        0 if isinstance(d, Rejected) else bucket_of(w, config)
        for d, w in zip(documents, whole, strict=True)
    ]
    return pa.table(
        {
            "doc_id": pa.array([d.doc_id for d in whole], pa.string()),
            "text": pa.array([d.text for d in whole], pa.string()),
            "label": pa.array([d.label for d in whole], pa.string()),
            **{name: _column([d.columns[name] for d in whole], name) for name in config.columns},
            "bucket": pa.array(buckets, pa.int16()),
            "n_rows": pa.array([h.n_rows for h in found], pa.int32()),
            "rejected": pa.array(reasons, pa.string()),
        }
    )


def _column(values: list[Value], name: str) -> pa.Array:
    """Numbers as float64, all else as texts; of no type where there are none."""
    if all(v is None for v in values):
        return pa.nulls(len(values))
    if all(v is None or isinstance(v, int | float) for v in values):
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array([None if v is None else str(v) for v in values], pa.string())
