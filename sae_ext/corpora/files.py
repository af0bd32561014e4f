"""Documents in files, in a folder or anywhere fsspec reads: `.txt`, `.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet`.

Files are read one after the other, in the order of their names, and never whole (but for `.json`, which is one
value). What gives no document is told by file and row and left out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ext.corpora.config import CorpusConfig
from sae_ext.corpora.documents import (
    EMPTY,
    ENCODING,
    MALFORMED,
    Document,
    Rejected,
    Value,
)
from sae_ext.errors import UserError

_CHUNK = 1 << 20
_ROWS_AT_ONCE = 1024
csv.field_size_limit(1 << 30)  # a text may be long


Reader = Callable[[Any, str, CorpusConfig, bool], Iterator["Place"]]
"""Reads a file of a file system; the last argument is whether documents need a text."""


class Place(NamedTuple):
    """A row of a file: what it holds, and where it stands for messages."""

    where: str
    content: Mapping[str, Any] | Rejected


class Files:
    """The files that a source names."""

    def __init__(self, source: str) -> None:
        """Find them.

        Raises:
            UserError: there are none, or one has a suffix nobody reads.
        """
        self.source = source
        try:
            self.fs, path = fsspec.url_to_fs(source)
            if self.fs.isdir(path):
                self.root = str(path).rstrip("/")
                found = [p for p in self.fs.find(path) if _suffix(p) in READERS]
            else:
                self.root = str(path).rpartition("/")[0]
                found = list(self.fs.glob(path)) if _is_pattern(source) else [path]
                found = [p for p in found if self.fs.isfile(p)]
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"corpus.source {source!r} cannot be looked at ({error})") from error
        self.paths = sorted(map(str, found))
        if not self.paths:
            kinds = ", ".join(READERS)
            raise UserError(
                f"corpus.source: there is no file {source}: name one, a folder or a pattern of {kinds}"
            )
        for path in self.paths:
            if _suffix(path) not in READERS:
                raise UserError(
                    f"corpus.source: {path} is none of {', '.join(READERS)}: convert it, or name others"
                )

    def fingerprint(self) -> str:
        """Hash over names and contents."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(self._short(path).encode())
            with self.fs.open(path, "rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()[:16]

    def read(
        self, config: CorpusConfig, *, needs_text: bool = True
    ) -> Iterator[Document | Rejected]:
        """All documents, in order.

        Args:
            needs_text: reject those without one.

        Raises:
            UserError: a file cannot be read at all, or has no such field or column.
        """
        number = 0  # of all places, which names documents that have no name
        for path in self.paths:
            for place in READERS[_suffix(path)](self.fs, path, config, needs_text):
                if isinstance(place.content, Rejected):
                    yield place.content
                else:
                    name = self._short(path) if place.content.get(_FILE) else str(number)
                    yield document_of(place.content, place.where, name, config, needs_text)
                number += 1

    def _short(self, path: str) -> str:
        return path.removeprefix(self.root).lstrip("/")


_FILE = "\0file"  # marks a document that is a whole file, and is named after it


def document_of(
    row: Mapping[str, Any], where: str, name: str, config: CorpusConfig, needs_text: bool = True
) -> Document | Rejected:
    """The document of a row.

    Args:
        name: its name, where the row gives none.
    """
    text = row.get(config.text)
    if text is None and not needs_text:
        text = ""
    if text is None and config.text not in row:
        return Rejected(where, MALFORMED, f"there is no {config.text!r}")
    if text is not None and not isinstance(text, str):
        return Rejected(where, MALFORMED, f"{config.text!r} is a {type(text).__name__}, not a text")
    if text is None or (needs_text and not text.strip()):
        return Rejected(where, EMPTY, f"{config.text!r} is empty")
    given, label = row.get(config.id), row.get(config.label)
    columns: dict[str, Value] = {}
    for column in config.columns:
        value = row.get(column)
        if value is not None and not isinstance(value, str | int | float | bool):
            return Rejected(where, MALFORMED, f"{column!r} is neither a text nor a number")
        columns[column] = value
    for column, value in {
        config.text: text,
        config.id: given,
        config.label: label,
        **columns,
    }.items():
        try:
            str(value).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can write
            return Rejected(where, ENCODING, f"{column!r} holds what is no Unicode text")
    doc_id = name if given is None or given == "" else str(given)
    return Document(doc_id, text, "" if label is None else str(label), columns)


# -- one file ------------------------------------------------------------------------------------


def _texts(fs: Any, path: str, config: CorpusConfig, _: bool) -> Iterator[Place]:
    if config.txt == "file":
        with fs.open(path, "rb") as stream:
            yield Place(path, _decoded(stream.read(), path, config, whole=True))
        return
    with fs.open(path, "rb") as stream:
        begun, held = 1, b""
        for number, line in enumerate(stream, start=1):
            if config.txt == "line":
                if line.strip():
                    yield _text_place(line, path, number, config)
            elif line.strip():
                begun, held = (begun if held else number), held + line
            elif held:
                yield _text_place(held, path, begun, config)
                held = b""
        if held:
            yield _text_place(held, path, begun, config)


def _text_place(content: bytes, path: str, number: int, config: CorpusConfig) -> Place:
    where = f"{path}, line {number}"
    return Place(where, _decoded(content, where, config))


def _decoded(
    content: bytes, where: str, config: CorpusConfig, *, whole: bool = False
) -> Mapping[str, Any] | Rejected:
    try:
        text = content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        return Rejected(where, ENCODING, f"byte {error.start} is not UTF-8")
    return {config.text: text, **({_FILE: True} if whole else {})}


def _json_lines(fs: Any, path: str, config: CorpusConfig, _: bool) -> Iterator[Place]:
    with fs.open(path, "rb") as lines:  # decoded line by line, to name the one that fails
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield Place(where, _object(line, where))


def _object(content: bytes, where: str) -> Mapping[str, Any] | Rejected:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Rejected(where, ENCODING, f"byte {error.start} is not UTF-8")
    except ValueError as error:
        return Rejected(where, MALFORMED, f"this is not JSON ({error})")
    return row if isinstance(row, dict) else Rejected(where, MALFORMED, "this is not an object")


def _json(fs: Any, path: str, config: CorpusConfig, _: bool) -> Iterator[Place]:
    with fs.open(path, "rb") as stream:
        try:
            rows = json.loads(stream.read().decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON in UTF-8 ({error})") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path} must hold a list of objects, got a {type(rows).__name__}: write it as one, or one object "
            "a line in a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        fine = isinstance(row, dict)
        yield Place(where, row if fine else Rejected(where, MALFORMED, "this is not an object"))


def _separated(separator: str) -> Reader:
    def read(fs: Any, path: str, config: CorpusConfig, needs_text: bool) -> Iterator[Place]:
        with fs.open(path, "rb") as raw:
            # What is not UTF-8 comes through as half a surrogate pair, and its row is rejected.
            stream = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
            rows = csv.DictReader(stream, delimiter=separator)
            _require_columns(rows.fieldnames or [], path, config, needs_text)
            try:
                for number, row in enumerate(rows, start=1):
                    where = f"{path}, row {number}"
                    if None in row:
                        more = Rejected(
                            where, MALFORMED, "it has more values than there are columns"
                        )
                        yield Place(where, more)
                    else:
                        yield Place(where, {name: _number(value) if name in config.columns else value
                                            for name, value in row.items()})  # fmt: skip
            except csv.Error as error:
                raise UserError(f"{path}, line {rows.line_num}: {error}") from error

    return read


def _number(value: str | None) -> Value:
    """A value of a column that may hold numbers."""
    if value is None or value == "":
        return None
    try:
        return float(value)
    except ValueError:
        return value


def _parquet(fs: Any, path: str, config: CorpusConfig, needs_text: bool) -> Iterator[Place]:
    wanted = [config.text, config.id, config.label, *config.columns]
    try:
        with fs.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            _require_columns(names, path, config, needs_text)
            number = 0
            columns = [name for name in dict.fromkeys(wanted) if name in names]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(f"{path}, row {number}", {k: _plain(v) for k, v in row.items()})
    except (pa.ArrowException, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a readable Parquet file ({first}): it may be cut short; make it again"
        ) from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _require_columns(names: Any, path: str, config: CorpusConfig, needs_text: bool) -> None:
    for name in (*((config.text,) if needs_text else ()), *config.columns):
        if name not in names:
            field = "text" if name == config.text else "columns"
            raise UserError(
                f"{path} has no column {name!r}: set corpus.{field}; there are {', '.join(names)}"
            )


READERS: dict[str, Reader] = {
    ".txt": _texts,
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
"""By the end of a file's name."""


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def _is_pattern(source: str) -> bool:
    return any(letter in source for letter in "*?[")
