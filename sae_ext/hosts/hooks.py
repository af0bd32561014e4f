"""Reading what modules give or are given while a model runs, and leaving the model once all have been read."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_ext.errors import UserError


class Place(NamedTuple):
    """A hook in a loaded model."""

    name: str
    module: nn.Module
    before: bool = False
    """Whether what the module reads is wanted, not what it gives."""
    pooled: bool = False
    """Whether it is [batch, d_in]."""


class Done(Exception):
    """Raised inside the forward to leave it."""


@contextmanager
def hooked(places: Sequence[Place], captured: list[Tensor | None]) -> Iterator[None]:
    """Have what stands at each place put into `captured`, and the forward left after the last of them."""

    def take(index: int, value: Any) -> None:
        if captured[index] is None:
            captured[index] = first_tensor(value)
            if all(x is not None for x in captured):
                raise Done

    def before(index: int) -> Callable[..., None]:
        return lambda _module, args, kwargs: take(index, args or list(kwargs.values()))

    def after(index: int) -> Callable[..., None]:
        return lambda _module, _args, output: take(index, output)

    handles = [
        place.module.register_forward_pre_hook(before(i), with_kwargs=True)
        if place.before
        else place.module.register_forward_hook(after(i))
        for i, place in enumerate(places)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(value: Any) -> Tensor:
    """The tensor that a module's output is, or begins with.

    Raises:
        UserError: it is no tensor and begins with none.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and value:
        return first_tensor(value[0])
    raise UserError(
        f"host: the module that is hooked gives a {type(value).__name__}, not a tensor: name another one"
    )


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of that path.

    Raises:
        UserError: there is none; it names the nearest there are.
    """
    names = [name for name, _ in model.named_modules() if name]
    if path in names:
        return model.get_submodule(path)
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or names[:5]
    raise UserError(
        f"host: a {type(model).__name__} has no module {path!r}: did you mean {' or '.join(near)}?"
    )


def run(model: Any, places: Sequence[Place], inputs: dict[str, Tensor]) -> list[Tensor]:
    """What stands at each place when the model runs on `inputs`; the forward is left after the last of them.

    Raises:
        UserError: one of them does not run.
    """
    captured: list[Tensor | None] = [None] * len(places)
    with hooked(places, captured), contextlib.suppress(Done), torch.inference_mode():
        model(**inputs)
    found = []
    for place, x in zip(places, captured, strict=True):
        if x is None:
            raise UserError(
                f"host: {place.name} does not run when the model does: name another module"
            )
        found.append(x)
    return found
