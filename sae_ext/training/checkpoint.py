"""A training as bytes: everything the next step depends on, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_ext.errors import CorruptArtefact, UserError

_REMEDY = "delete checkpoint/ in the SAE's folder to train from the start"


_STATE = "state"


def to_bytes(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], identity: Mapping[str, Any]
) -> bytes:
    """Tensors and plain facts, and what they belong to (configuration and data)."""
    text = json.dumps({"facts": facts, "identity": identity}, sort_keys=True)
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # As a tensor, since the header of the format has an end that a long history would reach.
    contiguous[_STATE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    data: bytes = save_tensors(contiguous)
    return data


def from_bytes(
    data: bytes, identity: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts again.

    Raises:
        CorruptArtefact: it cannot be read.
        UserError: it belongs to another configuration or other data; the message names the field.
    """
    try:
        tensors = load_tensors(data)
        state = json.loads(tensors.pop(_STATE).numpy().tobytes())
        facts, found = state["facts"], state["identity"]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise unreadable(error) from error
    # As JSON has it: tuples are lists there.
    wanted = json.loads(json.dumps(identity))
    if found != wanted:
        raise UserError(
            f"the checkpoint was made by another configuration ({_difference(found, wanted)}): {_REMEDY}"
        )
    return tensors, facts


def unreadable(error: Exception) -> CorruptArtefact:
    """What to raise where a checkpoint does not hold what it should."""
    return CorruptArtefact(f"the checkpoint cannot be read ({type(error).__name__}): {_REMEDY}")


def _difference(found: Any, wanted: Any, name: str = "") -> str:
    """The first field in which two configurations differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                inner = f"{name}.{key}" if name else key
                return _difference(found.get(key), wanted.get(key), inner)
    return f"{name} is {found!r} there and {wanted!r} here"
