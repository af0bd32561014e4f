from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import yaml

from flows import recipe as recipes
from flows.recipe import Recipe, Resources, changed, load, parse, replaced, to_yaml
from sae_ext.architectures import AnyArchitecture, TopK
from sae_ext.config import TrainConfig, TuneConfig
from sae_ext.errors import UserError
from sae_ext.hosts import AnyHost
from sae_ext.schedules import Schedule
from sae_ext.training.config import RevivalConfig
from sae_ext.training.terms import AuxK

SECTIONS = {name: kind for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind)}


class Place(NamedTuple):
    """A field somewhere in a recipe."""

    path: tuple[str, ...]
    hint: Any
    default: Any
    kind: str | None = None
    """That of the architecture it belongs to."""

    def __str__(self) -> str:
        return ".".join([*self.path, *([] if self.kind is None else [self.kind])])


def configs(hint: Any) -> list[type]:
    found = [hint] if isinstance(hint, type) and is_dataclass(hint) else []
    return [*found, *(inner for part in get_args(hint) for inner in configs(part))]


def places(path: tuple[str, ...], kind: type, tag: str | None = None) -> Iterator[Place]:
    """Every field of a section and of those in it; of schedules, the learning rate's stands for all."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        several = get_origin(hints[field.name]) is tuple  # a list of sections is one value
        here, inner = (*path, field.name), [] if several else configs(hints[field.name])
        if inner and (Schedule not in inner or field.name == "lr_schedule"):
            for config in inner:
                yield from places(here, config, tag or (config.kind if len(inner) > 1 else None))
        elif field.name != "kind" or kind is Schedule:
            yield Place(here, hints[field.name], field.default, tag)


HOSTS = {kind.kind: kind for kind in configs(AnyHost)}
FIELDS = [
    *(place for section, kind in SECTIONS.items() for place in places((section,), kind)),
    *(place for kind, host in HOSTS.items() for place in places(("host",), host, kind)),
    *(
        Place(
            ("resources", name), get_type_hints(Resources, include_extras=True)[name], info.default
        )
        for name, info in Resources.model_fields.items()
    ),
]
# Values for fields whose type and default do not show what else they may hold.
OTHER: dict[str, Any] = {
    "corpus.source": "texts.jsonl",
    "corpus.columns": ["age"],
    "corpus.split_by": "label",
    "host.site.transformer": "attention",
    "host.long.transformer": "windows",
    "host.also.transformer": [{"layer": 1, "site": "mlp", "module": None}],
    "host.build.module": "mine.model:load",
    "host.collate.module": "mine.model:collate",
    "host.options.module": {"width": 3.0},
    "harvest.unit_kb": 0.5,
    "interpret.backend": "openai",
    "interpret.base_url": "http://127.0.0.1:8000/v1",
    "resources.ray_address": "head:6379",
    "train.steps": 999,
    "train.revival.at": [3, 9],
    "train.revival.every": 200,
    "tune.trials": 9,
}
NO_PENALTY: dict[str, Any] = {"objective": {"l1": None}}
REWARDED: dict[str, Any] = {"objective": {"l1": None, "reward": {}}}
# What an architecture needs beside its kind.
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"train": NO_PENALTY},
    "batchtopk": {"train": NO_PENALTY},
    "gated": {"train": REWARDED},
    "projection": {"sae": {"architecture": {"pretrained": "folder"}}},
}
# The architecture that has what a term is made of.
TERMS: dict[str, str] = {"l0": "jumprelu", "reward": "gated", "auxk": "topk"} | dict.fromkeys(
    ("entropy", "alignment", "independence", "value"), "slots"
)
# What a recipe must say so that the field may be there at all.
NEEDED: dict[str, dict[str, Any]] = {
    "host.overlap.transformer": {"host": {"long": "windows"}},
    "sae.output": {"train": {"scale": "none"}},
    "train.lr_schedule.final": {"train": {"lr_schedule": {"kind": "linear"}}},
    "train.lr_schedule.initial": {"train": {"lr_schedule": {"warmup_steps": 9}}},
    "train.lr_schedule.last": {"train": {"lr_schedule": {"kind": "linear"}}},
    "train.lr_schedule.period": {"train": {"lr_schedule": {"kind": "cosine"}}},
    "train.objective.value.schedule": {"sae": {"architecture": {"answer": "answer"}}},
    "train.objective.value.weight": {"sae": {"architecture": {"answer": "answer"}}},
    "train.precision": {"resources": {"train_gpus": 1}},
    **{
        f"train.revival.{field.name}": {"train": {"revival": {"every": 150}}}
        for field in fields(RevivalConfig)
    },
}
# What must be said together with the changed value.
ALONG = {
    "interpret.backend": {"base_url": "http://127.0.0.1:8000/v1", "model": "m"},
    "train.revival.at": {"every": None},
}


def another(place: Place) -> Any:
    """A value other than the default, as YAML would hold it."""
    if str(place) in OTHER:
        return OTHER[str(place)]
    hint, default = place.hint, place.default
    if configs(hint):
        return {"kind": "linear", "final": 0.5}
    if get_origin(hint) is Literal:
        return next(value for value in get_args(hint) if value != default)
    if default is None:
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
        return {int: 5, float: 0.5, str: "other"}.get(hint, {"a": 0.5})
    if isinstance(default, bool):
        return not default
    if isinstance(default, str) or default is MISSING:
        return "other"
    if isinstance(default, tuple):
        return [1.5 * value for value in default]
    return default + 1 if isinstance(default, int) else default * 0.5 or 0.5


def merged(content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, what stands in both being taken from `other`."""
    both = {name: merged(content[name], other[name])
            for name in content.keys() & other.keys()
            if isinstance(content[name], dict) and isinstance(other[name], dict)}  # fmt: skip
    return {**content, **other, **both}


def nested(path: tuple[str, ...], value: Any) -> Any:
    for part in reversed(path):
        value = {part: value}
    return value


def of_kind(kind: str) -> dict[str, Any]:
    """An architecture of that kind, as a recipe that can be trained."""
    return merged({"sae": {"architecture": {"kind": kind}}}, KINDS.get(kind, {}))


HOST_NEEDS: dict[str, dict[str, Any]] = {
    "module": {"build": "a.b:c", "collate": "a.b:d", "hook": "e"},
    "embeddings": {"file": "rows.npy"},
}


def around(place: Place) -> dict[str, Any]:
    """A recipe in which that field may stand."""
    content = {"name": "n"}
    if place.path[0] == "host":
        needs = {"kind": place.kind, **HOST_NEEDS.get(place.kind or "", {})}
        return merged({**content, "host": needs}, NEEDED.get(str(place), {}))
    kind = place.kind or TERMS.get(place.path[2]) if len(place.path) > 2 else None
    if kind is not None:
        content = merged(content, of_kind(kind))
    if place.path[:2] == ("train", "objective"):
        penalty = {} if place.path[2] == "l1" else None
        content = merged(content, {"train": {"objective": {"l1": penalty}}})
    return merged(merged(content, nested(place.path[:-1], {})), NEEDED.get(str(place), {}))


def leaves(content: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(content, dict) or path[-1:] in [
        ("class_weights",),
        ("options",),
        ("schedule",),
        ("anneal",),
    ]:
        return {path: content}
    return {
        k: v for name, inner in content.items() for k, v in leaves(inner, (*path, name)).items()
    }


@pytest.fixture
def write(tmp_path: Path):
    def write(content: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def refusal(content: Any) -> str:
    with pytest.raises(UserError) as error:
        parse(content)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- what a recipe may say -----------------------------------------------------------------------


def test_a_name_is_all_a_recipe_needs():
    made = parse({"name": "quick"})
    assert all(getattr(made, section) == kind() for section, kind in SECTIONS.items())
    assert made.resources == Resources()


@pytest.mark.parametrize("place", FIELDS, ids=str)
def test_every_field_can_be_set_and_is_the_only_one_that_changes(write, place):
    above, value = place.path[:-1], another(place)
    along = ALONG.get(str(place), {})

    def made(content: dict[str, Any]) -> dict[tuple[str, ...], Any]:
        return leaves(yaml.safe_load(to_yaml(load(write(content)))))

    base = around(place)
    before = made(base)
    after = made(merged(base, nested(above, {**along, place.path[-1]: value})))
    found = after[place.path]
    assert (found.items() >= value.items()) if isinstance(value, dict) else found == value
    moved = {path for path in before if before[path] != after.get(path)}
    assert moved == {place.path, *((*above, other) for other in along)}


def test_the_fields_above_are_those_of_every_section_and_of_what_is_in_them():
    found = {str(place) for place in FIELDS}
    assert {
        "corpus.limit",
        "train.lr",
        "train.lr_schedule.period",
        "train.objective.l1.weight",
    } <= found
    assert {"sae.architecture.k.topk", "train.revival.at", "resources.train_readers"} <= found
    assert {*OTHER, *ALONG} <= found


def test_every_section_has_a_default_for_every_field():
    for kind in SECTIONS.values():
        assert all(field.default is not MISSING for field in fields(kind))


@pytest.mark.parametrize("kind", [c.kind for c in configs(AnyArchitecture)])
def test_an_architecture_is_chosen_by_its_kind(kind):
    made = parse({"name": "n", **of_kind(kind)})
    assert made.sae.architecture.kind == kind
    assert parse(yaml.safe_load(to_yaml(made))) == made


def test_a_number_in_scientific_notation_is_a_number(write):
    made = load(write("name: n\ntrain: {lr: 1e-3}\ntune: {lr: [1e-4, 2e-3]}\n"))
    assert made.train.lr == 1e-3
    assert made.tune.lr == (1e-4, 2e-3)


@pytest.mark.parametrize(
    "sections",
    [
        {"tune": {"lr": [1e-4, 1e-3], "trials": 6}, "corpus": {"source": "tëxts.jsonl"}},
        {
            "sae": {"architecture": {"kind": "topk", "k": 3}},
            "train": {
                "objective": {"l1": None, "auxk": {"k": 9, "schedule": {"start_step": 5}}},
                "revival": {"at": [5, 9]},
                "lr_schedule": {"kind": "cosine", "period": 9},
            },
        },
    ],
)
def test_a_recipe_comes_back_from_its_own_yaml(sections):
    made = parse({"name": "n", **sections})
    assert parse(yaml.safe_load(to_yaml(made))) == made
    assert list(yaml.safe_load(to_yaml(made))) == list(Recipe.model_fields)


def test_the_recipes_that_ship_can_be_read():
    folder = Path(__file__).parents[2] / "recipes"
    paths = sorted(folder.glob("*.yaml"))
    assert paths
    assert [load(path).name for path in paths] == [path.stem for path in paths]


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        parse({"name": "n"}).name = "other"


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trian": {}}, "unknown key 'trian': did you mean 'train'?"),
        ({"train": {"setps": 3}}, "unknown key 'train.setps': did you mean 'train.steps'?"),
        ({"lr": 3}, "unknown key 'lr': did you mean 'train.lr'?"),
        ({"sae": {"steps": 3}}, "unknown key 'sae.steps': did you mean 'train.steps'?"),
        ({"resources": {"worker": 1}}, "'resources.worker': did you mean 'resources.workers'?"),
        (
            {"host": {"xyzzy": 1}},
            "unknown key 'host.xyzzy': known here are layer, site, module, kind, model",
        ),
        (
            {"sae": {"architecture": {"kind": "relu", "clipp": 3}}},
            "unknown key 'sae.architecture.clipp': did you mean 'sae.architecture.clip'?",
        ),
        (
            {"sae": {"architecture": {"kind": "topk", "xyzzy": 3}}},
            "unknown key 'sae.architecture.xyzzy': known here are kind, k",
        ),
        (
            {"train": {"objective": {"l1": {"wieght": 1}}}},
            "'train.objective.l1.wieght': did you mean 'train.objective.l1.weight'?",
        ),
        (
            {"train": {"objective": {"l1": {"target": 9}}}},
            "'train.objective.l1.target': did you mean 'train.objective.l1.target_l0'?",
        ),
        (
            {"train": {"objective": {"l1": {"schedule": {"perod": 9}}}}},
            "'train.objective.l1.schedule.perod': did you mean 'train.objective.l1.schedule.period'?",
        ),
        (
            {"train": {"lr_schedule": {"kind": "linear", "lats": 0.5}}},
            "'train.lr_schedule.lats': did you mean 'train.lr_schedule.last'?",
        ),
        (
            {"train": {"objective": {"auxx": {}}}},
            "'train.objective.auxx': did you mean 'train.objective.auxk'?",
        ),
        # In the right section, but not as deep as it belongs.
        ({"train": {"l1": 2.7}}, "unknown key 'train.l1': did you mean 'train.objective.l1'?"),
        ({"sae": {"clip": 20}}, "unknown key 'sae.clip': did you mean 'sae.architecture.clip'?"),
        (
            {"train": {"warmup_steps": 20}},
            "'train.warmup_steps': did you mean 'train.lr_schedule.warmup_steps'?",
        ),
        ({"clip": 20}, "unknown key 'clip': did you mean 'sae.architecture.clip'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_that_exists(content, message):
    assert message in refusal({"name": "n", **content})


def test_an_unknown_key_is_told_before_a_wrong_value():
    assert "unknown key 'trian'" in refusal({"name": "n", "sae": {"d_sae": "many"}, "trian": {}})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"train": {"steps": "many"}}, "train.steps: .*valid integer.* got 'many'"),
        ({"train": {"steps": 2.5}}, "train.steps: .*integer"),
        ({"train": {"lr": [1]}}, "train.lr: .*number"),
        ({"train": 3}, "train: .* got 3"),
        ({"harvest": {"dtype": "float8"}}, "harvest.dtype: .*'float16', 'bfloat16' or 'float32'"),
        ({"tune": {"lr": 1e-3}}, "tune.lr"),
        ({"tune": {"lr": [1e-3]}}, r"tune\.lr"),
        ({"resources": {"workers": 0}}, "resources.workers: .*greater than or equal to 1"),
        ({"name": "two words"}, "name: .*got 'two words'"),
        ({"name": "../up"}, "name: "),
        ({"name": None}, "name: "),
        ({"resources": {"train_gpus": -1}}, "resources.train_gpus: .*greater than or equal to 0"),
        ({"resources": {"train_gpus": "all"}}, "resources.train_gpus: .*valid number"),
        ({"resources": {"train_workers": 0}}, "resources.train_workers: .*or equal to 1"),
        ({"resources": {"train_workers": 1.5}}, "resources.train_workers: .*integer"),
        ({"resources": {"train_readers": -1}}, "resources.train_readers: .*or equal to 0"),
        ({"resources": {"tensorboard": True}}, "resources.tensorboard: .*string"),
        ({"sae": {"output": "relu"}}, "sae.output: .*'identity', 'sigmoid' or 'tanh'"),
        ({"sae": {"decoder": 1}}, "sae.decoder: .*'free' or 'unit'"),
        (
            {"sae": {"architecture": {"kind": "topk", "k": 2.5}}},
            "recipe: sae.architecture.k: .*integer.* got 2.5",
        ),
        (
            {"train": {"objective": {"l1": {"weight": "much"}}}},
            "recipe: train.objective.l1.weight: .*number.* got 'much'",
        ),
        ({"train": {"objective": {"l1": 2.7}}}, "recipe: train.objective.l1: .* got 2.7"),
        ({"train": {"objective": {"mse": None}}}, "recipe: train.objective.mse: .* got None"),
        (
            {"train": {"objective": {"l1": {"class_weights": {"a": "b"}}}}},
            "recipe: train.objective.l1.class_weights.a: .*number.* got 'b'",
        ),
        (
            {"train": {"lr_schedule": {"kind": "square"}}},
            "train.lr_schedule.kind: .*'constant', 'linear' or 'cosine'.* got 'square'",
        ),
        ({"train": {"lr_schedule": "linear"}}, "recipe: train.lr_schedule: .* got 'linear'"),
        ({"train": {"revival": {"at": [5, "x"]}}}, "train.revival.at.1: .*integer.* got 'x'"),
        ({"train": {"revival": True}}, "train.revival: .* got True"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(content, named):
    assert re.search(named, refusal({"name": "n", **content}))


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({"kind": "topkk", "k": 3}, ", got 'topkk'"),
        ({"kind": None}, ", got None"),
        ({"k": 3}, ", and is missing"),
        ({}, ", and is missing"),
        ("topk", ", got 'topk'"),
        (None, ", got None"),
        ([1, 2], ", got [1, 2]"),
    ],
)
def test_an_architecture_without_a_kind_or_with_a_wrong_one_is_told_those_there_are(given, end):
    kinds = [c.kind for c in configs(AnyArchitecture)]
    assert kinds[:4] == ["relu", "topk", "batchtopk", "jumprelu"]
    wanted = f"recipe: sae.architecture.kind must be one of {', '.join(kinds)}{end}"
    assert refusal({"name": "n", "sae": {"architecture": given}}) == wanted


def test_a_missing_name_is_told():
    assert "the key 'name' is missing" in refusal({"train": {"steps": 300}})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"train": {"lr": -1.0}}, "train.lr must be positive"),
        ({"train": {"lr": -1}}, "train.lr must be positive"),
        ({"tune": {"lr": [2, 1]}}, "tune.lr must be [low, high]"),
        (
            {"sae": {"architecture": {"kind": "relu", "clip": -1.0}}},
            "sae.architecture.clip must be positive",
        ),
        (
            {"sae": {"architecture": {"kind": "relu", "clip": float("inf")}}},
            "sae.architecture.clip must be finite",
        ),
        (
            {"sae": {"architecture": {"kind": "topk", "k": 0}}},
            "sae.architecture.k must be positive",
        ),
        (
            {"sae": {"d_sae": 9, "architecture": {"kind": "batchtopk", "k": 10}}},
            "sae.architecture.k is 10, but d_sae is only 9: lower it",
        ),
        (
            {"train": {"objective": {"l1": {"weight": -1}}}},
            "train.objective.l1.weight must be 0 or more, got -1",
        ),
        (
            {"train": {"objective": {"l1": {"class_weights": {"a": -1}}}}},
            "train.objective.l1.class_weights.a must be 0 or more",
        ),
        (
            {"train": {"objective": {"l1": {"target_l0": 9}, "l0": {"target_l0": 9}}}},
            "train.objective.target_l0 may stand in one term only",
        ),
        (
            {"train": {"steps": 20}},
            "train.lr_schedule: start_step + warmup_steps is 100, but the run has 20",
        ),
        (
            {"train": {"steps": 150}},
            "train.objective.l1.schedule: start_step + warmup_steps is 200, but the run has 150 steps",
        ),
        (
            {"train": {"objective": {"l1": {"schedule": {"warmup_steps": 9000}}}}},
            "train.objective.l1.schedule: start_step + warmup_steps is 9000, but the run has 2000 steps",
        ),
        (
            {"train": {"objective": {"l1": {"schedule": {"kind": "cosine", "period": 1}}}}},
            "train.objective.l1.schedule.period must be at least 2, got 1",
        ),
        (
            {"train": {"lr_schedule": {"kind": "linear", "last": 2}}},
            "train.lr_schedule.last must lie in",
        ),
        ({"train": {"lr_schedule": {"final": 0.5}}}, "train.lr_schedule.final and last are for"),
        (
            {"train": {"revival": {"at": [5], "every": 3}}},
            "train.revival.every or at must be given, and not both, got every=3 and at=[5]",
        ),
        (
            {"train": {"revival": {"at": [5, 3000]}}},
            "train.revival.at names step 3000, but the run has 2000",
        ),
        ({"train": {"early_stopping": {"patience": 0}}}, "train.early_stopping.patience must be"),
        (
            {"train": {"buffer": {"rows": 9}}},
            "train.buffer.min_rows is 50000, but the buffer holds only 9",
        ),
        (
            {"resources": {"train_gpus": 1.5}},
            "resources.train_gpus must be at most 1, got 1.5: to use several GPUs set train_workers",
        ),
        ({"tune": {"seed": 1, "l0_band": [2.0, 1.0]}}, "tune.l0_band must be [low, high]"),
        ({"tune": {"trials": 3}}, "tune.initial_trials must be"),
        ({"interpret": {"backend": "openai"}}, "interpret.base_url is needed"),
        ({"corpus": {"test_percent": 90}}, "corpus.validation_percent and test_percent"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_section(content, named):
    assert f"recipe: {named}" in refusal({"name": "n", **content})


def test_a_number_in_scientific_notation_out_of_range_is_refused_with_its_section(write):
    with pytest.raises(UserError, match=r": train\.lr must be positive"):
        load(write("name: n\ntrain: {lr: -1e-3}\n"))


# -- what does not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {"train": {"objective": {"l0": {}}}},
            "train.objective.l0 needs 'l0', which the architecture ReLU does not have",
        ),
        (
            {"sae": {"architecture": {"kind": "topk"}}},
            "train.objective.l1 is a penalty, which the architecture TopK does without",
        ),
        ({"sae": {"output": "sigmoid"}}, "sae.output 'sigmoid' cannot be scaled back"),
        ({"train": {"precision": "tf32"}}, "train.precision 'tf32' needs a GPU"),
        (
            merged(of_kind("batchtopk"), {"resources": {"train_workers": 2}}),
            "sae.architecture (BatchTopK) looks at a whole batch at once",
        ),
        (
            {"tune": {"trials": 8}, "train": {"objective": {"l1": {"target_l0": 20}}}},
            "tune searches λ, and so does train.objective.l1.target_l0",
        ),
        ({"stream": {}}, "a stream is mixed in a ring buffer: give train.buffer"),
        (
            {"stream": {}, "train": {"buffer": {}}, "resources": {"train_workers": 2}},
            "a stream goes to one trainer, and 2 are asked for",
        ),
        (
            {"stream": {}, "train": {"buffer": {}, "objective": {"mse": {"row_weight": "w"}}}},
            "MSE reads the column 'w', which rows of a stream do not have",
        ),
        (
            {"stream": {}, "train": {"buffer": {}}, "corpus": {"test_percent": 20}},
            "stream.test_percent is 10 and corpus.test_percent 20: set both alike",
        ),
        (
            {"stream": {}, "train": {"buffer": {}}, "tune": {"trials": 8}},
            "every trial of tune would harvest the whole stream",
        ),
    ],
)
def test_sections_that_do_not_go_together_are_refused_as_the_recipe_is_read(content, told):
    assert refusal({"name": "n", **content}).startswith(f"recipe: {told}")


# -- what a search needs -------------------------------------------------------------------------

SEARCH = {"trials": 8}


def test_a_search_needs_a_penalty_to_search():
    without = {"train": {"objective": {"l1": None}}}
    assert parse({"name": "n", **without}).train.objective.l1 is None
    told = refusal({"name": "n", **without, "tune": SEARCH})
    assert told == (
        "recipe: tune searches λ, but train.objective.l1 is left out: give it, or set tune.trials to 0"
    )


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({}, "train.lr_schedule: start_step + warmup_steps is 100, but the run has 50 steps"),
        (
            {"lr_schedule": {}, "objective": {"l1": {"schedule": {"warmup_steps": 50}}}},
            "train.objective.l1.schedule: start_step + warmup_steps is 50, but the run has 50 steps",
        ),
        (
            {
                "lr_schedule": {},
                "objective": {"l1": {"schedule": {}}},
                "revival": {"at": [9, 50]},
            },
            "train.revival.at names step 50, but the run has 50 steps",
        ),
    ],
)
def test_a_trial_too_short_for_the_schedules_is_refused_where_there_are_trials(train, told):
    content = {"name": "n", "train": train}
    short = {"steps": 50}
    assert refusal({**content, "tune": {**SEARCH, **short}}).startswith(
        f"recipe: in a trial of tune.steps, {told}"
    )
    assert parse({**content, "tune": short}).tune == TuneConfig(steps=50)
    assert parse({**content, "tune": SEARCH}).train.steps == TrainConfig().steps
    with pytest.raises(UserError, match="command line: in a trial of tune"):
        changed(parse({**content, "tune": short}), {"tune.trials": 8})


# -- files ---------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_told_with_the_nearest_name(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("name: n")
    (tmp_path / "other.yaml").write_text("name: n")
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.yaml\?"):
        load(tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match=r"the recipe .*none\.yaml does not exist$"):
        load(tmp_path / "nowhere" / "none.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [", "is not valid YAML"),
        ("name: n\ntrain: {lr: 1\n", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("", "must hold a mapping"),
        ("- name", "must hold a mapping"),
        ("quickstart", "must hold a mapping"),
        ("name: n\ntrain:\n  steps: none", "train.steps"),
        ("name: n\n3: 4", "keys should be strings"),
    ],
)
def test_a_file_that_holds_no_recipe_is_a_user_error_of_one_line_that_names_it(
    write, content, message
):
    path = write(content)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(str(path)) or str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"name: \xff\xfe", None])
def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.yaml cannot be read"):
        load(path)


# -- changes -------------------------------------------------------------------------------------


def test_changes_replace_the_named_fields_and_none_leaves_one_alone():
    made = parse({"name": "n", "train": {"lr": 0.5}})
    other = changed(
        made,
        {"train.steps": 700, "train.lr": None, "store": "s3://x", "sae.architecture.clip": 2},
    )
    assert (other.train.steps, other.train.lr, other.store) == (700, 0.5, "s3://x")
    assert other.sae.architecture.clip == 2
    assert changed(other, {"train.steps": 2000, "store": "store"}).sae.architecture.clip == 2
    assert made.train.steps == 2000
    assert changed(made, {}) == made


def test_none_leaves_a_field_alone_or_is_a_value_like_any_other():
    made = parse({"name": "n", "sae": {"d_in": 9}})
    nothing = {"sae.d_in": None, "train.objective.l1": None}
    assert changed(made, nothing) == made
    assert replaced(made, nothing).sae.d_in is None
    assert replaced(made, nothing).train.objective.l1 is None


def test_a_change_may_be_about_a_section_that_was_left_out():
    few = {"train.dead_rows": 9999}
    made = changed(
        parse({"name": "n", **of_kind("topk")}),
        {"train.revival.every": 300, "train.objective.auxk.k": 9, **few},
    )
    assert made.train.revival == RevivalConfig(every=300)
    assert made.train.objective.auxk == AuxK(k=9)
    assert made.train.objective.l1 is None


def test_another_kind_of_architecture_has_its_own_fields_and_another_kind_of_schedule_the_same():
    made = parse({"name": "n", "sae": {"architecture": {"kind": "relu", "clip": 3}}})
    topk = {"train.objective.l1": None, "sae.architecture.kind": "topk"}
    other = replaced(made, {**topk, "sae.architecture.k": 9})
    assert other.sae.architecture == TopK(k=9)
    assert replaced(other, topk) == other
    cosine = changed(made, {"train.lr_schedule.kind": "cosine"})
    assert cosine.train.lr_schedule == Schedule(kind="cosine", warmup_steps=100, last=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.lr": -1.0}, "command line: train.lr must be positive"),
        ({"train.lrr": 1}, "command line: unknown key 'train.lrr'"),
        ({"tune.trials": "many"}, "command line: tune.trials: "),
        ({"train.objective.l1.weight": -1.0}, "command line: train.objective.l1.weight must be 0"),
        ({"train.steps": 50}, "command line: train.lr_schedule: start_step"),
        (
            {"train.objetcive.l1.weight": 1},
            "command line: unknown key 'train.objetcive': did you mean",
        ),
        ({"train.lr.high": 1}, "command line: train.lr: .* got {'high': 1}"),
        ({"sae.architecture.kind": "topkk"}, "command line: sae.architecture.kind must be one of"),
        ({"sae.architecture.k": 3}, "command line: unknown key 'sae.architecture.k'"),
    ],
)
def test_a_change_is_checked_like_a_recipe(change, message):
    with pytest.raises(UserError, match=f"^{message}"):
        changed(parse({"name": "n"}), change)


def test_documentation_stands_with_every_field_of_its_own():
    for model in (recipes.Recipe, recipes.Resources):
        assert all(field.description for field in model.model_fields.values())
