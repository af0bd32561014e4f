"""The `sparsemill` command.

Exit codes: 0 done; 1 done, but something did not go well (a check failed, a bug); 2 not done: bad
input, an environment that cannot work, or stopped by the user. A user's mistake is one line; only
--debug shows tracebacks.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.exceptions import TyperException

from sae_ext.errors import Stopped, UserError

if TYPE_CHECKING:
    from flows.recipe import Recipe

app = typer.Typer(
    name="sparsemill",
    help="Turn a model's activations into features a person can read.\n\n"
    "Start with: [bold]sparsemill run recipes/quickstart.yaml[/]. Every result is kept in a store under a key "
    "made from what it was computed from, so the same command run again does nothing, and one that was "
    "killed goes on where it stopped.\n\nExit codes: 0 done, 1 something went wrong, 2 refused or stopped.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stores = typer.Typer(
    help="Look at the store, check it, clear it out, hand activations on.", no_args_is_help=True
)
app.add_typer(stores, name="store")
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", envvar="SPARSEMILL_STORE", help="Folder or fsspec URL of the store."),
]
DEFAULT_STORE = "store"
_TYPER_INTERRUPTED = 130


@app.command()
def run(path: RecipePath, store: StoreOption = None) -> None:
    """Run a campaign: harvest, train, analyse, interpret, report.

    What is in the store already is not done again. Ctrl-C stops within seconds; the same command
    goes on from there.

    Example: [bold]sparsemill run recipes/quickstart.yaml --store /data/mill[/]
    """
    _run(_load(path, store))


@app.command()
def harvest(path: RecipePath, store: StoreOption = None) -> None:
    """Read the activations of a recipe into the store, and nothing more.

    Example: [bold]sparsemill harvest recipes/quickstart.yaml[/]
    """
    from flows import running, showing

    chosen = _load(path, store)
    showing.harvested(console, chosen.store, running.run_harvest(chosen))


@app.command()
def tune(
    path: RecipePath,
    trials: Annotated[
        int | None, typer.Option(min=2, help="Trials of the search; the recipe's, or 8.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(help="Trials at once.")] = None,
    store: StoreOption = None,
) -> None:
    """Search learning rate and λ, then run the campaign with the best of them.

    scikit-optimize proposes, every trial trains an SAE, validation documents judge: lowest FVU with
    the mean L0 inside `tune.l0_band`. A ledger keeps every trial, so a killed search goes on.

    Example: [bold]sparsemill tune recipes/quickstart.yaml --trials 8 --parallel 2[/]
    """
    chosen = _load(path, store)
    trials = trials or chosen.tune.trials or 8
    changes = {
        "tune.trials": trials,
        "tune.parallel": parallel,
        "tune.initial_trials": min(chosen.tune.initial_trials, trials - 1),
    }
    _run(_changed(chosen, changes))


@app.command()
def sweep(
    path: RecipePath,
    vary: Annotated[
        list[str],
        typer.Option(
            help="A field of sae or train and its values: train.seed=0,1,2. Repeat for a grid."
        ),
    ],
    store: StoreOption = None,
) -> None:
    """Train several SAEs in one pass over the activations and compare them.

    Each ends as it would have alone and has a key of its own. Where seeds vary, the table says how
    much of one dictionary is found again in the others, beside the same for random directions.

    Example: [bold]sparsemill sweep recipes/quickstart.yaml --vary train.seed=0,1,2[/]
    """
    from flows import running, showing

    chosen = _load(path, store)
    showing.sweep(console, chosen.store, running.run_sweep(chosen, vary))


@app.command("export")
def export_sae(
    key: Annotated[str, typer.Argument(help="Key of an SAE (or its beginning).")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    layout: Annotated[
        str, typer.Option("--format", help="saelens or dictionary_learning.")
    ] = "saelens",
    allow_clip: Annotated[
        bool, typer.Option(help="Write an SAE whose clip the other library does not know.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Write an SAE as a folder that another library loads; refuses where that would change its numbers.

    Example: [bold]sparsemill export 3f2a --format dictionary_learning --out /tmp/sae[/]
    """
    from flows import exchanging

    exchanging.export(console, store or DEFAULT_STORE, key, layout, out, allow_clip=allow_clip)


@app.command("import")
def import_sae(
    path: Annotated[Path, typer.Argument(help="A folder, or a .pth file.")],
    activations: Annotated[str, typer.Option(help="Key of the activations it reads.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="saelens, dictionary_learning, splatnlp, or growth_signals-identity, -sigmoid or -tanh.",
        ),
    ] = "saelens",
    store: StoreOption = None,
) -> None:
    """Take an SAE made elsewhere into the store, judged on the validation rows of some activations.

    Example: [bold]sparsemill import /tmp/their-sae --activations 81c0[/]
    """
    from flows import exchanging

    exchanging.import_(console, store or DEFAULT_STORE, path, layout, activations)


@app.command()
def interpret(
    path: RecipePath,
    backend: Annotated[str | None, typer.Option(help="rules, or openai for a chat server.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Server, such as http://127.0.0.1:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name the server knows.")] = None,
    features: Annotated[int | None, typer.Option(help="How many features.")] = None,
    store: StoreOption = None,
) -> None:
    """Explain features again, with another backend or more of them, and rebuild the report.

    Harvest, training and analysis are taken from the store. The key of a chat server is read from
    OPENAI_API_KEY. Every reply is kept, so no question is asked twice.

    Example: [bold]sparsemill interpret recipes/quickstart.yaml --backend openai --base-url
    http://127.0.0.1:8000/v1 --model NAME[/]
    """
    chosen = _load(path, store)
    given = {"backend": backend, "base_url": base_url, "model": model, "features": features}
    _run(_changed(chosen, {f"interpret.{name}": value for name, value in given.items()}))


@app.command()
def report(
    campaign: Annotated[
        str, typer.Argument(help="Key of a campaign (or its beginning); the newest.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Copy the report and the export there.")] = None,
    store: StoreOption = None,
) -> None:
    """Print a campaign's key figures and where its report is; --out copies it with the export.

    The copied folder opens in any browser without a network; `export/` in it is one that SAELens
    loads, if it has such SAEs; where it has not, the last line says why.

    Example: [bold]sparsemill report --out /tmp/quickstart[/]
    """
    from flows import showing

    showing.report(console, store or DEFAULT_STORE, campaign, out)


@app.command()
def show(path: RecipePath, store: StoreOption = None) -> None:
    """Show a recipe with every default.

    Example: [bold]sparsemill show recipes/quickstart.yaml[/]
    """
    from flows import recipe as recipes

    console.print(recipes.to_yaml(_load(path, store)), markup=False)


@stores.command("ls")
def list_artefacts(
    kind: Annotated[
        str, typer.Argument(help="activations, saes, trials, features, ...; all.")
    ] = "",
    store: StoreOption = None,
) -> None:
    """List what the store holds, newest first."""
    from flows import showing

    showing.listing(console, store or DEFAULT_STORE, kind)


@stores.command("show")
def show_artefact(
    key: Annotated[str, typer.Argument(help="A key (or its beginning).")],
    feature: Annotated[int | None, typer.Option(help="Show this feature's evidence.")] = None,
    store: StoreOption = None,
) -> None:
    """Show one artefact: what it was made from, its files, its figures.

    Examples: [bold]sparsemill store show 3f2a[/], [bold]sparsemill store show 3f2a --feature 17[/]
    """
    from flows import showing

    showing.artefact(console, store or DEFAULT_STORE, key, feature)


@stores.command()
def verify(
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys (or their beginnings); everything.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the files that are wrong.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Read every file and compare it with its checksum; exit code 1 where one is wrong.

    A file that is removed is made again by the command that made it.
    """
    from flows import storing

    if not storing.verify(console, store or DEFAULT_STORE, keys or [], remove=remove):
        raise typer.Exit(1)


@stores.command()
def gc(
    keep: Annotated[
        list[str] | None, typer.Option(help="Keep this artefact and what it was made from.")
    ] = None,
    hours: Annotated[
        float, typer.Option(min=0, help="Leave alone what was touched in the last hours.")
    ] = 24.0,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove it, instead of listing.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """List what no campaign was made from, and what was begun and never ended; --remove removes it.

    Example: [bold]sparsemill store gc --keep 3f2a --remove[/]
    """
    from flows import storing

    storing.gc(console, store or DEFAULT_STORE, keep or [], hours=hours, remove=remove)


@stores.command("export")
def export_activations(
    key: Annotated[str, typer.Argument(help="Key of activations (or its beginning).")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens in a context.")] = 128,
    store: StoreOption = None,
) -> None:
    """Write activations as SAELens caches them (needs the package datasets).

    Example: [bold]sparsemill store export 81c0 --out /tmp/cache --context 128[/]
    """
    from flows import storing

    storing.export(console, store or DEFAULT_STORE, key, out, context)


@app.command()
def doctor(store: StoreOption = None) -> None:
    """Say what works here: kernels, Prefect, Ray, the store; exit code 1 if something does not."""
    from flows import doctor as checks

    if not checks.report(console, store or DEFAULT_STORE):
        raise typer.Exit(1)


@app.command()
def serve(
    path: RecipePath,
    cron: Annotated[str, typer.Option(help="When the scheduled deployment runs.")] = "0 2 * * *",
    store: StoreOption = None,
) -> None:
    """Offer the campaign in Prefect: one deployment on a schedule, one on demand; until Ctrl-C.

    With PREFECT_API_URL set, both appear in that server; else a server of our own is started and its
    UI address printed.

    Example: [bold]sparsemill serve recipes/quickstart.yaml --cron "0 2 * * *"[/]
    """
    from flows import serving

    serving.serve(_load(path, store), cron, console)


def _load(path: Path, store: str | None) -> Recipe:
    from flows import recipe as recipes

    return recipes.changed(recipes.load(path), {"store": store})


def _changed(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    from flows import recipe as recipes

    return recipes.changed(recipe, changes)


def _run(recipe: Recipe) -> None:
    from flows import running, showing

    keys = running.run(recipe)
    showing.report(console, recipe.store, keys["campaigns"], None)


@app.callback()
def settings(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and every log line.")
    ] = False,
) -> None:
    """Options before the command."""
    if debug:
        os.environ["SPARSEMILL_DEBUG"] = "1"
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "DEBUG"


def command_line(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code.

    Raises:
        KeyboardInterrupt: stopped by the user.
    """
    try:
        code = app(args=arguments, standalone_mode=False)
    except UserError as error:
        _say("error", str(error), error)
        return 2
    except TyperException as error:
        _say("error", f"{error} See `sparsemill --help`.", error)
        return 2
    except (Stopped, typer.Abort) as error:
        raise KeyboardInterrupt from error
    except Exception as error:  # noqa: BLE001 - the last line before a user's terminal
        hint = "run again with --debug for the traceback"
        _say("bug", f"{type(error).__name__}: {error} ({hint})", error)
        return 1
    if code == _TYPER_INTERRUPTED:
        raise KeyboardInterrupt
    return int(code or 0)


def _say(what: str, line: str, error: BaseException) -> None:
    if os.environ.get("SPARSEMILL_DEBUG"):
        traceback.print_exception(error)
    errors.print(f"[bold red]{what}:[/] {escape(line)}", soft_wrap=True)
