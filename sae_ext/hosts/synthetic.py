"""Rows that are made up, with the truth known: sine waves, and planted dictionaries.

A row is a function of the seed and its number alone, so any part of the rows can be made anywhere. Documents
are numbered, a row each; the label says what a row was made of where that is one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from sae_ext import corpora
from sae_ext.corpora.config import CorpusConfig
from sae_ext.corpora.documents import Document, Rejected
from sae_ext.fields import (
    STRICT,
    require,
    require_above,
    require_at_least,
    require_finite,
)
from sae_ext.hosts.base import Found, Host, HostConfig, empty, placed
from sae_ext.hosts.embeddings import ROW

_BLOCK = 1024
"""Rows that are drawn together, so that a row costs no generator of its own."""


class _Synthetic(HostConfig):
    """What both have in common."""

    __slots__ = ()
    reads_texts: ClassVar[bool] = False

    rows: int
    d_in: int
    seed: int

    def documents(self, corpus: CorpusConfig) -> Iterator[Document | Rejected]:
        """A numbered document for every row."""
        require(
            corpus.source is None,
            f"corpus.source is {corpus.source!r}, but a host of kind {self._kind} makes its own rows: leave it "
            "out",
        )
        return corpora.limited(
            (Document(str(row), "", "", {ROW: row}) for row in range(self.rows)), corpus, self._kind
        )

    def documents_fingerprint(self, corpus: CorpusConfig) -> str:
        """Rows come from the configuration alone."""
        return "rows"

    def fingerprint(self) -> str:
        """The version of the formulas."""
        return "1"

    def open(self, device: str = "cpu") -> SyntheticHost:
        """Nothing is loaded; `device` makes no difference."""
        return SyntheticHost(self)

    def width(self) -> int | None:
        """As configured."""
        return self.d_in

    def portable(self) -> Self:
        """Itself."""
        return self

    def described(self) -> dict[str, Any]:
        """What SAELens wants to know."""
        return {"model_name": self._kind, "hook_name": "rows"}

    def summary(self) -> str:
        """How many rows of what."""
        return f"{self.rows:,} rows of kind {self._kind}"

    def block(self, number: int) -> npt.NDArray[np.float32]:
        """Rows number · 1024 and on, as many."""
        raise NotImplementedError

    @property
    def _kind(self) -> str:
        return str(getattr(self, "kind", ""))

    def _check(self) -> None:
        require_finite(self)
        require_above(self, 0, "rows", "d_in")
        require_at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class Sine(_Synthetic):
    """Sums of a few sine waves along the inputs: x_i = Σ_w a_w sin(2π (f_w i / d_in + φ_w)) + noise."""

    __pydantic_config__ = STRICT

    kind: Literal["sine"] = "sine"
    rows: int = 100_000
    """How many rows."""
    d_in: int = 64
    """Width of a row."""
    waves: int = 3
    """Waves in a row."""
    max_frequency: float = 16.0
    """Frequencies are uniform from 1 to this, in periods per row."""
    noise: float = 0.0
    """Standard deviation of what is added to every number."""
    seed: int = 0
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        self._check()
        require_above(self, 0, "waves")
        require_at_least(self, 0, "noise")
        require(
            self.max_frequency >= 1, f"max_frequency must be 1 or more, got {self.max_frequency}"
        )

    def block(self, number: int) -> npt.NDArray[np.float32]:
        """See `_Synthetic.block`."""
        rng = np.random.default_rng([self.seed, number])
        size = (_BLOCK, self.waves, 1)
        amplitude = rng.uniform(0.5, 1.5, size)
        frequency = rng.uniform(1, self.max_frequency, size)
        phase = rng.uniform(0, 1, size)
        places = np.arange(self.d_in) / self.d_in
        x = (amplitude * np.sin(2 * np.pi * (frequency * places + phase))).sum(axis=1)
        x += self.noise * rng.standard_normal((_BLOCK, self.d_in))
        found: npt.NDArray[np.float32] = x.astype(np.float32)
        return found


@dataclass(frozen=True, kw_only=True)
class Planted(_Synthetic):
    """Sums of a few of many fixed directions: x = z D + noise, z_j = 0.5 + |N(0, 1)| where feature j is there.

    How often features are there falls with their number by `skew`; with `correlation` features come in groups of
    `group`, a row holding either several of a group or none.
    """

    __pydantic_config__ = STRICT

    kind: Literal["planted"] = "planted"
    rows: int = 100_000
    """How many rows."""
    d_in: int = 64
    """Width of a row."""
    n_features: int = 512
    """Directions."""
    active: float = 10.0
    """Features in a row, on average."""
    skew: float = 0.0
    """Feature j is there in proportion to (j + 1)^-skew."""
    correlation: float = 0.0
    """Share of a feature's presences that come with those of its group."""
    group: int = 8
    """Features in a group."""
    noise: float = 0.0
    """Standard deviation of what is added to every number."""
    seed: int = 0
    """Seed of all that is drawn, the directions among it."""

    def __post_init__(self) -> None:
        self._check()
        require_above(self, 0, "n_features", "active", "group")
        require_at_least(self, 0, "skew", "noise")
        require(
            0 <= self.correlation <= 1, f"correlation must lie in [0, 1], got {self.correlation}"
        )
        most = float(self.frequencies().max())
        require(
            most <= 1,
            f"active is {self.active:g} of {self.n_features} features, so that with skew {self.skew:g} the most "
            f"frequent would be there {most:.2f} times a row: lower active or skew",
        )

    def frequencies(self) -> npt.NDArray[np.float64]:
        """In which share of the rows each feature is there, [n_features]."""
        shape = np.arange(1, self.n_features + 1, dtype=np.float64) ** -self.skew
        found: npt.NDArray[np.float64] = shape * (self.active / shape.sum())
        return found

    def directions(self) -> npt.NDArray[np.float32]:
        """The truth D [n_features, d_in], rows of length 1."""
        rng = np.random.default_rng([self.seed, 2**32 - 1])
        found: npt.NDArray[np.float32] = rng.standard_normal(
            (self.n_features, self.d_in), dtype=np.float32
        )
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found

    def strengths(self, number: int) -> npt.NDArray[np.float32]:
        """z of the rows of a block [1024, n_features]."""
        rng = np.random.default_rng([self.seed, number])
        there = rng.random((_BLOCK, self.n_features)) < self.frequencies()
        if self.correlation:
            there = self._together(rng, there)
        strength = 0.5 + np.abs(rng.standard_normal((_BLOCK, self.n_features)))
        return np.where(there, strength, 0).astype(np.float32)

    def block(self, number: int) -> npt.NDArray[np.float32]:
        """See `_Synthetic.block`."""
        x = self.strengths(number) @ self.directions()
        if self.noise:
            rng = np.random.default_rng([self.seed, number, 1])
            x += self.noise * rng.standard_normal(x.shape, dtype=np.float32)
        return x

    def _together(
        self, rng: np.random.Generator, alone: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Presences of which a share is decided for a whole group, each feature as often as before."""
        groups = np.arange(self.n_features) // self.group
        drawn = rng.random((_BLOCK, int(groups[-1]) + 1))[:, groups]
        with_group = drawn < self.frequencies()
        return np.where(rng.random(alone.shape) < self.correlation, with_group, alone)


class SyntheticHost(Host):
    """Makes rows as they are asked for."""

    def __init__(self, config: _Synthetic) -> None:
        self.config = config

    def read(self, documents: Sequence[Document], dtype: torch.dtype) -> list[Found]:
        """The rows of the documents."""
        rows = np.array([d.columns[ROW] for d in documents], dtype=np.int64)
        x = np.empty((len(rows), self.config.d_in), dtype=np.float32)
        of_block = rows // _BLOCK
        for number in np.unique(of_block).tolist():
            here = of_block == number
            x[here] = self.config.block(number)[rows[here] % _BLOCK]
        counts = np.ones(len(rows), dtype=np.int64)
        found = torch.from_numpy(x).to(dtype)
        return [Found(found, counts, placed(counts), None, None, empty(counts))]
