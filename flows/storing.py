"""Looking after a store from the command line: checking its files, clearing it out, handing activations on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sae_ext import upkeep
from sae_ext.activations.reader import Activations
from sae_ext.artefacts import activations
from sae_ext.errors import UserError
from sae_ext.interchange import cached_activations
from sae_ext.store import KINDS, Store

_log = logging.getLogger("flows")


def verify(console: Console, url: str, prefixes: Sequence[str], *, remove: bool) -> bool:
    """Read and hash the files of some artefacts, or of all; whether all are what they were.

    Args:
        remove: remove what is wrong, so that the command that made it makes it again.

    Raises:
        UserError: a prefix matches nothing, or several.
    """
    store = Store.open(url)
    which = [store.find(prefix) for prefix in prefixes]
    if not prefixes:
        which = [(kind, key) for kind in KINDS for key in store.list(kind)]
    files = bytes_ = 0
    bad = []
    total = sum(len(store.manifest(*each).files) for each in which)
    for checked in track(
        upkeep.verify(store, which), "verifying", total=total, console=console, transient=True
    ):
        files, bytes_ = files + 1, bytes_ + checked.bytes
        if checked.wrong is not None:
            bad.append(checked)
    for each in bad:
        console.print(f"[red]✗[/] {each.kind}/{each.key}/{each.name} {each.wrong}", soft_wrap=True)
        if remove:
            store.remove(each.kind, each.key, each.name)
    console.print(f"{files:,} files of {len(which)} artefacts, {bytes_ / 2**20:,.1f} MB: "
                  f"{len(bad)} wrong")  # fmt: skip
    if bad:
        again = "run the command that made them again"
        console.print(
            f"removed: {again}" if remove else f"remove them with --remove, then {again}",
            soft_wrap=True,
        )
    return not bad


def gc(console: Console, url: str, keep: Sequence[str], *, hours: float, remove: bool) -> None:
    """Say what nothing refers to, or remove it.

    Raises:
        UserError: a key to keep matches nothing, or several.
    """
    store = Store.open(url, writable=remove)
    found = upkeep.idle(store, [store.find(prefix) for prefix in keep], hours)
    for each in found:
        console.print(
            f"{each.bytes / 2**20:>10,.1f} MB  {each.kind}/{each.key}  "
            f"[dim]{len(each.names)} files, {each.what}[/]",
            soft_wrap=True,
        )
        if remove:
            upkeep.remove(store, each)
    size = sum(each.bytes for each in found) / 2**20
    if not found:
        console.print(f"nothing in {url} that may go")
    elif remove:
        console.print(f"removed {size:,.1f} MB")
    else:
        console.print(f"{size:,.1f} MB may go: remove them with --remove, or name some with --keep")


def export(console: Console, url: str, prefix: str, out: Path, context: int) -> None:
    """Write activations as SAELens caches them.

    Raises:
        UserError: no such activations, or the folder is in use.
    """
    store = Store.open(url)
    _, key = store.find(prefix, (activations.KIND,))
    contexts, left = cached_activations.write(Activations(store, key), out, context)
    rest = f" ({left} rows behind the last whole one are left out)" if left else ""
    console.print(f"{contexts:,} contexts of {context} tokens{rest} → {out}", soft_wrap=True)
    if contexts == 0:
        raise UserError(f"--context {context} is more than all rows there are: lower it")
