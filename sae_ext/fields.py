"""What all configuration classes share: plain frozen dataclasses whose fields are checked when they are made.

Each field is documented under itself. Unknown keys are refused where configs are read from a file
(`flows.recipe`) or from a manifest (`from_dict`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from sae_ext.errors import UserError

T = TypeVar("T")

STRICT: Any = {"extra": "forbid"}  # read by pydantic


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-ready data; tuples become lists."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def from_dict(kind: type[T], content: Mapping[str, Any]) -> T:
    """A config from what `to_dict` made of it.

    Raises:
        UserError: a key is unknown or a value wrong, as a manifest of another version may hold.
    """
    from pydantic import TypeAdapter, ValidationError  # takes a while to import

    try:
        return TypeAdapter(kind).validate_python(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{getattr(kind, '__name__', 'host')}: {where}: {first['msg']}") from error


def with_changes(config: T, changes: Mapping[str, Any]) -> T:
    """A copy with some fields replaced, checked like the original; `a.b` names a field of a field."""
    changed: dict[str, Any] = dict(vars(config))
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        if inner and changed[outer] is None:
            raise UserError(f"{name} cannot be set: there is no {outer}")
        changed[outer] = with_changes(changed[outer], {inner: value}) if inner else value
    return type(config)(**changed)


def require(ok: bool, what: str) -> None:
    """Raise `UserError` unless ok."""
    if not ok:
        raise UserError(what)


def require_finite(config: Any) -> None:
    """No field is infinite or no number: keys are made of fields, and where no bound is wanted it is left out."""
    for name, value in vars(config).items():
        numbers = tuple(value.values()) if isinstance(value, Mapping) else value
        for number in numbers if isinstance(numbers, tuple) else (numbers,):
            bad = isinstance(number, float) and not math.isfinite(number)
            require(not bad, f"{name} must be finite, got {number}")


def require_above(config: Any, low: float, *names: str) -> None:
    """These fields, where they are set, are above `low`."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > low, f"{name} must be {_above(low)}, got {value}")


def require_at_least(config: Any, low: float, *names: str) -> None:
    """These fields, where they are set, are `low` or more."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= low, f"{name} must be {low:g} or more, got {value}")


def _above(low: float) -> str:
    return "positive" if low == 0 else f"above {low:g}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
