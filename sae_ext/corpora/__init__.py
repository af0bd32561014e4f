"""Documents: the texts whose activations are read, with names, labels, further columns and a fixed split.

stdlib     the built-in corpus       files     .txt, .json, .jsonl, .csv, .parquet
hub        the package `datasets`    documents what a document is, and its split
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sae_ext.corpora import hub, stdlib
from sae_ext.corpora.config import CorpusConfig
from sae_ext.corpora.documents import (
    Document,
    Harvested,
    Rejected,
    Split,
    Value,
    bucket,
    bucket_of,
    split_masks,
    to_table,
)
from sae_ext.corpora.files import Files
from sae_ext.corpora.stdlib import STDLIB
from sae_ext.errors import UserError


def read(config: CorpusConfig) -> Iterator[Document | Rejected]:
    """The corpus in its fixed order, a document at a time, up to `limit` of them.

    Raises:
        UserError: the source does not exist, cannot be read, or gives not a single document.
    """
    source = config.source or STDLIB
    if source == STDLIB:
        found: Iterator[Document | Rejected] = stdlib.read()
    elif source.startswith(hub.PREFIX):
        found = hub.read(config)
    else:
        found = Files(source).read(config)
    yield from limited(found, config, source)


def limited(
    found: Iterable[Document | Rejected], config: CorpusConfig, source: str
) -> Iterator[Document | Rejected]:
    """The first `limit` documents of a source.

    Raises:
        UserError: it gives not a single one.
    """
    count, first = 0, None
    for each in found:
        if isinstance(each, Rejected):
            first = first or each
        elif count == config.limit:
            return
        else:
            count += 1
        yield each
    if count == 0:
        why = f" ({first.where}: {first.detail})" if first else ""
        raise UserError(f"corpus {source!r} holds no documents{why}: give a source with texts")


def load(config: CorpusConfig) -> list[Document]:
    """All documents of the corpus, without what was rejected."""
    return [each for each in read(config) if isinstance(each, Document)]


def portable(config: CorpusConfig) -> CorpusConfig:
    """The same under a name that means the same in another working directory."""
    source = config.source or STDLIB
    if source == STDLIB or "://" in source:
        return config
    prefix = hub.PREFIX if source.startswith(hub.PREFIX) else ""
    path = Path(source.removeprefix(prefix)).expanduser()
    if prefix and not path.is_dir():
        return config
    return replace(config, source=f"{prefix}{path.absolute()}")


def fingerprint(config: CorpusConfig) -> str:
    """Hash over what the corpus is read from, so that changed texts mean a new artefact."""
    source = config.source or STDLIB
    if source.startswith(hub.PREFIX):
        return hub.fingerprint(config)
    if source != STDLIB:
        return Files(source).fingerprint()
    digest = hashlib.sha256()
    for path in stdlib.files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


__all__ = [
    "STDLIB",
    "Document",
    "Files",
    "Harvested",
    "Rejected",
    "Split",
    "Value",
    "bucket",
    "bucket_of",
    "fingerprint",
    "limited",
    "load",
    "portable",
    "read",
    "split_masks",
    "to_table",
]
