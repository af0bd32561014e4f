"""What an architecture is: how pre-activations become the few activations of a row.

    pre = (x - b_dec) W_enc + b_enc      z = activation(pre)      x̂ = output(z W_dec + b_dec)

An architecture is its own configuration: a frozen dataclass with a `kind`. It may choose which entries can
be active (`support`), learn tensors beside the four, or replace the forward altogether. What it becomes
after training (`final`) is what `sae_ext.model.SAE` encodes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from sae_ext import ops
from sae_ext.fields import require
from sae_ext.ops import Parameters, SparseCode, Support
from sae_ext.schedules import Schedule

FOUR = ("W_enc_rows", "b_enc", "W_dec", "b_dec")
"""Names of the tensors that every autoencoder has."""
Weights = dict[str, Tensor]
"""Everything an autoencoder learns, by name: the four, and what its architecture adds."""
_CHUNK_BYTES = 64 << 20


class Forward(NamedTuple):
    """What the terms of an objective are made of; gradients flow through all of it."""

    x_hat: Tensor
    """Reconstruction [B, d_in], before the output activation."""
    code: SparseCode
    """The active entries; `val` is z."""
    l1: Tensor
    """Σ_j n_j z_bj [B]: n_j = ‖W_dec,j‖ for a free decoder, else 1."""
    target: Tensor | None = None
    """What x̂ should be; None for x itself."""
    more: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """What the architecture alone has, by the names in its `gives`."""


@dataclass
class Now:
    """A training step as architectures and terms see it."""

    step: int
    """Steps done before this one."""
    generator: Callable[[str], torch.Generator]
    """For what is drawn in this step: the same for the same purpose, step and seed."""
    factors: dict[str, float] = field(default_factory=dict)
    """Of the schedules that architectures name, such as a temperature."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Values of the batch's rows in document columns: float numbers, or int64 places in `classes` (-1 for
    one never seen in training)."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """The values each column of classes has in the training split, sorted."""
    dead: Tensor | None = None
    """Which features have not fired for a whole window, bool [d_sae]; None where nobody asked."""
    counters: dict[str, Tensor] = field(default_factory=dict)
    """What is kept from step to step without being learned; written in place."""


class Architecture:
    """The base of all; what it does is a plain ReLU."""

    __slots__ = ()

    gives: ClassVar[frozenset[str]] = frozenset()
    """Names in `Forward.more` for the terms that need them."""
    selects: ClassVar[bool] = True
    """Whether it is the ordinary forward on the entries that `support` lists, so that the fused step does it."""
    per_feature: ClassVar[tuple[str, ...]] = ()
    """Names of what it learns beside the four that has a row or number for each feature."""
    sparse_alone: ClassVar[bool] = False
    """Whether it is sparse without a penalty."""
    ranks: ClassVar[bool] = False
    """Whether a feature has to be among the largest to be active, so that a silent one may be positive."""
    own_target: ClassVar[bool] = False
    """Whether x̂ should be something else than x."""
    by_row: ClassVar[bool] = True
    """Whether a row's code depends on that row alone: what training on several workers needs."""
    layout: ClassVar[str] = "standard"
    """What SAELens calls it in `cfg.json`; a name SAELens refuses where it has no such architecture."""

    @property
    def clip(self) -> float | None:
        """Upper bound of z; None for none."""
        return None

    @property
    def ordinary_from(self) -> int:
        """The first feature that is of the ordinary kind.

        Those before it learn whether they fire or not, so they count as neither silent nor dead, and their
        decoder rows may have any length.
        """
        return 0

    def check(self, d_sae: int) -> None:
        """Raise `UserError` where it cannot have that many features."""

    def initial(
        self, d_in: int, d_sae: int, b_dec: Tensor, classes: Mapping[str, list[str]], seed: int
    ) -> Weights:
        """Everything it learns, as training begins; b_dec is where that of an ordinary one begins.

        Args:
            classes: the values of the columns of classes it reads.
        """
        return initial_weights(d_in, d_sae, b_dec, seed)

    def counted(self) -> dict[str, Tensor]:
        """What it keeps from step to step beside that, as training begins."""
        return {}

    def begins_from(self) -> str | None:
        """A hash of what it begins from outside the data, such as a pre-trained SAE; None for nothing.

        Raises:
            UserError: it is not there.
        """
        return None

    def columns(self) -> dict[str, Literal["class", "number"]]:
        """Document columns it reads in training."""
        return {}

    def schedules(self) -> dict[str, Schedule]:
        """Schedules of its own, whose factors it finds in `Now.factors`."""
        return {}

    def support(self, x: Tensor, params: Parameters, now: Now) -> Support | None:
        """The entries that may be active in this training step; None for all."""
        return None

    def forward(self, x: Tensor, weights: Weights, now: Now, *, price: Tensor | None) -> Forward:
        """The differentiable forward of a training step; `price` is n [d_sae], None for 1."""
        params = four(weights)
        with torch.no_grad():
            support = self.support(x, params, now)
        out = ops.autoencode(x, params, clip=self.clip, feature_weight=price, support=support)
        return Forward(out.x_hat, out.code, out.l1)

    def folded(self, weights: Weights, scale: float) -> Weights:
        """What was learned on scale · x, for raw x; codes keep their units.

        W_enc · scale reads raw rows, W_dec / scale and b_dec / scale write them.
        """
        return {name: t.clone() for name, t in weights.items()} | {
            "W_enc_rows": weights["W_enc_rows"] * scale,
            "W_dec": weights["W_dec"] / scale,
            "b_dec": weights["b_dec"] / scale,
        }

    def constrain(self, weights: Weights) -> None:
        """Bring back into its range what an update took out of it, in place; the four need nothing."""

    def revive(self, weights: Weights, which: Tensor) -> None:
        """Let what it learned for these features, numbers [n], begin again, in place."""

    def final(self, weights: Weights, counters: Mapping[str, Tensor]) -> tuple[Any, Weights]:
        """The architecture after training, and the tensors beside the four that `encode` needs."""
        return self, {}

    def named(self, classes: Mapping[str, list[str]]) -> Architecture:
        """The same after training, with the classes of its columns where it keeps them."""
        return self

    def encode(self, x: Tensor, params: Parameters, more: Mapping[str, Tensor]) -> SparseCode:
        """The code of rows x [B, d_in] once trained."""
        return ops.encode(x, params, self.clip)

    def read(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the encoder reads of rows x, given what it learned beside the four: x itself."""
        return x

    def target(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the reconstruction of rows x should be: x itself."""
        return x

    def write(self, x_hat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the decoder's output becomes in the end: it stays."""
        return x_hat

    def d_in(self, params: Parameters, tensors: Mapping[str, Tensor]) -> int:
        """Width of the rows it reads."""
        return int(params.W_enc_rows.shape[1])

    def d_out(self, params: Parameters, tensors: Mapping[str, Tensor]) -> int:
        """Width of what it reconstructs."""
        return int(params.W_dec.shape[1])

    def to_layout(self) -> dict[str, Any]:
        """Its entries of `cfg.json`."""
        return {}

    @classmethod
    def from_layout(cls, cfg: Mapping[str, Any]) -> Self:
        """From the entries of `cfg.json`; raises KeyError or TypeError where they are not right."""
        return cls()


def require_never_zero(schedule: Schedule, name: str) -> None:
    """Raise `UserError` where a schedule's factor is 0 at some step, as nothing that is divided by may be."""
    require(
        schedule.start_step == 0
        and (schedule.warmup_steps == 0 or schedule.initial > 0)
        and (schedule.kind == "constant" or schedule.final > 0),
        f"{name} must not come to 0: leave start_step out, and give {name}.final (and with warmup_steps "
        f"{name}.initial) above 0",
    )


def initial_weights(d_in: int, d_sae: int, b_dec: Tensor, seed: int) -> Weights:
    """Random unit-norm decoder rows, the encoder a tenth of its transpose, b_enc zero, b_dec as given.

    So the first reconstructions are small and grow where they help. With an encoder as long as the decoder,
    half of all features fire at once, x̂ is d_sae / (2 d_in) times too long, and the first thousand steps
    go into shrinking it.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return {
        "W_enc_rows": 0.1 * W_dec,
        "b_enc": torch.zeros(d_sae),
        "W_dec": W_dec,
        "b_dec": b_dec.float().clone(),
    }


def four(weights: Mapping[str, Tensor]) -> Parameters:
    """The four tensors (no copies)."""
    return Parameters(*(weights[name] for name in FOUR))


def pre_activations(x: Tensor, params: Parameters) -> Iterator[tuple[slice, Tensor]]:
    """pre [rows, d_sae] of some rows at a time: memory stays bounded where no chunk is kept."""
    size = max(1, _CHUNK_BYTES // (len(params.b_enc) * params.b_enc.element_size()))
    for start in range(0, max(1, len(x)), size):  # of no rows one chunk of none
        rows = slice(start, min(start + size, len(x)))
        yield (
            rows,
            torch.addmm(params.b_enc, x[rows].to(params.b_dec.dtype) - params.b_dec, params.W_enc),
        )


def support_of(chunks: Iterable[Tensor]) -> Support:
    """A support from boolean chunks [rows, d_sae], none of which is kept."""
    return joined([listed(chunk) for chunk in chunks])


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Entries per row and the columns of all, of a boolean chunk [rows, d_sae]."""
    return chosen.sum(dim=1), chosen.nonzero()[:, 1].int()


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Support:
    """A support from what `listed` made of chunks of rows."""
    counts = torch.cat([count for count, _ in parts])
    row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=row_ptr[1:])
    return Support(row_ptr, torch.cat([col for _, col in parts]))


def code_on(
    x: Tensor, params: Parameters, support: Support, clip: float | None = None
) -> SparseCode:
    """The active entries of x on a support."""
    if len(x) == 0:
        return ops.encode(x, params, clip)
    with torch.no_grad():
        return ops.autoencode(x, params, clip=clip, support=support).code
