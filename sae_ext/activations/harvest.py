"""From documents to activation shards: the plan, and the work on one shard.

The plan cuts the documents, in corpus order, into shards by row count alone, so it does not depend
on who computes them or when. A shard's bytes are a function of its documents, the model and the
configuration: any worker may make it, twice if need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.numpy import save

from sae_ext.config import HarvestConfig, HostConfig
from sae_ext.corpora import Document
from sae_ext.errors import UserError
from sae_ext.host import Host

_TOKENIZE_AT_ONCE = 1024


class Unit(NamedTuple):
    """Shard `number` to make: documents `start` up to `stop` of the corpus, `rows` rows in all."""

    number: int
    start: int
    stop: int
    rows: int


class Plan(NamedTuple):
    """Rows of each document, and the shards they go to."""

    rows: list[int]
    units: list[Unit]


class ShardData(NamedTuple):
    """A finished shard as the bytes of its two files."""

    activations: bytes
    provenance: pa.Table


def plan(
    documents: Sequence[Document],
    tokenizer: Any,
    host: HostConfig,
    config: HarvestConfig,
    d_in: int,
) -> Plan:
    """Count each document's rows and cut the corpus into shards of at most `shard_mb`.

    Documents that give no row (only special tokens) stay in the table with zero rows.
    """
    rows: list[int] = []
    for first in range(0, len(documents), _TOKENIZE_AT_ONCE):
        texts = [d.text for d in documents[first : first + _TOKENIZE_AT_ONCE]]
        rows += [int(mask.sum()) for mask in _encode(texts, tokenizer, host, config)[2]]
    row_bytes = d_in * np.dtype(config.dtype).itemsize
    limit = max(1, int(config.shard_mb * 2**20) // row_bytes)
    units: list[Unit] = []
    start = filled = 0
    for document, count in enumerate(rows):
        if filled and count and filled + count > limit:
            units.append(Unit(len(units), start, document, filled))
            start, filled = document, 0
        filled += count
    if filled:
        units.append(Unit(len(units), start, len(rows), filled))
    if not units:
        raise UserError("corpus: no document has a single token to read")
    return Plan(rows, units)


def harvest_unit(host: Host, documents: Sequence[Document], config: HarvestConfig) -> ShardData:
    """Compute one shard.

    Returns:
        The safetensors file: `x` [rows, d_in] in `config.dtype`, and float64 sums over its rows for
        the manifest (`sum`, `sum_sq` [d_in], `norm_sum` [1]); and the provenance table, one line per
        row: doc_id, position (token position in the document), token_id, token_text.

    Raises:
        UserError: an activation is NaN or infinite, or overflows `config.dtype`.
    """
    texts = [d.text for d in documents]
    ids, attention, keep = _encode(texts, host.tokenizer, host.config, config)
    x = _forward(host, ids, attention, keep, config)
    if not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x).all(axis=1))[0, 0])
        owner = int(np.searchsorted(np.cumsum([m.sum() for m in keep]), row, side="right"))
        raise UserError(
            f"document {documents[owner].doc_id!r}: activations are not finite in {config.dtype}: "
            "set harvest.dtype to float32, or drop the document"
        )
    exact = x.astype(np.float64)
    arrays = {
        "x": x,
        "sum": exact.sum(axis=0),
        "sum_sq": np.square(exact).sum(axis=0),
        "norm_sum": np.linalg.norm(exact, axis=1).sum(keepdims=True),
    }
    return ShardData(save(arrays), _provenance(documents, ids, keep, host.tokenizer))


_Encoded = tuple[
    list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]], list[npt.NDArray[np.bool_]]
]


def _encode(texts: list[str], tokenizer: Any, host: HostConfig, config: HarvestConfig) -> _Encoded:
    """Token ids, attention masks and the mask of rows to keep, per document."""
    special = tokenizer.num_special_tokens_to_add()
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=min(host.max_tokens + special, tokenizer.model_max_length),
        return_special_tokens_mask=True,
    )
    ids = [np.array(i, dtype=np.int64) for i in encoded["input_ids"]]
    attention = [np.array(m, dtype=np.int64) for m in encoded["attention_mask"]]
    is_special = [np.array(m, dtype=bool) for m in encoded["special_tokens_mask"]]
    keep = [~m if config.drop_special_tokens else np.ones_like(m) for m in is_special]
    return ids, attention, keep


def _forward(
    host: Host,
    ids: list[npt.NDArray[np.int64]],
    attention: list[npt.NDArray[np.int64]],
    keep: list[npt.NDArray[np.bool_]],
    config: HarvestConfig,
) -> npt.NDArray[Any]:
    """Activations of the kept tokens [rows, d_in], in document order."""
    starts = np.concatenate([[0], np.cumsum([m.sum() for m in keep])])
    out: npt.NDArray[Any] | None = None
    padding = host.tokenizer.pad_token_id or 0
    for batch in length_buckets([len(i) for i in ids], config.batch_tokens):
        longest = max(len(ids[d]) for d in batch)
        tokens = torch.full((len(batch), longest), padding, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for line, d in enumerate(batch):
            tokens[line, : len(ids[d])] = torch.from_numpy(ids[d])
            mask[line, : len(ids[d])] = torch.from_numpy(attention[d])
        residual = host.residual(tokens, mask).numpy()
        if out is None:
            out = np.empty((int(starts[-1]), residual.shape[-1]), dtype=config.dtype)
        with np.errstate(over="ignore"):  # an overflow shows as inf, which the caller reports
            for line, d in enumerate(batch):
                out[starts[d] : starts[d + 1]] = residual[line, : len(ids[d])][keep[d]]
    assert out is not None, "a unit holds at least one document"
    return out


def length_buckets(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group documents of like length so that a padded batch holds at most `batch_tokens` tokens.

    Returns:
        Lists of document indices, longest documents first; a document longer than `batch_tokens`
        is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))
    batches: list[list[int]] = []
    for d in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(d)
        else:
            batches.append([d])
    return batches


def _provenance(
    documents: Sequence[Document],
    ids: list[npt.NDArray[np.int64]],
    keep: list[npt.NDArray[np.bool_]],
    tokenizer: Any,
) -> pa.Table:
    kept_ids = np.concatenate([i[k] for i, k in zip(ids, keep, strict=True)])
    counts = [int(k.sum()) for k in keep]
    # Position counts the kept tokens, so that windows cut by position have no holes.
    positions = np.concatenate([np.arange(c, dtype=np.int32) for c in counts])
    return pa.table(
        {
            "doc_id": pa.array(
                np.repeat(np.array([d.doc_id for d in documents], dtype=object), counts)
            ).dictionary_encode(),
            "position": positions,
            "token_id": kept_ids.astype(np.int32),
            "token_text": pa.array(
                tokenizer.convert_ids_to_tokens(kept_ids.tolist())
            ).dictionary_encode(),
        }
    )
