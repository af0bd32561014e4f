"""A recipe with a stream: what is stored is little, and the SAE is trained on far more."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from conftest import digests, stop

from sae_ext.activations.reader import Activations
from sae_ext.store import Store

pytestmark = pytest.mark.slow
ONE = {"workers": 1, "train_cpus": 1}
BUFFER = {"rows": 1500, "min_rows": 1000}


def test_a_streamed_campaign_stores_its_corpus_alone_and_goes_on_after_a_stop(
    sparsemill, recipe_file, corpus_file, tmp_path
):
    recipe = recipe_file(
        corpus={"limit": 60}, stream={"source": str(corpus_file)}, train={"buffer": BUFFER},
        resources=ONE,
    )  # fmt: skip
    made = {}
    for name in ("whole", "stopped"):
        store = tmp_path / name
        if name == "stopped":
            command = sparsemill("run", str(recipe), "--store", str(store))
            command.until(lambda store=store: list(store.glob("saes/*/checkpoint/*")))
            assert stop(command, signal.SIGINT) < 12
            assert command.left_running() == []
        command = sparsemill("run", str(recipe), "--store", str(store))
        assert command.wait() == 0, command.output
        assert command.left_running() == []
        made[name] = digests(store)
    assert made["whole"] == made["stopped"]
    found = Store(str(tmp_path / "whole"))
    (key,) = found.list("activations")
    assert found.manifest("activations", key).extra["n_documents"] == 60
    (sae,) = found.list("saes")
    assert found.manifest("saes", sae).config["stream"]["source"] == str(corpus_file)
    cfg = json.loads(Path(found.path("saes", sae, "cfg.json")).read_text())
    assert str(corpus_file) in json.dumps(cfg)
    assert Activations(found, key).n_rows < 6000


def test_a_stream_that_needs_more_than_the_machine_has_is_refused(
    sparsemill, recipe_file, corpus_file, tmp_path
):
    recipe = recipe_file(
        stream={"source": str(corpus_file)}, train={"buffer": BUFFER},
        resources={"workers": 500, "train_cpus": 1},
    )  # fmt: skip
    command = sparsemill("run", str(recipe), "--store", str(tmp_path / "store"))
    assert command.wait() == 2
    (said,) = [line for line in command.lines if line.startswith("error:")]
    assert "harvest workers beside the trainer" in said
    assert "lower resources.workers" in said


def test_a_stream_that_is_not_there_is_refused_before_anything_starts(
    sparsemill, recipe_file, tmp_path
):
    recipe = recipe_file(stream={"source": "gone.jsonl"}, train={"buffer": BUFFER}, resources=ONE)
    command = sparsemill("run", str(recipe), "--store", str(tmp_path / "store"))
    assert command.wait() == 2
    (said,) = [line for line in command.lines if line.startswith("error:")]
    assert "gone.jsonl" in said
    assert not list((tmp_path / "store").glob("activations/*"))
