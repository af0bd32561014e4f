"""Looking after a store: whether its files are what they were, and what may go.

An artefact is needed while something that is kept was made from it; campaigns are kept, and so is whatever is
named. The rest goes only where that is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sae_ext.errors import CorruptArtefact
from sae_ext.store import KINDS, MANIFEST, Store

_ROOTS = ("campaigns",)


class Checked(NamedTuple):
    """A file that has been read and hashed."""

    kind: str
    key: str
    name: str
    bytes: int
    wrong: str | None
    """What is wrong with it; None where it is what it was."""


class Idle(NamedTuple):
    """Something that nothing refers to."""

    kind: str
    key: str
    names: list[str]
    """Its files, or those of them that no manifest lists."""
    bytes: int
    what: str
    """Why it may go, in words."""


def verify(store: Store, which: Sequence[tuple[str, str]]) -> Iterator[Checked]:
    """Read and hash every file of some artefacts.

    Yields:
        Each file as it is done; a manifest that cannot be read counts as one.
    """
    for kind, key in which:
        try:
            files = store.manifest(kind, key).files
        except CorruptArtefact as error:
            yield Checked(kind, key, MANIFEST, 0, str(error))
            continue
        for name, facts in files.items():
            yield Checked(kind, key, name, facts["bytes"], store.wrong(kind, key, name))


def idle(store: Store, keep: Sequence[tuple[str, str]], hours: float) -> list[Idle]:
    """What nothing refers to: artefacts, work that was begun and never ended, files no manifest lists.

    Args:
        keep: artefacts that are kept with all they were made from, beside the campaigns.
        hours: what was touched since then is left alone: someone may be at work on it.
    """
    manifests = {
        (kind, key): store.manifest(kind, key) for kind in KINDS for key in store.list(kind)
    }
    needed: set[tuple[str, str]] = set()
    waiting = [*keep, *(each for each in manifests if each[0] in _ROOTS)]
    while waiting:
        each = waiting.pop()
        if each in needed or each not in manifests:
            continue
        needed.add(each)
        waiting += [(kind, key) for kind, key in manifests[each].inputs.items() if kind in KINDS]
    found = []
    before = time.time() - 3600 * hours
    for kind in KINDS:
        for key, files in store.folders(kind).items():
            if max((f.changed for f in files.values()), default=0.0) > before:
                continue
            manifest = manifests.get((kind, key))
            if manifest is None:
                left, what = list(files), "begun and never ended"
            elif (kind, key) not in needed:
                left, what = list(files), "nothing was made from it"
            else:
                listed = {*manifest.files, MANIFEST}
                left = [name for name in files if name not in listed]
                what = "files that no manifest lists"
            if left:
                size = sum(files[name].bytes for name in left)
                found.append(Idle(kind, key, sorted(left), size, what))
    return found


def remove(store: Store, which: Idle) -> None:
    """Remove it, the manifest first: what is cut short here is not taken for whole."""
    for name in sorted(which.names, key=lambda name: name != MANIFEST):
        store.remove(which.kind, which.key, name)
    store.prune(which.kind, which.key)
