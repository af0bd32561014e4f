"""What an autoencoder's configuration and its training's cannot see alone: whether they go together.

Called where a recipe is read, so that nothing is started in vain, and again before the first row is read.
"""

from __future__ import annotations

from sae_ext.architectures import Projection
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.errors import UserError
from sae_ext.fields import require
from sae_ext.training.terms import L0, L1


def check_together(
    sae: SAEConfig,
    train: TrainConfig,
    *,
    workers: int = 1,
    on_gpu: bool = False,
    folders: bool = True,
    streamed: bool = False,
) -> None:
    """Raise `UserError`, naming the field and the remedy, where they do not go together.

    Args:
        folders: look into the folder that an autoencoder begins from; a recipe can be read without it.
        streamed: the rows to train on come as a stream, and nothing is known of them but themselves.
    """
    architecture, objective = sae.architecture, train.objective
    kind = type(architecture).__name__
    if folders or not isinstance(architecture, Projection):
        _check_sparsity(sae, train)
    for name, schedule in architecture.schedules().items():
        schedule.check_fits(train.steps, f"sae.architecture.{name}")
    objective.check_serves(architecture)
    require(
        objective.l0 is None or objective.l1 is None,
        "train.objective has both l0 and l1, which is there unless it is left out: set l1 to null",
    )
    require(
        "gates" not in architecture.gives or objective.reward is not None,
        f"the gates of a {kind} learn from train.objective.reward alone: give it",
    )
    _check_output(sae, train)
    _check_targets(sae, train)
    _check_dead(train)
    _check_precision(sae, train, on_gpu=on_gpu)
    _check_workers(sae, train, workers)
    if streamed:
        _check_streamed(sae, train, workers)
    if train.buffer is not None:
        require(
            train.batch_rows <= train.buffer.min_rows,
            f"train.buffer.min_rows is {train.buffer.min_rows}, but a batch has {train.batch_rows} rows: raise it",
        )


def _check_sparsity(sae: SAEConfig, train: TrainConfig) -> None:
    architecture, objective = sae.architecture, train.objective
    kind = type(architecture).__name__
    require(
        objective.l1 is None or not architecture.sparse_alone,
        f"train.objective.l1 is a penalty, which the architecture {kind} does without: set l1 to null",
    )
    require(
        objective.auxk is None or architecture.ranks,
        f"train.objective.auxk reaches features that are positive but not among the largest, and a silent one of "
        f"a {kind} never is: leave it out and set train.revival, or choose topk or batchtopk",
    )


def _check_output(sae: SAEConfig, train: TrainConfig) -> None:
    architecture, kind = sae.architecture, type(sae.architecture).__name__
    if sae.output != "identity":
        require(
            train.scale == "none",
            f"sae.output {sae.output!r} cannot be scaled back: set train.scale to none, or output to identity",
        )
        require(
            not architecture.own_target,
            f"sae.output is {sae.output!r}, but a {kind} has a target of its own: leave output out",
        )
    reads_out = isinstance(architecture, Projection) and architecture.target == "embedding"
    require(
        train.objective.auxk is None or not reads_out,
        "train.objective.auxk is about x̂ as it is before the read-out: leave it out, or set "
        "sae.architecture.target to stopgrad",
    )
    if train.early_stopping is not None and train.early_stopping.metric == "loss":
        why = None
        if architecture.own_target:
            why = f"a {kind} has a target of its own"
        elif train.objective.reward is not None:
            why = "rewards are not computed on validation rows"
        elif architecture.ordinary_from and train.objective.l1 is not None:
            why = f"l1 is about some features of a {kind} alone"
        require(why is None, f"train.early_stopping.metric must be fvu: {why}")


def _check_targets(sae: SAEConfig, train: TrainConfig) -> None:
    for name, term in train.objective.terms().items():
        if not isinstance(term, L1 | L0) or term.target_l0 is None:
            continue
        where = f"train.objective.{name}.target_l0"
        require(
            term.target_l0 <= sae.d_sae / 2,
            f"{where} is {term.target_l0:g}, more than half of the {sae.d_sae} features: lower it",
        )
        require(
            train.early_stopping is None,
            f"train.early_stopping cannot judge while {where} is searched for: leave one of them out",
        )


def _check_dead(train: TrainConfig) -> None:
    wanting = [
        n for n, v in (("revival", train.revival), ("objective.auxk", train.objective.auxk)) if v
    ]
    rows = train.steps * train.batch_rows
    require(
        not wanting or train.dead_rows < rows,
        f"train.dead_rows is {train.dead_rows}, but the run sees {rows} rows, so that no feature is ever dead: "
        f"lower it, or leave {' and '.join(wanting)} out",
    )
    revival = train.revival
    require(
        revival is None or revival.every is None or revival.every <= revival.until * train.steps,
        "train.revival.every is longer than the part of the run in which features are revived (until): lower it",
    )
    require(
        revival is None or revival.every is None or revival.rewarm_steps <= revival.every,
        "train.revival.rewarm_steps is longer than every, so that the learning rate would never come back: lower "
        "it",
    )


def _check_precision(sae: SAEConfig, train: TrainConfig, *, on_gpu: bool) -> None:
    if train.precision == "float32":
        return
    require(
        on_gpu,
        f"train.precision {train.precision!r} needs a GPU: set it to float32, or train on one",
    )
    fused = sae.architecture.selects and sae.output == "identity"
    others = set(train.objective.terms()) - {"mse", "l1"}
    require(
        fused and not others,
        f"train.precision {train.precision!r} is for the fused step alone, which does reconstruction and l1 for "
        "architectures that choose entries: set it to float32",
    )


def _check_streamed(sae: SAEConfig, train: TrainConfig, workers: int) -> None:
    require(
        train.buffer is not None,
        "a stream is mixed in a ring buffer: give train.buffer, such as {rows: 100000, min_rows: 50000}",
    )
    require(
        workers == 1,
        f"a stream goes to one trainer, and {workers} are asked for: set resources.train_workers to 1",
    )
    for reader in (sae.architecture, *train.objective.terms().values()):
        for name in reader.columns():
            raise UserError(
                f"{type(reader).__name__} reads the column {name!r}, which rows of a stream do not have: "
                "store the activations (leave stream out)"
            )


def _check_workers(sae: SAEConfig, train: TrainConfig, workers: int) -> None:
    if workers == 1:
        return
    require(
        train.batch_rows >= workers,
        f"train.batch_rows is {train.batch_rows}, fewer than the {workers} workers: raise it, or lower "
        "resources.train_workers",
    )
    parts = {"sae.architecture": sae.architecture} | {
        f"train.objective.{name}": term for name, term in train.objective.terms().items()
    }
    for where, part in parts.items():
        if not part.by_row:
            raise UserError(
                f"{where} ({type(part).__name__}) looks at a whole batch at once, of which several workers "
                "have a part each: set resources.train_workers to 1, or choose another one"
            )
