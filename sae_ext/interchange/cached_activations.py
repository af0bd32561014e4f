"""Activations as SAELens 6 caches them: a data set of the package `datasets`, a row for every context.

    cached_activations.write(Activations(store, key), Path("cache"), context_size=128)

Columns: the hook's name, [context_size, d_in], and `token_ids`. SAELens cuts a stream of tokens into contexts of
one length, and so are these: rows follow each other whatever document they are of. Read there with
`cached_activations_path`, and `hook_name` as it stands in `cfg.json` of SAEs trained here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae_ext import hosts
from sae_ext.activations.reader import Activations
from sae_ext.errors import UserError

_FORMATS = {
    "float16": "float16",
    "float32": "float32",
    "bfloat16": "float32",
}  # Arrow has no bfloat16


def write(source: Activations, folder: Path, context_size: int) -> tuple[int, int]:
    """Write the data set; returns how many contexts, and how many rows are left over behind the last.

    Raises:
        UserError: the package datasets is missing, rows are no tokens, or the folder is in use.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "SAELens' layout is one of the package datasets: pip install datasets"
        ) from error
    if context_size < 1:
        raise UserError(f"context_size must be at least 1, got {context_size}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name another folder")
    if source.provenance(0)["token_id"].null_count:
        raise UserError(
            f"the rows of activations/{source.key} are no tokens, of which SAELens makes contexts: name others"
        )
    host = hosts.from_content(source.manifest.config["host"])
    hook = str(host.described()["hook_name"])
    kind = _FORMATS[source.manifest.extra["dtype"]]
    features = datasets.Features(
        {
            hook: datasets.Array2D(shape=(context_size, source.d_in), dtype=kind),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=context_size),
        }
    )
    contexts, left = divmod(source.n_rows, context_size)

    def rows() -> Iterator[dict[str, Any]]:
        ids = np.concatenate(
            [source.provenance(i)["token_id"].to_numpy() for i in range(len(source.shard_rows))]
        )
        for number in range(contexts):
            places = np.arange(number * context_size, (number + 1) * context_size)
            x = source.gather(places).numpy().astype(kind)
            yield {hook: x, "token_ids": ids[places].astype(np.int32)}

    made = datasets.Dataset.from_generator(rows, features=features)
    made.save_to_disk(str(folder))
    return contexts, left
