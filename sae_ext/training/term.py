"""What a term of an objective is; those there are stand in `sae_ext.training.terms`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_ext.architectures import Forward, Now, Weights
from sae_ext.fields import require_at_least, require_finite
from sae_ext.schedules import Schedule


class Seen(NamedTuple):
    """What a term looks at."""

    forward: Forward
    """With `x_hat` after the output activation."""
    x: Tensor
    """What the encoder read [B, d_in]."""
    target: Tensor
    """What x̂ should be [B, d_out]."""
    weights: Weights
    now: Now


class Term:
    """The base of all."""

    __slots__ = ()

    needs: ClassVar[str | None] = None
    """The name in `Forward.more` it is made of; None where every architecture will do."""
    by_row: ClassVar[bool] = True
    """Whether it is a mean over rows of what each row gives alone: what several workers need."""

    weight: float
    schedule: Schedule

    def columns(self) -> dict[str, Literal["class", "number"]]:
        """Document columns it reads."""
        return {}

    def counted(self, d_sae: int) -> dict[str, Tensor]:
        """What it keeps from step to step, as training begins."""
        return {}

    def check_classes(self, classes: Mapping[str, list[str]]) -> None:
        """Raise `UserError` where its columns hold a class in the training split that it cannot do with."""

    def value(self, seen: Seen) -> Tensor:
        """The value of a batch, before its weight."""
        raise NotImplementedError

    def _check(self) -> None:
        require_finite(self)
        require_at_least(self, 0, "weight")


def moved(t: Tensor, device: str | torch.device) -> Tensor:
    """The same on a device; a GPU takes it while Python goes on."""
    if t.is_cuda or torch.device(device).type != "cuda":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


def cross_entropy(logits: Tensor, places: Tensor) -> Tensor:
    """Mean cross-entropy over the rows whose class was seen in training; 0 where none was."""
    known = places >= 0
    if not bool(known.any()):
        return logits.sum() * 0
    return F.cross_entropy(logits[known], places[known])
