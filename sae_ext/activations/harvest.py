"""From documents to activation shards: units of work, and the work on one of them.

A unit is a run of documents of the corpus with about `unit_kb` of text; so the units depend on the corpus alone,
not on who computes them or when. What a unit gives is a function of its documents, the host and the configuration:
any worker may make it, twice if need be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from sae_ext.config import HarvestConfig
from sae_ext.corpora import Document, Harvested, Rejected, to_table
from sae_ext.corpora.config import CorpusConfig
from sae_ext.errors import UserError
from sae_ext.hosts import Found, Host

_ROW_BYTES = 4  # a document without text counts as a token of English does
_SUM_ROWS = 1024


class Unit(NamedTuple):
    """Work unit `number`: documents `start` up to `stop` of the corpus, `size` bytes of text in all."""

    number: int
    start: int
    stop: int
    size: int


class Shard(NamedTuple):
    """What a unit gives at one hook."""

    x: Tensor
    """[rows, d_in] in the format that is stored."""
    sums: dict[str, npt.NDArray[np.float64]]
    """Over the rows: `sum`, `sum_sq` [d_in] and `norm_sum` [1]."""
    provenance: pa.Table
    """A line a row, see `provenance_table`."""
    documents: pa.Table
    """See `sae_ext.corpora.to_table`."""


def size_of(document: Document | Rejected) -> int:
    """Bytes of text in a document, which is what its work is measured by."""
    if isinstance(document, Rejected):
        return 0
    return len(document.text.encode()) or _ROW_BYTES


def units(sizes: Iterable[int], config: HarvestConfig) -> Iterator[Unit]:
    """Cut a corpus into units, given the sizes of its documents; a document is never cut."""
    limit = max(1, int(config.unit_kb * 1024))
    number = start = filled = stop = 0
    for stop, size in enumerate(sizes):
        if size and filled and filled + size > limit:
            yield Unit(number, start, stop, filled)
            number, start, filled = number + 1, stop, 0
        filled += size
    if filled:
        yield Unit(number, start, stop + 1, filled)


def parts(
    documents: Iterable[Document | Rejected], config: HarvestConfig
) -> Iterator[tuple[Unit, list[Document | Rejected]]]:
    """The same, with the documents of each unit; no more than one unit's are held."""
    held: list[Document | Rejected] = []

    def sizes() -> Iterator[int]:
        for each in documents:
            held.append(each)
            yield size_of(each)

    for unit in units(sizes(), config):
        count = unit.stop - unit.start
        mine, held[:] = held[:count], held[count:]
        yield unit, mine


def harvest_unit(
    host: Host,
    documents: Sequence[Document | Rejected],
    config: HarvestConfig,
    corpus: CorpusConfig,
) -> list[Shard]:
    """Compute a unit: what each of the host's hooks gives.

    Raises:
        UserError: an activation is NaN or infinite, or overflows `config.dtype`, where that is not to be passed
            over.
    """
    good = [d for d in documents if isinstance(d, Document)]
    dtype = getattr(torch, config.dtype)
    found = host.read(good, dtype) if good else []
    return [_shard(documents, good, each, config, corpus) for each in found]


def _shard(
    documents: Sequence[Document | Rejected],
    good: Sequence[Document],
    found: Found,
    config: HarvestConfig,
    corpus: CorpusConfig,
) -> Shard:
    found = finite(good, found, config)
    kept = iter(
        Harvested(int(n), found.rejected.get(d)) for d, n in enumerate(found.counts.tolist())
    )
    fate = [Harvested(0) if isinstance(d, Rejected) else next(kept) for d in documents]
    return Shard(
        found.x, row_sums(found.x), provenance_table(good, found), to_table(documents, fate, corpus)
    )


def finite(documents: Sequence[Document], found: Found, config: HarvestConfig) -> Found:
    """What was found, without documents that give a NaN or an infinity.

    Raises:
        UserError: there are some, and `config.not_finite` is `refuse`.
    """
    bad = found.not_finite()
    if bad and config.not_finite == "refuse":
        first = min(bad)
        more = f" and {len(bad) - 1} more documents" if len(bad) > 1 else ""
        raise UserError(
            f"document {documents[first].doc_id!r}{more}: activations are not finite in {config.dtype} "
            f"({bad[first]}): set harvest.dtype to float32 or bfloat16, or harvest.not_finite to drop to leave "
            "such documents out"
        )
    return found.without(bad) if bad else found


def row_sums(x: Tensor) -> dict[str, npt.NDArray[np.float64]]:
    """Float64 sums over rows [n, d]: `sum`, `sum_sq` [d] and `norm_sum` [1]."""
    total = torch.zeros(2, x.shape[1], dtype=torch.float64)
    norms = torch.zeros(1, dtype=torch.float64)
    for part in torch.split(x, _SUM_ROWS):  # in float64 all of them are large
        exact = part.double()
        total[0] += exact.sum(dim=0)
        total[1] += exact.square().sum(dim=0)
        norms += exact.norm(dim=1).sum()
    return {"sum": total[0].numpy(), "sum_sq": total[1].numpy(), "norm_sum": norms.numpy()}


def provenance_table(documents: Sequence[Document], found: Found) -> pa.Table:
    """A line for each row.

    Columns: doc_id, position (place among the rows of its document), token_id and token_text (null where rows are
    no tokens).
    """
    n = len(found.position)
    # Put together here: pyarrow would import pandas to look through an array of objects.
    giving = np.flatnonzero(found.counts)
    place = np.repeat(np.arange(len(giving), dtype=np.int32), found.counts[giving])
    names = pa.array([documents[d].doc_id for d in giving.tolist()], pa.string())
    ids = pa.nulls(n, pa.int32()) if found.token_id is None else pa.array(found.token_id)
    texts = (
        pa.nulls(n, pa.string())
        if found.token_text is None
        else pa.array(found.token_text, pa.string())
    )
    return pa.table(
        {
            "doc_id": pa.DictionaryArray.from_arrays(pa.array(place), names),
            "position": pa.array(found.position, pa.int32()),
            "token_id": ids,
            "token_text": texts.dictionary_encode(),
        }
    )
