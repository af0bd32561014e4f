"""The architectures there are. A new one is a file beside these, and its name in two places here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sae_ext.architectures.base import Architecture, Forward, Now, Weights
from sae_ext.architectures.batchtopk import BatchTopK
from sae_ext.architectures.gated import Gated
from sae_ext.architectures.jumprelu import JumpReLU, Thresholds
from sae_ext.architectures.projection import Projected, Projection
from sae_ext.architectures.relu import ReLU
from sae_ext.architectures.slots import OneSlot, Slots
from sae_ext.architectures.topk import TopK

AnyArchitecture = Annotated[
    ReLU | TopK | BatchTopK | JumpReLU | Gated | Slots | Projection, Field(discriminator="kind")
]
"""What can be trained, told apart by `kind`."""

LAYOUTS: dict[str, type[Architecture]] = {
    a.layout: a for a in (ReLU, TopK, Thresholds, OneSlot, Projected)
}
"""What a folder may hold, by the name of the architecture in its `cfg.json`."""

__all__ = [
    "LAYOUTS",
    "AnyArchitecture",
    "Architecture",
    "BatchTopK",
    "Forward",
    "Gated",
    "JumpReLU",
    "Now",
    "OneSlot",
    "Projected",
    "Projection",
    "ReLU",
    "Slots",
    "Thresholds",
    "TopK",
    "Weights",
]
