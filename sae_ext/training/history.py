"""What a training leaves for people to look at: history.parquet, events.parquet, TensorBoard."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from sae_ext.errors import UserError

COLUMNS = (
    "step",
    "loss",
    "mse",
    "fvu",
    "l0",
    "dead_fraction",
    "clip_rate",
    "lr",
    "l1",
    "validation_fvu",
    "validation_l0",
)
"""history.parquet, one row per `log_every` steps, means over the steps since the row before: `loss` before
row weights, `mse` in scaled units, `fvu` against the training split's variance (null where x̂ approximates
something else than x), `dead_fraction` as of that step over the last `dead_rows` rows, `lr` and `l1` (λ, or the
weight of `l0`, null where there is neither) as of that step, validation columns null except at checkpoints; then
a column for every further term of the objective, its mean value, null where it was not computed."""

EVENT_COLUMNS = pa.schema(
    [
        ("step", pa.int64()),
        ("event", pa.string()),
        ("features", pa.int64()),
        ("detail", pa.string()),
    ]
)
"""events.parquet, one row per `Event`."""


class Event(NamedTuple):
    """Something that happened in a training."""

    step: int
    """Steps done by then."""
    event: str
    """`revived`, `fired_again`, `still_silent`, `best` or `early_stop`."""
    features: int | None
    """How many features it was about; None where it is not about features."""
    detail: str
    """In words."""


Line = dict[str, float]
"""A row of the history; what is missing is NaN, or not there."""


def history_table(lines: Sequence[Line], terms: Sequence[str]) -> pa.Table:
    """history.parquet."""
    nullable = {"fvu", "l1", "validation_fvu", "validation_l0", *terms}
    columns = {}
    for name in (*COLUMNS, *terms):
        values = [line.get(name, math.nan) for line in lines]
        if name in nullable:
            columns[name] = pa.array([None if math.isnan(v) else v for v in values], pa.float64())
        else:
            columns[name] = pa.array(values, pa.float64())
    columns["step"] = pa.array([int(line["step"]) for line in lines], pa.int64())
    return pa.table(columns)


def events_table(events: Sequence[Event]) -> pa.Table:
    """events.parquet."""
    return pa.Table.from_pylist([e._asdict() for e in events], schema=EVENT_COLUMNS)


def require_tensorboard() -> None:
    """Raise `UserError` where the package `tensorboard` is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "the package tensorboard is missing: pip install tensorboard, or leave resources.tensorboard out"
        )


class TensorBoard:
    """Writes every line of a history where TensorBoard finds it. Needs the package `tensorboard`.

    Lines that an earlier writer left behind its last checkpoint, and that now come again, are shown once.
    """

    def __init__(self, folder: Path) -> None:
        require_tensorboard()
        self._folder = folder
        self._writer: Any = None

    def __call__(self, line: Mapping[str, float]) -> None:
        """Write one line; what is NaN is left out."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=int(line["step"]))
        for name, value in line.items():
            if name != "step" and not math.isnan(value):
                self._writer.add_scalar(name, value, int(line["step"]))
        self._writer.flush()
