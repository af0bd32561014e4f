"""The points of a sweep: what varies, and the SAEs that are wanted.

Imports neither Prefect nor Ray, so that a mistake is told, and a finished sweep recognised, before either
starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from flows import recipe as recipes
from flows import stages
from flows.recipe import Recipe
from sae_ext.artefacts import Stage, saes
from sae_ext.errors import UserError
from sae_ext.training.run import require_one_pass

_SECTIONS = ("sae.", "train.")


class Variant(NamedTuple):
    """One point of the grid."""

    values: dict[str, Any]
    """Field of the recipe to value."""
    recipe: Recipe


def variants(recipe: Recipe, vary: Sequence[str]) -> list[Variant]:
    """The grid over `FIELD=VALUE,VALUE,...`, the last field changing fastest.

    Raises:
        UserError: a field is unknown or not one of the SAE and its training, a value is wrong, or the SAEs
            would not read the same batches.
    """
    axes: dict[str, list[Any]] = {}
    for given in vary:
        name, _, values = given.partition("=")
        try:
            axis = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            axis = None
        if not axis or not name.startswith(_SECTIONS):
            raise UserError(
                f"--vary {given!r}: give a field of sae or train and its values, such as train.seed=0,1,2"
            )
        if name in axes:
            raise UserError(f"--vary {name} is given twice: give all its values at once")
        axes[name] = axis
    if not axes:
        raise UserError("nothing varies: give --vary, such as --vary train.seed=0,1,2")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    found = [Variant(point, recipes.replaced(recipe, point)) for point in points]
    require_one_pass([variant.recipe.train for variant in found])
    return found


def stages_of(recipe: Recipe, points: Sequence[Variant]) -> list[Stage]:
    """The stages of a sweep: the activations, then one SAE a point."""
    source, stream = stages.of_activations(recipe), stages.streaming(recipe)
    trained = (saes.stage(p.recipe.sae, p.recipe.train, source.key, stream) for p in points)
    return [source, *trained]
