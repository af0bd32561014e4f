"""How a number moves over a run: the learning rate, the weight of a term, a temperature.

A schedule gives a factor between 0 and 1 for every step; what it belongs to says of what.

    warm-up      linear from `initial` to 1 over `warmup_steps`, from `start_step` on (0 before it)
    constant     1 from then on
    linear       falls to `final` over the `last` part of the run
    cosine       falls to `final` along half a cosine over the `last` part; with a `period` it comes back
                 and falls again, without end
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sae_ext.fields import STRICT, require, require_at_least, require_finite


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """See the module."""

    __pydantic_config__ = STRICT

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """What happens after the warm-up."""
    start_step: int = 0
    """The factor is 0 before this step."""
    warmup_steps: int = 0
    """Steps over which the factor rises linearly from `initial`."""
    initial: float = 0.0
    """Factor at the beginning of the warm-up."""
    final: float = 0.0
    """Factor at the end of a linear or cosine schedule (at the bottom of each period)."""
    last: float = 1.0
    """Part of the run, at its end, over which a linear or cosine schedule falls; at most what the warm-up
    leaves of it."""
    period: int | None = None
    """Steps in which a cosine schedule falls and comes back once, from the end of the warm-up on."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, 0, "start_step", "warmup_steps")
        for name in ("initial", "final"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must lie in [0, 1], got {value}")
        require(0 < self.last <= 1, f"last must lie in (0, 1], got {self.last}")
        require(
            self.period is None or self.period >= 2, f"period must be at least 2, got {self.period}"
        )
        require(
            self.period is None or (self.kind == "cosine" and self.last == 1),
            "period is for the kind 'cosine', and not together with last: leave it or them out",
        )
        require(
            self.kind != "constant" or (self.final == 0 and self.last == 1),
            "final and last are for the kinds 'linear' and 'cosine': choose one, or leave them out",
        )
        require(
            self.warmup_steps > 0 or self.initial == 0,
            f"initial is where a warm-up begins: give warmup_steps too, or leave initial ({self.initial}) out",
        )

    def check_fits(self, steps: int, name: str) -> None:
        """Raise `UserError` where a run of so many steps would end before the warm-up or the first period."""
        end = self.start_step + self.warmup_steps
        remedy = "shorten it, or train for more steps"
        require(
            end < steps,
            f"{name}: start_step + warmup_steps is {end}, but the run has {steps} steps: {remedy}",
        )
        half = 0 if self.period is None else self.period // 2
        require(
            end + half <= steps,
            f"{name}: half a period after the warm-up ends at step {end + half}, but the run has {steps} "
            f"steps: {remedy}",
        )

    def factor(self, step: int, steps: int, *, offset: int = 0) -> float:
        """The factor at a step, counted from 0, of a run of `steps`.

        Args:
            offset: 1 lets a warm-up from 0 begin one step on, for what may not be 0 in the first step.
        """
        if step < self.start_step:
            return 0.0
        warm = self.start_step + self.warmup_steps
        if step < warm:
            rise = (step - self.start_step + offset) / self.warmup_steps
            return self.initial + (1 - self.initial) * rise
        return self._after(warm, step, steps)

    def _after(self, warm: int, step: int, steps: int) -> float:
        if self.kind == "constant":
            return 1.0
        if self.period is not None:
            phase = (step - warm) % self.period / self.period
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(2 * math.pi * phase))
        begin = max(warm, steps - self.last * steps)
        left = 1.0 if step < begin else (steps - step) / (steps - begin)
        share = left if self.kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return self.final + (1 - self.final) * share
