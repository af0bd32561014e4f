"""The ledger of searches: every trial is a row, written before it runs and again when it ends.

A transactional database beside the store (SQLite, one writer), so that a killed search goes on:
finished trials are never repeated, trials asked for but not ended are run first, and the optimizer
is rebuilt from the rows.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

_METADATA = sa.MetaData()
_TRIALS = sa.Table(
    "trials",
    _METADATA,
    sa.Column("search", sa.String, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("lr", sa.Float, nullable=False),
    sa.Column("l1", sa.Float, nullable=False),
    sa.Column("sae", sa.String),
    sa.Column("fvu", sa.Float),
    sa.Column("l0", sa.Float),
    sa.Column("objective", sa.Float),
    sa.Column("error", sa.String),
    sa.Column("host", sa.String),
    sa.Column("asked", sa.Float),
    sa.Column("ended", sa.Float),
)

ASKED, DONE, FAILED = "asked", "done", "failed"


class Trial(NamedTuple):
    """One row."""

    trial: int
    state: str
    lr: float
    l1: float
    sae: str | None
    fvu: float | None
    l0: float | None
    objective: float | None
    error: str | None


class Ledger:
    """The trials of one search (named by the key of its artefact)."""

    def __init__(self, state_dir: Path, search: str) -> None:
        self.search = search
        self.engine = sa.create_engine(f"sqlite:///{state_dir / 'ledger.sqlite'}")
        with self.engine.begin() as connection:
            connection.execute(sa.text("PRAGMA journal_mode=WAL"))
            connection.execute(sa.text("PRAGMA synchronous=FULL"))
        _METADATA.create_all(self.engine)

    def rows(self) -> list[Trial]:
        """All trials, by number."""
        columns = [_TRIALS.c[name] for name in Trial._fields]
        query = sa.select(*columns).where(_TRIALS.c.search == self.search).order_by(_TRIALS.c.trial)
        with self.engine.connect() as connection:
            return [Trial(*row) for row in connection.execute(query)]

    def ask(self, points: Sequence[tuple[float, float]]) -> None:
        """Write down new trials (lr, λ) in one transaction, before any of them starts."""
        first = len(self.rows())
        rows = [
            {
                "search": self.search,
                "trial": first + index,
                "state": ASKED,
                "lr": lr,
                "l1": l1,
                "host": f"{socket.gethostname()}:{os.getpid()}",
                "asked": time.time(),
            }
            for index, (lr, l1) in enumerate(points)
        ]
        with self.engine.begin() as connection:
            connection.execute(_TRIALS.insert(), rows)

    def done(self, trial: int, *, sae: str, fvu: float, l0: float, objective: float) -> None:
        """A trial ended well."""
        self._end(trial, state=DONE, sae=sae, fvu=fvu, l0=l0, objective=objective, error=None)

    def failed(self, trial: int, error: str) -> None:
        """A trial ended with an error."""
        self._end(trial, state=FAILED, error=error)

    def close(self) -> None:
        """Let go of the database."""
        self.engine.dispose()

    def _end(self, trial: int, **values: str | float | None) -> None:
        here = (_TRIALS.c.search == self.search) & (_TRIALS.c.trial == trial)
        with self.engine.begin() as connection:
            connection.execute(_TRIALS.update().where(here).values(ended=time.time(), **values))
