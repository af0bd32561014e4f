"""Any torch module of the user's as a host: `package.module:callable` gives it, another callable its inputs.

host: {kind: module, build: mine.model:load, hook: encoder.1, collate: mine.model:collate}

def load(**options) -> nn.Module: ...
def collate(documents: list[Document]) -> Inputs: ...
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_ext.corpora.documents import Document
from sae_ext.errors import UserError
from sae_ext.fields import STRICT, require, require_above
from sae_ext.hosts.base import Found, Host, HostConfig, empty, placed
from sae_ext.hosts.hooks import Place, module_at, run


class Inputs(NamedTuple):
    """What a module runs on, for some documents."""

    arguments: dict[str, Tensor]
    """Passed by name."""
    mask: Tensor | None = None
    """bool [documents, places]: which places of the hooked output [documents, places, d_in] give rows. None where
    it is [documents, d_in], a row each."""
    names: Sequence[Sequence[str]] | None = None
    """What stands at each place, for people."""


@dataclass(frozen=True, kw_only=True)
class Module(HostConfig):
    """See the module. Both callables must be importable where the work is done."""

    __pydantic_config__ = STRICT

    kind: Literal["module"] = "module"
    build: str
    """`package.module:callable` that gives the module, its weights loaded."""
    collate: str
    """`package.module:callable` that makes a list of documents into `Inputs`."""
    hook: str
    """Path of the module inside whose output is read: `encoder.1`."""
    options: dict[str, str | float | bool] = field(default_factory=dict)
    """Arguments of `build`, by name."""
    batch_documents: int = 64
    """Documents per forward pass."""

    def __post_init__(self) -> None:
        require_above(self, 0, "batch_documents")
        for name in ("build", "collate"):
            value = getattr(self, name)
            require(
                value.count(":") == 1 and all(value.split(":")),
                f"{name} must be package.module:callable, got {value!r}",
            )

    def fingerprint(self) -> str:
        """Hash over the module's weights and the files of both callables."""
        digest = hashlib.sha256()
        for name in ("build", "collate"):
            digest.update(_source_of(imported(getattr(self, name), f"host.{name}")))
        for name, tensor in sorted(self._built().state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def open(self, device: str = "cpu") -> ModuleHost:
        """Import both and build the module."""
        return ModuleHost(self._built(), imported(self.collate, "host.collate"), self, device)

    def width(self) -> int | None:
        """Not known before it has run."""
        return None

    def portable(self) -> Module:
        """Itself."""
        return self

    def described(self) -> dict[str, Any]:
        """What SAELens wants to know."""
        return {"model_name": self.build, "hook_name": self.hook}

    def summary(self) -> str:
        """Callable and hook."""
        return f"{self.build} {self.hook}"

    def _built(self) -> nn.Module:
        built = imported(self.build, "host.build")(**self.options)
        if not isinstance(built, nn.Module):
            raise UserError(
                f"host.build: {self.build} gives a {type(built).__name__}, not a torch.nn.Module"
            )
        return built


def imported(name: str, field_name: str) -> Callable[..., Any]:
    """The callable of `package.module:callable`; the folder the command is run in is looked into as well.

    Raises:
        UserError: there is no such module, it cannot be imported, or it has no such callable.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise UserError(
            f"{field_name}: {module} cannot be imported ({type(error).__name__}: {error}): install it, or run the "
            "command in the folder it lies in"
        ) from error
    if not callable(found):
        raise UserError(f"{field_name}: {module} has no callable {attribute!r}")
    call: Callable[..., Any] = found
    return call


def _source_of(call: Callable[..., Any]) -> bytes:
    try:
        return Path(inspect.getfile(inspect.unwrap(call))).read_bytes()
    except (TypeError, OSError):  # built in
        return repr(call).encode()


class ModuleHost(Host):
    """One that is built."""

    def __init__(
        self,
        model: nn.Module,
        collate: Callable[[list[Document]], Inputs],
        config: Module,
        device: str = "cpu",
    ) -> None:
        self.config, self.collate, self.device = config, collate, device
        self.model = model.eval().requires_grad_(False).to(device)
        self._place = Place(config.hook, module_at(self.model, config.hook))

    def read(self, documents: Sequence[Document], dtype: torch.dtype) -> list[Found]:
        """Rows of the documents at the hook."""
        xs, counts, texts = [], [], []
        named = True
        for start in range(0, len(documents), self.config.batch_documents):
            part = list(documents[start : start + self.config.batch_documents])
            inputs = self.collate(part)
            arguments = {name: t.to(self.device) for name, t in inputs.arguments.items()}
            (x,) = run(self.model, [self._place], arguments)
            mask = self._mask(inputs.mask, x, len(part))
            counts.append(mask.sum(dim=1).numpy())
            xs.append(x.cpu().reshape(-1, x.shape[-1])[mask.flatten()].to(dtype))
            named = named and inputs.names is not None
            if inputs.names is not None:
                texts += [n for names, kept in zip(inputs.names, mask.tolist(), strict=True)
                          for n, k in zip(names, kept, strict=False) if k]  # fmt: skip
        rows = np.concatenate(counts)
        x = torch.cat(xs)
        if named and len(texts) != len(x):
            raise UserError(
                f"host.collate: {self.config.collate} names {len(texts)} places, but {len(x)} give rows: give "
                "each a name"
            )
        return [Found(x, rows, placed(rows), None, texts if named else None, empty(rows))]

    def _mask(self, mask: Tensor | None, x: Tensor, documents: int) -> Tensor:
        if mask is None:
            mask = torch.ones(documents, 1, dtype=torch.bool)
            x = x[:, None] if x.ndim == 2 else x
        mask = mask.bool().cpu()
        if x.ndim != 3 or x.shape[:2] != mask.shape:
            raise UserError(
                f"host.hook: {self.config.hook} gives {list(x.shape)} for {documents} documents, but rows are "
                f"taken from [{documents}, {mask.shape[1]}, d_in]: correct the mask of {self.config.collate}, or "
                "hook another module"
            )
        return mask
