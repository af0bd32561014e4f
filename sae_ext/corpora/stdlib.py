"""The built-in corpus: docstrings of the running Python's standard library, labelled by top-level module."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sae_ext.corpora.documents import Document
from sae_ext.errors import UserError

STDLIB = "stdlib-docstrings"
_TESTS = {"test", "tests"}
# Applications and data that ship with the library, and packages that only some versions still have.
_NOT_LIBRARY = {"idlelib", "turtledemo", "pydoc_data", "lib2to3", "distutils", "test"}


def files() -> list[Path]:
    """Source files of the running interpreter's public standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _NOT_LIBRARY:
            continue
        single, package = root / f"{name}.py", root / name
        if single.is_file():
            found.append(single)
        elif package.is_dir():
            found += [
                path
                for path in sorted(package.rglob("*.py"))
                if not _TESTS & set(path.relative_to(root).parts)
            ]
    if not found:
        raise UserError(
            f"{STDLIB}: no source files under {root}: install the Python standard library's sources "
            "or set corpus.source to a .jsonl file"
        )
    return found


def read() -> Iterator[Document]:
    """Docstrings of modules, classes and functions, read from source (importing could run things)."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in files():
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
