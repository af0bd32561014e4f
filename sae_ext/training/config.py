"""How an autoencoder is trained: every knob, documented under itself.

Part of the key of the result: so nothing here says how the work is spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_ext.fields import STRICT, require, require_above, require_at_least, require_finite
from sae_ext.schedules import Schedule
from sae_ext.training.terms import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class RevivalConfig:
    """Dead features are given new directions, those of rows that are reconstructed badly.

    Of `candidates` random rows some are drawn with probability proportional to their squared error squared,
    without replacement (Bricken et al. 2023, app. "resampling").
    """

    __pydantic_config__ = STRICT

    every: int | None = None
    """Steps between looks for dead features."""
    at: tuple[int, ...] = ()
    """Steps after which to look, instead of `every`."""
    until: float = 0.7
    """Part of the run after which `every` stops: late revivals have no time to learn."""
    candidates: int = 8192
    """Rows looked at."""
    encoder_scale: float | None = None
    """Length of a new encoder row, as a share of the living features' mean. When absent 0.2, or 1 where a
    feature has to be among the largest of its row to be active (TopK and its kin)."""
    rewarm_steps: int = 100
    """Steps over which the learning rate comes back from 0 after a revival; 0 leaves it."""
    verify_after: int = 500
    """Steps after which revived features must have fired; those that have not are dead again."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(self, 0, "every", "candidates", "encoder_scale", "verify_after")
        require_at_least(self, 0, "rewarm_steps")
        require(
            (self.every is None) != (not self.at),
            f"every or at must be given, and not both, got every={self.every} and at={list(self.at)}",
        )
        require(
            all(step > 0 for step in self.at) and list(self.at) == sorted(set(self.at)),
            f"at must be steps in ascending order from 1 on, got {list(self.at)}",
        )
        require(0 < self.until <= 1, f"until must lie in (0, 1], got {self.until}")


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Stop where validation no longer improves, and keep the best. Judged at every checkpoint, once all
    warm-ups have ended."""

    __pydantic_config__ = STRICT

    patience: int = 5
    """Checkpoints in a row without improvement after which training ends."""
    metric: Literal["loss", "fvu"] = "loss"
    """`loss`: reconstruction, L1 and L0 terms with their full weights, before row weights; `fvu`."""
    min_change: float = 0.0
    """Share by which the best must be undercut to count as better."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(self, 0, "patience")
        require(0 <= self.min_change < 1, f"min_change must lie in [0, 1), got {self.min_change}")


@dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """Rows are read in stored order through a ring buffer from which batches are drawn, instead of in a
    shuffled order of all: for data that comes as a stream, or lies where random access is dear."""

    __pydantic_config__ = STRICT

    rows: int = 100_000
    """Rows the buffer holds."""
    min_rows: int = 50_000
    """Rows there must be before the first batch is drawn."""
    fresh: float = 1.0
    """New rows taken in for each row trained on: 1 uses every row about once, 0.25 four times."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the rows kept."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(self, 0, "rows", "min_rows", "fresh")
        require(
            self.min_rows <= self.rows,
            f"min_rows is {self.min_rows}, but the buffer holds only {self.rows} rows: lower it",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    __pydantic_config__ = STRICT

    steps: int = 2000
    """Number of optimizer steps."""
    batch_rows: int = 2048
    """Rows per step, over all workers."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is lowered."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    lr_schedule: Schedule = Schedule(kind="linear", warmup_steps=100, last=0.2)
    """How the learning rate moves."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled, as AdamW's."""
    max_grad_norm: float | None = 1.0
    """Bound of the norm of all gradients together; none where it is null. The gradients of the first steps are so
    much longer than later ones that Adam, which remembers them, would move too slowly for long."""
    scale: Literal["dataset", "none"] = "dataset"
    """`dataset` scales activations so that E‖x‖ = sqrt(d_in) on the training split, and folds the factor into
    every SAE that is saved; `none` takes them as they are."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of matrix products on a GPU; the CPU knows float32 alone. Weights and sums stay float32 and more."""
    revival: RevivalConfig | None = None
    """What is done about dead features; nothing when absent."""
    dead_rows: int = 500_000
    """A feature is dead when it fired in none of this many last rows, over all workers."""
    early_stopping: EarlyStoppingConfig | None = None
    """When to stop before the last step; never when absent."""
    buffer: BufferConfig | None = None
    """How rows are mixed; a shuffled order of all of them when absent."""
    seed: int = 0
    """Seed of the initial weights and of all that is drawn in training."""
    order_seed: int = 0
    """Seed of the order of the rows. SAEs trained together must agree on it."""
    checkpoint_every: int = 500
    """Steps between checkpoints, from which a killed run goes on bit for bit, and looks at validation."""
    keep_checkpoints: bool = False
    """Keep an SAE folder of every checkpoint, ready for use."""
    log_every: int = 25
    """Steps between lines of the history."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(
            self, 0, "steps", "batch_rows", "lr", "max_grad_norm", "dead_rows", "checkpoint_every",
            "log_every",
        )  # fmt: skip
        require_at_least(self, 0, "weight_decay", "seed", "order_seed")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
        self.lr_schedule.check_fits(self.steps, "lr_schedule")
        self.objective.check_fits(self.steps)
        if self.revival is not None and self.revival.at:
            require(
                self.revival.at[-1] < self.steps,
                f"revival.at names step {self.revival.at[-1]}, but the run has {self.steps} steps: lower it, "
                "or train for more steps",
            )
