"""Finding λ while training: the user asks for an L0, and the penalty's weight is steered until it is met.

The logarithm of the weight is moved in proportion to the logarithm of the ratio of L0s (the integral part),
plus a multiple of that logarithm itself (the proportional part, which damps):

    w ← w · exp(pace · gain · e)        λ = w · exp(lead · ē)        e = log(L0 / target), within ±1

ē is the running mean of e. L0 answers to λ only after the weights have moved, so the pace slows down with the
learning rate: where the weights hardly move any more, λ hardly does.
"""

from __future__ import annotations

import math
from typing import Any

_GAIN = 0.012
_LEAD = 1.0
_MEMORY = 0.9
_LARGEST_ERROR = 1.0


class L0Target:
    """See the module."""

    def __init__(self, term: str, target: float, weight: float) -> None:
        self.term, self.target = term, target
        """The term whose weight is steered, and the mean L0 wanted."""
        self._log_weight = math.log(weight)
        self._error = 0.0

    @property
    def weight(self) -> float:
        """The weight as of now."""
        return math.exp(self._log_weight + _LEAD * self._error)

    def see(self, l0: float, steps: float) -> None:
        """Take in the mean L0 of some steps; `steps` counts them by how fast weights move, 0 not to learn."""
        if steps == 0:
            return
        e = math.log(max(l0, 1e-3) / self.target)
        e = max(-_LARGEST_ERROR, min(_LARGEST_ERROR, e))
        self._error = _MEMORY * self._error + (1 - _MEMORY) * e
        self._log_weight += _GAIN * steps * e

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"log_weight": self._log_weight, "error": self._error}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._log_weight, self._error = state["log_weight"], state["error"]
