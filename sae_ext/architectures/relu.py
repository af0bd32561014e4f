"""The ReLU, with an upper bound where one is wanted: z = min(max(pre, 0), clip)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sae_ext.architectures.base import Architecture
from sae_ext.fields import STRICT, require_above, require_finite


@dataclass(frozen=True, kw_only=True)
class ReLU(Architecture):
    """See the module. Sparse by a penalty: give the objective an `l1` term."""

    __pydantic_config__ = STRICT

    kind: Literal["relu"] = "relu"
    clip: float | None = None
    """Upper bound on a feature's activation; none when absent. Where decoder rows have length 1 it is in units
    in which E‖x‖ = sqrt(d_in); with a free decoder features have units of their own: z_j ‖W_dec,j‖ is in those."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(self, 0, "clip")

    @classmethod
    def from_layout(cls, cfg: Mapping[str, Any]) -> ReLU:
        """SAELens knows no clip; ours is in the metadata."""
        return cls(clip=cfg.get("metadata", {}).get("activation_clip"))
