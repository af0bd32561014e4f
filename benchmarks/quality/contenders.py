"""Training ours and the peers', and judging all by the same measure."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.quality.problem import Settings
from sae_ext.activations.dataset import InMemory
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.errors import UserError
from sae_ext.metrics import evaluate
from sae_ext.metrics.stability import recovery
from sae_ext.model import SAE
from sae_ext.ops import Parameters
from sae_ext.schedules import Schedule
from sae_ext.training.run import run_to_end, train
from sae_ext.training.terms import L1, ObjectiveConfig

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
OURS, SAELENS, DICTIONARY_LEARNING = "Sparsemill", "SAELens", "dictionary_learning"
_CHILD = {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}


class Result(NamedTuple):
    """One autoencoder, judged on held-out rows."""

    name: str
    seed: int
    l1: float
    """λ, given or found."""
    seconds: float
    """Of all training steps."""
    fvu: float
    l0: float
    dead: float
    """Share of features that fired in none of the held-out rows."""
    matched_cosine: float | None
    """Mean cosine with the planted directions, matched one to one."""
    recovered: float | None
    """Share of planted directions whose match is nearer than 0.9."""


def ours(
    x: Path, settings: Settings, seed: int, *, l1: float, target_l0: float | None = None,
    truth: np.ndarray | None = None,
) -> Result:  # fmt: skip
    """Train ours in this process."""
    rows = np.load(x)
    cut = len(rows) - settings.held_out
    split = {"train": np.arange(cut), "validation": np.arange(cut, len(rows))}
    data = InMemory(rows, split=split)
    started = time.perf_counter()
    trained = run_to_end(
        train(data, SAEConfig(d_sae=settings.d_sae), train_config(settings, seed, l1, target_l0))
    )
    seconds = time.perf_counter() - started
    return _judged(OURS, seed, trained.penalty, seconds, trained.sae, rows[cut:], truth)


def train_config(
    settings: Settings, seed: int, l1: float, target_l0: float | None = None
) -> TrainConfig:
    """The settings as our configuration."""
    return TrainConfig(
        steps=settings.steps, batch_rows=settings.batch_rows, lr=settings.lr,
        lr_schedule=Schedule(
            kind="linear", warmup_steps=settings.lr_warmup, last=settings.lr_decay / settings.steps
        ),
        objective=ObjectiveConfig(
            l1=L1(weight=l1, schedule=Schedule(warmup_steps=settings.l1_warmup), target_l0=target_l0)
        ),
        seed=seed, order_seed=seed, checkpoint_every=settings.steps, log_every=100,
    )  # fmt: skip


def peer(
    name: str, x: Path, settings: Settings, seed: int, *, l1: float, work: Path,
    truth: np.ndarray | None = None,
) -> Result:  # fmt: skip
    """Train a peer in its own environment.

    Raises:
        UserError: it could not.
    """
    if not PEERS_PYTHON.exists():
        raise UserError("the peers are not installed: run `make peers`")
    request = work / "request.json"
    asked = {
        "peer": name, "x": str(x), "settings": settings._asdict(), "seed": seed, "l1": l1,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    request.write_text(json.dumps(asked), encoding="utf-8")
    child = subprocess.run(
        [PEERS_PYTHON, "-m", "benchmarks.quality.peers", str(request)], cwd=ROOT,
        env={**os.environ, **_CHILD}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"]
        raise UserError(f"{name} cannot be trained: {said[-1]}")
    seconds = json.loads(request.with_suffix(".out").read_text(encoding="utf-8"))["seconds"]
    sae = SAE(Parameters(**load_file(request.with_suffix(".safetensors"))))
    held_out = np.load(x)[-settings.held_out :]
    return _judged(name, seed, l1, seconds, sae, held_out, truth)


def at_l0(
    target: float,
    first: float,
    train_once: Callable[[float], Result],
    *,
    within: float = 0.02,
    runs: int = 5,
) -> Result:
    """The result of `train_once(λ)` whose L0 is nearest to a target, by a secant search in logarithms.

    Args:
        first: λ to begin with.
        within: how near is near enough, as a share.
    """
    tried = []
    l1 = first
    for _ in range(runs):
        result = train_once(l1)
        tried.append(result)
        if abs(math.log(max(result.l0, 0.1) / target)) <= math.log(1 + within):
            break
        slope = -1.5
        if len(tried) > 1:
            a, b = sorted(tried, key=lambda r: abs(math.log(max(r.l0, 0.1) / target)))[:2]
            rise = math.log(max(a.l0, 0.1) / max(b.l0, 0.1))
            run = math.log(a.l1 / b.l1)
            slope = min(-0.3, rise / run) if run else slope
        nearest = min(tried, key=lambda r: abs(math.log(max(r.l0, 0.1) / target)))
        l1 = nearest.l1 * math.exp(math.log(target / max(nearest.l0, 0.1)) / slope)
    return min(tried, key=lambda r: abs(math.log(max(r.l0, 0.1) / target)))


def _judged(
    name: str, seed: int, l1: float, seconds: float, sae: SAE, held_out: np.ndarray,
    truth: np.ndarray | None,
) -> Result:  # fmt: skip
    seen = evaluate(sae, torch.from_numpy(held_out).split(4096)).metrics()
    found = None
    if truth is not None:
        found = recovery(torch.from_numpy(truth), sae.parameters.W_dec)
    return Result(
        name, seed, l1, seconds, seen["fvu"], seen["l0"], seen["dead_fraction"],
        None if found is None else found["matched_cosine"],
        None if found is None else found["recovered"],
    )  # fmt: skip
