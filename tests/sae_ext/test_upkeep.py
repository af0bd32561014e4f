"""What a store finds wrong, and what it lets go."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sae_ext import upkeep
from sae_ext.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """activations/a → saes/b → campaigns/c, and saes/d of the same activations, and activations/e."""
    store = Store.open(str(tmp_path / "store"), writable=True)
    for kind, key, inputs in (
        ("activations", "a", {"corpus": "0123"}),
        ("saes", "b", {"activations": "a"}),
        ("campaigns", "c", {"activations": "a", "saes": "b"}),
        ("saes", "d", {"activations": "a"}),
        ("activations", "e", {}),
    ):
        files = {"one": store.put(kind, key, "one", key.encode() * 10)}
        files["in/two"] = store.put(kind, key, "in/two", b"two")
        store.commit(kind, key, config={}, inputs=inputs, files=files)
    return store


def found(store: Store, keep: list[tuple[str, str]] | None = None, hours: float = 0) -> set[str]:
    time.sleep(0.01)
    return {f"{i.kind}/{i.key}" for i in upkeep.idle(store, keep or [], hours)}


ALL = [("activations", "a"), ("saes", "b"), ("campaigns", "c"), ("saes", "d"), ("activations", "e")]


def test_files_that_are_what_they_were_are_fine(store):
    seen = list(upkeep.verify(store, ALL))
    assert len(seen) == 10
    assert all(c.wrong is None for c in seen)
    assert sum(c.bytes for c in seen) == 5 * 13


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: p.write_bytes(b"b" * 9 + b"c"), "does not match its checksum"),
        (lambda p: p.write_bytes(b"b" * 7), "has 7 bytes instead of 10"),
        (lambda p: p.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_is_found_and_named(store, damage, told):
    damage(Path(store.path("saes", "b", "one")))
    wrong = [c for c in upkeep.verify(store, ALL) if c.wrong is not None]
    assert [(c.kind, c.key, c.name, c.wrong) for c in wrong] == [("saes", "b", "one", told)]


def test_a_manifest_that_cannot_be_read_is_found_too(store):
    store.put("saes", "b", "manifest.json", b"{")
    wrong = [c for c in upkeep.verify(store, ALL) if c.wrong is not None]
    assert [(c.key, c.name) for c in wrong] == [("b", "manifest.json")]


def test_what_no_campaign_was_made_from_may_go(store):
    assert found(store) == {"saes/d", "activations/e"}
    assert found(store, [("saes", "d")]) == {"activations/e"}
    assert found(store, [("activations", "e"), ("saes", "d")]) == set()


def test_what_was_touched_of_late_is_left_alone(store):
    assert found(store, hours=1) == set()
    old = time.time() - 7200
    for path in Path(store.path("saes", "d")).rglob("*"):
        os.utime(path, (old, old))
    assert found(store, hours=1) == {"saes/d"}


def test_work_that_never_ended_and_files_nobody_lists_may_go(store):
    store.put("activations", "f", "shard-00000.safetensors", b"12345")
    store.put("saes", "b", "left", b"123")
    idle = {(i.key, i.what): i for i in upkeep.idle(store, [], 0)}
    assert idle["f", "begun and never ended"].bytes == 5
    assert idle["b", "files that no manifest lists"].names == ["left"]
    assert idle["b", "files that no manifest lists"].bytes == 3


def test_what_is_removed_is_gone_and_nothing_else(store):
    store.put("saes", "b", "left", b"123")
    for each in upkeep.idle(store, [], 0):
        upkeep.remove(store, each)
    assert {(k, key) for k in ("activations", "saes", "campaigns") for key in store.list(k)} == {
        ("activations", "a"), ("saes", "b"), ("campaigns", "c"),
    }  # fmt: skip
    assert found(store) == set()
    assert all(c.wrong is None for c in upkeep.verify(store, ALL[:3]))
    assert not Path(store.path("saes", "d")).exists()


def test_the_manifest_goes_first(store, monkeypatch):
    gone: list[str] = []
    monkeypatch.setattr(store, "remove", lambda kind, key, name: gone.append(name))
    (sae,) = (i for i in upkeep.idle(store, [], 0) if i.key == "d")
    upkeep.remove(store, sae)
    assert gone == ["manifest.json", "in/two", "one"]
