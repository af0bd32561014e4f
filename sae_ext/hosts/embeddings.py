"""Embeddings that are there already as a host: a row a document, from `.npy`, `.safetensors` or `.parquet`.

A Parquet file may hold texts, names, labels and further columns beside its list column; they are found by the
names in the corpus' configuration. For the others `corpus.source` may name a file with the documents, in the order
of the rows; without one they are numbered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae_ext import corpora
from sae_ext.corpora.config import CorpusConfig
from sae_ext.corpora.documents import Document, Rejected
from sae_ext.errors import UserError
from sae_ext.fields import STRICT, require_above
from sae_ext.hosts.base import Found, Host, HostConfig, empty, placed

ROW = "\0row"
"""Where a document keeps the number of its row."""


@dataclass(frozen=True, kw_only=True)
class Embeddings(HostConfig):
    """See the module."""

    __pydantic_config__ = STRICT
    reads_texts: ClassVar[bool] = False

    kind: Literal["embeddings"] = "embeddings"
    file: str
    """A `.npy` or `.safetensors` array [n, d_in], or a `.parquet` file with a column of lists."""
    column: str = "embedding"
    """Name of the tensor (`.safetensors`) or of the column of lists (`.parquet`)."""
    d_in: int | None = None
    """Width that lists are cut or filled up with zeros to; where absent all have to be equally long."""

    def __post_init__(self) -> None:
        require_above(self, 0, "d_in")

    def fingerprint(self) -> str:
        """Hash over the file."""
        with _existing(self.file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]

    def open(self, device: str = "cpu") -> EmbeddingsHost:
        """Map or read the file; `device` makes no difference."""
        return EmbeddingsHost(self)

    def width(self) -> int | None:
        """As the file has it."""
        return _array(self).shape[1]

    def portable(self) -> Embeddings:
        """The file by its absolute path."""
        return replace(self, file=str(Path(self.file).expanduser().resolve()))

    def described(self) -> dict[str, Any]:
        """What SAELens wants to know."""
        return {"model_name": self.file, "hook_name": self.column}

    def summary(self) -> str:
        """The file."""
        return self.file

    def documents(self, corpus: CorpusConfig) -> Iterator[Document | Rejected]:
        """A document for every row of the file."""
        return corpora.limited(_numbered(self._described(corpus)), corpus, self.file)

    def documents_fingerprint(self, corpus: CorpusConfig) -> str:
        """That of the file which describes the rows, where there is one of its own."""
        return "rows" if corpus.source is None else corpora.Files(corpus.source).fingerprint()

    def _described(self, corpus: CorpusConfig) -> Iterator[Document | Rejected]:
        rows = len(_array(self))
        if corpus.source is None and not self.file.endswith(".parquet"):
            yield from (Document(str(row), "", "") for row in range(rows))
            return
        count = 0
        for each in corpora.Files(corpus.source or self.file).read(corpus, needs_text=False):
            count += 1
            yield each
        if count != rows:
            raise UserError(
                f"{corpus.source} describes {count} rows, but {self.file} has {rows}: give a document for every "
                "row, in their order"
            )


def _numbered(found: Iterator[Document | Rejected]) -> Iterator[Document | Rejected]:
    for row, each in enumerate(found):
        if isinstance(each, Document):
            yield each._replace(columns={**each.columns, ROW: row})
        else:
            yield each


class EmbeddingsHost(Host):
    """An open file."""

    def __init__(self, config: Embeddings) -> None:
        self.config = config
        self._array = _array(config)

    def read(self, documents: Sequence[Document], dtype: torch.dtype) -> list[Found]:
        """The rows of the documents."""
        rows = np.array([d.columns[ROW] for d in documents], dtype=np.int64)
        counts = np.ones(len(rows), dtype=np.int64)
        x = self._array.rows(rows).to(dtype)
        return [Found(x, counts, placed(counts), None, None, empty(counts))]


class _Array:
    """The rows of a file, read as they are asked for."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Some rows, which follow each other closely."""
        raise NotImplementedError


class _Numpy(_Array):
    def __init__(self, path: Path) -> None:
        try:
            self._x = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"host.file: {path} is not a readable .npy file ({error})") from error
        _require_matrix(self._x.shape, self._x.dtype.kind == "f", path)
        self.shape = self._x.shape

    def rows(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(self._x[numbers])


class _Safetensors(_Array):
    def __init__(self, path: Path, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, "pt")
            names = list(self._file.keys())  # type: ignore[no-untyped-call]
            if name not in names:
                raise UserError(
                    f"host.column: {path} has no tensor {name!r}: there are {', '.join(names)}"
                )
            self._slice = self._file.get_slice(name)  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"host.file: {path} is not a readable .safetensors file ({error})"
            ) from error
        shape = tuple(self._slice.get_shape())
        _require_matrix(shape, self._slice.get_dtype() in ("F64", "F32", "F16", "BF16"), path)
        self.shape = shape

    def rows(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        first = int(numbers.min())
        part: torch.Tensor = self._slice[first : int(numbers.max()) + 1]
        return part[torch.from_numpy(numbers - first)]


class _Parquet(_Array):
    def __init__(self, path: Path, column: str, d_in: int | None) -> None:
        self._path, self._column = path, column
        try:
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
            if column not in schema.names:
                raise UserError(
                    f"host.column: {path} has no column {column!r}: there are {', '.join(schema.names)}"
                )
            kind = schema.field(column).type
            lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            if not (lists or pa.types.is_fixed_size_list(kind)):
                raise UserError(
                    f"host.column: {column!r} of {path} is {kind}, not a list of numbers"
                )
            sizes = [
                self._file.metadata.row_group(g).num_rows
                for g in range(self._file.metadata.num_row_groups)
            ]
            self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            self._group: tuple[int, list[Any]] = (-1, [])
            width = d_in or (len(self._lists(0)[0] or []) if sizes and sizes[0] else 0)
        except (OSError, pa.ArrowException) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"host.file: {path} is not a readable Parquet file ({first}): it may be cut short; make it again"
            ) from error
        self._cut = d_in is not None
        _require_matrix((int(self._starts[-1]), width), True, path)
        self.shape = (int(self._starts[-1]), width)

    def _lists(self, group: int) -> list[Any]:
        if self._group[0] != group:
            column = self._file.read_row_group(group, columns=[self._column])[self._column]
            self._group = group, column.to_pylist()
        return self._group[1]

    def rows(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        out = np.zeros((len(numbers), self.shape[1]), dtype=np.float32)
        for place, row in enumerate(numbers.tolist()):
            group = int(np.searchsorted(self._starts, row, side="right")) - 1
            values = self._lists(group)[row - int(self._starts[group])]
            if values is None or (len(values) != self.shape[1] and not self._cut):
                found = "nothing" if values is None else f"{len(values)} numbers"
                raise UserError(
                    f"{self._path}, row {row + 1}: {self._column!r} holds {found}, but row 1 has {self.shape[1]}: "
                    "set host.d_in to cut or fill them up"
                )
            part = values[: self.shape[1]]
            out[place, : len(part)] = part
        return torch.from_numpy(out)


def _array(config: Embeddings) -> _Array:
    path = _existing(config.file)
    match path.suffix:
        case ".npy":
            return _Numpy(path)
        case ".safetensors":
            return _Safetensors(path, config.column)
        case ".parquet":
            return _Parquet(path, config.column, config.d_in)
    raise UserError(f"host.file: {path} is none of .npy, .safetensors and .parquet: convert it")


def _existing(file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"host.file: the file {path} does not exist")
    return path


def _require_matrix(shape: tuple[int, ...], numbers: bool, path: Path) -> None:
    if len(shape) != 2 or 0 in shape or not numbers:
        raise UserError(
            f"host.file: {path} must hold rows of floating-point numbers, [n, d_in], got shape {list(shape)}"
        )
