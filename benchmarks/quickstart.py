"""The quickstart as a newcomer runs it: how long it takes, how much memory, and what comes out.

    python -m benchmarks.quickstart [--store DIR]

Runs `sparsemill run recipes/quickstart.yaml` twice into an empty store (a temporary one unless DIR
is given), with the bare encoder's forward before and after the first run. Takes five to ten minutes
and wants an otherwise idle machine. Prints a table and one line per bar, adds a row to
`benchmarks/results/quickstart.csv`, and exits with 1 if a bar is missed, with 2 if nothing could be
measured. Needs the packages of the `dev` extra.
"""

from __future__ import annotations

import argparse
import operator
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.bare_forward import BareForward
from benchmarks.records import Value, append, machine, shown
from benchmarks.watching import Watched, watch
from flows import recipe as recipes
from flows.recipe import Recipe
from sae_ext.artefacts import activations, campaigns
from sae_ext.errors import UserError
from sae_ext.store import Store

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.csv"

_STAGES = ("harvest", "train", "analyse", "interpret", "aggregate")
_STAGE_DONE = re.compile(rf"✓ ({'|'.join(_STAGES)}) .* ([\d.]+) s$")
_FIRST_UNIT = "harvest: loaded "  # a worker says so when its model is there and its work begins
_RELATIONS = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}
_ELSEWHERE = ("PREFECT_API_URL", "RAY_ADDRESS", "SPARSEMILL_STORE")

Figures = dict[str, Value]
"""What was measured, by column of the CSV file; None is not measured."""

LABELS = {
    "date": "date",
    "cpu": "processor",
    "cores": "cores",
    "torch": "torch",
    "wall_s": "quickstart wall time, s",
    "startup_s": "start-up overhead, s (command to first unit: servers, documents, worker, model)",
    **{f"{stage}_s": f"stage {stage}, s" for stage in _STAGES},
    "second_run_s": "second run, s",
    "peak_rss_gb": "largest process, GB of RSS (10⁹ bytes)",
    "peak_rss_process": "largest process, name",
    "rows": "activation rows",
    "bare_rows_per_s": "bare forward, rows/s (all cores as threads; better of before and after)",
    "harvest_rows_per_s": "harvest, rows/s (rows / (seconds summed over units / workers))",
    "harvest_over_bare": "harvest over bare forward",
    "explained_variance": "held-out explained variance",
    "l0": "held-out L0",
    "dead_fraction": "dead features, share (no firing in the held-out rows)",
    "median_lift": "median lift of the rule baseline over shuffled explanations",
}
"""What each column of the CSV file is, in the order of the columns."""


class Bar(NamedTuple):
    """What a figure must reach."""

    figure: str
    relation: str
    target: float

    def met_by(self, measured: float | str | None) -> bool:
        """Whether it does; what was not measured does not."""
        return isinstance(measured, float) and _RELATIONS[self.relation](measured, self.target)


BARS = (
    Bar("wall_s", "<=", 360.0),
    Bar("startup_s", "<=", 20.0),
    Bar("second_run_s", "<=", 20.0),
    Bar("peak_rss_gb", "<=", 1.5),
    Bar("explained_variance", ">=", campaigns.MIN_EXPLAINED_VARIANCE),
    Bar("l0", "<=", campaigns.MAX_L0),
    Bar("dead_fraction", "<=", campaigns.MAX_DEAD),
    Bar("harvest_over_bare", ">=", 0.8),
    Bar("median_lift", ">", campaigns.MIN_LIFT),
)


def main() -> int:
    """Measure, print, record; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, metavar="DIR", help="empty folder to keep it all in")
    given = parser.parse_args().store
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            figures, peaks = measure(RECIPE, _empty(given or Path(temporary)))
        print_table(figures, peaks)
        missed = [bar for bar in BARS if not print_bar(bar, figures[bar.figure])]
        append(RESULTS, figures)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if missed else 0


def measure(path: Path, store: Path) -> tuple[Figures, dict[str, int]]:
    """Run the recipe twice into an empty store.

    Returns:
        The figures, and the highest resident memory in bytes by name of process.
    """
    recipe = recipes.load(path)
    bare = BareForward(recipe)
    bare_rate = bare.rows_per_second()
    first = _campaign(path, store)
    bare_rate = max(bare_rate, bare.rows_per_second())
    second = _campaign(path, store)
    names = first.peaks | second.peaks
    peaks = {name: max(run.peaks.get(name, 0) for run in (first, second)) for name in names}
    largest = max(peaks, key=lambda name: peaks[name])
    figures: Figures = {
        **machine(),
        **_times(first),
        "second_run_s": second.seconds,
        "peak_rss_gb": peaks[largest] / 1e9,
        "peak_rss_process": largest,
        "bare_rows_per_s": bare_rate,
        **_outcome(Store.open(str(store)), recipe, bare_rate),
    }
    return {name: figures[name] for name in LABELS}, peaks


def _campaign(path: Path, store: Path) -> Watched:
    """The command a user types, of the interpreter that runs this, with servers of its own."""
    command = Path(sys.executable).parent / "sparsemill"
    if not command.exists():
        raise UserError(f"{command} is missing: install the package (`make setup`)")
    environment = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    # Wide enough that no line is broken where we look for its end.
    environment |= {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    watched = watch([str(command), "run", str(path), "--store", str(store)], ROOT, environment)
    if watched.code != 0:
        raise UserError(f"`sparsemill run {path}` ended with {watched.code}: see its lines above")
    return watched


def _times(run: Watched) -> Figures:
    """Wall time of a campaign, of its start and of its stages."""
    found: Figures = dict.fromkeys(("startup_s", *(f"{stage}_s" for stage in _STAGES)))
    for seconds, line in reversed(run.lines):  # of several workers the first one stays
        if line.startswith(_FIRST_UNIT):
            found["startup_s"] = seconds
        elif done := _STAGE_DONE.match(line):
            found[f"{done[1]}_s"] = float(done[2])
    return {"wall_s": run.seconds, **found}


def _outcome(store: Store, recipe: Recipe, bare_rate: float) -> Figures:
    """What the newest campaign's manifests say about its quality and the harvest's speed."""
    campaign = store.manifest(campaigns.KIND, store.list(campaigns.KIND)[0])
    card = {line["metric"]: line["value"] for line in campaign.extra["scorecard"]}
    harvest = store.manifest(activations.KIND, campaign.inputs[activations.KIND])
    workers = min(recipe.resources.workers, len(harvest.extra["shard_rows"]))
    rate = harvest.extra["n_rows"] / (harvest.timings["computing"] / workers)
    return {
        "rows": str(harvest.extra["n_rows"]),
        "harvest_rows_per_s": rate,
        "harvest_over_bare": rate / bare_rate,
        "explained_variance": card["explained variance"],
        "l0": card["L0"],
        "dead_fraction": card["dead features"],
        "median_lift": card["median lift"],
    }


def print_table(figures: Figures, peaks: dict[str, int]) -> None:
    """Everything measured, as Markdown."""
    print("| figure | measured |\n|---|---|")
    for name, label in LABELS.items():
        print(f"| {label} | {shown(figures[name])} |")
    for process in sorted(peaks, key=lambda name: -peaks[name]):
        print(f"| memory of {process}, GB | {shown(peaks[process] / 1e9)} |")
    print()


def print_bar(bar: Bar, measured: float | str | None) -> bool:
    """One line; returns whether the bar is met."""
    met = bar.met_by(measured)
    what = LABELS[bar.figure].partition(" (")[0]
    verdict = "ok" if met else "MISSED"
    print(f"bar: {what} {shown(measured)} {bar.relation} {bar.target:g} {verdict}")
    return met


def _empty(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--store {folder} is not an empty folder: name one that is")
    return folder.resolve()


if __name__ == "__main__":
    sys.exit(main())
