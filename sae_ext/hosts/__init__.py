"""The hosts there are: what gives rows of activations. A new one is a file beside these, and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from sae_ext.fields import from_dict
from sae_ext.hosts.base import Found, Host, HostConfig
from sae_ext.hosts.embeddings import Embeddings
from sae_ext.hosts.module import Inputs, Module
from sae_ext.hosts.synthetic import Planted, Sine
from sae_ext.hosts.transformer import Hook, Transformer


def _kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return str(value.get("kind", "transformer"))
    return getattr(value, "kind", None)


AnyHost = Annotated[
    Annotated[Transformer, Tag("transformer")]
    | Annotated[Module, Tag("module")]
    | Annotated[Embeddings, Tag("embeddings")]
    | Annotated[Sine, Tag("sine")]
    | Annotated[Planted, Tag("planted")],
    Discriminator(_kind),
]
"""What activations can be read from, told apart by `kind`; a transformer where it says nothing."""


def from_content(content: Mapping[str, Any]) -> HostConfig:
    """A host's configuration from a manifest.

    Raises:
        UserError: a key is unknown or a value wrong, as a manifest of another version may hold.
    """
    host: HostConfig = from_dict(AnyHost, content)  # type: ignore[arg-type]  # told apart by its kind
    return host


__all__ = [
    "AnyHost",
    "Embeddings",
    "Found",
    "Hook",
    "Host",
    "HostConfig",
    "Inputs",
    "Module",
    "Planted",
    "Sine",
    "Transformer",
    "from_content",
]
