"""How good the autoencoders are, how fast they are made, and whether a killed training ends the same.

    python -m benchmarks.quality                       everything, about an hour and a half on two cores
    python -m benchmarks.quality --only planted target
    python -m benchmarks.quality --store FOLDER        where the quickstart's activations are, or will be

Needs `make peers`. Run it on an otherwise idle machine: the ratio of wall-clocks is one of the bars. All
contenders get the same rows, steps, threads and learning rate; λ is found for each, the rate is not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import records
from benchmarks.quality import contenders, plots, resume, throughput
from benchmarks.quality.contenders import DICTIONARY_LEARNING, OURS, SAELENS, Result
from benchmarks.quality.problem import Planted, Settings, planted, scale_of
from benchmarks.records import Bar
from sae_ext.activations.reader import Activations
from sae_ext.store import Store

_RESULTS = Path(__file__).parents[1] / "results"
_CSV = _RESULTS / "quality.csv"
_RUNS = _RESULTS / "quality_runs.csv"  # every autoencoder
_PICTURE = Path(__file__).parents[2] / "docs" / "images" / "pareto.png"
_RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
_PEERS = (SAELENS, DICTIONARY_LEARNING)
_SECTIONS = ("planted", "minilm", "target", "resume", "throughput")

_PLANTED = (  # and λ from which each contender's own is searched
    (Planted(512, 64, 10), Settings(512, 4000, 2048, 5e-3, 100, 800, 2000, 20_000), 2.75),
    (Planted(2048, 256, 20), Settings(2048, 1500, 1024, 5e-3, 100, 300, 750, 20_000), 3.1),
)
_PLANTED_ROWS = 220_000
_MINILM = Settings(3072, 600, 1024, 1.5e-3, 60, 120, 120, 0)
_QUICKSTART = Settings(3072, 1500, 2048, 1.5e-3, 100, 300, 200, 0)  # as the recipe has it
_LADDER = (1.0, 1.6, 2.5, 4.0, 6.3)
_TARGETS = (16.0, 32.0, 64.0)
_KILLS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=_SECTIONS, default=_SECTIONS)
    parser.add_argument("--store", default=None, help="store with the quickstart's activations")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the planted dictionaries")
    chosen = parser.parse_args(arguments)
    missed = False

    def found(bars: Sequence[Bar]) -> None:  # at once, as a later section may fail
        nonlocal missed
        missed |= records.missed_any(bars, _CSV)

    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        work = Path(folder)
        store = chosen.store or str(work / "store")
        if "planted" in chosen.only:
            for kind, settings, first in _PLANTED:
                found(_planted(kind, settings, first, chosen.seeds, work))
        if {"minilm", "target", "throughput"} & set(chosen.only):
            data = _activations(store)
            x, settings = _as_array(data, work)
            if "minilm" in chosen.only:
                found(_minilm(x, settings, work))
            if "target" in chosen.only:
                found(_targets(x, _QUICKSTART._replace(held_out=settings.held_out)))
            if "throughput" in chosen.only:
                share = throughput.ratio(data, _QUICKSTART, 2.7, _say)
                what = "rate of steps from mapped shards ÷ on resident rows"
                found([Bar(what, share, ">=", 0.85)])
        if "resume" in chosen.only:
            found([_resume(work)])
    return int(missed)


def _planted(kind: Planted, settings: Settings, first: float, seeds: int, work: Path) -> list[Bar]:
    """Recovery of a planted dictionary at its own L0."""
    name = f"planted {kind.n_features}/{kind.d_in}/{kind.active}"
    _say(f"\n{name}: d_sae {settings.d_sae}, {settings.steps} steps of {settings.batch_rows} rows")
    found: list[Result] = []
    target, l1 = float(kind.active), dict.fromkeys((OURS, *_PEERS), first)
    for seed in range(seeds):
        rows, truth = planted(kind, _PLANTED_ROWS, seed)
        x = work / "planted.npy"
        np.save(x, rows)

        def once(
            name: str, l1: float, x: Path = x, seed: int = seed, truth: np.ndarray = truth
        ) -> Result:
            if name == OURS:
                return contenders.ours(x, settings, seed, l1=l1, truth=truth)
            return contenders.peer(name, x, settings, seed, l1=l1, work=work, truth=truth)

        for who in (OURS, *_PEERS):
            if seed == 0:
                result = contenders.at_l0(target, l1[who], lambda v, who=who: once(who, v))
                l1[who] = result.l1
            else:
                result = once(who, l1[who])
            found.append(result)
            _tell(name, result)
    return _compare(name, found)


def _compare(name: str, found: Sequence[Result]) -> list[Bar]:
    """Ours against the better peer, within the noise of seeds."""

    def mean(who: str, field: str) -> float:
        return statistics.fmean(getattr(r, field) for r in found if r.name == who)

    def noise(who: str, field: str) -> float:
        values = [getattr(r, field) for r in found if r.name == who]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    bars = []
    best = max(_PEERS, key=lambda who: mean(who, "matched_cosine"))
    allowed = math.hypot(noise(OURS, "matched_cosine"), noise(best, "matched_cosine"))
    least = mean(best, "matched_cosine") - allowed
    bars.append(Bar(f"{name}: matched cosine, best peer ({best}) less noise",
                    mean(OURS, "matched_cosine"), ">=", least))  # fmt: skip
    best = min(_PEERS, key=lambda who: mean(who, "fvu"))
    most = mean(best, "fvu") + math.hypot(noise(OURS, "fvu"), noise(best, "fvu"))
    bars.append(Bar(f"{name}: FVU, best peer ({best}) plus noise", mean(OURS, "fvu"), "<=", most))
    bars.append(Bar(f"{name}: share of dead features", mean(OURS, "dead"), "<=", 0.01))
    for who in _PEERS:
        share = mean(OURS, "seconds") / mean(who, "seconds")
        bars.append(Bar(f"{name}: seconds ÷ {who}'s", share, "<=", 0.25))
    return bars


def _minilm(x: Path, settings: Settings, work: Path) -> list[Bar]:
    """Explained variance over λ on a sentence encoder's activations."""
    _say(
        f"\nMiniLM layer 3: d_sae {settings.d_sae}, {settings.steps} steps of {settings.batch_rows} rows"
    )
    found = []
    for l1 in _LADDER:
        results = [contenders.ours(x, settings, 0, l1=l1)]
        results += [contenders.peer(who, x, settings, 0, l1=l1, work=work) for who in _PEERS]
        for result in results:
            _tell("MiniLM", result)
        found += results
    spread = [contenders.ours(x, settings, seed, l1=_LADDER[2]) for seed in (1, 2)]
    middle = next(r for r in found if r.name == OURS and r.l1 == _LADDER[2])
    noise = statistics.stdev(1 - r.fvu for r in (middle, *spread))
    plots.pareto(found, _PICTURE)
    bars = []
    at_32 = {who: _variance_at(found, who, 32.0) for who in (OURS, *_PEERS)}
    for who in _PEERS:
        bars.append(Bar(f"MiniLM: explained variance at L0 32, {who}'s less noise", at_32[OURS],
                        ">=", at_32[who] - noise))  # fmt: skip
        leads = [_gap(found, r) for r in found if r.name == who]
        least = min((lead for lead in leads if lead is not None), default=None)
        bars.append(Bar(f"MiniLM: smallest lead over {who}'s curve", least, ">=", -noise))
    return bars


def _targets(x: Path, settings: Settings) -> list[Bar]:
    """Does training with a target end there?"""
    _say("\ntarget L0")
    bars = []
    for target in _TARGETS:
        result = contenders.ours(x, settings, 0, l1=2.0, target_l0=target)
        _tell(f"target L0 {target:g}", result)
        bars.append(Bar(f"target L0 {target:g}: distance of the held-out L0",
                        abs(result.l0 / target - 1), "<=", 0.10))  # fmt: skip
    return bars


def _resume(work: Path) -> Bar:
    _say("\nkilled at random moments")
    rows, _ = planted(Planted(512, 64, 10), 40_000, 0)
    x = work / "resume.npy"
    np.save(x, rows)
    same = resume.kills(x, work, _KILLS, _say)
    return Bar(f"killed trainings of {_KILLS} that end with the same bytes", same, ">=", _KILLS)


def _variance_at(found: Sequence[Result], who: str, l0: float) -> float:
    """Explained variance at an L0, on the line through a contender's points over log L0."""
    points = sorted((math.log(r.l0), 1 - r.fvu) for r in found if r.name == who)
    return float(np.interp(math.log(l0), *zip(*points, strict=True)))


def _gap(found: Sequence[Result], other: Result) -> float | None:
    """How far our curve is above a peer's point; None where it does not reach as far."""
    ours = [r.l0 for r in found if r.name == OURS]
    if not min(ours) <= other.l0 <= max(ours):
        return None
    return _variance_at(found, OURS, other.l0) - (1 - other.fvu)


def _activations(store: str) -> Activations:
    """The quickstart's activations, harvested where they are not there yet."""
    opened = Store.open(store, writable=True)
    if not opened.list("activations"):
        _say("running the quickstart for its activations")
        command = [sys.executable, "-m", "flows", "run", str(_RECIPE), "--store", store]
        subprocess.run(command, check=True, capture_output=True)
    return Activations(opened, opened.list("activations")[0])


def _as_array(data: Activations, work: Path) -> tuple[Path, Settings]:
    """All rows as one scaled array, held-out rows last: what every contender reads."""
    train, held_out = (
        data.rows("train"),
        np.sort(np.concatenate([data.rows("validation"), data.rows("test")])),
    )
    x = np.concatenate([data.gather(train).numpy(), data.gather(held_out).numpy()])
    path = work / "minilm.npy"
    np.save(path, x * scale_of(x[: len(train)]))
    return path, _MINILM._replace(held_out=len(held_out))


def _tell(problem: str, r: Result) -> None:
    records.append(_RUNS, {**records.machine(), "problem": problem, **r._asdict()})
    recovery = (
        ""
        if r.matched_cosine is None
        else f"  matched {r.matched_cosine:.3f}  >0.9 {r.recovered:.3f}"
    )
    _say(f"{r.name:<20} seed {r.seed}  λ {r.l1:6.3f}  {r.seconds:6.1f} s  FVU {r.fvu:.3f}  L0 {r.l0:6.1f}  "
         f"dead {r.dead:.4f}{recovery}")  # fmt: skip


def _say(what: str) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    sys.exit(main())
