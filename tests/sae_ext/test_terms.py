"""The terms of an objective: values and gradients written out, and two ways of a step that agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_up_training import SHORT, fit, planted
from torch import Tensor

from sae_ext.architectures import Architecture, BatchTopK, JumpReLU, Now, ReLU, TopK, Weights
from sae_ext.config import SAEConfig, TrainConfig, with_changes
from sae_ext.errors import UserError
from sae_ext.schedules import Schedule
from sae_ext.training.learner import Learner
from sae_ext.training.term import Seen, Term
from sae_ext.training.terms import L0, L1, MSE, AuxK, ObjectiveConfig, Usage, l1_weight_between

pytestmark = pytest.mark.usefixtures("one_thread")
B, D_IN, D_SAE = 7, 5, 9
CLASSES = {"label": ["apple", "banana", "cherry"]}
CLASS_WEIGHTS = {"apple": 0.3, "banana": 1.0, "cherry": 2.5, "not there": 9.0}
Gradient = dict[str, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made_up(architecture: Architecture, seed: int = 0) -> Weights:
    """Random float64 weights, with decoder rows of many lengths."""
    begun = architecture.initial(D_IN, D_SAE, normal(D_IN, seed=seed), CLASSES, seed)
    weights = {
        name: t.double() + 0.2 * normal(*t.shape, seed=seed + 1) for name, t in begun.items()
    }
    weights["W_dec"] *= torch.linspace(0.5, 2, D_SAE, dtype=torch.float64)[:, None]
    return weights


def batch() -> Tensor:
    return 1.5 * normal(B, D_IN, seed=11)


def step(architecture: Architecture, terms: tuple[Term, ...] = (), **more: Any) -> Now:
    """A step with columns and fresh counters."""
    counters = architecture.counted()
    for term in terms:
        counters |= term.counted(D_SAE)
    return Now(
        step=0,
        generator=lambda purpose: torch.Generator().manual_seed(0),
        columns={
            "importance": normal(B, seed=5).abs(),
            "label": torch.tensor([0, 1, 2, 2, 0, 1, 1]),
        },
        classes=CLASSES,
        counters={name: t.double() for name, t in counters.items()},
        **more,
    )  # fmt: skip


def value(
    term: Term, weights: Weights, architecture: Architecture, decoder: str = "unit", **more: Any
) -> Tensor:
    """The term on the batch, differentiable."""
    now, x = step(architecture, (term,), **more), batch()
    price = weights["W_dec"].norm(dim=1) if decoder == "free" else None
    out = architecture.forward(x, weights, now, price=price)
    return term.value(Seen(out, x, x, weights, now))


def gradient(f: Callable[[Weights], Tensor], weights: Weights) -> Gradient:
    """By autograd; zeros where nothing reaches."""
    leaves = {name: t.clone().requires_grad_() for name, t in weights.items()}
    grads = torch.autograd.grad(f(leaves), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(leaves.items(), grads, strict=True)
    }


def differences(f: Callable[[Weights], Tensor], weights: Weights, h: float = 1e-6) -> Gradient:
    """By central finite differences."""
    found = {}
    for name, t in weights.items():
        found[name] = torch.zeros_like(t)
        for i in range(t.numel()):
            ends = []
            for sign in (h, -h):
                moved = t.clone()
                moved.view(-1)[i] += sign
                ends.append(float(f({**weights, name: moved})))
            found[name].view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    return found


def assert_same_gradient(found: Gradient, expected: Gradient, *, reaches: set[str]) -> None:
    """Equal up to the differences' own error, and not zero in those that the term reaches alone."""
    assert {name for name, g in found.items() if g.abs().max() > 1e-6} == reaches
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def activations(weights: Weights, architecture: Architecture) -> tuple[Tensor, Tensor]:
    """pre and z [B, D_SAE], dense, from the equations."""
    pre = (batch() - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    kept = pre > 0
    if isinstance(architecture, TopK):
        least = pre.topk(architecture.k, dim=1).values.min(dim=1, keepdim=True).values
        kept &= pre >= least
    if isinstance(architecture, BatchTopK):
        kept &= pre >= pre.flatten().topk(B * architecture.k).values.min()
    if isinstance(architecture, JumpReLU):
        kept &= pre > weights["threshold"]
    return pre, torch.where(kept, pre, 0).clamp(max=architecture.clip or math.inf)


FOUR = {"W_enc_rows", "b_enc", "W_dec", "b_dec"}
PLAIN = [ReLU(), ReLU(clip=0.7), TopK(k=3), BatchTopK(k=3)]
ROWS: list[dict[str, Any]] = [
    {},
    {"row_weight": "importance"},
    {"class_weights": CLASS_WEIGHTS},
    {"row_weight": "importance", "class_weights": CLASS_WEIGHTS},
]
PLAIN_OR_BOTH = pytest.mark.parametrize("given", [ROWS[0], ROWS[3]], ids=["plain", "weighted"])


def row_weights(given: dict[str, Any]) -> Tensor:
    """What a batch's rows weigh, written out."""
    now, found = step(ReLU()), torch.ones(B, dtype=torch.float64)
    if "row_weight" in given:
        found = found * now.columns["importance"]
    if "class_weights" in given:
        names = [CLASSES["label"][i] for i in now.columns["label"].tolist()]
        found = found * torch.tensor([CLASS_WEIGHTS[n] for n in names], dtype=torch.float64)
    return found


# -- reconstruction and L1 -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@PLAIN_OR_BOTH
@pytest.mark.parametrize("architecture", PLAIN, ids=["relu", "clip", "topk", "batchtopk"])
def test_the_reconstruction_is_its_formula_and_has_its_gradient(architecture, given, reduction):
    term, weights = MSE(reduction=reduction, **given), made_up(architecture)
    _, z = activations(weights, architecture)
    error = (z @ weights["W_dec"] + weights["b_dec"] - batch()).square().sum(dim=1)
    expected = (row_weights(given) * error).mean() / (D_IN if reduction == "mean" else 1)
    torch.testing.assert_close(value(term, weights, architecture), expected, rtol=1e-6, atol=0)

    def f(w: Weights) -> Tensor:
        return value(term, w, architecture)

    assert_same_gradient(gradient(f, weights), differences(f, weights), reaches=FOUR)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("decoder", ["unit", "free"])
@PLAIN_OR_BOTH
@pytest.mark.parametrize("architecture", PLAIN, ids=["relu", "clip", "topk", "batchtopk"])
def test_l1_is_its_formula_and_has_its_gradient(architecture, given, decoder, reduction):
    term, weights = L1(reduction=reduction, **given), made_up(architecture)
    _, z = activations(weights, architecture)
    n = weights["W_dec"].norm(dim=1) if decoder == "free" else torch.ones(D_SAE).double()
    expected = (row_weights(given) * (z @ n)).mean() / (D_SAE if reduction == "mean" else 1)
    found = value(term, weights, architecture, decoder)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    def f(w: Weights) -> Tensor:
        return value(term, w, architecture, decoder)

    reaches = FOUR if decoder == "free" else FOUR - {"W_dec"}
    assert_same_gradient(gradient(f, weights), differences(f, weights), reaches=reaches)


@pytest.mark.parametrize("given", ROWS, ids=["plain", "rows", "classes", "both"])
@pytest.mark.parametrize("kind", [MSE, L1])
def test_rows_weigh_what_their_columns_say(kind, given):
    found = kind(**given).row_weights(step(ReLU()))
    assert (found is None) == (given == {})
    if found is not None:
        torch.testing.assert_close(found.double(), row_weights(given), rtol=1e-6, atol=0)


@pytest.mark.parametrize("term", [MSE, L1])
def test_classes_without_a_weight_are_named(term):
    with pytest.raises(
        UserError, match=r"class_weights lacks 'b', 'd': give every .* 'kind' a weight"
    ):
        term(class_weights={"a": 1.0}, label="kind").check_classes({"kind": ["a", "b", "d"]})
    term(class_weights={"a": 1.0, "b": 0.0, "d": 2.0}, label="kind").check_classes(
        {"kind": ["a", "b", "d"]}
    )
    term().check_classes({})


@pytest.mark.parametrize("given", ["sum", "mean", "sum_all"])
@pytest.mark.parametrize("wanted", ["sum", "mean"])
def test_lambda_converted_between_reductions_leaves_the_objective_as_it_is(given, wanted):
    architecture = ReLU()
    weights = made_up(architecture)
    _, z = activations(weights, architecture)
    # sum_all is that of a trainer which adds up the L1 of a whole batch.
    before = {"sum": z.sum(dim=1).mean(), "mean": z.mean(), "sum_all": z.sum()}[given]
    weight = l1_weight_between(3.0, given, wanted, d_sae=D_SAE, batch_rows=B)
    after = value(L1(reduction=wanted), weights, architecture)
    torch.testing.assert_close(weight * after, 3.0 * before, rtol=1e-6, atol=0)


# -- JumpReLU's rectangles -----------------------------------------------------------------------

JUMP = JumpReLU(bandwidth=0.8, threshold=0.5)


def near(weights: Weights) -> Tensor:
    """1[|pre - θ| < ε/2], of which some are active and some are not."""
    pre, z = activations(weights, JUMP)
    found = (pre - weights["threshold"]).abs() < JUMP.bandwidth / 2
    assert 0 < (found & (z > 0)).sum() < found.sum() < found.numel()
    return found.double()


def test_l0_counts_and_its_gradient_is_the_rectangles():
    weights = made_up(JUMP)
    _, z = activations(weights, JUMP)
    found = value(L0(), weights, JUMP)
    assert float(found) == pytest.approx(float((z > 0).sum()) / B)
    grads = gradient(lambda w: value(L0(), w, JUMP), weights)
    expected = {name: torch.zeros_like(t) for name, t in weights.items()}
    expected["threshold"] = -1 / JUMP.bandwidth * near(weights).mean(dim=0)
    assert_same_gradient(grads, expected, reaches={"threshold"})


@PLAIN_OR_BOTH
@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("kind", [MSE, L1])
def test_thresholds_get_the_rectangles_gradient_of_what_activations_do(kind, decoder, given):
    term, weights = kind(**given), made_up(JUMP)
    theta, w = weights["threshold"], row_weights(given)
    _, z = activations(weights, JUMP)
    if kind is MSE:
        error = z @ weights["W_dec"] + weights["b_dec"] - batch()
        of_z = 2 / B * (w[:, None] * error) @ weights["W_dec"].T
    else:
        n = weights["W_dec"].norm(dim=1) if decoder == "free" else torch.ones(D_SAE).double()
        of_z = w[:, None] / B * n

    def f(weights: Weights) -> Tensor:
        return value(term, weights, JUMP, decoder)

    # All but θ as everywhere: what is active stays so when weights move a little.
    expected = differences(f, weights)
    expected["threshold"] = -(of_z * theta / JUMP.bandwidth * near(weights)).sum(dim=0)
    reaches = FOUR | {"threshold"}
    if kind is L1 and decoder == "unit":
        reaches -= {"W_dec"}
    assert_same_gradient(gradient(f, weights), expected, reaches=reaches)


# -- usage ---------------------------------------------------------------------------------------


def divergence(rate: float, p: Tensor) -> Tensor:
    """mean_j KL(ρ ‖ p_j)."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return (rate * (rate / p).log() + (1 - rate) * ((1 - rate) / (1 - p)).log()).mean()


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("memory", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("architecture", [ReLU(), TopK(k=3)], ids=["relu", "topk"])
def test_usage_is_its_formula_and_its_gradient_as_strong_as_the_batch_alone(
    architecture, memory, steps
):
    term = Usage(target=0.3, memory=memory, temperature=0.8)
    weights = made_up(architecture)
    now, x = step(architecture, (term,)), batch()

    def f(weights: Weights) -> Tensor:
        """The term in the last of some steps on the same batch, and counters as before that."""
        kept = {name: t.clone() for name, t in now.counters.items()}
        out = architecture.forward(x, weights, now, price=None)
        found = term.value(Seen(out, x, x, weights, now))
        now.counters.update(kept)
        return found

    running, rates = torch.zeros(D_SAE).double(), []
    for i in range(steps):
        # Weights that differ from step to step, the last being `weights`.
        past = made_up(architecture, seed=steps - 1 - i)
        out = architecture.forward(x, past, now, price=None)
        if i < steps - 1:
            term.value(Seen(out, x, x, past, now))
        _, z = activations(past, architecture)
        rates.append((z > 0).double().mean(dim=0))
        running = memory * running + (1 - memory) * rates[-1]
    known = running / (1 - memory**steps) if memory else rates[-1]

    def written_out(weights: Weights) -> Tensor:
        _, z = activations(weights, architecture)
        live = (z / term.temperature).tanh().mean(dim=0)
        return divergence(term.target, memory * known + (1 - memory) * live)

    torch.testing.assert_close(f(weights), written_out(weights), rtol=1e-6, atol=1e-9)
    expected = {n: g / (1 - memory) for n, g in differences(written_out, weights).items()}
    found = gradient(f, weights)
    assert {n for n, g in found.items() if g.abs().max() > 1e-6} == FOUR - {"W_dec"}
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-5, atol=1e-6)


def test_the_usage_term_moves_firing_rates_toward_its_target():
    target, distances = 0.1, []
    for weight in (0.0, 300.0):
        usage = Usage(weight=weight, target=target, memory=0.9)
        config = SHORT
        for name, new in {
            "steps": 120, "objective.usage": usage, "objective.l1.weight": 0.3, "lr": 1e-2,
        }.items():  # fmt: skip
            config = with_changes(config, {name: new})
        density = fit(SAEConfig(d_sae=32), config).density
        distances.append(float((density - target).abs().mean()))
    assert distances[1] < 0.5 * distances[0]


# -- AuxK ----------------------------------------------------------------------------------------

DEAD = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)


@pytest.mark.parametrize("k", [1, 2, 4, 64])
@pytest.mark.parametrize("architecture", [ReLU(), TopK(k=3)], ids=["relu", "topk"])
def test_auxk_is_its_formula_and_reaches_dead_features_alone(architecture, k):
    term, weights = AuxK(k=k), made_up(architecture)
    pre, z = activations(weights, architecture)
    x = batch()
    error = x - (z @ weights["W_dec"] + weights["b_dec"])
    best = pre.masked_fill(~DEAD, -math.inf).topk(min(k, 4), dim=1).indices
    chosen = torch.zeros_like(DEAD).expand(B, -1).scatter(1, best, True)
    assert (chosen & (pre > 0)).any()

    def written_out(w: Weights) -> Tensor:
        """Of the error and the choice as they are now; b_dec comes in through pre alone."""
        pre = (x - w["b_dec"]) @ w["W_enc_rows"].T + w["b_enc"]
        guess = torch.where(chosen, pre.relu(), 0) @ w["W_dec"]
        spread = (error - error.mean(dim=0)).square().sum()
        variance = (x - x.mean(dim=0)).square().sum(dim=1).mean()
        return variance * (guess - error).square().sum() / spread

    def f(w: Weights) -> Tensor:
        return value(term, w, architecture, dead=DEAD)

    torch.testing.assert_close(f(weights), written_out(weights), rtol=1e-6, atol=0)
    found = gradient(f, weights)
    assert_same_gradient(found, differences(written_out, weights), reaches=FOUR)
    for name in FOUR - {"b_dec"}:
        assert (found[name][~DEAD] == 0).all()


@pytest.mark.parametrize("dead", [None, torch.zeros(D_SAE, dtype=torch.bool)])
def test_auxk_is_nothing_while_no_feature_is_dead(dead):
    weights = made_up(ReLU())
    assert float(value(AuxK(), weights, ReLU(), dead=dead)) == 0
    grads = gradient(lambda w: value(AuxK(), w, ReLU(), dead=dead), weights)
    assert all(bool((g == 0).all()) for g in grads.values())


# -- two ways of a step --------------------------------------------------------------------------

TINY = Usage(weight=1e-60)
"""Sends a step through autograd, and adds nothing to it."""
WAYS: dict[str, tuple[Architecture, dict[str, Any], str]] = {
    "relu": (ReLU(), {}, "unit"),
    "clip": (ReLU(clip=0.5), {}, "unit"),
    "free": (ReLU(), {}, "free"),
    "free clip": (ReLU(clip=0.5), {"objective.l1.row_weight": "importance"}, "free"),
    "topk": (TopK(k=3), {"objective.l1": None}, "unit"),
    "topk and l1": (TopK(k=3), {}, "free"),
    "batchtopk": (BatchTopK(k=3), {"objective.l1": None}, "unit"),
    "rows": (ReLU(), {f"objective.{n}.row_weight": "importance" for n in ("mse", "l1")}, "unit"),
    "classes": (ReLU(), {"objective.mse.class_weights": CLASS_WEIGHTS}, "unit"),
    "reductions": (ReLU(), {f"objective.{n}.reduction": "mean" for n in ("mse", "l1")}, "unit"),
    "weights": (ReLU(), {"objective.mse.weight": 0.3, "objective.l1.weight": 2.0}, "free"),
    "decay": (ReLU(), {"weight_decay": 0.3}, "unit"),
    "free decay": (ReLU(), {"weight_decay": 0.3}, "free"),
    "bounded": (ReLU(), {"max_grad_norm": 0.2}, "unit"),
    "not bounded": (ReLU(), {"max_grad_norm": 1e6}, "free"),
    "betas": (ReLU(), {"beta1": 0.5, "beta2": 0.8}, "unit"),
    "silent mse": (ReLU(), {"objective.mse.schedule": Schedule(start_step=2)}, "unit"),
}


def learner(way: str, extra: Usage | None) -> Learner:
    architecture, changes, decoder = WAYS[way]
    config: TrainConfig = SHORT
    for name, new in changes.items():
        config = with_changes(config, {name: new})
    config = with_changes(config, {"objective.usage": extra})
    sae = SAEConfig(d_sae=D_SAE, architecture=architecture, decoder=decoder)
    made = Learner(sae, config, CLASSES, device=torch.device("cpu"), group=None)
    made.begin(D_IN, normal(D_IN, seed=3))
    for group in (made.weights, made.m, made.v):
        group.update({name: t.double() for name, t in group.items()})
    return made


@pytest.mark.parametrize("way", WAYS)
def test_the_fused_step_and_autograd_do_the_same(way, monkeypatch):
    fused, through = learner(way, None), learner(way, TINY)
    monkeypatch.setattr(fused, "_by_autograd", None)
    monkeypatch.setattr(through, "_fused", None)
    columns = step(ReLU()).columns
    for i in range(5):
        x = normal(B, D_IN, seed=20 + i)
        for one in (fused, through):
            one.step(x, columns)
    for one in (fused, through):
        one.settle()
    for group in ("weights", "m", "v"):
        for name, tensor in getattr(fused, group).items():
            other = getattr(through, group)[name]
            torch.testing.assert_close(other, tensor, rtol=1e-9, atol=1e-11, msg=f"{group} {name}")
    if way == "bounded":  # and it did bound
        assert fused.m["W_dec"].norm() < learner_after("relu", columns).m["W_dec"].norm()
    a, b = fused.window, through.window
    assert (a.rows, a.steps, a.nnz, a.saturated) == (b.rows, b.steps, b.nnz, b.saturated)
    assert b.squared_error == pytest.approx(a.squared_error, rel=1e-9)
    assert b.l1 == pytest.approx(a.l1, rel=1e-9)
    assert torch.equal(fused.silent_rows, through.silent_rows)
    for name, tensor in fused.counters.items():
        torch.testing.assert_close(through.counters[name], tensor)


def learner_after(way: str, columns: dict[str, Tensor]) -> Learner:
    made = learner(way, None)
    for i in range(5):
        made.step(normal(B, D_IN, seed=20 + i), columns)
    return made


def test_single_precision_ends_alike_on_both_ways():
    one, two = (
        fit(SAEConfig(d_sae=32), with_changes(SHORT, {"objective.usage": extra}))
        for extra in (None, Usage(weight=1e-30))
    )
    for name in ("mse", "l0", "loss"):
        expected = one.history[name].to_pylist()
        assert two.history[name].to_pylist() == pytest.approx(expected, rel=1e-3)
    assert two.validation["fvu"] == pytest.approx(one.validation["fvu"], rel=1e-3)
    assert planted().d_in == 16


@pytest.mark.parametrize("architecture", [JumpReLU(), ReLU()], ids=["jumprelu", "relu"])
def test_a_step_in_which_no_term_has_a_weight_moves_nothing(architecture):
    nothing = ObjectiveConfig(mse=MSE(schedule=Schedule(start_step=5)), l1=None)
    config = with_changes(SHORT, {"objective": nothing})
    sae = SAEConfig(d_sae=D_SAE, architecture=architecture)
    made = Learner(sae, config, {}, device=torch.device("cpu"), group=None)
    made.begin(D_IN, torch.zeros(D_IN))
    before = {name: t.clone() for name, t in made.weights.items()}
    for i in range(5):
        made.step(normal(B, D_IN, seed=i).float(), {})
    for name, t in before.items():
        torch.testing.assert_close(made.weights[name], t)
    made.step(normal(B, D_IN, seed=6).float(), {})
    assert not torch.equal(made.weights["W_dec"], before["W_dec"])


def test_thresholds_do_not_decay():
    sae = SAEConfig(d_sae=D_SAE, architecture=JumpReLU(threshold=0.4, bandwidth=0.5))
    ends = []
    for decay in (0.0, 1.0):
        config = with_changes(SHORT, {"weight_decay": decay})
        made = Learner(sae, config, {}, device=torch.device("cpu"), group=None)
        made.begin(D_IN, torch.zeros(D_IN))
        made.step(normal(B, D_IN, seed=0).float(), {})
        ends.append(made.weights)
    assert torch.equal(ends[0]["threshold"], ends[1]["threshold"])
    assert not torch.equal(ends[0]["W_enc_rows"], ends[1]["W_enc_rows"])
