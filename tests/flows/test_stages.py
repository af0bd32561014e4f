from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import stages
from flows.recipe import Recipe, Resources, parse
from sae_ext.artefacts import Stage
from sae_ext.store import Store

ORDER = ["activations", "saes", "features", "interpretations", "campaigns"]
SEARCH = {"trials": 6, "initial_trials": 2}
BEST = {"trial": 3, "lr": 0.0123, "l1": 4.56}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


@pytest.fixture
def recipe(tmp_path: Path):
    """A recipe over a corpus and a model that are small files."""
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")

    def recipe(**sections: Any) -> Recipe:
        known = {
            "name": "n",
            "corpus": {"source": str(tmp_path / "texts.jsonl")},
            "host": {"model": str(tmp_path / "model")},
        }
        return parse({**known, **sections})

    return recipe


def commit(store: Store, stage: Stage) -> None:
    extra = {"best": BEST} if stage.kind == "trials" else {}
    stage.commit(store, {}, extra)


def kinds(found: list[Stage]) -> list[str]:
    return [stage.kind for stage in found]


def test_the_stages_come_in_order_and_each_takes_the_keys_of_those_before(store, recipe):
    found = list(stages.all_of(recipe(), store))
    assert kinds(found) == ORDER
    keys = {stage.kind: stage.key for stage in found}
    by_kind = {stage.kind: stage for stage in found}
    assert by_kind["saes"].inputs == {"activations": keys["activations"]}
    assert by_kind["features"].inputs == {
        "activations": keys["activations"], "sae": keys["saes"],
    }  # fmt: skip
    assert by_kind["interpretations"].inputs == {"features": keys["features"]}
    del keys["campaigns"]
    assert by_kind["campaigns"].inputs == keys


def test_asking_for_the_stages_writes_nothing(store, recipe):
    before = sorted(Path(store.root).rglob("*"))
    assert stages.pending(recipe(), store)
    assert sorted(Path(store.root).rglob("*")) == before


def test_something_is_left_to_do_until_every_stage_is_done(store, recipe):
    for stage in stages.all_of(recipe(), store):
        assert stages.pending(recipe(), store)
        assert not stage.done(store)
        commit(store, stage)
        assert stage.done(store)
    assert not stages.pending(recipe(), store)


def test_an_unfinished_search_is_the_last_stage_that_is_known(store, recipe):
    made = recipe(tune=SEARCH)
    found = list(stages.all_of(made, store))
    assert kinds(found) == ["activations", "trials"]
    for stage in found:
        commit(store, stage)
    assert kinds(list(stages.all_of(made, store))) == [
        "activations", "trials", "saes", "features", "interpretations", "campaigns",
    ]  # fmt: skip


def test_after_a_search_the_winners_values_are_trained_with(store, recipe):
    schedule = {"warmup_steps": 70}
    written = {"steps": 700, "lr": 0.5, "objective": {"l1": {"schedule": schedule}}}
    made = recipe(tune=SEARCH, train=written)
    for stage in stages.all_of(made, store):
        commit(store, stage)
    assert not stages.pending(made, store)
    (sae,) = (s for s in stages.all_of(made, store) if s.kind == "saes")
    trained = sae.config["train"]
    assert (trained["lr"], trained["objective"]["l1"]["weight"]) == (0.0123, 4.56)
    assert trained["steps"] == 700
    assert trained["objective"]["l1"]["schedule"]["warmup_steps"] == 70
    (campaign,) = (s for s in stages.all_of(made, store) if s.kind == "campaigns")
    assert "trials" in campaign.inputs
    found = {"weight": 4.56, "schedule": schedule}
    plain = recipe(train={"steps": 700, "lr": 0.0123, "objective": {"l1": found}})
    assert sae.key in [s.key for s in stages.all_of(plain, store)]


def test_a_finished_campaign_is_not_finished_under_another_recipe(store, recipe):
    for stage in stages.all_of(recipe(), store):
        commit(store, stage)
    for other in (
        {"train": {"seed": 1}},
        {"train": {"objective": {"usage": {}}}},
        {"sae": {"architecture": {"kind": "jumprelu"}}},
        {"interpret": {"features": 7}},
        {"name": "m"},
    ):
        assert stages.pending(recipe(**other), store)


ELSEWHERE = {
    "workers": 7,
    "cpus_per_worker": 2,
    "train_cpus": 3,
    "train_gpus": 0.5,
    "harvest_gpus": 0.5,
    "train_workers": 4,
    "train_readers": 0,
    "tensorboard": "runs",
    "ray_address": "head:6379",
}


def test_every_field_of_the_resources_is_one_of_those_below():
    assert set(ELSEWHERE) == set(Resources.model_fields)


@pytest.mark.parametrize(
    "change",
    [{"store": "elsewhere"}, *({"resources": {name: value}} for name, value in ELSEWHERE.items())],
    ids=["store", *ELSEWHERE],
)
def test_where_and_with_what_work_is_done_changes_no_key(store, recipe, change):
    before, after = (list(stages.all_of(r, store)) for r in (recipe(), recipe(**change)))
    assert [stage.key for stage in before] == [stage.key for stage in after]


@pytest.mark.parametrize(
    ("section", "shared"),
    [
        ({"interpret": {"seed": 1}}, 3),
        ({"analyse": {"window": 9}}, 2),
        ({"train": {"objective": {"l1": {"weight": 9.0}}}}, 1),
        ({"train": {"lr_schedule": {"warmup_steps": 9}}}, 1),
        ({"sae": {"architecture": {"kind": "relu", "clip": 9.0}}}, 1),
        ({"harvest": {"dtype": "float32"}}, 0),
    ],
)
def test_two_campaigns_share_the_stages_before_the_first_difference(store, recipe, section, shared):
    one, two = ([s.key for s in stages.all_of(r, store)] for r in (recipe(), recipe(**section)))
    assert [a == b for a, b in zip(one, two, strict=True)] == [True] * shared + [False] * (
        5 - shared
    )
