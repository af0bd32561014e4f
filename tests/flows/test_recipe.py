from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from flows import recipe as recipes
from flows.recipe import Recipe, Resources, changed, load, parse, to_yaml
from sae_ext.errors import UserError

SECTIONS = {name: kind for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind)}
FIELDS = [
    *((section, field.name) for section, kind in SECTIONS.items() for field in fields(kind)),
    *(("resources", name) for name in Resources.model_fields),
]
# Values for fields whose default does not show what else they may hold.
OTHER: dict[str, Any] = {
    "corpus.source": "texts.jsonl",
    "corpus.limit": 5,
    "host.model": "a/model",
    "harvest.dtype": "float32",
    "sae.d_in": 5,
    "sae.clip": 5.5,
    "tune.steps": 5,
    "tune.trials": 9,
    "interpret.backend": "openai",
    "interpret.base_url": "http://127.0.0.1:8000/v1",
    "interpret.model": "a-model",
    "resources.ray_address": "head:6379",
}
ALONG = {"interpret.backend": {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}}


def another(section: str, field: str, default: Any) -> Any:
    """A value other than the default, as YAML would hold it."""
    if f"{section}.{field}" in OTHER:
        return OTHER[f"{section}.{field}"]
    if isinstance(default, bool):
        return not default
    if isinstance(default, tuple):
        return [1.5 * value for value in default]
    return default + 1 if isinstance(default, int) else default * 0.5


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


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_field_can_be_set_and_is_the_only_one_that_changes(write, section, field):
    before = parse({"name": "n"})
    value = another(section, field, getattr(getattr(before, section), field))
    along = ALONG.get(f"{section}.{field}", {})
    made = load(write({"name": "n", section: {field: value, **along}}))
    found = getattr(getattr(made, section), field)
    assert (list(found) if isinstance(found, tuple) else found) == value
    assert found != getattr(getattr(before, section), field)
    old, new = before.model_dump(), made.model_dump()
    moved = {(s, f) for s in old if isinstance(old[s], dict) for f in old[s]
             if old[s][f] != new[s][f]}  # fmt: skip
    assert moved == {(section, field), *((section, name) for name in along)}


def test_every_section_has_a_default_for_every_field():
    for kind in SECTIONS.values():
        assert all(field.default is not MISSING for field in fields(kind))


def test_a_number_in_scientific_notation_is_a_number(write):
    made = load(write("name: n\ntrain: {lr: 1e-3}\ntune: {lr: [1e-4, 2e-3]}\n"))
    assert made.train.lr == 1e-3
    assert made.tune.lr == (1e-4, 2e-3)


def test_a_recipe_comes_back_from_its_own_yaml(write):
    made = parse(
        {"name": "n", "tune": {"lr": [1e-4, 1e-3], "trials": 6}, "sae": {"clip": 3},
         "corpus": {"source": "tëxts.jsonl"}}
    )  # fmt: skip
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
            "unknown key 'host.xyzzy': known here are model, layer, max_tokens",
        ),
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
        ({"harvest": {"dtype": "float8"}}, "harvest.dtype: .*'float16' or 'float32'"),
        ({"tune": {"lr": 1e-3}}, "tune.lr"),
        ({"tune": {"lr": [1e-3]}}, r"tune\.lr"),
        ({"resources": {"workers": 0}}, "resources.workers: .*greater than or equal to 1"),
        ({"name": "two words"}, "name: .*got 'two words'"),
        ({"name": "../up"}, "name: "),
        ({"name": None}, "name: "),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(content, named):
    assert re.search(named, refusal({"name": "n", **content}))


def test_a_missing_name_is_told():
    assert "the key 'name' is missing" in refusal({"train": {"steps": 3}})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"train": {"lr": -1.0}}, "train.lr must be positive"),
        ({"train": {"lr": -1}}, "train.lr must be positive"),
        ({"tune": {"lr": [2, 1]}}, "tune.lr must be [low, high]"),
        ({"sae": {"clip": -1.0}}, "sae.clip must be positive"),
        ({"sae": {"clip": float("inf")}}, "sae.clip must be finite"),
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
    other = changed(made, {"train.steps": 7, "train.lr": None, "store": "s3://x", "sae.clip": 2})
    assert (other.train.steps, other.train.lr, other.store, other.sae.clip) == (7, 0.5, "s3://x", 2)
    assert changed(other, {"train.steps": 2000, "store": "store"}).sae.clip == 2
    assert made.train.steps == 2000
    assert changed(made, {}) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.lr": -1.0}, "command line: train.lr must be positive"),
        ({"train.lrr": 1}, "command line: unknown key 'train.lrr'"),
        ({"tune.trials": "many"}, "command line: tune.trials: "),
    ],
)
def test_a_change_is_checked_like_a_recipe(change, message):
    with pytest.raises(UserError, match=f"^{message}"):
        changed(parse({"name": "n"}), change)


def test_documentation_stands_with_every_field_of_its_own():
    for model in (recipes.Recipe, recipes.Resources):
        assert all(field.description for field in model.model_fields.values())
