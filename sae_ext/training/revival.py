"""Bringing dead features back: they are given the directions of rows that are reconstructed badly.

Of the candidate rows, some are drawn without replacement with probability proportional to ‖x̂ - x‖⁴ (Bricken
et al. 2023, "Neuron Resampling"). A revived feature points along x - b_dec in encoder and decoder, its bias is
0, and Adam knows nothing of its past. It counts as dead until it has really fired: that is looked at after
`verify_after` steps, and where it has not it may be revived again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext.model import activated
from sae_ext.training.config import RevivalConfig
from sae_ext.training.history import Event
from sae_ext.training.learner import Learner, seed_of

_CHUNK_ROWS = 1024


class Revival:
    """The revivals of one run. Results have been settled whenever it looks at the learner."""

    def __init__(self, config: RevivalConfig, learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.revived_at = torch.full_like(learner.silent_rows, -1, device="cpu")
        """Step after which each feature was revived, while that is to be verified; else -1 [d_sae]."""

    def due(self, step: int) -> bool:
        """Whether dead features are to be revived after this many steps."""
        every, run = self.config.every, self.learner.config.steps
        if step == run:
            return False  # what is revived now would never learn
        return step in self.config.at or (
            every is not None and step % every == 0 and step <= self.config.until * run
        )

    def verifies(self, step: int) -> bool:
        """Whether it is time to see if revived features have fired."""
        begun = self.revived_at[self.revived_at >= 0]
        return bool((begun + self.config.verify_after <= step).any())

    def verify(self, step: int) -> list[Event]:
        """See whether those revived long enough ago have fired since."""
        events = []
        for begun in sorted(set(self.revived_at.tolist())):
            if begun < 0 or step < begun + self.config.verify_after:
                continue
            which = self.revived_at == begun
            rows = (step - begun) * self.learner.config.batch_rows
            fired = which & (self.learner.silent_rows.cpu() < rows)
            self.revived_at[which] = -1
            told = f"of {int(which.sum())} revived after step {begun}"
            for name, some in (("fired_again", fired), ("still_silent", which & ~fired)):
                if count := int(some.sum()):
                    events.append(Event(step, name, count, told))
        return events

    def revive(self, candidates: Callable[[int, int], Tensor]) -> list[Event]:
        """Give dead features that are not waiting to be verified new directions.

        Args:
            candidates: gives so many scaled rows [n, d_in], drawn with a seed.
        """
        learner, step = self.learner, self.learner.step_number
        silent = learner.silent_rows.cpu() >= learner.config.dead_rows
        which = (silent & (self.revived_at < 0)).nonzero()[:, 0]
        if len(which) == 0:
            return []
        seed = seed_of(learner.config.seed, step, "revival")
        rows = candidates(self.config.candidates, seed)
        errors = _squared_errors(learner, rows)
        # Gumbel top-k: the largest of log p + noise are a draw without replacement.
        generator = torch.Generator().manual_seed(seed)
        noise = -torch.empty_like(errors).exponential_(generator=generator).log()
        which = which[: int((errors > 0).sum())]
        if len(which) == 0:
            return []
        chosen = (2 * errors.log() + noise).topk(len(which)).indices
        self._give(which.to(learner.device), rows[chosen.to(rows.device)])
        self.revived_at[which] = step
        learner.rewarm_from = step
        return [Event(step, "revived", len(which), f"from the worst of {len(rows)} rows")]

    def _give(self, which: Tensor, rows: Tensor) -> None:
        learner, weights = self.learner, self.learner.weights
        alive = learner.silent_rows < learner.config.dead_rows
        if not bool(alive.any()):
            alive = torch.ones_like(alive)
        direction = learner.architecture.read(rows, weights) - weights["b_dec"]
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
        lengths = {
            name: weights[name][alive].norm(dim=1).mean() for name in ("W_enc_rows", "W_dec")
        }
        share = self.config.encoder_scale
        if share is None:
            share = 1.0 if learner.architecture.ranks else 0.2
        weights["W_enc_rows"][which] = share * lengths["W_enc_rows"] * direction
        unit = learner.sae_config.decoder == "unit"
        weights["W_dec"][which] = direction if unit else lengths["W_dec"] * direction
        weights["b_enc"][which] = 0
        learner.architecture.revive(weights, which)
        for moments in (learner.m, learner.v):
            for name in ("W_enc_rows", "b_enc", "W_dec", *learner.architecture.per_feature):
                moments[name][which] = 0
        if learner.group is not None:  # machines may round differently
            for t in weights.values():
                dist.broadcast(t, group_src=0, group=learner.group)


@torch.no_grad()
def _squared_errors(learner: Learner, rows: Tensor) -> Tensor:
    """‖x̂ - x‖² of scaled rows, float64 [n] on the CPU."""
    now = learner.now({})
    # What an architecture keeps from batch to batch is not to learn from these.
    now.counters = {name: t.clone() for name, t in now.counters.items()}
    price = torch.ones_like(learner.weights["b_enc"])
    found = []
    for x in torch.split(rows, _CHUNK_ROWS):
        out = learner.architecture.forward(x, learner.weights, now, price=price)
        x_hat = activated(out.x_hat, learner.sae_config.output)
        target = x if out.target is None else out.target
        found.append((x_hat - target).double().square().sum(dim=1).cpu())
    return torch.cat(found)
