"""Training from a notebook or a script, without a store or a cluster: a progress bar and a folder.

    from sae_ext.activations.dataset import InMemory
    from sae_ext.config import SAEConfig, TrainConfig, to_dict
    from sae_ext.training.fit import fit

    trained = fit(InMemory(x), SAEConfig(d_sae=4096), TrainConfig(steps=3000), "runs/first")
    code = trained.sae.encode(x[:8])

Ctrl-C or SIGTERM saves a checkpoint first; the same call goes on from there, and so it does after a kill.
The folder then holds an SAE that SAELens loads, how it was trained, its history, events and checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sae_ext.activations.dataset import Dataset
from sae_ext.config import SAEConfig, TrainConfig, to_dict
from sae_ext.errors import Stopped
from sae_ext.model import SAE
from sae_ext.store import table_bytes, write_atomically
from sae_ext.training.job import Place, Trained
from sae_ext.training.run import train

_CHECKPOINT = Path("checkpoint", "state.safetensors")


def fit(
    data: Dataset,
    sae: SAEConfig,
    config: TrainConfig,
    folder: str | Path,
    *,
    place: Place = Place(),
) -> Trained:
    """Train one autoencoder and write it to a folder; goes on from the checkpoint there.

    Raises:
        UserError: the data or the checkpoint does not fit the configuration.
        Diverged: a term was not finite; the last checkpoint is kept.
        Stopped: by a signal; the message says how to go on.
    """
    root = Path(folder)
    state = root / _CHECKPOINT

    def keep(step: int, kept: SAE, seen: dict[str, object]) -> None:
        _write(
            root / "checkpoints" / f"step-{step:08d}", kept, {"fvu": seen["fvu"], "l0": seen["l0"]}
        )

    with _signals() as stopping, _bar() as bar:
        work = train(
            data, sae, config, place=place, stop=stopping.is_set,
            load_checkpoint=lambda: state.read_bytes() if state.exists() else None,
            save_checkpoint=lambda content: write_atomically(state, content),
            keep=keep,
        )  # fmt: skip
        task = bar.add_task("training", total=config.steps, note="")
        while True:
            try:
                p = next(work)
            except StopIteration as stop:
                trained: Trained = stop.value
                break
            except Stopped as stop:
                raise Stopped(f"{stop}; the same call goes on from {root}") from None
            note = (
                f"loss {p.loss:.4g}  L0 {p.l0:.1f}  FVU {p.fvu:.3f}  dead {100 * p.dead_fraction:.1f} %  "
                f"{p.rows_per_second:,.0f} rows/s"
            )
            bar.update(task, completed=p.step, note=note)
    if place.share[0] > 0:  # the first worker has looked at the validation split, and writes
        return trained
    _write(root, trained.sae, {"l0": trained.validation["l0"], "fvu": trained.validation["fvu"]})
    for name, table in (("history", trained.history), ("events", trained.events)):
        write_atomically(root / f"{name}.parquet", table_bytes(table))
    content = {"sae": to_dict(sae), "train": to_dict(config)}
    write_atomically(root / "training.json", trained.told(content, data.key))
    return trained


def _write(folder: Path, sae: SAE, metadata: dict[str, object]) -> None:
    for name, content in sae.files(metadata).items():
        write_atomically(folder / name, content)


def _bar() -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeRemainingColumn(),
    )


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set meanwhile; a second SIGINT interrupts as usual."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only that one may listen
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hear(number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    for number in before:
        signal.signal(number, hear)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
