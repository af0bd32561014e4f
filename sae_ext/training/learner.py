"""One autoencoder in training: its weights, Adam's moments, its counters, and one step of it.

Where the objective is reconstruction and L1 and the architecture chooses among ordinary entries, a step is
the fused kernel's (`sae_ext.ops.Step`); anything else goes through autograd over the same kernels, with the
same Adam. Results are looked at every few steps, so that a GPU is not waited for in between.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from sae_ext import ops, reference
from sae_ext.architectures import Forward, Now, Weights
from sae_ext.architectures.base import FOUR, four
from sae_ext.config import SAEConfig, TrainConfig
from sae_ext.errors import Diverged
from sae_ext.model import SAE, activated
from sae_ext.training.sparsity import L0Target
from sae_ext.training.term import Seen
from sae_ext.training.terms import L0, L1

_EPS = 1e-8
_DECIDE_EVERY = 10
"""Steps between decisions that read results: often enough for them, rare enough for a GPU."""


class StepSums(NamedTuple):
    """What a step saw, over the rows of all workers; numbers may be tensors that are still computed."""

    rows: int
    squared_error: Any
    """Σ_b ‖x̂_b - t_b‖², without weights."""
    l1: Any
    """Σ_b Σ_j n_j z_bj, without weights."""
    nnz: Any
    saturated: Any
    fired: Tensor
    """In how many rows each feature was active, int64 [d_sae]."""
    terms: dict[str, Any]
    """The values of the objective's other terms."""


@dataclass
class Window:
    """Sums over the steps since the history's last line."""

    rows: int = 0
    steps: int = 0
    squared_error: float = 0.0
    l1: float = 0.0
    nnz: int = 0
    saturated: int = 0
    lr: float = 0.0
    """Of the last step."""
    terms: dict[str, float] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    """Steps in which each term was: not where its weight is 0."""

    def add(self, seen: StepSums, lr: float) -> None:
        """Take in a step; reads its numbers."""
        self.lr = lr
        self.rows += seen.rows
        self.steps += 1
        self.squared_error += float(seen.squared_error)
        self.l1 += float(seen.l1)
        self.nnz += int(seen.nnz)
        self.saturated += int(seen.saturated)
        for name, value in seen.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + float(value)
            self.computed[name] = self.computed.get(name, 0) + 1


class Learner:
    """See the module. Made ready by `begin`, and to go on from a checkpoint by `restore` after that."""

    def __init__(
        self,
        sae: SAEConfig,
        config: TrainConfig,
        classes: Mapping[str, list[str]],
        *,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.sae_config, self.config, self.classes = sae, config, dict(classes)
        self.architecture = sae.architecture
        self.device, self.group = device, group
        self.terms = config.objective.terms()
        self.weights: Weights = {}
        self.m: Weights = {}
        self.v: Weights = {}
        self.adam_step = 0
        self.step_number = 0
        self.counters: dict[str, Tensor] = {}
        self.silent_rows = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        """Rows since each feature last fired [d_sae]; 0 for those before `Architecture.ordinary_from`."""
        self.dead = torch.zeros(sae.d_sae, dtype=torch.bool, device=device)
        """Which had not fired for a whole window when that was last decided [d_sae]."""
        self.rewarm_from: int | None = None
        """Step from which the learning rate comes back after a revival."""
        self.window = Window()
        self.l0_target = _l0_target(config)
        self._some_dead = False
        self._op = ops.Step(precision=config.precision)
        self._pending: list[tuple[int, StepSums]] = []
        # Active entries, rows and the pace of steps since the last decision.
        self._undecided = [0.0, 0.0, 0.0]

    def begin(self, d_in: int, b_dec: Tensor) -> None:
        """Initial weights; b_dec [d_in] in scaled units."""
        seed, d_sae = self.config.seed, self.sae_config.d_sae
        weights = self.architecture.initial(d_in, d_sae, b_dec, self.classes, seed)
        self.weights = {name: t.to(self.device) for name, t in weights.items()}
        self.m = {name: torch.zeros_like(t) for name, t in self.weights.items()}
        self.v = {name: torch.zeros_like(t) for name, t in self.weights.items()}
        counted = self.architecture.counted()
        for term in self.terms.values():
            counted |= term.counted(d_sae)
        self.counters = {name: t.to(self.device) for name, t in counted.items()}

    # -- a step --------------------------------------------------------------------------------

    def step(self, x: Tensor, columns: Mapping[str, Tensor]) -> None:
        """One update on scaled rows x [B, d_in] and the values of their document columns."""
        now = self.now(columns)
        rates = {name: self.weight(name, self.step_number) for name in self.terms}
        active = {name for name, rate in rates.items() if rate > 0}
        if not self._some_dead:
            active.discard("auxk")  # its value is 0 then, and the fused step may do
        plain = active <= {"mse", "l1"} and self.sae_config.output == "identity"
        try:
            if plain and self.architecture.selects:
                seen = self._fused(x, now, rates)
            else:
                wanted = active | {"mse"}
                seen = self._by_autograd(x, now, {n: rates[n] for n in self.terms if n in wanted})
        except Diverged as error:
            self.settle()  # says which term, where that can be seen
            raise Diverged(
                f"{error}; that was step {self.step_number + 1}: {self._advice()}"
            ) from error
        self.step_number += 1
        self._pending.append((self.step_number, seen))
        if self.step_number % _DECIDE_EVERY == 0:
            self.settle()
            self._decide()

    def now(self, columns: Mapping[str, Tensor]) -> Now:
        """The step as architectures and terms see it."""
        names = self.architecture.schedules()
        factors = {
            name: schedule.factor(self.step_number, self.config.steps)
            for name, schedule in names.items()
        }
        return Now(
            step=self.step_number,
            generator=self._generator,
            factors=factors,
            columns=dict(columns),
            classes=self.classes,
            dead=self.dead,
            counters=self.counters,
        )

    def settle(self) -> None:
        """Look at the results of the steps since the last time.

        Raises:
            Diverged: a term was not finite; nothing is to be saved then.
        """
        pending, self._pending = self._pending, []
        for number, seen in pending:
            for name, value in (("mse", seen.squared_error), ("l1", seen.l1), *seen.terms.items()):
                if not math.isfinite(float(value)):
                    raise Diverged(
                        f"the term {name} is not finite at step {number}: {self._advice()}"
                    )
            lr = self.learning_rate(number - 1)
            self.window.add(seen, lr)
            fired = seen.fired.to(self.device) > 0
            fired[: self.architecture.ordinary_from] = True
            self.silent_rows = torch.where(fired, 0, self.silent_rows + seen.rows)
            for i, amount in enumerate((float(seen.nnz), seen.rows, lr / self.config.lr)):
                self._undecided[i] += amount

    def check_weights(self) -> None:
        """Raise `Diverged` where the last step has left a weight that is not finite."""
        for name, t in self.weights.items():
            if not bool(t.isfinite().all()):
                raise Diverged(
                    f"{name} is not finite after step {self.step_number}: {self._advice()}"
                )

    def _decide(self) -> None:
        """What later steps depend on is decided at fixed steps, whenever results are looked at."""
        nnz, rows, pace = self._undecided
        self._undecided = [0.0, 0.0, 0.0]
        self.dead = self.silent_rows >= self.config.dead_rows
        self._some_dead = bool(self.dead.any())
        if self.l0_target is not None and self._warm(self.l0_target.term):
            self.l0_target.see(nnz / rows, pace)

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        config = self.config
        rate = config.lr * config.lr_schedule.factor(step, config.steps, offset=1)
        revival = config.revival
        if self.rewarm_from is not None and revival is not None and revival.rewarm_steps:
            rate *= min(1.0, (step - self.rewarm_from + 1) / revival.rewarm_steps)
        return rate

    def full_weight(self, name: str) -> float:
        """Weight of a term without its schedule: as given, or as found for a `target_l0`."""
        target = self.l0_target
        if target is not None and target.term == name:
            return target.weight
        return self.terms[name].weight

    def weight(self, name: str, step: int) -> float:
        """Weight of a term at a step, counted from 0."""
        factor = self.terms[name].schedule.factor(step, self.config.steps)
        return self.full_weight(name) * factor

    def penalty(self, step: int) -> float | None:
        """Weight of the term for sparsity at a step: the one that is searched for, or λ, or that of `l0`; None
        where there is none."""
        for name in (self.l0_target.term if self.l0_target else "l1", "l1", "l0"):
            if name in self.terms:
                return self.weight(name, step)
        return None

    def sae(self, scale: float) -> SAE:
        """The autoencoder as it is now, for raw rows, where the learner is."""
        folded = self.architecture.folded(self.weights, scale)
        architecture, more = self.architecture.final(folded, self.counters)
        named = architecture.named(self.classes)
        return SAE(four(folded), named, more, self.sae_config.output)

    # -- a checkpoint ----------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the next step depends on: tensors by name, and plain facts."""
        self._op.wait()
        groups = (("w", self.weights), ("m", self.m), ("v", self.v), ("c", self.counters))
        tensors = {f"{g}.{name}": t for g, members in groups for name, t in members.items()}
        tensors |= {"silent_rows": self.silent_rows, "dead": self.dead}
        facts = {
            "step": self.step_number,
            "adam_step": self.adam_step,
            "rewarm_from": self.rewarm_from,
            "classes": self.classes,
            "kernels": self._op.state(),
            "l0_target": None if self.l0_target is None else self.l0_target.state(),
            "window": vars(self.window),
            "undecided": self._undecided,
        }
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from `state`, after `begin`; KeyError or TypeError where that is not what it gave."""
        for letter, group in (
            ("w", self.weights), ("m", self.m), ("v", self.v), ("c", self.counters),
        ):  # fmt: skip
            # In the order of `begin`: a file has none, but workers on one autoencoder must share it.
            group.update({n: tensors[f"{letter}.{n}"].to(self.device) for n in group})
        self.silent_rows = tensors["silent_rows"].to(self.device)
        self.dead = tensors["dead"].to(self.device)
        self._some_dead = bool(self.dead.any())
        self.step_number, self.adam_step = facts["step"], facts["adam_step"]
        self.rewarm_from, self.classes = facts["rewarm_from"], facts["classes"]
        self.window, self._undecided = Window(**facts["window"]), list(facts["undecided"])
        self._op.restore(facts["kernels"])
        if self.l0_target is not None:
            self.l0_target.restore(facts["l0_target"])

    # -- inside ----------------------------------------------------------------------------------

    def _fused(self, x: Tensor, now: Now, rates: Mapping[str, float]) -> StepSums:
        config, d_sae, params = self.config, self.sae_config.d_sae, four(self.weights)
        mse, l1 = config.objective.mse, config.objective.l1
        recon_weight = mse.row_weights(now)
        factor = rates["mse"] * mse.scale(x.shape[1])
        if factor != 1:
            ones = torch.ones_like(x[:, 0])
            recon_weight = factor * (ones if recon_weight is None else recon_weight)
        with torch.no_grad():
            support = self.architecture.support(x, params, now)
        adam = ops.AdamState(m=four(self.m), v=four(self.v), step=self.adam_step)
        result = self._op(
            params, adam, x,
            l1=0.0 if l1 is None else rates["l1"] * l1.scale(d_sae),
            lr=self.learning_rate(self.step_number),
            clip=self.architecture.clip, beta1=config.beta1, beta2=config.beta2, eps=_EPS,
            weight_decay=config.weight_decay,
            recon_weight=recon_weight,
            l1_weight=None if l1 is None else l1.row_weights(now),
            decoder_norm=self.sae_config.decoder, max_grad_norm=config.max_grad_norm,
            support=support, group=self.group,
        )  # fmt: skip
        self.adam_step = adam.step
        rows = len(x) if self.group is None else config.batch_rows
        return _Lazy(rows, result)  # type: ignore[return-value]

    def _by_autograd(self, x: Tensor, now: Now, rates: Mapping[str, float]) -> StepSums:
        self._op.wait()  # what is queued on a GPU moves the same weights
        leaves = {name: t.requires_grad_(True) for name, t in self.weights.items()}
        try:
            free = self.sae_config.decoder == "free"
            price = leaves["W_dec"].norm(dim=1) if free else None
            out = self.architecture.forward(x, leaves, now, price=price)
            out = out._replace(x_hat=activated(out.x_hat, self.sae_config.output))
            target = x if out.target is None else out.target
            seen = Seen(out, self.architecture.read(x, leaves), target, leaves, now)
            values = {name: self.terms[name].value(seen) for name in rates}
            loss = torch.stack([rates[name] * value for name, value in values.items()]).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        finally:
            for t in self.weights.values():
                t.requires_grad_(False)
        with torch.no_grad():
            gradient = {
                name: torch.zeros_like(t) if g is None else g
                for (name, t), g in zip(self.weights.items(), grads, strict=True)
            }
            sums = self._sums(out, target, values)
            if self.group is not None:
                sums = self._over_group(gradient, sums, len(x))
            self._update(gradient)
        return sums

    def _sums(self, out: Forward, target: Tensor, values: Mapping[str, Tensor]) -> StepSums:
        clip, z = self.architecture.clip, out.code.val
        return StepSums(
            len(target),
            (out.x_hat - target).double().square().sum(),
            out.l1.double().sum(),
            len(z),
            0 if clip is None else (z >= clip).sum(),
            torch.bincount(out.code.col, minlength=self.sae_config.d_sae),
            {name: value.detach() for name, value in values.items() if name not in ("mse", "l1")},
        )

    def _over_group(self, gradient: Weights, sums: StepSums, rows: int) -> StepSums:
        """The gradient in place and the sums, over the rows of all members."""
        numbers = [
            rows,
            *(float(s) for s in sums[1:5]),
            *(rows * float(t) for t in sums.terms.values()),
        ]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        for g in gradient.values():
            g *= rows
        for tensor in (total, sums.fired, *gradient.values()):
            dist.all_reduce(tensor, group=self.group)
        all_rows, squared_error, l1, nnz, saturated, *terms = total.tolist()
        for g in gradient.values():
            g /= all_rows
        means = {n: t / all_rows for n, t in zip(sums.terms, terms, strict=True)}
        return StepSums(int(all_rows), squared_error, l1, nnz, saturated, sums.fired, means)

    def _update(self, gradient: Weights) -> None:
        """Clip, project, move by Adam, bring decoder rows back to length 1."""
        config = self.config
        if config.max_grad_norm is not None:
            norm = torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt()
            share = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for g in gradient.values():
                g *= share
        unit = self.sae_config.decoder == "unit"
        if unit:
            reference.project(self._of_unit_rows(gradient), self._of_unit_rows(self.weights))
        # Only the four decay: thresholds and the like are no weights to be kept small.
        for names, decay in (
            (FOUR, config.weight_decay),
            ([name for name in gradient if name not in FOUR], 0.0),
        ):
            weights, grads, m, v = (
                [group[n] for n in names] for group in (self.weights, gradient, self.m, self.v)
            )
            adamw(
                weights, grads, m, v, [], [torch.tensor(float(self.adam_step)) for _ in names],
                amsgrad=False, beta1=config.beta1, beta2=config.beta2, eps=_EPS, maximize=False,
                lr=self.learning_rate(self.step_number), weight_decay=decay,
            )  # fmt: skip
        self.adam_step += 1
        if unit:
            reference.renormalise(self._of_unit_rows(self.weights))
        self.architecture.constrain(self.weights)

    def _of_unit_rows(self, weights: Weights) -> ops.Parameters:
        """The four, of the features whose decoder rows have length 1 (no copies)."""
        params = four(weights)
        return dataclasses.replace(params, W_dec=params.W_dec[self.architecture.ordinary_from :])

    def _warm(self, name: str) -> bool:
        schedule = self.terms[name].schedule
        return self.step_number > schedule.start_step + schedule.warmup_steps

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.config.seed, self.step_number, purpose))

    def _advice(self) -> str:
        return (
            f"lower train.lr (now {self.config.lr:g}), give train.lr_schedule more warmup_steps or set "
            "train.max_grad_norm; the last checkpoint is kept"
        )


class _Lazy:
    """A `StepSums` over a fused step's result, whose numbers may not be known yet."""

    def __init__(self, rows: int, result: ops.StepResult) -> None:
        self.rows, self._result = rows, result
        self.terms: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._result, name)


def seed_of(seed: int, step: int, purpose: str) -> int:
    """A seed for what is drawn in a step; no state is kept, so a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _l0_target(config: TrainConfig) -> L0Target | None:
    for name, term in config.objective.terms().items():
        if isinstance(term, L1 | L0) and term.target_l0 is not None:
            return L0Target(name, term.target_l0, term.weight)
    return None
