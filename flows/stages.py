"""Which artefacts a recipe stands for, and which of them are still to be made.

Imports neither Prefect nor Ray, so that a finished campaign is recognised before either starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from flows.recipe import Recipe
from sae_ext import corpora
from sae_ext.activations.harvest import Unit, size_of, units
from sae_ext.activations.streaming import of_stream
from sae_ext.artefacts import Stage, activations, campaigns, features, interpretations, saes, trials
from sae_ext.config import CorpusConfig, HarvestConfig, with_changes
from sae_ext.errors import UserError
from sae_ext.hosts import AnyHost
from sae_ext.store import Store

Keys = Mapping[str, str]
"""Keys of the artefacts made so far, by kind."""


def of_activations(recipe: Recipe) -> Stage:
    """Reads the corpus' and the host's files for their hashes."""
    return harvested(recipe)[0]


def harvested(recipe: Recipe) -> list[Stage]:
    """The activations of each place that is read in one pass, the recipe's own first."""
    return activations.stages(recipe.corpus, recipe.host, recipe.harvest)


def of_trials(recipe: Recipe, keys: Keys) -> Stage:
    """The search over learning rate and λ."""
    return trials.stage(recipe.sae, recipe.train, recipe.tune, keys[activations.KIND])


def of_sae(recipe: Recipe, keys: Keys, store: Store) -> Stage:
    """The final SAE: trained with the winner's learning rate and λ where there was a search."""
    config = recipe.train
    if trials.KIND in keys:
        best = store.manifest(trials.KIND, keys[trials.KIND]).extra["best"]
        config = with_changes(config, {"lr": best["lr"], trials.PENALTY: best["l1"]})
    return saes.stage(recipe.sae, config, keys[activations.KIND], streaming(recipe))


def streaming(recipe: Recipe) -> saes.Streaming | None:
    """The stream that is trained on, if there is one; reads its files for their hash.

    Raises:
        UserError: it is not there.
    """
    if recipe.stream is None:
        return None
    try:
        return saes.Streaming(recipe.stream, recipe.host.documents_fingerprint(recipe.stream))
    except UserError as error:
        raise of_stream(error) from error


def of_features(recipe: Recipe, keys: Keys) -> Stage:
    """The analysis."""
    return features.stage(recipe.analyse, keys[activations.KIND], keys[saes.KIND])


def of_interpretations(recipe: Recipe, keys: Keys) -> Stage:
    """The explanations."""
    return interpretations.stage(recipe.interpret, keys[features.KIND])


def of_campaign(recipe: Recipe, keys: Keys) -> Stage:
    """The report."""
    content = recipe.model_dump(mode="json", exclude={"store", "resources"})
    return campaigns.stage(recipe.name, content, keys)


def all_of(recipe: Recipe, store: Store) -> Iterator[Stage]:
    """Every stage in order; ends early at an unfinished search, whose winner decides the rest."""
    first = of_activations(recipe)
    yield first
    keys = {first.kind: first.key}
    if recipe.tune.trials:
        search = of_trials(recipe, keys)
        yield search
        if not search.done(store):
            return
        keys[search.kind] = search.key
    sae = of_sae(recipe, keys, store)
    keys[sae.kind] = sae.key
    yield sae
    for of in (of_features, of_interpretations, of_campaign):
        stage = of(recipe, keys)
        keys[stage.kind] = stage.key
        yield stage


def planned_harvest(recipe: Recipe, key: str) -> list[Unit]:
    """How the corpus is cut into units of work; worked out once per process and key.

    The command line calls it while its servers start, which takes about as long.

    Raises:
        UserError: the corpus cannot be read.
    """
    return _planned(key, recipe.corpus, recipe.host, recipe.harvest)


@lru_cache(maxsize=1)
def _planned(_key: str, corpus: CorpusConfig, host: AnyHost, harvest: HarvestConfig) -> list[Unit]:
    return list(units(map(size_of, host.documents(corpus)), harvest))


def preflight(recipe: Recipe) -> None:
    """Look at what can be looked at quickly, before anything is started.

    Raises:
        UserError: the host is not there, has fewer blocks than `host.layer` or another width than `sae.d_in`, or
            the user's corpus cannot be read.
    """
    if recipe.corpus.source not in (None, corpora.STDLIB):
        planned_harvest(recipe, of_activations(recipe).key)
    d_in = recipe.host.width()
    if None not in (d_in, recipe.sae.d_in) and recipe.sae.d_in != d_in:
        raise UserError(
            f"sae.d_in is {recipe.sae.d_in}, but {recipe.host.summary()} gives activations of width "
            f"{d_in}: correct it or leave it out"
        )


def check_stream(recipe: Recipe) -> None:
    """Look whether the stream's documents can be read.

    Raises:
        UserError: there is a stream, and it cannot be read.
    """
    if recipe.stream is None:
        return
    try:
        next(recipe.host.documents(recipe.stream))
    except UserError as error:
        raise of_stream(error) from error


def pending(recipe: Recipe, store: Store) -> bool:
    """Whether anything is left to do."""
    return not all(stage.done(store) for stage in all_of(recipe, store))
