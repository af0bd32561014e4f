"""Documents: the texts whose activations are read, with ids, labels and a fixed split by hash.

Split: a document's text is hashed to a bucket 0..99; buckets below `test_percent` are test, the
next `validation_percent` validation, the rest training. Equal texts always land in the same part,
and adding documents never moves one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_ext.config import CorpusConfig
from sae_ext.errors import UserError

Split = Literal["train", "validation", "test"]
STDLIB = "stdlib-docstrings"
_TESTS = {"test", "tests"}
# Applications and data that ship with the library, and packages that only some versions still have.
_NOT_LIBRARY = {"idlelib", "turtledemo", "pydoc_data", "lib2to3", "distutils", "test"}


class Document(NamedTuple):
    """One text. `label` groups documents (the top-level module, a class); empty when unknown."""

    doc_id: str
    text: str
    label: str


def load(config: CorpusConfig) -> list[Document]:
    """All documents of the corpus, in its fixed order.

    Raises:
        UserError: the source does not exist, a row is malformed, or no document is left.
    """
    source = _stdlib() if config.source == STDLIB else _jsonl(Path(config.source))
    documents = list(islice(source, config.limit))
    if not documents:
        raise UserError(f"corpus {config.source!r} holds no documents: give a source with texts")
    return documents


def fingerprint(config: CorpusConfig) -> str:
    """Hash over the files the corpus is read from, so that changed texts mean a new artefact."""
    digest = hashlib.sha256()
    for path in _stdlib_files() if config.source == STDLIB else [_existing(Path(config.source))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def bucket(text: str) -> int:
    """The hash bucket 0..99 of a text, which decides its split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def split_masks(
    buckets: npt.NDArray[np.integer], config: CorpusConfig
) -> dict[Split, npt.NDArray[np.bool_]]:
    """For each split, which of the documents with these buckets belong to it."""
    test = buckets < config.test_percent
    validation = ~test & (buckets < config.test_percent + config.validation_percent)
    return {"train": ~test & ~validation, "validation": validation, "test": test}


def to_table(documents: list[Document], rows: list[int]) -> pa.Table:
    """The documents as stored beside the activations.

    Columns: doc_id, text, label, bucket (0..99, see `bucket`), n_rows (activation rows of the
    document; a document's rows are contiguous and documents follow each other in table order).
    """
    return pa.table(
        {
            "doc_id": [d.doc_id for d in documents],
            "text": [d.text for d in documents],
            "label": [d.label for d in documents],
            "bucket": pa.array([bucket(d.text) for d in documents], pa.int16()),
            "n_rows": pa.array(rows, pa.int32()),
        }
    )


def _stdlib_files() -> list[Path]:
    """Source files of the running interpreter's public standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _NOT_LIBRARY:
            continue
        single, package = root / f"{name}.py", root / name
        if single.is_file():
            files.append(single)
        elif package.is_dir():
            files += [
                path
                for path in sorted(package.rglob("*.py"))
                if not _TESTS & set(path.relative_to(root).parts)
            ]
    if not files:
        raise UserError(
            f"{STDLIB}: no source files under {root}: install the Python standard library's sources "
            "or set corpus.source to a .jsonl file"
        )
    return files


def _stdlib() -> Iterator[Document]:
    """Docstrings of modules, classes and functions, read from source (importing could run things)."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _stdlib_files():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # some packages ship files that are broken on purpose
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if all(map(_is_public, parts)):
            yield from _docstrings(tree, ".".join(parts), label=parts[0], seen=set())


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name.endswith("__")


def _docstrings(node: ast.AST, name: str, label: str, seen: set[str]) -> Iterator[Document]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and name not in seen:  # a name defined twice (by platform) counts once
            seen.add(name)
            yield Document(name, text, label)
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not _is_public(child.name):
                continue
            inner = f"{name}.{child.name}"
        yield from _docstrings(child, inner, label, seen)


def _existing(path: Path) -> Path:
    if path.suffix != ".jsonl":
        raise UserError(f"corpus.source {str(path)!r} is neither {STDLIB!r} nor a .jsonl file")
    if not path.is_file():
        raise UserError(f"corpus.source: the file {path} does not exist")
    return path


def _jsonl(path: Path) -> Iterator[Document]:
    with _existing(path).open("rb") as lines:  # decoded line by line, to name the one that fails
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"]
                text.encode()  # half a surrogate pair is no text
            except (ValueError, KeyError, TypeError, AttributeError):
                text = ""
            if not text.strip():
                raise UserError(
                    f'{path}, line {number}: expected an object with a non-empty "text" in UTF-8'
                )
            doc_id, label = row.get("id"), row.get("label")
            yield Document(
                str(number - 1 if doc_id is None else doc_id),
                text,
                "" if label is None else str(label),
            )
