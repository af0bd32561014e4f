"""TopK: in each row the k largest pre-activations, where they are positive (Gao et al. 2024, §2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sae_ext.architectures.base import Architecture, Now, code_on, pre_activations
from sae_ext.fields import STRICT, require, require_above
from sae_ext.ops import Parameters, SparseCode, Support


@dataclass(frozen=True, kw_only=True)
class TopK(Architecture):
    """See the module. Needs no penalty; `auxk` keeps its features alive."""

    __pydantic_config__ = STRICT
    sparse_alone: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    layout: ClassVar[str] = "topk"

    kind: Literal["topk"] = "topk"
    k: int = 32
    """Features that may be active in a row."""

    def __post_init__(self) -> None:
        require_above(self, 0, "k")

    def check(self, d_sae: int) -> None:
        """k features must be there."""
        require(self.k <= d_sae, f"architecture.k is {self.k}, but d_sae is only {d_sae}: lower it")

    def support(self, x: Tensor, params: Parameters, now: Now | None) -> Support:
        """The k largest of each row; among equal ones those that torch.topk takes."""
        return largest(x, params, self.k)

    def encode(self, x: Tensor, params: Parameters, more: Mapping[str, Tensor]) -> SparseCode:
        """The same choice as in training."""
        return code_on(x, params, self.support(x, params, None))

    def to_layout(self) -> dict[str, Any]:
        """k; no rescaling by the decoder's lengths, as SAELens can be told to do."""
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def from_layout(cls, cfg: Mapping[str, Any]) -> TopK:
        """See `to_layout`."""
        if cfg.get("rescale_acts_by_decoder_norm"):
            raise KeyError(
                "rescale_acts_by_decoder_norm is set: fold the decoder's lengths into the weights"
            )
        return cls(k=int(cfg["k"]))


def largest(x: Tensor, params: Parameters, k: int, among: Tensor | None = None) -> Support:
    """In each row the k entries with the largest pre-activations, of the features `among` [d_sae] alone."""
    cols = []
    for _, pre in pre_activations(x, params):
        if among is not None:
            pre.masked_fill_(~among, -torch.inf)
        cols.append(pre.topk(k, dim=1, sorted=False).indices.sort(dim=1).values)
    row_ptr = torch.arange(0, (len(x) + 1) * k, k, dtype=torch.int64, device=x.device)
    return Support(row_ptr, torch.cat(cols).flatten().int())
