"""Training one sparse autoencoder, and going on after a kill as if nothing had happened.

    loss_t = mean_b ‖x̂ - x‖² + λ_t · mean_b Σ_j z_bj        x scaled so that E‖x‖ = sqrt(d_in)

Decoder rows keep unit norm (gradient projected, Adam, renormalised), b_dec starts at the data mean,
λ and the learning rate warm up linearly. Everything a step depends on is in the checkpoint, so a
resumed run ends with the same bytes as one never interrupted (same machine and thread count).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_ext import ops
from sae_ext.activations.reader import Activations, ShuffledRows
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.errors import CorruptArtefact, Diverged, UserError
from sae_ext.metrics import ROUNDING, evaluate
from sae_ext.model import SAE, fold_scale, initial_parameters

DEAD_WINDOW_ROWS = 500_000
"""During training a feature counts as dead when it fired in none of this many last rows."""
VALIDATION_ROWS = 8192
"""Rows of the validation split looked at beside each checkpoint."""
EVALUATION_BATCH = 4096
_STATISTICS_BATCH = 16_384

HISTORY_COLUMNS = (
    "step",
    "loss",
    "mse",
    "fvu",
    "l0",
    "dead_fraction",
    "clip_rate",
    "lr",
    "l1",
    "validation_fvu",
    "validation_l0",
)
"""history.parquet, one row per `log_every` steps, means over the steps since the row before: `mse`
in scaled units, `fvu` against the training split's variance, `dead_fraction` as of that step over
the last DEAD_WINDOW_ROWS rows, `lr` and `l1` (λ) as of that step, validation columns null except at
checkpoints."""


class DataStatistics(NamedTuple):
    """Of the training split, raw units."""

    mean: npt.NDArray[np.float64]
    """[d_in]"""
    mean_norm: float
    """E‖x‖."""
    variance: float
    """E‖x - mean‖²."""


class Progress(NamedTuple):
    """Where a run is."""

    step: int
    steps: int
    rows_per_second: float
    loss: float
    fvu: float
    l0: float
    dead_fraction: float


@dataclass
class Trained:
    """The result of a run."""

    sae: SAE
    """Ready for raw activations."""
    history: pa.Table
    scale: float
    """The factor by which activations were scaled in training; folded into the SAE."""
    validation: dict[str, Any]
    """Metrics on the whole validation split, see `sae_ext.metrics`."""
    density: Tensor
    """Fraction of the validation rows in which each feature fires, float64 [d_sae]."""


@dataclass
class _Window:
    """Sums over the steps since the last line of the history."""

    rows: int = 0
    squared_error: float = 0.0
    l1: float = 0.0
    nnz: int = 0
    saturated: int = 0

    def add(self, rows: int, result: ops.StepResult) -> None:
        self.rows += rows
        self.squared_error += result.squared_error
        self.l1 += result.l1
        self.nnz += result.nnz
        self.saturated += result.saturated


@dataclass
class _State:
    """Everything the next step depends on."""

    parameters: ops.Parameters
    adam: ops.AdamState
    silent_rows: Tensor
    """Rows since each feature last fired, int64 [d_sae]."""
    step: int = 0
    cursor: int = 0
    history: list[list[float]] = field(default_factory=list)

    def to_bytes(self, config: dict[str, Any]) -> bytes:
        tensors = {"silent_rows": self.silent_rows}
        for prefix, group in (("", self.parameters), ("m.", self.adam.m), ("v.", self.adam.v)):
            tensors |= {prefix + name: value for name, value in group.tensors().items()}
        history = torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(HISTORY_COLUMNS))
        tensors["history"] = history
        facts = {
            "step": self.step,
            "adam_step": self.adam.step,
            "cursor": self.cursor,
            "config": config,
        }
        data: bytes = save_tensors(tensors, {"state": json.dumps(facts, sort_keys=True)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, config: dict[str, Any]) -> _State:
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            facts = json.loads(header["__metadata__"]["state"])
            tensors = load_tensors(data)
            groups = [
                ops.Parameters(**{name: tensors[prefix + name] for name in _PARAMETERS})
                for prefix in ("", "m.", "v.")
            ]
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptArtefact(
                f"the checkpoint cannot be read ({type(error).__name__}): delete checkpoint/ in the SAE's "
                "folder to train from the start"
            ) from error
        if facts["config"] != config:
            raise UserError(
                "the checkpoint was made by another configuration: delete checkpoint/ in the SAE's folder"
            )
        return cls(
            parameters=groups[0],
            adam=ops.AdamState(m=groups[1], v=groups[2], step=facts["adam_step"]),
            silent_rows=tensors["silent_rows"],
            step=facts["step"],
            cursor=facts["cursor"],
            history=tensors["history"].tolist(),
        )


_PARAMETERS = ("W_enc_rows", "b_enc", "W_dec", "b_dec")


def train(
    activations: Activations,
    sae_config: SAEConfig,
    config: TrainConfig,
    *,
    load_checkpoint: Callable[[], bytes | None] = lambda: None,
    save_checkpoint: Callable[[bytes], object] = lambda data: None,
) -> Generator[Progress, None, Trained]:
    """Train on the training split; a generator that yields its progress and returns the result.

    Args:
        load_checkpoint: gives the bytes last saved for this run, or None to start.
        save_checkpoint: keeps the bytes of a checkpoint; called every `checkpoint_every` steps and
            at the end.

    Raises:
        UserError: d_in does not match, a split is empty, the rows to train on are all alike, or the
            loss is not finite.
    """
    splits = {split: activations.rows(split) for split in ("train", "validation")}
    for split, rows in splits.items():
        if len(rows) == 0:
            raise UserError(
                f"the {split} split has no rows: give the corpus more documents, or a larger "
                "corpus.validation_percent"
            )
    if sae_config.d_in not in (None, activations.d_in):
        raise UserError(
            f"sae.d_in is {sae_config.d_in}, but the activations have width {activations.d_in}: "
            "correct it or leave it out"
        )
    statistics = data_statistics(activations, splits["train"])
    if statistics.variance <= ROUNDING * statistics.mean_norm**2:
        raise UserError("the train split's rows are all alike: give the corpus more documents")
    scale = math.sqrt(activations.d_in) / statistics.mean_norm
    identity = {"sae": vars(sae_config), "train": vars(config), "activations": activations.key}
    saved = load_checkpoint()
    state = (
        _State.from_bytes(saved, identity)
        if saved is not None
        else _initial_state(sae_config, config, statistics, scale)
    )
    yield from _steps(
        state, activations, splits, sae_config, config, scale, statistics,
        lambda: save_checkpoint(state.to_bytes(identity)),
    )  # fmt: skip
    sae = SAE(fold_scale(state.parameters, scale), sae_config.clip)
    seen = evaluate(sae, activations.in_order(splits["validation"], EVALUATION_BATCH))
    density = torch.from_numpy(seen.fired / seen.rows)
    return Trained(sae, _history_table(state.history), scale, seen.metrics(), density)


def data_statistics(activations: Activations, rows: npt.NDArray[np.int64]) -> DataStatistics:
    """Mean, mean norm and variance of the given rows, one streaming pass in float64."""
    total = torch.zeros(activations.d_in, dtype=torch.float64)
    norms = squares = 0.0
    for x in activations.in_order(rows, _STATISTICS_BATCH):
        exact = x.double()
        total += exact.sum(dim=0)
        norms += float(exact.norm(dim=1).sum())
        squares += float(exact.square().sum())
    mean = (total / len(rows)).numpy()
    return DataStatistics(
        mean, norms / len(rows), squares / len(rows) - float(np.square(mean).sum())
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up from lr/warmup, constant, linear decay over the last part of the run."""
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    decay_steps = config.lr_decay_fraction * config.steps
    decay = min(1.0, (config.steps - step) / decay_steps) if decay_steps else 1.0
    return config.lr * min(warm, decay)


def l1_weight(config: TrainConfig, step: int) -> float:
    """λ at a step: linear from 0 over the warm-up."""
    return config.l1 * (min(1.0, step / config.l1_warmup_steps) if config.l1_warmup_steps else 1.0)


def _initial_state(
    sae_config: SAEConfig, config: TrainConfig, statistics: DataStatistics, scale: float
) -> _State:
    b_dec = torch.from_numpy(statistics.mean * scale)
    parameters = initial_parameters(len(statistics.mean), sae_config.d_sae, b_dec, config.seed)
    return _State(
        parameters=parameters,
        adam=ops.AdamState.zeros(parameters),
        silent_rows=torch.zeros(sae_config.d_sae, dtype=torch.int64),
    )


def _steps(
    state: _State,
    activations: Activations,
    splits: dict[str, npt.NDArray[np.int64]],
    sae_config: SAEConfig,
    config: TrainConfig,
    scale: float,
    statistics: DataStatistics,
    save: Callable[[], object],
) -> Generator[Progress, None, None]:
    """Run the remaining steps on `state` in place."""
    sampler = ShuffledRows(activations, splits["train"], config.batch_rows, config.seed)
    sampler.cursor = state.cursor
    check_rows = np.sort(
        np.random.default_rng(config.seed).permutation(splits["validation"])[:VALIDATION_ROWS]
    )
    step_op = ops.Step()
    window = _Window()
    started, first = time.perf_counter(), state.step
    while state.step < config.steps:
        l1, lr = l1_weight(config, state.step), learning_rate(config, state.step)
        try:
            result = step_op(
                state.parameters, state.adam, sampler.next() * scale, l1=l1, lr=lr,
                clip=sae_config.clip, beta1=config.beta1, beta2=config.beta2,
            )  # fmt: skip
        except Diverged as error:
            raise _diverged(state.step + 1, config) from error
        state.step += 1
        state.cursor = sampler.cursor
        state.silent_rows = torch.where(result.fired > 0, 0, state.silent_rows + config.batch_rows)
        window.add(config.batch_rows, result)
        if not math.isfinite(result.squared_error + result.l1):
            raise _diverged(state.step, config)
        checkpoint = state.step % config.checkpoint_every == 0 or state.step == config.steps
        if state.step % config.log_every == 0 or checkpoint:
            validation = (math.nan, math.nan)
            if checkpoint:
                sae = SAE(fold_scale(state.parameters, scale), sae_config.clip)
                seen = evaluate(sae, activations.in_order(check_rows, EVALUATION_BATCH)).metrics()
                validation = (math.nan if seen["fvu"] is None else seen["fvu"], seen["l0"])
            variance = statistics.variance * scale**2
            line = _history_line(state, window, variance, lr, l1, validation)
            state.history.append(line)
            window = _Window()
            if checkpoint:
                save()
            speed = (state.step - first) * config.batch_rows / (time.perf_counter() - started)
            named = dict(zip(HISTORY_COLUMNS, line, strict=True))
            yield Progress(
                state.step, config.steps, speed, named["loss"], named["fvu"], named["l0"],
                named["dead_fraction"],
            )  # fmt: skip


def _diverged(step: int, config: TrainConfig) -> Diverged:
    return Diverged(
        f"the loss is not finite at step {step}: lower train.lr (now {config.lr:g}) or raise "
        "train.lr_warmup_steps; the last checkpoint is kept"
    )


def _history_line(
    state: _State,
    window: _Window,
    variance: float,
    lr: float,
    l1: float,
    validation: tuple[float, float],
) -> list[float]:
    mse = window.squared_error / window.rows
    return [
        float(state.step),
        mse + l1 * window.l1 / window.rows,
        mse,
        mse / variance,
        window.nnz / window.rows,
        float((state.silent_rows >= DEAD_WINDOW_ROWS).double().mean()),
        window.saturated / max(window.nnz, 1),
        lr,
        l1,
        *validation,
    ]


def _history_table(history: list[list[float]]) -> pa.Table:
    columns = np.array(history, dtype=np.float64).reshape(-1, len(HISTORY_COLUMNS)).T
    table = {
        name: pa.array(values, mask=np.isnan(values))
        if name.startswith("validation")
        else pa.array(values)
        for name, values in zip(HISTORY_COLUMNS, columns, strict=True)
    }
    table["step"] = pa.array(columns[0].astype(np.int64))
    return pa.table(table)
