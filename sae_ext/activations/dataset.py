"""What training reads: rows of activations by number, their splits and the columns that describe them.

`sae_ext.activations.reader.Activations` is the dataset of a stored artefact; `InMemory` is one over
arrays, for notebooks and tests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_ext.activations.order import Rows
from sae_ext.corpora import Split
from sae_ext.errors import UserError


class Batch(NamedTuple):
    """Rows and where they come from."""

    x: Tensor
    """float32 [b, d_in]; in a stream any floating-point dtype."""
    rows: npt.NDArray[np.int64]
    """Their numbers in the dataset, [b]."""


Stream = Callable[[int], Iterator[Batch]]
"""Gives the chunks of a sequence from the given number on, the same ones every time it is called.
Chunks may differ in size. The iterator is advanced in another thread; a generator is closed when
it is no longer needed."""


class Dataset(Protocol):
    """Rows numbered 0 to n - 1. `gather` may be called from several threads at once."""

    key: str
    """Equal keys mean equal content."""
    d_in: int
    stream: Stream | None = None
    """An endless stream to train on instead of the rows of the training split; see `streaming`."""

    def rows(self, split: Split) -> Rows:
        """Ascending numbers of a split's rows."""
        ...

    def gather(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """The given rows in the given order, as float32 [len(rows), d_in]."""
        ...

    def column(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A column's values for the given rows: texts as numpy strings or objects, numbers as they are.

        Raises:
            UserError: there is no such column, or it has no value for one of the rows.
        """
        ...

    def where(self, row: int) -> str:
        """Where a row lies, for messages: the file and the row in it, counted from 0."""
        ...

    def in_order(self, rows: Rows | npt.NDArray[np.int64], batch_rows: int) -> Iterator[Tensor]:
        """The given rows in batches, the last one shorter."""
        for start in range(0, len(rows), batch_rows):
            yield self.gather(rows[start : start + batch_rows])


class Percentages(NamedTuple):
    """A split of the rows at random; what is neither validation nor test is train."""

    validation: float = 10
    test: float = 10
    seed: int = 0


class InMemory(Dataset):
    """A dataset over arrays.

    Args:
        x: [n, d_in], floating point. Float32 is not copied, so leave it as it is afterwards.
        columns: per name n texts or n numbers; None, an empty text and NaN mean "no value".
        split: row numbers per split, or percentages.

    Raises:
        UserError: a shape or dtype does not fit, a number is not finite, or the split takes a row
            twice or one that is not there.
    """

    def __init__(
        self,
        x: npt.ArrayLike | Tensor,
        columns: Mapping[str, npt.ArrayLike] | None = None,
        split: Mapping[Split, npt.ArrayLike] | Percentages = Percentages(),  # noqa: B008 (a tuple)
    ) -> None:
        self._x = _finite_rows(x)
        n_rows, self.d_in = self._x.shape
        self._columns = {
            name: _checked_column(name, values, n_rows) for name, values in (columns or {}).items()
        }
        if isinstance(split, Percentages):
            self._split = _at_random(n_rows, split)
        else:
            self._split = _checked_split(n_rows, split)
        self.key = self._hash()

    def rows(self, split: Split) -> Rows:
        """Ascending numbers of a split's rows."""
        return Rows.of(self._split[split])

    def gather(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """The given rows in the given order, as float32 [len(rows), d_in]."""
        return torch.from_numpy(self._x[rows])

    def column(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A column's values for the given rows.

        Raises:
            UserError: there is no such column, or it has no value for one of the rows.
        """
        if name not in self._columns:
            raise UserError(f"there is no column {name!r}: {_choose_from(self._columns)}")
        values = self._columns[name][rows]
        missing = rows[is_missing(values)]
        if len(missing):
            raise UserError(
                f"column {name!r} has no value for row {missing[0]}{and_more(len(missing))}: "
                "give every row of the split one"
            )
        return values

    def where(self, row: int) -> str:
        """Where a row lies, for messages."""
        return f"row {row} of x"

    def _hash(self) -> str:
        columns = {name: values.tolist() for name, values in self._columns.items()}
        split = {name: len(rows) for name, rows in self._split.items()}
        digest = hashlib.sha256(
            json.dumps([self._x.shape, columns, split], sort_keys=True).encode()
        )
        for array in (self._x, *self._split.values()):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def is_missing(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which values of a column are absent: None, an empty text or NaN."""
    if values.dtype.kind in "OU":
        return np.array([v is None or v == "" for v in values.tolist()], dtype=bool)
    absent: npt.NDArray[np.bool_] = np.isnan(values)
    return absent


def and_more(count: int) -> str:
    """For messages that name the first of `count`: how many others there are."""
    return f" and {count - 1:,} more" if count > 1 else ""


def _choose_from(names: Mapping[str, object]) -> str:
    return f"choose from {', '.join(names)}" if names else "there are none"


def _finite_rows(x: npt.ArrayLike | Tensor) -> npt.NDArray[np.float32]:
    if isinstance(x, Tensor) and x.is_floating_point():
        x = x.detach().cpu().float().numpy()  # numpy has no bfloat16
    array = np.asarray(x)
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"x must have rows and columns, [n, d_in], got shape {list(array.shape)}")
    if array.dtype.kind != "f":
        raise UserError(
            f"x must hold floating-point numbers, got {array.dtype}: convert it to float32"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold shows as inf
        found: npt.NDArray[np.float32] = np.asarray(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise UserError(
            f"x is not finite as float32 in row {bad[0]}{and_more(len(bad))}: leave such rows out"
        )
    return found


def _checked_column(name: str, values: npt.ArrayLike, n_rows: int) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (n_rows,):
        raise UserError(
            f"column {name!r} must have one value per row of x, {n_rows}, "
            f"got shape {list(array.shape)}"
        )
    texts = array.dtype.kind == "O" and all(v is None or isinstance(v, str) for v in array)
    if not texts and array.dtype.kind not in "Ubiuf":
        raise UserError(f"column {name!r} must hold texts or numbers (NaN where there is none)")
    return array


def _at_random(n_rows: int, share: Percentages) -> dict[Split, npt.NDArray[np.int64]]:
    if min(share.validation, share.test) < 0 or share.validation + share.test >= 100:
        raise UserError(
            "split: the percentages must not be negative and must leave rows to train on, got "
            f"validation {share.validation} and test {share.test}"
        )
    order = np.random.default_rng(share.seed).permutation(n_rows)
    test = int(n_rows * share.test / 100)
    validation = int(n_rows * share.validation / 100)
    parts = np.split(order, [test, test + validation])
    return {"train": np.sort(parts[2]), "validation": np.sort(parts[1]), "test": np.sort(parts[0])}


def _checked_split(
    n_rows: int, split: Mapping[Split, npt.ArrayLike]
) -> dict[Split, npt.NDArray[np.int64]]:
    names: tuple[Split, ...] = get_args(Split)
    unknown = sorted(set(split) - set(names))
    if unknown:
        raise UserError(f"split: {unknown[0]!r} is not one of {', '.join(names)}")
    found: dict[Split, npt.NDArray[np.int64]] = {}
    for name in names:
        rows = np.asarray(split.get(name, []))
        if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
            raise UserError(
                f"split: {name} must be a list of row numbers, got shape {list(rows.shape)} "
                f"of {rows.dtype}"
            )
        found[name] = np.sort(rows.astype(np.int64))
    every = np.concatenate(list(found.values()))
    outside = every[(every < 0) | (every >= n_rows)]
    if len(outside):
        raise UserError(f"split: there is no row {outside[0]}, x has rows 0 to {n_rows - 1}")
    twice = np.flatnonzero(np.bincount(every, minlength=n_rows) > 1)
    if len(twice):
        raise UserError(
            f"split takes row {twice[0]}{and_more(len(twice))} twice: a row belongs to one split"
        )
    return found
