"""How fast the host model alone reads a corpus: the upper limit of any harvest on this machine."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from flows.recipe import Recipe
from sae_ext import corpora
from sae_ext.activations.harvest import length_buckets, plan
from sae_ext.host import Host, resolve, width

_WARM_UP_BATCHES = 3


class BareForward:
    """The harvest's own batches through the same shortened forward; nothing is kept or stored."""

    def __init__(self, recipe: Recipe) -> None:
        self.host = Host.load(recipe.host)
        documents = corpora.load(recipe.corpus)
        d_in = width(resolve(recipe.host.model), recipe.host.layer)
        planned = plan(documents, self.host.tokenizer, recipe.host, recipe.harvest, d_in)
        self.rows = sum(planned.rows)
        self.batches = [
            batch
            for unit in planned.units
            for batch in self._batches(
                [d.text for d in documents[unit.start : unit.stop]], recipe.harvest.batch_tokens
            )
        ]

    def rows_per_second(self) -> float:
        """Activation rows per second with all cores as torch threads; padding costs time too."""
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            for tokens, mask in self.batches[:_WARM_UP_BATCHES]:
                self.host.residual(tokens, mask)
            began = time.perf_counter()
            for tokens, mask in self.batches:
                self.host.residual(tokens, mask)
            return self.rows / (time.perf_counter() - began)
        finally:
            torch.set_num_threads(threads)

    def _batches(self, texts: list[str], batch_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Token ids and masks [documents, tokens] of one shard's padded batches."""
        tokenizer = self.host.tokenizer
        longest = self.host.config.max_tokens + tokenizer.num_special_tokens_to_add()
        longest = min(longest, tokenizer.model_max_length)
        ids = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        batches = []
        for chosen in length_buckets([len(i) for i in ids], batch_tokens):
            padded = tokenizer.pad({"input_ids": [ids[d] for d in chosen]}, return_tensors="pt")
            batches.append((padded["input_ids"], padded["attention_mask"]))
        return batches
