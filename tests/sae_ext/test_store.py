from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae_ext.errors import CorruptArtefact, UserError
from sae_ext.store import KINDS, MANIFEST, STAGE_VERSIONS, Store, stage_key

CONFIG = {"train": {"lr": 1e-3, "steps": 5}, "sae": {"d_sae": 8, "clip": None}}
INPUTS = {"activations": "0123", "sae": "4567"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store on another file system, with a cache of its own here."""
    monkeypatch.setenv("SPARSEMILL_CACHE", str(tmp_path / "cache"))
    return Store.open(f"memory://{uuid.uuid4().hex}", writable=True)


def committed(store: Store, key: str = "k1", kind: str = "saes", **files: bytes) -> str:
    facts = {
        name: store.put(kind, key, name, data) for name, data in (files or {"a": b"one"}).items()
    }
    store.commit(kind, key, config=CONFIG, inputs=INPUTS, files=facts)
    return key


def names(store: Store, kind: str, key: str) -> list[str]:
    return sorted(p.name for p in Path(store.path(kind, key)).rglob("*"))


@contextmanager
def no_file_larger_than(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to let this process write more than so much into one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- keys ----------------------------------------------------------------------------------------


def test_a_key_is_sixteen_hex_digits_and_the_same_every_time():
    key = stage_key("saes", CONFIG, INPUTS)
    assert re.fullmatch("[0-9a-f]{16}", key)
    assert key == stage_key("saes", CONFIG, INPUTS)


@pytest.mark.parametrize(
    ("kind", "config", "inputs"),
    [
        ("features", CONFIG, INPUTS),
        ("saes", {**CONFIG, "train": {"lr": 2e-3, "steps": 5}}, INPUTS),
        ("saes", {**CONFIG, "extra": 1}, INPUTS),
        ("saes", CONFIG, {**INPUTS, "sae": "4568"}),
        ("saes", CONFIG, {"activations": "4567", "sae": "0123"}),
    ],
    ids=["kind", "nested value", "new field", "input", "inputs exchanged"],
)
def test_a_key_depends_on_every_part(kind, config, inputs):
    assert stage_key(kind, config, inputs) != stage_key("saes", CONFIG, INPUTS)


def test_a_key_depends_on_the_version_of_the_stage(monkeypatch):
    before = stage_key("saes", CONFIG, INPUTS)
    monkeypatch.setitem(STAGE_VERSIONS, "saes", STAGE_VERSIONS["saes"] + 1)
    assert stage_key("saes", CONFIG, INPUTS) != before


def test_a_key_does_not_depend_on_the_order_of_fields():
    turned = {
        "sae": {"clip": None, "d_sae": 8},
        "train": dict(reversed(CONFIG["train"].items())),
    }
    inputs = dict(reversed(INPUTS.items()))
    assert stage_key("saes", turned, inputs) == stage_key("saes", CONFIG, INPUTS)


def test_a_number_that_json_cannot_hold_gives_no_key():
    with pytest.raises(ValueError, match="JSON"):
        stage_key("saes", {"lr": float("nan")}, {})


# -- one file ------------------------------------------------------------------------------------


def test_a_put_file_is_read_back_and_its_facts_are_told(store):
    facts = store.put("saes", "k", "sub/a.bin", b"abc")
    assert facts == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert store.read("saes", "k", "sub/a.bin") == b"abc"
    assert store.facts("saes", "k", "sub/a.bin") == facts
    assert store.has_file("saes", "k", "sub/a.bin")
    assert names(store, "saes", "k") == ["a.bin", "sub"]


def test_a_reader_sees_the_old_file_or_the_new_one_and_nothing_between(store):
    contents = {letter * (4 << 20) for letter in (b"a", b"b")}
    store.put("saes", "k", "x", min(contents))
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(store.read("saes", "k", "x"))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(3):
        for content in contents:
            store.put("saes", "k", "x", content)
    done.set()
    reader.join()
    assert seen
    assert seen <= contents


def test_a_write_that_fails_half_way_is_a_user_error_and_leaves_nothing(store):
    with no_file_larger_than(1 << 20), pytest.raises(UserError, match="cannot be written"):
        store.put("saes", "k", "big.bin", bytes(2 << 20))
    assert names(store, "saes", "k") == []


def test_a_write_that_fails_half_way_leaves_the_file_that_was_there(store):
    store.put("saes", "k", "a", b"whole")
    with no_file_larger_than(1 << 20), pytest.raises(UserError):
        store.put("saes", "k", "a", bytes(2 << 20))
    assert store.read("saes", "k", "a") == b"whole"
    assert names(store, "saes", "k") == ["a"]


def test_a_killed_writer_leaves_no_file_under_the_name(store):
    code = (
        "import os, signal, sys\n"
        "from sae_ext.store import Store\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(sys.argv[1]).put('saes', 'k', 'a', bytes(100))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, store.url], timeout=60)
    assert ended.returncode == -9
    assert not store.has_file("saes", "k", "a")
    (left,) = names(store, "saes", "k")
    assert left.startswith(".tmp-")
    store.sweep("saes", "k")
    assert names(store, "saes", "k") == []


def test_a_store_that_cannot_be_written_to_is_a_user_error():
    with pytest.raises(UserError, match=r"cannot be written to .*--store"):
        Store.open("/proc/sparsemill", writable=True)


def test_a_put_below_something_that_is_no_folder_is_a_user_error(store):
    store.put("saes", "k", "a", b"x")
    with pytest.raises(UserError, match="cannot be written"):
        store.put("saes", "k", "a/b", b"x")


def test_an_unknown_protocol_is_a_user_error():
    with pytest.raises(UserError, match="nosuch"):
        Store.open("nosuch://bucket/store")


def test_opening_for_reading_creates_nothing(tmp_path):
    store = Store.open(str(tmp_path / "none"))
    assert store.list("saes") == []
    assert not (tmp_path / "none").exists()


def test_a_missing_file_is_named(store):
    with pytest.raises(UserError, match=r"saes/k has no file cfg.json"):
        store.read("saes", "k", "cfg.json")


def test_a_table_comes_back_and_a_broken_one_is_corrupt(store):
    table = pa.table({"n": [1, 2, None], "s": ["a", None, "c"]})
    store.put_table("saes", "k", "t.parquet", table)
    assert store.read_table("saes", "k", "t.parquet").equals(table)
    store.put("saes", "k", "t.parquet", b"not parquet")
    with pytest.raises(CorruptArtefact, match=r"t\.parquet is not a readable table"):
        store.read_table("saes", "k", "t.parquet")


# -- an artefact ---------------------------------------------------------------------------------


def test_an_artefact_is_complete_only_once_it_is_committed(store):
    facts = store.put("saes", "k1", "a", b"one")
    assert not store.complete("saes", "k1")
    store.commit("saes", "k1", config={}, inputs={}, files={"a": facts})
    assert store.complete("saes", "k1")


def test_an_artefact_with_a_missing_file_is_not_complete(store):
    key = committed(store, a=b"one", b=b"two")
    store.remove("saes", key, "b")
    assert not store.complete("saes", key)


def test_a_file_of_another_size_is_corrupt_and_the_message_says_what_to_do(store):
    key = committed(store, a=b"one")
    Path(store.path("saes", key, "a")).write_bytes(b"on")
    with pytest.raises(CorruptArtefact, match="has 2 bytes instead of 3: delete that file"):
        store.complete("saes", key)


def test_a_flipped_byte_is_found_where_it_is_looked_for(store):
    key = committed(store, a=b"one")
    assert store.local("saes", key, "a", verify=True).read_bytes() == b"one"
    Path(store.path("saes", key, "a")).write_bytes(b"ons")
    assert store.complete("saes", key)
    with pytest.raises(CorruptArtefact, match="does not match its checksum"):
        store.local("saes", key, "a", verify=True)


def test_a_vanished_file_is_corrupt_where_it_is_verified(store):
    key = committed(store, a=b"one")
    store.remove("saes", key, "a")
    with pytest.raises(CorruptArtefact, match="is missing"):
        store.local("saes", key, "a", verify=True)


def test_a_manifest_tells_what_was_committed(store):
    facts = store.put("saes", "k", "a", b"one")
    written = store.commit(
        "saes", "k", config=CONFIG, inputs=INPUTS, files={"a": facts}, extra={"n": 3},
        timings={"training": 1.23456},
    )  # fmt: skip
    assert store.manifest("saes", "k") == written
    assert (written.config, written.inputs, written.extra) == (CONFIG, INPUTS, {"n": 3})
    assert written.files == {"a": facts}
    assert written.timings == {"training": 1.235}
    assert written.created.endswith("Z")
    assert written.machine["host"] == socket.gethostname()


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"kind": "saes"}', b'{"nonsense": 1}', b""])
def test_a_manifest_that_cannot_be_read_is_corrupt(store, content):
    store.put("saes", "k", MANIFEST, content)
    with pytest.raises(CorruptArtefact, match="is not a manifest"):
        store.manifest("saes", "k")


def test_an_artefact_that_is_not_there_is_a_user_error(store):
    with pytest.raises(UserError, match="saes/none is not in the store"):
        store.manifest("saes", "none")
    assert not store.complete("saes", "none")


def test_a_digest_is_that_of_the_bytes_and_not_of_the_time(store, tmp_path):
    committed(store, a=b"one", b=b"two")
    other = Store.open(str(tmp_path / "other"), writable=True)
    facts = {name: other.put("saes", "k2", name, data) for name, data in
             (("b", b"two"), ("a", b"one"))}  # fmt: skip
    late = other.commit("saes", "k2", config={}, inputs={}, files=facts, timings={"t": 9.0})
    late = type(late)(**{**vars(late), "created": "2030-01-01T00:00:00Z", "machine": {}})
    assert late.digest == store.manifest("saes", "k1").digest
    committed(store, key="k3", a=b"one", b=b"twO")
    assert store.manifest("saes", "k3").digest != late.digest


def test_artefacts_are_listed_newest_first(store):
    for key, created in (("k1", "2025-01-02"), ("k2", "2025-03-01"), ("k3", "2024-12-31")):
        committed(store, key)
        path = Path(store.path("saes", key, MANIFEST))
        path.write_text(re.sub(r'"created": "[^"]*"', f'"created": "{created}"', path.read_text()))
    store.put("saes", "unfinished", "a", b"x")
    assert store.list("saes") == ["k2", "k1", "k3"]
    assert store.list("features") == []


def test_a_prefix_finds_the_one_artefact_it_fits(store):
    committed(store, "abc1")
    committed(store, "abd2", kind="features")
    assert store.find("abc") == ("saes", "abc1")
    assert store.find("abd") == ("features", "abd2")
    assert store.find("ab", kinds=("features",)) == ("features", "abd2")


def test_a_prefix_that_fits_none_or_several_is_a_user_error(store):
    committed(store, "abc1")
    committed(store, "abd2", kind="features")
    with pytest.raises(UserError, match="'zz' matches nothing"):
        store.find("zz")
    with pytest.raises(UserError, match="saes/abc1 and features/abd2"):
        store.find("ab")


def test_a_sweep_takes_what_the_dead_left_and_nothing_else(store):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.put("saes", "k", "parts/a", b"x")
    folder = Path(store.path("saes", "k"))
    here = socket.gethostname()
    files = {
        "dead": folder / f".tmp-{here}-{ended.pid}-0a1b2c3d-a",
        "dead below": folder / "parts" / f".tmp-{here}-{ended.pid}-0a1b2c3d-b.parquet",
        "alive": folder / f".tmp-{here}-{os.getpid()}-0a1b2c3d-a",
        "elsewhere": folder / f".tmp-another.machine-{ended.pid}-0a1b2c3d-a",
    }
    for path in files.values():
        path.write_bytes(b"partial")
    store.sweep("saes", "k")
    left = {name for name, path in files.items() if path.exists()}
    assert left == {"alive", "elsewhere"}
    assert store.read("saes", "k", "parts/a") == b"x"


def test_sweeping_an_artefact_that_was_never_begun_does_nothing(store):
    store.sweep("saes", "never")
    assert not Path(store.path("saes", "never")).exists()


def test_the_state_folder_lies_in_a_local_store_and_is_no_artefact(store):
    folder = store.state_dir()
    assert folder == Path(store.root) / ".state"
    assert folder.is_dir()
    assert all(store.list(kind) == [] for kind in KINDS)


# -- another file system -------------------------------------------------------------------------


def test_a_store_elsewhere_keeps_the_same_contract(remote):
    table = pa.table({"n": [1, 2]})
    facts = {"a": remote.put("saes", "k1", "a", b"one"),
             "t.parquet": remote.put_table("saes", "k1", "t.parquet", table)}  # fmt: skip
    assert not remote.complete("saes", "k1")
    remote.commit("saes", "k1", config=CONFIG, inputs=INPUTS, files=facts)
    assert remote.complete("saes", "k1")
    assert remote.list("saes") == ["k1"]
    assert remote.find("k") == ("saes", "k1")
    assert remote.read("saes", "k1", "a") == b"one"
    assert remote.read_table("saes", "k1", "t.parquet").equals(table)
    remote.remove("saes", "k1", "a")
    assert not remote.complete("saes", "k1")


def test_a_file_from_elsewhere_is_fetched_once_and_then_read_from_the_cache(remote, tmp_path):
    key = committed(remote, a=b"one")
    path = remote.local("saes", key, "a")
    assert path.read_bytes() == b"one"
    assert path.is_relative_to(tmp_path / "cache")
    remote.fs.rm_file(remote.path("saes", key, "a"))
    assert remote.local("saes", key, "a") == path
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_a_file_from_elsewhere_that_came_damaged_is_corrupt_and_not_kept(remote, tmp_path):
    key = committed(remote, a=b"one")
    remote.fs.pipe_file(remote.path("saes", key, "a"), b"onE")
    with pytest.raises(CorruptArtefact, match="does not match its checksum"):
        remote.local("saes", key, "a")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    remote.fs.pipe_file(remote.path("saes", key, "a"), b"one")
    assert remote.local("saes", key, "a").read_bytes() == b"one"


def test_a_cached_file_that_went_bad_is_found_when_it_is_verified(remote):
    key = committed(remote, a=b"one")
    remote.local("saes", key, "a").write_bytes(b"onE")
    assert remote.local("saes", key, "a", verify=True).read_bytes() == b"one"


def cached(tmp_path: Path) -> dict[str, int]:
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    return {p.name: p.stat().st_size for p in files}


def test_what_was_used_longest_ago_makes_room_in_the_cache(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMILL_CACHE_GB", "2.5e-6")
    committed(remote, **{name: name.encode() * 1000 for name in "abcd"})
    for name in "ab":
        remote.local("saes", "k1", name)
        time.sleep(0.02)
    remote.local("saes", "k1", "a")
    time.sleep(0.02)
    mapped = remote.local("saes", "k1", "b").open("rb")
    time.sleep(0.02)
    remote.local("saes", "k1", "a")
    time.sleep(0.02)
    remote.local("saes", "k1", "c")
    assert cached(tmp_path) == {"a": 1000, "c": 1000}
    assert mapped.read() == b"b" * 1000
    mapped.close()
    assert remote.local("saes", "k1", "b").read_bytes() == b"b" * 1000
    assert cached(tmp_path) == {"b": 1000, "c": 1000}


def test_a_file_larger_than_the_cache_is_kept_while_it_is_the_newest(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMILL_CACHE_GB", "0")
    committed(remote, a=b"a" * 10, b=b"b" * 10)
    assert remote.local("saes", "k1", "a").read_bytes() == b"a" * 10
    assert remote.local("saes", "k1", "b").read_bytes() == b"b" * 10
    assert cached(tmp_path) == {"b": 10}


@pytest.mark.parametrize("size", ["much", "-1", "nan"])
def test_a_size_of_the_cache_that_is_none_is_refused(remote, monkeypatch, size):
    monkeypatch.setenv("SPARSEMILL_CACHE_GB", size)
    committed(remote)
    with pytest.raises(UserError, match="SPARSEMILL_CACHE_GB must be a number of gigabytes"):
        remote.local("saes", "k1", "a")


def test_a_file_may_be_put_in_parts(store, remote):
    parts = [memoryview(b"one"), memoryview(b""), memoryview(np.arange(3, dtype=np.uint8).data)]
    for each in (store, remote):
        facts = each.put("saes", "k1", "a", parts)
        assert each.read("saes", "k1", "a") == b"one\x00\x01\x02"
        assert facts == each.put("saes", "k1", "b", b"one\x00\x01\x02")


def test_a_file_that_is_missing_elsewhere_is_corrupt(remote):
    key = committed(remote, a=b"one")
    remote.remove("saes", key, "a")
    with pytest.raises(CorruptArtefact, match="is missing"):
        remote.local("saes", key, "a")


def test_two_stores_elsewhere_do_not_share_their_cache(remote):
    other = Store.open(f"memory://{uuid.uuid4().hex}", writable=True)
    committed(remote, a=b"one")
    committed(other, a=b"two")
    assert remote.local("saes", "k1", "a").read_bytes() == b"one"
    assert other.local("saes", "k1", "a").read_bytes() == b"two"
    assert remote.state_dir() != other.state_dir()
