"""A store on S3: a real client, over HTTP, against a server that speaks the protocol."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae_ext import upkeep
from sae_ext.activations.harvest import harvest_unit, parts
from sae_ext.activations.reader import Activations
from sae_ext.artefacts import activations
from sae_ext.config import CorpusConfig, HarvestConfig
from sae_ext.errors import CorruptArtefact, UserError
from sae_ext.hosts import Planted
from sae_ext.store import Store

pytest.importorskip("s3fs")
pytest.importorskip("moto")

pytestmark = pytest.mark.slow

HOST = Planted(rows=2000, d_in=16, n_features=32, active=3)
HARVEST = HarvestConfig(dtype="float32", unit_kb=2)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, object]]:
    """Its address and itself."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}", server
    server.stop()


@pytest.fixture
def url(server, tmp_path, monkeypatch) -> str:
    """Of a store in a bucket of its own."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", server[0])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("SPARSEMILL_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"b{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/mill"
    s3fs.S3FileSystem.clear_instance_cache()


def harvested(store: Store, order: list[int] | None = None) -> str:
    """The activations of the made-up rows, their units made in some order."""
    corpus = CorpusConfig()
    (stage,) = activations.stages(corpus, HOST, HARVEST)
    plan = list(parts(HOST.documents(corpus), HARVEST))
    host = HOST.open()
    made = activations.made(store, stage.key)
    for number in order if order is not None else range(len(plan)):
        if number not in made:
            (shard,) = harvest_unit(host, plan[number][1], HARVEST, corpus)
            activations.put(store, stage.key, number, shard)
    if activations.made(store, stage.key) == set(range(len(plan))):
        activations.commit(store, stage, len(plan), {})
    return stage.key


def test_activations_on_s3_are_those_of_a_folder_byte_for_byte(url, tmp_path):
    here, there = Store.open(str(tmp_path / "here"), writable=True), Store.open(url, writable=True)
    key = harvested(here)
    order = np.random.default_rng(0).permutation(4).tolist()
    assert harvested(there, order) == key
    one, two = (s.manifest("activations", key) for s in (here, there))
    assert one.files == two.files
    assert one.extra == two.extra
    rows = np.random.default_rng(1).permutation(2000)
    assert torch.equal(Activations(here, key).gather(rows), Activations(there, key).gather(rows))
    assert there.complete("activations", key)
    assert there.list("activations") == [key]


def test_a_harvest_on_s3_goes_on_with_the_units_that_are_missing(url):
    store = Store.open(url, writable=True)
    key = harvested(store, [2, 0])
    assert activations.made(store, key) == {0, 2}
    assert not store.complete("activations", key)
    before = store.folders("activations")[key]
    harvested(store)
    assert store.complete("activations", key)
    after = store.folders("activations")[key]
    assert {name: after[name] for name in before} == before, "what was there is not made again"


def test_a_flipped_byte_is_found_removed_and_made_again(url):
    store = Store.open(url, writable=True)
    key = harvested(store)
    path = store.path("activations", key, "shard-00001.safetensors")
    good = store.fs.cat_file(path)
    store.fs.pipe_file(path, good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptArtefact, match=r"shard-00001\.safetensors does not match"):
        Activations(store, key).shard(1)
    (bad,) = [c for c in upkeep.verify(store, [("activations", key)]) if c.wrong]
    assert bad.name == "shard-00001.safetensors"
    store.remove(bad.kind, bad.key, bad.name)
    assert not store.complete("activations", key)
    assert activations.made(store, key) == {0, 2, 3}
    harvested(store)
    assert store.fs.cat_file(path) == good
    assert store.complete("activations", key)


def test_gc_removes_from_s3_what_nothing_refers_to(url):
    store = Store.open(url, writable=True)
    key = harvested(store)
    (idle,) = upkeep.idle(store, [], hours=-1)
    assert (idle.kind, idle.key) == ("activations", key)
    assert upkeep.idle(store, [("activations", key)], hours=-1) == []
    assert upkeep.idle(store, [], hours=1) == []
    upkeep.remove(store, idle)
    assert store.folders("activations") == {}


class Line:
    """A network between a client and the server that breaks after so many bytes, until it is mended."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self.left: float = float("inf")
        line = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection((host, int(port))) as there:
                    back = threading.Thread(target=line.pump, args=(there, self.request, False))
                    back.start()
                    line.pump(self.request, there, True)
                    back.join()

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def pump(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1024):
                if counts:
                    self.left -= len(data)
                if self.left < 0:
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("lasts", [500, 5_000, 20_000, 30_000])
def test_a_line_that_breaks_in_the_middle_of_a_unit_leaves_nothing_half_written(
    url, server, monkeypatch, lasts
):
    """The rerun, once it is mended, goes on."""
    import s3fs

    whole = Store.open(url, writable=True)
    key = harvested(whole, [0])
    corpus = CorpusConfig()
    _, documents = list(parts(HOST.documents(corpus), HARVEST))[1]
    (shard,) = harvest_unit(HOST.open(), documents, HARVEST, corpus)
    line = Line(server[0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    s3fs.S3FileSystem.clear_instance_cache()
    store = Store.open(url, writable=True)
    line.left = lasts
    with pytest.raises(UserError, match=r"-00001\..* cannot be written .*run the same command"):
        activations.put(store, key, 1, shard)
    assert activations.made(whole, key) == {0}
    # What is there is whole.
    there = whole.folders("activations")[key]
    line.left = float("inf")
    assert activations.made(store, key) == {0}
    harvested(store)
    after = whole.folders("activations")[key]
    assert {n: f.bytes for n, f in there.items()} == {n: after[n].bytes for n in there}
    assert whole.complete("activations", key)
    assert all(c.wrong is None for c in upkeep.verify(whole, [("activations", key)]))
    line.server.shutdown()
    line.server.server_close()


def test_an_endpoint_that_does_not_answer_is_refused_when_the_store_is_opened(url, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"store 's3://.*' cannot be written to"):
        Store.open(url, writable=True)
    assert "AWS_ENDPOINT_URL" in os.environ
