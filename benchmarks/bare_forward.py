"""How fast the host model alone reads a corpus: the upper limit of any harvest on this machine."""

from __future__ import annotations

import os
import time

import torch

from flows.recipe import Recipe
from sae_ext.activations.harvest import parts
from sae_ext.corpora import Document
from sae_ext.hosts.transformer import Transformer, TransformerHost

_WARM_UP_BATCHES = 3


class BareForward:
    """The harvest's own batches through the same shortened forward; nothing is kept or stored."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.host, Transformer)
        self.host = TransformerHost.load(recipe.host)
        self.batches = [
            batch
            for _, documents in parts(recipe.host.documents(recipe.corpus), recipe.harvest)
            for batch in self.host.batches([d for d in documents if isinstance(d, Document)])
        ]
        special = self.host.tokenizer.num_special_tokens_to_add() if recipe.host.drop_special else 0
        self.rows = sum(int(mask.sum()) - special * len(mask) for _, mask in self.batches)

    def rows_per_second(self, threads: int | None = None) -> float:
        """Activation rows per second, with all cores as torch threads or so many; padding costs time too."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads or os.cpu_count() or 1)
        try:
            for batch in self.batches[:_WARM_UP_BATCHES]:
                self.host.captured(*batch)
            began = time.perf_counter()
            for batch in self.batches:
                self.host.captured(*batch)
            return self.rows / (time.perf_counter() - began)
        finally:
            torch.set_num_threads(before)
