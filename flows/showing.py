"""What the store holds, for a person at a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.display import figure
from sae_ext import hosts
from sae_ext.artefacts import activations, campaigns, features, saes
from sae_ext.errors import Diverged, UserError
from sae_ext.metrics.stability import agreement
from sae_ext.store import KINDS, Manifest, Store

_EXAMPLES = 8
_SEED = "train.seed"


def report(console: Console, url: str, campaign: str, out: Path | None) -> None:
    """Key figures of a campaign (the newest when not named), and where its report is.

    Raises:
        UserError: no such campaign, or `out` cannot be written.
    """
    store = Store.open(url)
    key = store.find(campaign, (campaigns.KIND,))[1] if campaign else _newest(store)
    manifest = store.manifest(campaigns.KIND, key)
    table = Table(title=f"{manifest.config['name']}  [dim]{key}[/]", title_justify="left")
    for heading in ("", "value", "target", ""):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("", style="dim")
    for line in manifest.extra["scorecard"]:
        verdict = {True: "[green]ok[/]", False: "[red]MISSED[/]", None: ""}[line["ok"]]
        table.add_row(
            line["metric"], figure(line["value"]), line["target"] or "", verdict, line["note"]
        )
    console.print(table)
    folder = store.path(campaigns.KIND, key)
    if out is not None:
        folder = str(_copy(store, manifest, out))
    console.print(f"report  {folder}/{campaigns.REPORT}", soft_wrap=True)
    differs = manifest.extra["differs_in_saelens"]
    said = "loads in SAELens" if differs is None else f"not for SAELens: {differs}"
    console.print(f"export  {folder}/export  [dim]({escape(said)})[/]", soft_wrap=True)


def harvested(console: Console, url: str, keys: Sequence[str]) -> None:
    """What was read at each place, and its key."""
    store = Store.open(url)
    for key in keys:
        console.print(f"{key}  {_gist(store.manifest(activations.KIND, key))}", soft_wrap=True)


def sweep(
    console: Console, url: str, swept: Sequence[tuple[dict[str, Any], str | Diverged]]
) -> None:
    """The SAEs of a sweep side by side, and how far dictionaries that differ by seed agree.

    Raises:
        UserError: some diverged; the others are shown.
    """
    found = [(values, key) for values, key in swept if isinstance(key, str)]
    if found:
        _side_by_side(console, Store.open(url), found)
    diverged = [f"{_named(values)}: {why}" for values, why in swept if isinstance(why, Diverged)]
    if diverged:
        others = f" (and {len(diverged) - 1} more)" if len(diverged) > 1 else ""
        raise UserError(f"{len(diverged)} of {len(swept)} SAEs diverged: {diverged[0]}{others}")


def _side_by_side(
    console: Console, store: Store, found: Sequence[tuple[dict[str, Any], str]]
) -> None:
    table = Table(box=None, pad_edge=False)
    varied = list(found[0][0])
    for heading in (*(name.rpartition(".")[2] for name in varied), "FVU", "L0", "dead", "λ", "key"):
        table.add_column(heading, justify="right")
    for values, key in found:
        extra = store.manifest(saes.KIND, key).extra
        seen = extra["validation"]
        table.add_row(
            *(str(values[name]) for name in varied),
            figure(seen["fvu"]),
            f"{seen['l0']:.1f}",
            figure(seen["dead_fraction"]),
            figure(extra["penalty"]),
            key,
        )
    console.print(table)
    for named, keys in _by_seed(found).items():
        first, *others = (saes.load(store, key).parameters.W_dec for key in keys)
        pairs = [agreement(first, other) for other in others]
        own, null = (
            sum(p["matched_cosine"] for p in side) / len(side)
            for side in (pairs, [p["null_random"] for p in pairs])
        )
        share = sum(p["matched_above_0.9"] for p in pairs) / len(pairs)
        console.print(
            f"{named}{len(keys)} seeds: matched one to one, decoder rows have cosine {own:.2f} (random "
            f"directions {null:.2f}); {100 * share:.0f} % above 0.9",
            soft_wrap=True,
        )


def _by_seed(found: Sequence[tuple[dict[str, Any], str]]) -> dict[str, list[str]]:
    """Keys of SAEs that differ by seed alone, by what they have in common."""
    groups: dict[str, list[str]] = {}
    for values, key in found:
        rest = _named({n: v for n, v in values.items() if n != _SEED})
        group = groups.setdefault(f"{rest}, " if rest else "", [])
        if key not in group:  # two ways to write a value are one SAE
            group.append(key)
    return {name: keys for name, keys in groups.items() if len(keys) > 1}


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def listing(console: Console, url: str, kind: str) -> None:
    """A table of the artefacts of one kind, or of all."""
    if kind and kind not in KINDS:
        raise UserError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    store = Store.open(url)
    table = Table(box=None, pad_edge=False)
    for heading in ("kind", "key", "created", "size"):
        table.add_column(heading, no_wrap=True)
    table.add_column("")
    for each in [kind] if kind else KINDS:
        for key in store.list(each):
            manifest = store.manifest(each, key)
            size = sum(f["bytes"] for f in manifest.files.values()) / 2**20
            table.add_row(each, key, manifest.created, f"{size:,.1f} MB", _gist(manifest))
    if table.row_count == 0:
        console.print(f"nothing in {url} yet: start with `sparsemill run recipes/quickstart.yaml`")
    else:
        console.print(table)


def artefact(console: Console, url: str, prefix: str, feature: int | None) -> None:
    """One artefact's manifest, or one feature's evidence.

    Raises:
        UserError: no artefact or several match, or the feature does not exist.
    """
    store = Store.open(url)
    kind, key = store.find(prefix)
    manifest = store.manifest(kind, key)
    if feature is not None:
        _evidence(console, store, manifest, feature)
        return
    console.print(f"[bold]{kind}/{key}[/]  {manifest.created}  {_gist(manifest)}")
    for title, content in (
        ("made from", manifest.inputs),
        ("configuration", manifest.config),
        (
            "facts",
            {k: v for k, v in manifest.extra.items() if k not in ("mean", "variance", "scorecard")},
        ),
        ("seconds", manifest.timings),
        ("machine", manifest.machine),
    ):
        if content:
            console.print(f"[bold]{title}[/]")
            console.print(json.dumps(content, indent=2, ensure_ascii=False), markup=False)
    console.print("[bold]files[/]")
    for name, facts in manifest.files.items():
        console.print(f"  {facts['bytes']:>12,}  {facts['sha256'][:12]}  {name}", markup=False)


def _evidence(console: Console, store: Store, manifest: Manifest, feature: int) -> None:
    key = manifest.key if manifest.kind == features.KIND else manifest.inputs.get("features")
    if key is None:
        raise UserError(
            f"{manifest.kind}/{manifest.key} has no features: name a features or campaigns key"
        )
    table = store.read_table(features.KIND, key, features.FEATURES)
    if not 0 <= feature < table.num_rows:
        raise UserError(f"--feature {feature} is not between 0 and {table.num_rows - 1}")
    facts = table.slice(feature, 1).to_pylist()[0]
    console.print(f"[bold]feature {feature}[/]  fires in {facts['density']:.3%} of rows")
    windows = store.read_table(features.KIND, key, features.WINDOWS)
    rows = windows.filter(_column(windows, "feature", feature))
    for row in [r for r in rows.to_pylist() if r["kind"] == "top"][:_EXAMPLES]:
        line = Text(f"{row['doc_id'][:40]:<40} ", style="dim")
        for token, value in zip(row["tokens"], row["activations"], strict=True):
            text = token.removeprefix("##") if token.startswith("##") else f" {token}"
            line.append(text, style="bold black on yellow" if value > row["max"] / 3 else "default")
        console.print(line, soft_wrap=True)


def _column(table: Any, name: str, value: int) -> Any:
    import pyarrow.compute as pc

    return pc.equal(table[name], value)


def _newest(store: Store) -> str:
    keys = store.list(campaigns.KIND)
    if not keys:
        raise UserError(f"no campaign in {store.url} yet: run one with `sparsemill run RECIPE`")
    return keys[0]


def _copy(store: Store, manifest: Manifest, out: Path) -> Path:
    try:
        for name in manifest.files:
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(store.read(manifest.kind, manifest.key, name))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error})") from error
    return out.resolve()


def _gist(manifest: Manifest) -> str:
    """A few words on an artefact's content."""
    extra, config = manifest.extra, manifest.config
    match manifest.kind:
        case "activations":
            host = hosts.from_content(config["host"]).summary()
            return f"{extra['n_rows']:,} × {extra['d_in']} {extra['dtype']}, {host}"
        case "saes":
            seen = extra["validation"]
            what = f"d_sae {config['sae']['d_sae']}" if "sae" in config else "imported"
            return f"{what}, FVU {figure(seen['fvu'])} at L0 {seen['l0']:.1f}"
        case "trials":
            return f"{extra['n_trials']} trials, best FVU {extra['best']['fvu']:.3f}"
        case "features":
            return f"{extra['n_rows']:,} rows analysed"
        case "interpretations":
            told = extra["summary"]
            return f"{told['n_features']} features, {told['explainer_kind']}"
        case _:
            return escape(str(config.get("name", "")))
