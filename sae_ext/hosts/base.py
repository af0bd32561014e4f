"""What a host is: whatever gives rows of activations for documents.

A host has a configuration, which names it in a recipe and opens it, and may be told apart by `kind`. Opened,
it reads documents: for each of its hooks it gives their rows, one document after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_ext import corpora
from sae_ext.corpora.config import CorpusConfig
from sae_ext.corpora.documents import NO_ROWS, NOT_FINITE, Document, Rejected

Dtype = Literal["float32", "bfloat16", "float16"]


class Found(NamedTuple):
    """The rows of some documents at one hook."""

    x: Tensor
    """[n, d_in]"""
    counts: npt.NDArray[np.int64]
    """Rows of each document, which follow each other."""
    position: npt.NDArray[np.int32]
    """Of each row, its place among the rows of its document [n]."""
    token_id: npt.NDArray[np.int32] | None
    """[n]; None where rows are no tokens."""
    token_text: Sequence[str] | None
    """[n]; None where rows are no tokens."""
    rejected: dict[int, str]
    """Documents without rows, and why."""

    def without(self, documents: dict[int, str]) -> Found:
        """The same without the rows of some documents."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        keep = ~np.isin(owner, list(documents))
        counts = self.counts.copy()
        counts[list(documents)] = 0
        texts = self.token_text
        return Found(
            self.x[torch.from_numpy(keep)], counts, self.position[keep],
            None if self.token_id is None else self.token_id[keep],
            None if texts is None else [t for t, k in zip(texts, keep.tolist(), strict=True) if k],
            {**self.rejected, **documents},
        )  # fmt: skip

    def not_finite(self) -> dict[int, str]:
        """Documents of which a row holds a NaN or an infinity."""
        bad = ~self.x.isfinite().all(dim=1).numpy()
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        found = np.bincount(owner[bad], minlength=len(self.counts))
        return {
            int(d): f"{NOT_FINITE}: {found[d]} of {self.counts[d]} rows"
            for d in np.flatnonzero(found)
        }


class Host(ABC):
    """One that is open. Reading is a function of the documents: of nothing read before."""

    @abstractmethod
    def read(self, documents: Sequence[Document], dtype: torch.dtype) -> list[Found]:
        """Rows of the documents at each of the configuration's `hooks`, in that order."""


class HostConfig:
    """The base of all configurations."""

    __slots__ = ()

    reads_texts: ClassVar[bool] = True
    """Whether it reads the texts of documents; else it has rows of its own, and documents may be without text."""

    def documents(self, corpus: CorpusConfig) -> Iterator[Document | Rejected]:
        """What it reads, in a fixed order.

        Raises:
            UserError: the corpus cannot be read.
        """
        return corpora.read(corpus)

    def documents_fingerprint(self, corpus: CorpusConfig) -> str:
        """Hash over what the documents are read from.

        Raises:
            UserError: it is not there.
        """
        return corpora.fingerprint(corpus)

    def fingerprint(self) -> str:
        """Hash over what it computes with, so that other weights mean another artefact.

        Raises:
            UserError: it is not there.
        """
        raise NotImplementedError

    def open(self, device: str = "cpu") -> Host:
        """Load it.

        Raises:
            UserError: it is not there, or not what it should be.
        """
        raise NotImplementedError

    def width(self) -> int | None:
        """d_in, where that is known without opening it.

        Raises:
            UserError: it is not there.
        """
        raise NotImplementedError

    def portable(self) -> Self:
        """The same under a name that means the same in another working directory."""
        raise NotImplementedError

    def hooks(self) -> tuple[Self, ...]:
        """A configuration for each place that is read in one pass, this one's own first."""
        return (self,)

    def described(self) -> dict[str, Any]:
        """What SAELens wants to know: `model_name`, `hook_name`, `context_size` and the like."""
        raise NotImplementedError

    def summary(self) -> str:
        """The host in a few words."""
        raise NotImplementedError


def empty(counts: npt.NDArray[np.int64]) -> dict[int, str]:
    """Documents that give no row."""
    return {int(d): NO_ROWS for d in np.flatnonzero(counts == 0)}


def placed(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Of each row, its place among the rows of its document."""
    return np.concatenate([np.arange(c, dtype=np.int32) for c in counts] or [np.zeros(0, np.int32)])


def length_buckets(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group sequences of like length so that a padded batch holds at most `batch_tokens` tokens.

    Returns:
        Lists of indices, longest first; a sequence longer than `batch_tokens` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))
    batches: list[list[int]] = []
    for d in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(d)
        else:
            batches.append([d])
    return batches


__all__ = [
    "Dtype",
    "Found",
    "Host",
    "HostConfig",
    "empty",
    "length_buckets",
    "placed",
]
