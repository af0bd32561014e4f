"""Supervised slots: of K slots each row takes one, its rule's; further features are free.

    l = (x - b_dec) W_enc[:, :K] + b_enc[:K]
    z = softmax((l + g) / τ)                  in training, g Gumbel noise (Jang et al. 2017, eq. 2)
    z = one-hot of the largest l              after training
    x̂ = z W_dec[:K] + z_free W_dec[K:] + b_dec

The free features are an ordinary ReLU autoencoder of the same x beside them; with d_sae = K there are none,
and x̂ has K values only. With `magnitude` z is multiplied by relu((x - b_dec) · w_i + c_i), which is learned.

What a slot reads of a row is its content u_i = z_i V_i (x - b_dec), from which a linear head of its own tells
the answer (the term `value`); here z is without the magnitude. Training reads two document columns: the
row's rule, and its answer where one is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sae_ext import ops
from sae_ext.architectures.base import Architecture, Forward, Now, Weights, four, require_never_zero
from sae_ext.errors import UserError
from sae_ext.fields import STRICT, require, require_above, require_finite, to_dict
from sae_ext.ops import Parameters, SparseCode
from sae_ext.schedules import Schedule

_CONTENT, _HEAD, _HEAD_BIAS = "slots.content", "slots.head", "slots.head_bias"
_MAGNITUDE, _MAGNITUDE_BIAS = "slots.magnitude", "slots.magnitude_bias"
_OWN = (_CONTENT, _HEAD, _HEAD_BIAS, _MAGNITUDE, _MAGNITUDE_BIAS)
_READ_X = ("W_enc_rows", _CONTENT, _MAGNITUDE)


@dataclass(frozen=True, kw_only=True)
class OneSlot(Architecture):
    """Slots after training: each row has one, the one with the largest logit."""

    __pydantic_config__ = STRICT
    layout: ClassVar[str] = "sparsemill_slots"

    kind: Literal["one_slot"] = "one_slot"
    count: int
    """K."""
    column: str
    """Document column of the rules."""
    answer: str | None = None
    """Document column of the answers; None where none were learned."""
    rules: tuple[str, ...] = ()
    """The rule of each slot."""
    answers: tuple[str, ...] = ()
    """The answer of each place in a head."""

    @property
    def ordinary_from(self) -> int:
        """The slots come first."""
        return self.count

    def check(self, d_sae: int) -> None:
        """The slots are some of the features, or all."""
        _check_count(self.count, d_sae)

    def named(self, classes: Mapping[str, list[str]]) -> OneSlot:
        """The classes of both columns."""
        answers = () if self.answer is None else tuple(classes[self.answer])
        return dataclasses.replace(self, rules=tuple(classes[self.column]), answers=answers)

    def encode(self, x: Tensor, params: Parameters, more: Mapping[str, Tensor]) -> SparseCode:
        """In each row one slot, with 1 or its magnitude (a magnitude of 0 is not active); the free features."""
        centred = _centred(x, params.b_dec)
        slot = self._slot(centred, params)
        value = torch.ones_like(slot, dtype=centred.dtype)
        if _MAGNITUDE in more:
            value = _magnitudes(centred, more).gather(1, slot[:, None])[:, 0]
        free = _nothing(centred)
        if len(params.b_enc) > self.count:
            free = ops.encode(x, _free(params, self.count))
        return _joined(slot, value, free, self.count)

    def answer_logits(self, x: Tensor, params: Parameters, more: Mapping[str, Tensor]) -> Tensor:
        """What the head of each row's slot says of the answers, [B, len(answers)].

        Raises:
            UserError: no answers were learned.
        """
        if _HEAD not in more:
            raise UserError(
                "the slots have no value heads: train them with sae.architecture.answer"
            )
        centred = _centred(x, params.b_dec)
        slot = self._slot(centred, params)
        share = torch.ones_like(slot, dtype=centred.dtype)[:, None]
        return answer_logits(centred, slot, share, more)

    def to_layout(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {"slots": {name: value for name, value in to_dict(self).items() if name != "kind"}}

    @classmethod
    def from_layout(cls, cfg: Mapping[str, Any]) -> OneSlot:
        """See `to_layout`."""
        kept = cfg["slots"]
        return cls(
            count=kept["count"], column=kept["column"], answer=kept["answer"],
            rules=tuple(kept["rules"]), answers=tuple(kept["answers"]),
        )  # fmt: skip

    def _slot(self, centred: Tensor, params: Parameters) -> Tensor:
        return _logits(centred, params, self.count).argmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class Slots(Architecture):
    """See the module. Taught by the terms `alignment`, `entropy`, `independence` and `value`; the term `l1` is
    about the free features alone. The unit length of a decoder is theirs alone, too.

    The code of a row in training lists one slot, the largest of its sample, as after training; x̂ is made of
    all of them.
    """

    __pydantic_config__ = STRICT
    selects: ClassVar[bool] = False
    by_row: ClassVar[bool] = False  # the noise is drawn for a batch as a whole

    kind: Literal["slots"] = "slots"
    count: int = 6
    """K, the number of slots: that of the values of `column` in training. Slot i is the i-th of them
    in sorted order."""
    column: str = "rule"
    """Document column of the rules."""
    answer: str | None = None
    """Document column of the answers, for the term `value`; no contents and heads are learned when absent."""
    content: int = 16
    """Width of what a slot reads of a row; without answers it has no meaning."""
    temperature: float = 1.0
    """τ as the schedule `anneal` has it at 1: the higher, the more alike a sample's shares."""
    anneal: Schedule = Schedule(kind="linear", final=0.1)
    """How τ moves."""
    magnitude: bool = False
    """Whether slots have sizes, or are 1 where they are taken."""
    hard: bool = False
    """Whether training, too, reconstructs from the largest share as a 1 and the others as 0, with the gradient
    of the shares ("straight-through" there)."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_above(self, 0, "content", "temperature")
        require_above(self, 1, "count")
        require_never_zero(self.anneal, "anneal")
        require(
            self.answer != self.column,
            f"answer and column are both {self.column!r}: give the answers a column of their own",
        )

    @property
    def gives(self) -> frozenset[str]:  # type: ignore[override]
        """Answers, where there are some."""
        given = frozenset({"slot_logits", "slot_scaled", "slot_shares"})
        return given if self.answer is None else given | {"slot_answer"}

    @property
    def ordinary_from(self) -> int:
        """The slots come first."""
        return self.count

    def check(self, d_sae: int) -> None:
        """The slots are some of the features, or all."""
        _check_count(self.count, d_sae)

    def columns(self) -> dict[str, Literal["class", "number"]]:
        """Rules, and answers where there are some."""
        found = (self.column,) if self.answer is None else (self.column, self.answer)
        return dict.fromkeys(found, "class")

    def schedules(self) -> dict[str, Schedule]:
        """That of the temperature."""
        return {"anneal": self.anneal}

    def initial(
        self, d_in: int, d_sae: int, b_dec: Tensor, classes: Mapping[str, list[str]], seed: int
    ) -> Weights:
        """Beside the four V [K, content, d_in], heads [K, answers, content] and [K, answers], and magnitudes
        w [K, d_in], c [K], which begin at 1.

        Raises:
            UserError: there are more slots than rules, or fewer.
        """
        K, rules = self.count, len(classes[self.column])
        require(
            rules == K,
            f"count is {K}, but the column {self.column!r} has {rules} values in the train split: set count to "
            f"{rules}",
        )
        weights = super().initial(d_in, d_sae, b_dec, classes, seed)
        if self.answer is not None:
            generator = torch.Generator().manual_seed(seed + 1)
            shapes = {
                _CONTENT: (K, self.content, d_in),
                _HEAD: (K, len(classes[self.answer]), self.content),
            }
            for name, shape in shapes.items():
                weights[name] = torch.randn(shape, generator=generator) / shape[2] ** 0.5
            weights[_HEAD_BIAS] = torch.zeros(shapes[_HEAD][:2])
        if self.magnitude:
            weights[_MAGNITUDE], weights[_MAGNITUDE_BIAS] = torch.zeros(K, d_in), torch.ones(K)
        return weights

    def forward(self, x: Tensor, weights: Weights, now: Now, *, price: Tensor | None) -> Forward:
        """Slots by a dense product, free features by the sparse kernels."""
        params, K = four(weights), self.count
        centred = _centred(x, params.b_dec)
        logits = _logits(centred, params, K)
        temperature = self.temperature * now.factors["anneal"]
        shares = self._sample(logits, temperature, now.generator("gumbel"))
        z = shares * _magnitudes(centred, weights) if self.magnitude else shares
        x_hat, free, l1 = params.b_dec, _nothing(centred), centred.new_zeros(len(x))
        if len(params.b_enc) > K:
            out = ops.autoencode(
                x, _free(params, K), feature_weight=None if price is None else price[K:]
            )
            x_hat, free, l1 = out.x_hat, out.code, out.l1
        largest = shares.argmax(dim=1)
        code = _joined(largest, z.gather(1, largest[:, None])[:, 0], free, K)
        more = {
            "slot_logits": logits,
            "slot_scaled": logits / temperature,
            "slot_shares": shares,
        }
        for name, column in (("slot_rule", self.column), ("slot_answer", self.answer)):
            if column in now.columns:
                more[name] = now.columns[column]
        return Forward(x_hat + z @ params.W_dec[:K], code, l1, more=more)

    def folded(self, weights: Weights, scale: float) -> Weights:
        """Contents and magnitudes read raw rows, too."""
        folded = super().folded(weights, scale)
        return folded | {name: weights[name] * scale for name in _READ_X if name in weights}

    def final(self, weights: Weights, counters: Mapping[str, Tensor]) -> tuple[OneSlot, Weights]:
        """One slot per row."""
        more = {name: weights[name] for name in _OWN if name in weights}
        return OneSlot(count=self.count, column=self.column, answer=self.answer), more

    def _sample(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """The shares [B, K] of slots in each row."""
        wait = torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=generator)
        noise = -wait.clamp_min(torch.finfo(wait.dtype).tiny).log().to(logits.device)
        soft = ((logits + noise) / temperature).softmax(dim=1)
        if not self.hard:
            return soft
        taken = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        return taken + (soft - soft.detach())


def answer_logits(
    centred: Tensor, slot: Tensor, share: Tensor, weights: Mapping[str, Tensor]
) -> Tensor:
    """What the head of a row's slot makes of its content, [B, answers].

    Args:
        centred: x - b_dec [B, d_in].
        slot: int64 [B], whose head is asked.
        share: z of that slot [B, 1].
        weights: with the contents and heads that `Slots` learned.
    """
    parts, places = [], []
    for i, (V, head, bias) in enumerate(
        zip(weights[_CONTENT], weights[_HEAD], weights[_HEAD_BIAS], strict=True)
    ):
        rows = (slot == i).nonzero()[:, 0]
        content = share[rows] * (centred[rows] @ V.T)
        parts.append(content @ head.T + bias)
        places.append(rows)
    return torch.cat(parts)[torch.cat(places).argsort()]


def _check_count(count: int, d_sae: int) -> None:
    require(
        count <= d_sae,
        f"count is {count}, but d_sae is only {d_sae}: it counts slots and free features together, so raise "
        "d_sae",
    )


def _centred(x: Tensor, b_dec: Tensor) -> Tensor:
    return x.to(b_dec.dtype) - b_dec


def _logits(centred: Tensor, params: Parameters, count: int) -> Tensor:
    """l [B, K]."""
    return torch.addmm(params.b_enc[:count], centred, params.W_enc_rows[:count].T)


def _magnitudes(centred: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """[B, K]."""
    return torch.addmm(weights[_MAGNITUDE_BIAS], centred, weights[_MAGNITUDE].T).relu()


def _free(params: Parameters, count: int) -> Parameters:
    """The autoencoder of the free features (no copies)."""
    rest = {name: t[count:] for name, t in params.tensors().items() if name != "b_dec"}
    return Parameters(**rest, b_dec=params.b_dec)


def _nothing(x: Tensor) -> SparseCode:
    """A code of these rows without an entry."""
    return SparseCode(
        torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device),
        torch.zeros(0, dtype=torch.int32, device=x.device),
        x.new_zeros(0),
    )


def _joined(slot: Tensor, value: Tensor, free: SparseCode, count: int) -> SparseCode:
    """The code with one slot per row, where its value is positive, before the free features."""
    rows = torch.arange(len(slot), device=slot.device)
    taken = value > 0
    row = torch.cat([rows[taken], rows.repeat_interleave(free.row_ptr.diff())])
    order = row.argsort(stable=True)
    col = torch.cat([slot[taken].int(), free.col + count])[order]
    val = torch.cat([value[taken], free.val])[order]
    row_ptr = torch.zeros_like(free.row_ptr)
    torch.cumsum(free.row_ptr.diff() + taken, 0, out=row_ptr[1:])
    return SparseCode(row_ptr, col, val)
