"""Documents of a data set in the format of the package `datasets`: one of the hub by name, or a local folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from sae_ext.corpora.config import CorpusConfig
from sae_ext.corpora.documents import Document, Rejected
from sae_ext.corpora.files import document_of
from sae_ext.errors import UserError

PREFIX = "datasets:"


def load(config: CorpusConfig) -> Any:
    """The data set's part.

    Raises:
        UserError: the package is missing, or the data set is not there or has no such part or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"corpus.source {config.source!r} needs the package datasets: pip install datasets"
        ) from error
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    datasets.disable_progress_bars()
    name = (config.source or "").removeprefix(PREFIX)
    try:
        found = datasets.load_dataset(name, config.dataset_config, split=config.dataset_split)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"corpus.source: the data set {name!r} cannot be loaded ({first}): correct corpus.source, "
            "dataset_config or dataset_split, or save its texts as .parquet or .jsonl and name that file"
        ) from error
    for column in (config.text, *config.columns):
        if column not in found.column_names:
            field = "text" if column == config.text else "columns"
            raise UserError(
                f"the data set {name!r} has no column {column!r}: set corpus.{field}; there are "
                f"{', '.join(found.column_names)}"
            )
    return found


def fingerprint(config: CorpusConfig) -> str:
    """The one the package keeps, which changes with the content."""
    return str(load(config)._fingerprint)


def read(config: CorpusConfig) -> Iterator[Document | Rejected]:
    """All documents, in order."""
    for number, row in enumerate(load(config)):
        yield document_of(row, f"{config.source}, row {number + 1}", str(number), config)
