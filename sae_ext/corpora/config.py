"""The configuration of a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_ext.fields import STRICT, require


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the documents come from."""

    __pydantic_config__ = STRICT

    source: str | None = None
    """`stdlib-docstrings` (the documentation of the running Python's standard library), which is also what a host
    that reads texts takes where nothing is said; a file, a folder or a
    pattern of .txt, .json, .jsonl, .csv, .tsv or .parquet files, here or at any fsspec URL; `datasets:NAME` for a
    data set of the Hugging Face hub, or a local folder of one."""
    text: str = "text"
    """Field or column with the text."""
    id: str = "id"
    """Field or column with the document's name; its number in the corpus where there is none."""
    label: str = "label"
    """Field or column with what groups documents."""
    columns: tuple[str, ...] = ()
    """Further fields or columns that are kept: for weights, classes, slots and analyses."""
    txt: Literal["file", "paragraph", "line"] = "file"
    """What a document is in .txt files; paragraphs are told apart by empty lines."""
    dataset_config: str | None = None
    """Which configuration of a `datasets:` source."""
    dataset_split: str = "train"
    """Which part of a `datasets:` source is read; what is held out of it is decided here, by hash."""
    limit: int | None = None
    """Read only the first so many documents (of the corpus' fixed order); all when absent."""
    validation_percent: int = 10
    """Documents held out for choosing hyper-parameters, by hash of the text (never by row)."""
    test_percent: int = 10
    """Documents held out for the reported numbers and for scoring explanations, by the same hash."""
    split_by: str | None = None
    """Hash this field instead (`label`, or one of `columns`): documents that agree in it stay together."""

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, f"limit must be at least 1, got {self.limit}")
        taken = sorted(
            {"doc_id", "text", "label", "bucket", "n_rows", "rejected"} & set(self.columns)
        )
        require(
            not taken,
            f"columns cannot hold {', '.join(map(repr, taken))}, which every table of documents has already: "
            "rename it",
        )
        require(
            len(set(self.columns)) == len(self.columns),
            f"columns names one twice: {', '.join(self.columns)}",
        )
        require(
            self.split_by in (None, "label", *self.columns),
            f"split_by is {self.split_by!r}, which is neither 'label' nor one of columns: add it there",
        )
        require(
            self.validation_percent > 0
            and self.test_percent > 0
            and self.validation_percent + self.test_percent <= 80,
            "validation_percent and test_percent must be positive and leave 20 % to train on, got "
            f"{self.validation_percent} and {self.test_percent}",
        )
