"""Builds the CUDA kernels for the CPU: their own sources, over simt.h in the place of CUDA.

The result is a module like sae_ext._C whose device "cuda" works on ordinary memory. Objects are kept in
build/simt by what they are made of, so that a changed line recompiles only what includes it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KEPT = ROOT / "build" / "simt"

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
SIMT = ("-x", "c++", "-DSAEK_SIMT")


def build(sanitize: bool = False, mutation: tuple[str, str, str] | None = None) -> Path:
    """The compiled module; `mutation` is a file of csrc, a text that it has once, and another text.

    A sanitized module can be loaded where `runtimes` are preloaded.
    """
    import pybind11  # the tests of the shim itself do without

    python = [f"-isystem{p}" for p in (sysconfig.get_path("include"), pybind11.get_include())]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(ROOT / "csrc", Path(folder).resolve() / "csrc"))
        if mutation is not None:
            name, old, new = mutation
            (file,) = tree.rglob(name)
            text = file.read_text()
            if text.count(old) != 1:
                raise ValueError(f"{name} has {text.count(old)} times: {old}")
            file.write_text(text.replace(old, new))
        units = [
            (tree / "bind.cpp", ["-DSAEK_WITH_CUDA", *python]),
            (tree / "saek.cpp", ["-DSAEK_WITH_CUDA", "-fopenmp"]),
            (tree / "cpu" / "kernels.cpp", ["-DSAEK_ISA=portable", "-fno-math-errno", "-fopenmp"]),
            *((s, SIMT) for s in sorted(tree.glob("cuda/*.cu")) if s.name != "device.cu"),
            (HERE / "simt.cpp", []),
        ]
        return _link(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", units, tree, sanitize)


def library(source: Path, sanitize: bool = False) -> Path:
    """A shared library of one CUDA source and the shim."""
    units = [(source, SIMT), (HERE / "simt.cpp", [])]
    return _link(f"lib{source.stem}.so", units, ROOT / "csrc", sanitize)


def load(path: Path) -> ModuleType:
    """Import a built module, beside sae_ext._C and any others."""
    # pybind11 gives the first module of a name for any other of that name.
    spec = spec_from_file_location(f"simt.{path.parent.name}._C", path)
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seed(path: Path | str, value: int) -> None:
    """Begin the order of threads and blocks anew, for what has been built at `path`."""
    ctypes.CDLL(str(path)).saek_simt_seed(ctypes.c_uint(value))


def runtimes() -> list[str]:
    """What LD_PRELOAD must name: Python itself is linked without the sanitizer and without C++."""
    names = ("libasan.so", "libstdc++.so")
    return [_output("g++", f"-print-file-name={name}").strip() for name in names]


def _link(
    name: str, units: Iterable[tuple[Path, Iterable[str]]], tree: Path, sanitize: bool
) -> Path:
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda unit: _object(*unit, tree, sanitize), units))
    path = KEPT / _digest(name, *(o.stem for o in objects)) / name
    if not path.exists():
        _run(path, "-shared", "-fopenmp", *(SANITIZE if sanitize else ()), *map(str, objects))
    return path


def _object(source: Path, flags: Iterable[str], tree: Path, sanitize: bool) -> Path:
    # What binds to Python takes long to compile with them, and touches no array.
    watched = sanitize and source.name != "bind.cpp"
    flags = (*FLAGS, *(SANITIZE if watched else ()), *flags)
    parts = [
        part for file in _files(source, (tree, HERE)) for part in (file.name, file.read_text())
    ]
    path = KEPT / "objects" / f"{_digest(_version(), *flags, *parts)}.o"
    if not path.exists():
        # Relative names: where the copy lies must not show in an object that is kept.
        here = tree.parent
        name = source.relative_to(here) if source.is_relative_to(tree) else source
        places = (f"-I{tree.name}", f"-I{HERE}", f"-fdebug-prefix-map={here}=.", "-c", str(name))
        _run(path, *flags, *places, cwd=here)
    return path


def _files(source: Path, folders: Iterable[Path]) -> list[Path]:
    """A source and all it includes of ours."""
    files = [source]
    for file in files:  # grows on the way
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', file.read_text(), re.MULTILINE):
            places = ((folder / name).resolve() for folder in (file.parent, *folders))
            found = next((place for place in places if place.is_file()), None)
            if found is not None and found not in files:
                files.append(found)
    return files


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _run(path: Path, *arguments: str, cwd: Path = ROOT) -> None:
    """Have the compiler make a file, which is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    _output("g++", *arguments, "-o", str(partial), cwd=cwd)
    partial.replace(path)


@cache
def _version() -> str:
    return _output("g++", "--version")


def _output(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
