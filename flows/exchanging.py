"""SAEs of other libraries: taking them into the store, and writing ours for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from flows.display import figure
from sae_ext.artefacts import activations, saes
from sae_ext.errors import UserError
from sae_ext.interchange import dictionary_learning, pth, saelens
from sae_ext.model import SAE
from sae_ext.store import Store

_WRITERS = {"saelens": saelens.write, "dictionary_learning": dictionary_learning.write}
_READERS: dict[str, Callable[[Path], SAE]] = {
    "saelens": saelens.read,
    "dictionary_learning": dictionary_learning.read,
    "splatnlp": lambda path: pth.read_splatnlp(path, clip=6.0),  # the clip of all its SAEs
    # Its files do not say how the decoder ends.
    "growth_signals-identity": lambda path: pth.read_growth_signals(path, output="identity"),
    "growth_signals-sigmoid": lambda path: pth.read_growth_signals(path, output="sigmoid"),
    "growth_signals-tanh": lambda path: pth.read_growth_signals(path, output="tanh"),
}


def export(
    console: Console, url: str, prefix: str, layout: str, out: Path, *, allow_clip: bool
) -> None:
    """Write an SAE of the store as a folder another library loads.

    Raises:
        UserError: no such SAE or layout, `out` is in use, or the other library would compute other numbers.
    """
    store = Store.open(url)
    write = _WRITERS.get(layout)
    if write is None:
        raise UserError(f"--format {layout!r} is not one of {', '.join(_WRITERS)}")
    _, key = store.find(prefix, (saes.KIND,))
    seen = store.manifest(saes.KIND, key).extra["validation"]
    made = store.manifest(saes.KIND, key)
    source = store.manifest(activations.KIND, made.inputs["activations"]).config
    metadata = saes.metadata(source, seen, made.config.get("stream"))
    write(saes.load(store, key), out, metadata, clip_rate=seen["clip_rate"], allow_clip=allow_clip)
    console.print(f"{layout}  {out}", soft_wrap=True)


def import_(console: Console, url: str, path: Path, layout: str, prefix: str) -> None:
    """Take an SAE into the store and say how good it is on the validation rows of some activations.

    Raises:
        UserError: the file is not readable as that layout, or does not fit the activations.
    """
    read = _READERS.get(layout)
    if read is None:
        raise UserError(f"--format {layout!r} is not one of {', '.join(_READERS)}")
    _, source = Store.open(url).find(prefix, (activations.KIND,))
    stage, seen = saes.take_in(Store.open(url, writable=True), read(path), source)
    console.print(
        f"saes/{stage.key}  validation FVU {figure(seen['fvu'])} at L0 {seen['l0']:.1f}",
        soft_wrap=True,
    )
