"""Training sparse autoencoders on a dataset, and going on after a kill as if nothing had happened.

    loss_t = Σ weight · schedule(t) · term        x scaled so that E‖x‖ = sqrt(d_in)

    trained = run_to_end(train(InMemory(x), SAEConfig(d_sae=4096), TrainConfig(steps=2000)))

`train` is a generator: it yields its progress and returns the result. `train_many` does the same for several
configurations that share every read. Everything a step depends on is in the checkpoint, so a resumed run ends
with the same bytes as one never interrupted (on CPUs: same machine, thread count and number of workers; any
number of readers).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext.activations.dataset import Dataset
from sae_ext.activations.order import Rows
from sae_ext.architectures.base import four
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.errors import Diverged, Stopped, UserError
from sae_ext.metrics import ReconstructionSums, evaluate
from sae_ext.model import SAE
from sae_ext.training import checkpoint, history
from sae_ext.training.checks import check_together
from sae_ext.training.history import Event, Line
from sae_ext.training.job import Job, Place, Progress, Trained
from sae_ext.training.learner import Learner, Window
from sae_ext.training.prepared import Prepared, State, identity_of, source_of
from sae_ext.training.revival import Revival
from sae_ext.training.term import moved

T = TypeVar("T")

VALIDATION_ROWS = 8192
"""Rows of the validation split looked at beside each checkpoint."""
EVALUATION_BATCH = 4096
_OWN_COLUMNS = frozenset({"mse", "l1", "l0"})  # terms that have a column of the history already


def train(
    data: Dataset,
    sae: SAEConfig,
    config: TrainConfig,
    *,
    place: Place = Place(),
    stop: Callable[[], bool] = lambda: False,
    **hooks: Callable[..., Any],
) -> Generator[Progress, None, Trained]:
    """Train one autoencoder on the training split; see the module.

    Args:
        stop: looked at before every step; once it is true a checkpoint is saved and `Stopped` raised.
        hooks: the callables of `Job`, by name.

    Raises:
        UserError: the data or a checkpoint does not fit the configuration.
        Diverged: a term was not finite; the last checkpoint is kept.
        Stopped: `stop` said so.
    """
    (trained,) = yield from train_many(data, [Job(sae, config, **hooks)], place=place, stop=stop)
    if isinstance(trained, Diverged):
        raise trained
    return trained


def train_many(
    data: Dataset,
    jobs: Sequence[Job],
    *,
    place: Place = Place(),
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Progress, None, list[Trained | Diverged]]:
    """Train several autoencoders in one pass over the data; each ends as it would have alone.

    The configurations must agree on batch_rows, order_seed and buffer. One that is ahead, by its checkpoint,
    waits for the others; in place of one whose terms were not finite stands what went wrong. Raises as `train`
    does otherwise.
    """
    config = require_one_pass([job.config for job in jobs])

    def tick(where: str = "before the first step") -> None:
        if stop():
            raise Stopped(f"stopped {where}: nothing is lost")

    for job in jobs:
        check_together(
            job.sae, job.config, workers=place.share[1], on_gpu=place.device.startswith("cuda"),
            streamed=data.stream is not None,
        )  # fmt: skip
    states = [State.of(data, job, place) for job in jobs]
    prepared = Prepared.of(data, jobs, states, tick)
    runs = [
        _Run(number, job, prepared, place, state)
        for number, (job, state) in enumerate(zip(jobs, states, strict=True))
    ]
    states.clear()
    with source_of(data, prepared, config, place) as source:
        going = [run for run in runs if not run.ended]
        first = min(going or runs, key=lambda run: run.learner.step_number)
        source.restore(first.source_state or source.state())
        for run in runs:  # a buffer's rows are in it
            run.source_state = None
        for step in range(first.learner.step_number, max(job.config.steps for job in jobs)):
            due = [run for run in runs if not run.ended and run.learner.step_number == step]
            if all(run.ended for run in runs):
                break
            stopping = _stopping(stop, step, place)
            if not stopping:
                try:
                    batch = source.next()
                except Stopped:  # a stream hears it too, while it waits for rows
                    stopping = True
            if stopping:
                # One that is ahead has a checkpoint, with its own place in the rows.
                for run in due:
                    run.save_or_fail(source.state())
                if len(runs) == 1 and runs[0].failure is not None:
                    raise runs[0].failure
                raise Stopped(f"stopped after step {step}; a checkpoint is saved")
            x = moved(batch.x, place.device)
            for run in due:
                told = run.step_or_fail(x, batch.rows, source.state)
                if told is not None:
                    yield told
    return [run.failure or run.result(partial(tick, "after the last step")) for run in runs]


def require_one_pass(configs: Sequence[TrainConfig]) -> TrainConfig:
    """One of several configurations that ask for the same batches.

    Raises:
        UserError: there is none, or they would read other rows.
    """
    if not configs:
        raise UserError("there is nothing to train: give at least one configuration")
    for name in ("batch_rows", "order_seed", "buffer"):
        one, *others = (getattr(config, name) for config in configs)
        for other in others:
            if one != other:
                raise UserError(
                    f"train.{name} is {one} and {other}: SAEs that share their reads must agree on it"
                )
    return configs[0]


def run_to_end(work: Generator[Any, None, T]) -> T:
    """The result of a generator whose progress nobody looks at."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            found: T = stop.value
            return found


class _Run:
    """One autoencoder's way through the training."""

    def __init__(
        self, number: int, job: Job, prepared: Prepared, place: Place, state: State | None
    ) -> None:
        self.number, self.job, self.config = number, job, job.config
        self._data, self._prepared, self._place = prepared.data, prepared, place
        self.scale = 1.0
        if self.config.scale == "dataset":
            self.scale = math.sqrt(self._data.d_in) / prepared.statistics.mean_norm
        self.learner = Learner(
            job.sae, self.config, prepared.classes,
            device=torch.device(place.device), group=place.group,
        )  # fmt: skip
        self.ended = False
        self.failure: Diverged | None = None
        self.source_state: dict[str, Tensor] | None = None
        self._columns = sorted(
            {
                name
                for reader in (job.sae.architecture, *self.learner.terms.values())
                for name in reader.columns()
            }
        )
        self._lines: list[Line] = []
        self._events: list[Event] = []
        self._best: _Best | None = None
        rows = prepared.validation_rows
        places = np.random.default_rng(self.config.order_seed).choice(
            len(rows), min(VALIDATION_ROWS, len(rows)), replace=False
        )
        self._check_rows = Rows.of(rows[np.sort(places)])
        # One that goes on has its b_dec already.
        centre = prepared.centres.get(job.sae.b_dec, prepared.centres["mean"]) * self.scale
        self.learner.begin(self._data.d_in, centre)
        self._revival: Revival | None = None
        if self.config.revival is not None:
            self._revival = Revival(self.config.revival, self.learner)
        if state is not None:
            self._restore(state)
        elif place.group is not None:  # machines may round what they begin from differently
            for t in self.learner.weights.values():
                dist.broadcast(t, group_src=0, group=place.group)
        self._started, self._first = time.perf_counter(), self.learner.step_number
        self._identity = identity_of(self._data, job)

    def step_or_fail(
        self, x: Tensor, rows: npt.NDArray[np.int64], source_state: Callable[[], dict[str, Tensor]]
    ) -> Progress | None:
        """As `step`; one that diverges has ended, and the others go on."""
        try:
            return self.step(x, rows, source_state)
        except Diverged as error:
            self.failure, self.ended = error, True
            return None

    def save_or_fail(self, source_state: dict[str, Tensor]) -> None:
        """As `save`; one that has diverged has ended."""
        try:
            self.save(source_state)
        except Diverged as error:
            self.failure, self.ended = error, True

    def step(
        self, x: Tensor, rows: npt.NDArray[np.int64], source_state: Callable[[], dict[str, Tensor]]
    ) -> Progress | None:
        """One step on raw rows; progress where a line of the history was written."""
        columns = self._prepared.values(rows, self._columns)
        columns = {name: moved(t, self._place.device) for name, t in columns.items()}
        learner, config = self.learner, self.config
        learner.step(x * self.scale, columns)
        done = learner.step_number
        self._revive(done)
        last = done == config.steps
        saving = done % config.checkpoint_every == 0 or last
        if not (saving or done % config.log_every == 0):
            return None
        learner.settle()
        line = self._line(learner.window)
        learner.window = Window()
        if saving:
            learner.check_weights()
            self._validate(line)
        self._lines.append(line)
        self.job.on_line(line)
        self.ended = last or self._too_late(done)
        if (
            saving
        ):  # no batch is drawn after the last step, so where the next one was need not be kept
            self.save({} if self.ended else source_state())
        speed = (done - self._first) * config.batch_rows / (time.perf_counter() - self._started)
        return Progress(
            done, config.steps, speed, line["loss"], line["fvu"], line["l0"], line["dead_fraction"],
            self.number,
        )  # fmt: skip

    def save(self, source_state: dict[str, Tensor]) -> None:
        """Keep everything the next step depends on. Of several workers the first does."""
        self.learner.settle()
        self.learner.check_weights()
        tensors, facts = self.learner.state()
        tensors |= {f"source.{name}": t for name, t in source_state.items()}
        facts |= {
            "lines": self._lines,
            "events": [list(event) for event in self._events],
            "ended": self.ended,
            "statistics": [
                self._prepared.statistics.mean.tolist(),
                *self._prepared.statistics[1:],
            ],
        }
        if self._revival is not None:
            tensors["revived_at"] = self._revival.revived_at
        if self._best is not None:
            tensors |= {f"best.{name}": t for name, t in self._best.tensors.items()}
            facts["best"] = {
                "value": self._best.value,
                "step": self._best.step,
                "since": self._best.since,
            }
        if self._place.share[0] == 0:
            self.job.save_checkpoint(checkpoint.to_bytes(tensors, facts, self._identity))

    def result(self, tick: Callable[[], None]) -> Trained:
        """What the run has come to, judged on the whole validation split."""
        if self._best is not None:
            self.learner.weights, self.learner.counters = self._best.split(self._place.device)
        sae = self.learner.sae(self.scale)
        seen = self._evaluated(sae, self._prepared.validation_rows, tick)
        return Trained(
            sae.to("cpu"),
            history.history_table(self._lines, self._further_terms()),
            history.events_table(self._events),
            self.scale,
            self.learner.penalty(self.learner.step_number - 1),
            self.learner.step_number,
            seen.metrics(),
            torch.from_numpy(seen.fired / max(seen.rows, 1)),
        )

    # -- inside ----------------------------------------------------------------------------------

    def _evaluated(
        self, sae: SAE, rows: Rows, tick: Callable[[], None] = lambda: None
    ) -> ReconstructionSums:
        """Sums over some rows, computed where the training is; of several workers by the first alone."""
        if self._place.share[0] != 0:
            return ReconstructionSums.of(sae)
        device = self._place.device
        return evaluate(sae, (moved(x, device) for x in _ticking(self._data, rows, tick)))

    def _restore(self, state: State) -> None:
        tensors, facts = state
        try:
            self.learner.restore(tensors, facts)
            self._lines = facts["lines"]
            self._events = [Event(*event) for event in facts["events"]]
            self.ended = facts["ended"]
            self.source_state = _named(tensors, "source.")
            if not (self.source_state or self.ended):
                raise KeyError("source")
            if self._revival is not None:
                self._revival.revived_at = tensors["revived_at"]
            if "best" in facts:
                self._best = _Best(**facts["best"], tensors=_named(tensors, "best."))
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.unreadable(error) from error

    def _line(self, window: Window) -> Line:
        objective, learner = self.config.objective, self.learner
        mse, l1 = window.squared_error / window.rows, window.l1 / window.rows
        last = learner.step_number - 1
        width = learner.architecture.d_out(four(learner.weights), learner.weights)
        loss = learner.weight("mse", last) * objective.mse.scale(width) * mse
        if objective.l1 is not None:
            loss += learner.weight("l1", last) * objective.l1.scale(self.job.sae.d_sae) * l1
        for name, total in window.terms.items():
            loss += learner.weight(name, last) * total / window.steps
        terms = {name: total / window.computed[name] for name, total in window.terms.items()}
        variance = self._prepared.statistics.variance * self.scale**2
        dead = (learner.silent_rows >= self.config.dead_rows).double().mean()
        penalty = learner.penalty(last)
        return {
            "step": float(learner.step_number),
            "loss": loss,
            "mse": mse,
            "fvu": math.nan if learner.architecture.own_target else mse / variance,
            "l0": window.nnz / window.rows,
            "dead_fraction": float(dead),
            "clip_rate": window.saturated / max(window.nnz, 1),
            "lr": window.lr,
            "l1": math.nan if penalty is None else penalty,
            **{name: value for name, value in terms.items() if name not in _OWN_COLUMNS},
        }

    def _further_terms(self) -> list[str]:
        return [name for name in self.learner.terms if name not in _OWN_COLUMNS]

    def _revive(self, done: int) -> None:
        """Look after dead features, where there is a plan for them."""
        revival = self._revival
        if revival is None or not (revival.due(done) or revival.verifies(done)):
            return
        self.learner.settle()
        self._events += revival.verify(done)
        if revival.due(done):
            self._events += revival.revive(self._candidates)

    def _candidates(self, count: int, seed: int) -> Tensor:
        """Random scaled rows of the training split [count, d_in]."""
        rows = self._prepared.train_rows
        places = np.random.default_rng(seed).choice(len(rows), min(count, len(rows)), replace=False)
        return self._data.gather(rows[np.sort(places)]).to(self._place.device) * self.scale

    def _validate(self, line: Line) -> None:
        sae = self.learner.sae(self.scale)
        seen = self._evaluated(sae, self._check_rows).metrics()
        first = self._place.share[0] == 0
        value, fvu, l0 = _agreed(
            [self._judged(seen), seen["fvu"], seen["l0"]] if first else [], 3, self._place
        )
        line["validation_fvu"], line["validation_l0"] = fvu, l0
        step = self.learner.step_number
        if self.config.keep_checkpoints and first:
            self.job.keep(step, sae.to("cpu"), seen)
        if self.config.early_stopping is not None and step > self._warm_until():
            self._judge(value)

    def _judged(self, seen: dict[str, Any]) -> float | None:
        """What early stopping goes by."""
        stopping, objective = self.config.early_stopping, self.config.objective
        if stopping is None or stopping.metric == "fvu":
            return seen["fvu"]  # type: ignore[no-any-return]
        mse = objective.mse
        value: float = mse.weight * mse.scale(self._data.d_in) * seen["mse"] * self.scale**2
        if objective.l1 is not None:
            # In raw units a decoder row is shorter by the scale.
            l1 = seen["l1_weighted"] * self.scale
            value += objective.l1.weight * objective.l1.scale(self.job.sae.d_sae) * l1
        if objective.l0 is not None:
            value += objective.l0.weight * seen["l0"]
        return value

    def _judge(self, value: float) -> None:
        stopping = self.config.early_stopping
        assert stopping is not None
        step = self.learner.step_number
        if math.isnan(value):
            return
        if self._best is None or value < self._best.value * (1 - stopping.min_change):
            tensors = {f"w.{n}": t.cpu().clone() for n, t in self.learner.weights.items()}
            tensors |= {f"c.{n}": t.cpu().clone() for n, t in self.learner.counters.items()}
            self._best = _Best(value, step, 0, tensors)
            self._events.append(
                Event(step, "best", None, f"validation {stopping.metric} {value:.6g}")
            )
        else:
            self._best.since += 1

    def _too_late(self, done: int) -> bool:
        stopping, best = self.config.early_stopping, self._best
        if stopping is None or best is None or best.since < stopping.patience:
            return False
        self._events.append(
            Event(
                done,
                "early_stop",
                None,
                f"no better validation since step {best.step}, which is kept",
            )
        )
        return True

    def _warm_until(self) -> int:
        schedules = [self.config.lr_schedule, *(t.schedule for t in self.learner.terms.values())]
        return max(s.start_step + s.warmup_steps for s in schedules)


@dataclass
class _Best:
    """The best autoencoder so far."""

    value: float
    step: int
    since: int
    """Checkpoints since then."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def split(self, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Its weights and counters."""
        moved = {name: t.to(device) for name, t in self.tensors.items()}
        return _named(moved, "w."), _named(moved, "c.")


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _agreed(values: Sequence[float | None], count: int, place: Place) -> list[float]:
    """The first worker's numbers, NaN for None, for all."""
    given = [math.nan if v is None else v for v in values] or [math.nan] * count
    if place.group is None:
        return given
    numbers = torch.tensor(given, dtype=torch.float64, device=place.device)
    dist.broadcast(numbers, group_src=0, group=place.group)
    return [float(v) for v in numbers.tolist()]


def _stopping(stop: Callable[[], bool], step: int, place: Place) -> bool:
    """Whether to stop; several workers agree on it now and then."""
    if place.group is None:
        return stop()
    if step % 10:
        return False
    asked = torch.tensor(float(stop()), device=place.device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=place.group)
    return bool(asked)


def _ticking(data: Dataset, rows: Rows, tick: Callable[[], None]) -> Generator[Tensor, None, None]:
    for x in data.in_order(rows, EVALUATION_BATCH):
        tick()
        yield x
