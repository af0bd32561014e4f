"""Harvesting alone, and looking after a store, with the commands a user types."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import digests

from sae_ext.activations.reader import Activations
from sae_ext.artefacts import activations
from sae_ext.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The finished store, to be damaged."""
    return Path(shutil.copytree(finished["store"], tmp_path / "store"))


def test_several_places_are_read_in_one_pass_and_found_by_recipes_that_want_one(
    sparsemill, recipe_file, finished, copied
):
    path = recipe_file(host={"also": [{"layer": 2, "site": "mlp"}, {"module": "embeddings"}]})
    command = sparsemill("harvest", str(path), "--store", str(copied))
    assert command.wait() == 0, command.output
    assert command.left_running() == []
    store = Store(str(copied))
    keys = store.list("activations")
    assert len(keys) == 3
    for key in keys:
        assert f"{key}  " in command.output
        assert Activations(store, key).n_rows == Activations(store, keys[0]).n_rows
    before = digests(finished["store"])  # the place that was there already was left alone
    assert digests(copied).items() >= before.items()
    alone = recipe_file(host={"layer": 2, "site": "mlp"})
    again = sparsemill("harvest", str(alone), "--store", str(copied))
    assert again.wait() == 0, again.output
    assert len(store.list("activations")) == 3
    assert "found" in again.output


def test_a_harvest_whose_worker_dies_goes_on_by_itself(sparsemill, recipe_file, finished, tmp_path):
    path = recipe_file(harvest={"unit_kb": 0.5}, resources={"workers": 2})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert sparsemill("harvest", str(path), "--store", str(whole)).wait() == 0
    command = sparsemill("harvest", str(path), "--store", str(killed))
    command.until(lambda: len(list(killed.glob("activations/*/unit-*"))) > 2)
    workers = [p for p in [*command.family.values()] if "HarvestWorker" in "".join(p.cmdline())]
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)
    assert command.wait() == 0, command.output
    assert command.left_running() == []
    assert digests(killed) == digests(whole)


def test_verify_finds_a_flipped_byte_and_the_same_run_repairs_it(
    sparsemill, recipe_file, finished, copied
):
    store = Store(str(copied))
    (key,) = store.list("activations")
    shard = copied / "activations" / key / "shard-00001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    def verify(*more: str):
        return sparsemill("store", "verify", *more, "--store", str(copied))

    fine = verify(store.list("saes")[0])
    assert fine.wait() == 0
    assert "0 wrong" in fine.output
    found = verify()
    assert found.wait() == 1
    assert f"activations/{key}/{shard.name} does not match its checksum" in found.output
    assert "--remove" in found.output
    assert shard.exists()
    assert verify("--remove").wait() == 1
    assert not shard.exists()
    run = sparsemill("run", str(finished["recipe"]), "--store", str(copied))
    assert run.wait() == 0, run.output
    assert shard.read_bytes() == good
    assert verify().wait() == 0
    assert digests(copied) == finished["digests"]


def test_gc_lists_and_removes_what_no_campaign_was_made_from(sparsemill, finished, copied):
    store = Store(str(copied))
    for kind in ("activations", "saes"):
        shutil.copytree(copied / kind / store.list(kind)[0], copied / kind / "0123456789abcdef")

    def gc(*more: str):
        command = sparsemill("store", "gc", "--hours", "0", *more, "--store", str(copied))
        assert command.wait() == 0, command.output
        return command.output

    told = gc()
    assert "activations/0123456789abcdef" in told
    assert "saes/0123456789abcdef" in told
    assert "may go" in told
    assert "removed" in gc("--remove")
    assert not (copied / "activations" / "0123456789abcdef").exists()
    assert digests(copied) == finished["digests"]
    assert "nothing in" in gc()


def test_activations_are_exported_as_a_data_set_that_opens(sparsemill, finished, tmp_path):
    datasets = pytest.importorskip("datasets")
    store = Store(str(finished["store"]))
    (key,) = store.list(activations.KIND)
    out = tmp_path / "cache"
    command = sparsemill(
        "store", "export", key[:6], "--out", str(out), "--context", "16", "--store", store.url
    )
    assert command.wait() == 0, command.output
    rows = Activations(store, key)
    found = datasets.load_from_disk(str(out))
    assert len(found) == rows.n_rows // 16
    (hook,) = set(found.column_names) - {"token_ids"}
    assert found.features[hook].shape == (16, rows.d_in)
    again = sparsemill("store", "export", key, "--out", str(out), "--store", store.url)
    assert again.wait() == 2
    assert "is not empty" in again.output
    assert "Traceback" not in again.output
