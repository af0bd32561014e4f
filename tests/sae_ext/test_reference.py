"""The reference against what PyTorch itself computes: autograd, torch.optim and clip_grad_norm_."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_up_weights import batch, copied, dense, made_up, state, support_of, top_k
from torch import Tensor

from sae_ext import reference
from sae_ext.errors import UserError
from sae_ext.parameters import AdamState, Objective, Parameters, Support, Update

ROWS, D_IN, D_SAE = 23, 11, 31
WEIGHTS = {
    "recon_weight": 0.5 + batch(ROWS, 1, seed=5)[:, 0].abs(),
    "l1_weight": batch(ROWS, 1)[:, 0].abs(),
}
FEATURE_WEIGHT = batch(1, D_SAE, seed=6)[0].abs()
FEATURE_WEIGHT[3] = 0.0


def some_support(params: Parameters, x: Tensor) -> Support:
    """The 20 largest of each row, which reach below zero; no entry in rows 0, 7 and the last."""
    pre, _ = reference.activations(x, params)
    listed = top_k(pre, 20)
    listed[[0, 7, len(x) - 1]] = False
    assert (pre[listed] < 0).any()
    assert (pre[~listed] > 0).any()
    return support_of(listed)


def uneven(params: Parameters) -> Parameters:
    """The same with decoder rows of many lengths, one of them 0."""
    factor = torch.linspace(0.2, 3.0, len(params.b_enc), dtype=torch.float64)
    factor[2] = 0.0
    return dataclasses.replace(params, W_dec=params.W_dec * factor[:, None])


def leaves_of(params: Parameters) -> Parameters:
    return Parameters(**{name: t.requires_grad_() for name, t in copied(params).tensors().items()})


def autograd(
    x: Tensor, params: Parameters, objective: Objective, support: Support | None = None
) -> dict[str, Tensor]:
    leaves = leaves_of(params)
    reference.loss(x, leaves, objective, support).backward()
    return {name: leaf.grad for name, leaf in leaves.tensors().items() if leaf.grad is not None}


def plain_loss(x: Tensor, params: Parameters, o: Objective, listed: Tensor | None) -> Tensor:
    """The objective, row by row and entry by entry, from its definition."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x)):
        pre = params.W_enc_rows @ (x[b] - params.b_dec) + params.b_enc
        z = pre.clamp(min=0, max=o.clip)
        if listed is not None:
            z = z * listed[b]
        error = params.W_dec.T @ z + params.b_dec - x[b]
        penalty = torch.zeros((), dtype=torch.float64)
        for j in range(len(z)):
            p = 1.0 if o.feature_weight is None else o.feature_weight[j]
            n = params.W_dec[j].square().sum().sqrt() if o.decoder_norm == "free" else 1.0
            penalty = penalty + p * n * z[j]
        w = 1.0 if o.recon_weight is None else o.recon_weight[b]
        s = 1.0 if o.l1_weight is None else o.l1_weight[b]
        total = total + w * (error @ error) + o.l1 * s * penalty
    return total / len(x)


@pytest.mark.parametrize("supported", [False, True], ids=["all", "support"])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("feature_weight", [None, FEATURE_WEIGHT], ids=["p=1", "p"])
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["w=s=1", "w,s"])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("l1", [0.0, 3.0])
def test_written_out_gradients_equal_autograd(
    l1, clip, weights, feature_weight, decoder_norm, supported
):
    params, x = uneven(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    objective = Objective(
        l1, clip, **weights, feature_weight=feature_weight, decoder_norm=decoder_norm
    )
    support = some_support(params, x) if supported else None
    gradient, seen = reference.gradients(x, params, objective, support)
    expected = autograd(x, params, objective, support)
    assert len(expected) == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(gradient.tensors()[name], tensor, rtol=1e-12, atol=1e-13)
    value = reference.loss(x, params, objective, support).item()
    assert seen.loss == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize("supported", [False, True], ids=["all", "support"])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.7, "feature_weight": FEATURE_WEIGHT, **WEIGHTS}]
)
def test_the_loss_is_its_definition(options, decoder_norm, supported):
    params, x = uneven(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    support = some_support(params, x) if supported else None
    listed = None
    if support is not None:
        ones = torch.ones(len(support.col), dtype=torch.float64)
        listed = dense(reference.SparseCode(*support, ones), D_SAE)
    objective = Objective(2.5, **options, decoder_norm=decoder_norm)
    expected = plain_loss(x, params, objective, listed).item()
    assert reference.loss(x, params, objective, support).item() == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(
    "option",
    [
        {"l1": 2.0},
        {"clip": 0.7},
        {"recon_weight": WEIGHTS["recon_weight"]},
        {"l1_weight": WEIGHTS["l1_weight"]},
        {"feature_weight": FEATURE_WEIGHT},
        {"decoder_norm": "free"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_each_option_of_the_objective_changes_loss_and_gradient(option):
    params, x = uneven(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    plain, seen = reference.gradients(x, params, Objective(l1=1.0))
    changed, seen_changed = reference.gradients(x, params, Objective(**{"l1": 1.0, **option}))
    assert seen.loss != pytest.approx(seen_changed.loss, rel=1e-3)
    assert not torch.allclose(plain.b_enc, changed.b_enc, rtol=1e-3)


@pytest.mark.parametrize("supported", [False, True], ids=["all", "support"])
def test_the_reported_sums_carry_the_prices_of_features_but_not_the_weights_of_rows(supported):
    params, x = uneven(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    support = some_support(params, x) if supported else None
    objective = Objective(2.5, 0.7, **WEIGHTS, feature_weight=FEATURE_WEIGHT, decoder_norm="free")
    _, seen = reference.gradients(x, params, objective, support)
    pre, z = reference.activations(x, params, 0.7, support)
    error = z @ params.W_dec + params.b_dec - x
    prices = FEATURE_WEIGHT * params.W_dec.norm(dim=1)
    assert seen.squared_error == pytest.approx(error.square().sum().item(), rel=1e-13)
    assert seen.l1 == pytest.approx((z * prices).sum().item(), rel=1e-13)
    assert seen.nnz == int((pre > 0).sum()) > seen.saturated == int((pre > 0.7).sum()) > 0
    assert torch.equal(seen.fired, (pre > 0).sum(0))
    assert seen.grad_norm is None


def test_gradients_and_codes_do_not_depend_on_the_chunk_of_rows(monkeypatch):
    params, x = uneven(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    support = some_support(params, x)
    objective = Objective(2.0, 0.7, **WEIGHTS, feature_weight=FEATURE_WEIGHT, decoder_norm="free")

    def everything() -> list[Any]:
        gradient, seen = reference.gradients(x, params, objective, support)
        code = reference.encode(x, params)
        face = reference.autoencode(x, params, 0.7, FEATURE_WEIGHT, support)
        cotangents = (x, x[:, 0], FEATURE_WEIGHT, face[3].val)
        grad_x, grads, grad_p = reference.autoencode_backward(
            cotangents, x, params, face[3], FEATURE_WEIGHT
        )
        return [
            *gradient.tensors().values(), *grads.tensors().values(), grad_x, grad_p, *face[:3],
            *face[3], *code, reference.decode(code, params), seen.fired, list(seen[:5]),
        ]  # fmt: skip

    whole = everything()
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 5 * D_SAE * 8)
    for a, b in zip(whole, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_decoding_a_code_is_the_dense_product():
    params, x = made_up(D_IN, D_SAE), batch(ROWS, D_IN)
    code = reference.encode(x, params, 0.7)
    _, z = reference.activations(x, params, 0.7)
    assert torch.equal(dense(code, D_SAE), z)
    torch.testing.assert_close(reference.decode(code, params), z @ params.W_dec + params.b_dec)


def test_a_code_lists_the_entries_of_the_support_that_are_positive_and_a_nan_but_no_others():
    params, x = made_up(D_IN, D_SAE), batch(ROWS, D_IN)
    support = some_support(params, x)
    x[3] = math.nan
    pre, z = reference.activations(x, params)
    code = reference.encode(x, params, support=support)
    ones = torch.ones(len(support.col), dtype=torch.float64)
    active = dense(reference.SparseCode(*support, ones), D_SAE).bool() & ~(pre <= 0)
    assert active[3].sum() == 20
    assert torch.equal(code.col, active.nonzero()[:, 1].int())
    assert torch.equal(code.row_ptr.diff(), active.sum(1))
    torch.testing.assert_close(code.val, z[active], rtol=0, atol=0, equal_nan=True)


def test_a_nan_reaches_the_loss_and_the_gradients():
    params, x = made_up(D_IN, D_SAE), batch(ROWS, D_IN)
    x[3, 0] = math.nan
    gradient, seen = reference.gradients(x, params, Objective(1.0, 0.7))
    assert all(math.isnan(value) for value in (seen.loss, seen.squared_error, seen.l1))
    assert all(g.isnan().any() for g in gradient.tensors().values())


# One update against torch.optim, with each option.

UPDATES = {
    "adam": Update(0.01, 0.8, 0.99, 1e-6),
    "weight decay": Update(0.01, 0.8, 0.99, 1e-6, weight_decay=0.5),
    "clipped": Update(0.01, 0.8, 0.99, 1e-6, max_grad_norm=0.3),
    "norm below the bound": Update(0.01, 0.8, 0.99, 1e-6, max_grad_norm=1e3),
    "fixed b_dec": Update(0.01, 0.8, 0.99, 1e-6, train_b_dec=False),
    "all": Update(0.01, 0.8, 0.99, 1e-6, weight_decay=0.5, max_grad_norm=0.3, train_b_dec=False),
}


def optimizer_of(params: Parameters, update: Update) -> torch.optim.Optimizer:
    kind: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    decay = {}
    if update.weight_decay:
        kind, decay = torch.optim.AdamW, {"weight_decay": update.weight_decay}
    trained = [t for name, t in params.tensors().items() if update.train_b_dec or name != "b_dec"]
    betas = (update.beta1, update.beta2)
    return kind(trained, lr=update.lr, betas=betas, eps=update.eps, **decay)


def rival_step(
    optimizer: torch.optim.Optimizer, rival: Parameters, x: Tensor, o: Objective, u: Update
) -> float:
    """One step by autograd, clip_grad_norm_ and torch.optim; the norm of the gradient."""
    trained = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    reference.loss(x, rival, o, some_support(rival, x)).backward()
    bound = math.inf if u.max_grad_norm is None else u.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(trained, bound).item()
    with torch.no_grad():
        W, g = rival.W_dec, rival.W_dec.grad
        assert g is not None
        if o.decoder_norm == "unit":
            unit = W / W.norm(dim=1, keepdim=True)
            g -= torch.einsum("ji,ji->j", g, unit)[:, None] * unit
        optimizer.step()
        if o.decoder_norm == "unit":
            W /= W.norm(dim=1, keepdim=True)
    return norm


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("name", UPDATES)
def test_fifty_steps_equal_autograd_and_torch_optim(name, decoder_norm):
    update, params = UPDATES[name], made_up(9, 40, bias=-0.3)
    start = copied(params)
    adam = AdamState.zeros(params)
    rival = leaves_of(params)
    optimizer = optimizer_of(rival, update)
    shortened = 0
    for i in range(50):
        x = batch(32, 9, seed=i)
        objective = Objective(
            0.5, 1.0, x[:, 0].abs(), x[:, 1].abs(), batch(1, 40, seed=i)[0].abs(), decoder_norm
        )
        seen = reference.step(params, adam, x, objective, update, some_support(params, x))
        norm = rival_step(optimizer, rival, x, objective, update)
        if update.max_grad_norm is None:
            assert seen.grad_norm is None
        else:
            assert seen.grad_norm == pytest.approx(norm, rel=1e-9)
            shortened += norm > update.max_grad_norm
    assert (shortened > 40) == (update.max_grad_norm == 0.3)
    assert adam.step == 50
    for tensor, expected in rival.tensors().items():
        torch.testing.assert_close(
            params.tensors()[tensor], expected.detach(), rtol=1e-8, atol=1e-10, msg=tensor
        )
    held = torch.equal(params.b_dec, start.b_dec) and not adam.m.b_dec.any()
    assert held == (not update.train_b_dec)


@pytest.mark.parametrize("name", ["weight decay", "clipped", "fixed b_dec", "all"])
def test_each_option_of_the_update_changes_what_moves(name):
    x, objective = batch(32, 9), Objective(0.5, decoder_norm="free")
    ends = []
    for update in (UPDATES["adam"], UPDATES[name]):
        params = made_up(9, 40, bias=-0.3)
        adam = AdamState.zeros(params)
        # Adam's first update hardly feels the gradient's length: two, of unlike batches.
        reference.step(params, adam, x, objective, update)
        reference.step(params, adam, 0.1 * x[:16], objective, update)
        ends.append(params.b_dec)
    assert (ends[0] - ends[1]).abs().max() > 1e-5


def test_a_bound_above_the_norm_changes_nothing():
    ends = []
    for update in (UPDATES["adam"], UPDATES["norm below the bound"]):
        params = made_up(9, 40)
        adam = AdamState.zeros(params)
        reference.step(params, adam, batch(32, 9), Objective(0.5), update)
        ends.append(state(params, adam))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_the_norm_is_of_the_raw_gradients_before_the_projection():
    params, x, objective = made_up(9, 40), batch(32, 9), Objective(0.5)
    leaves = leaves_of(params)
    reference.loss(x, leaves, objective).backward()
    norm = torch.nn.utils.clip_grad_norm_(leaves.tensors().values(), 0.25).item()
    update = Update(lr=0.0, beta1=0.0, max_grad_norm=0.25)
    adam = AdamState.zeros(params)
    seen = reference.step(params, adam, x, objective, update)
    assert seen.grad_norm == pytest.approx(norm, rel=1e-12)
    # With beta1 = 0 the first moment is the gradient as Adam saw it.
    assert leaves.b_enc.grad is not None
    torch.testing.assert_close(adam.m.b_enc, leaves.b_enc.grad, rtol=1e-12, atol=1e-15)


def test_a_free_decoder_keeps_the_lengths_that_training_gives_it():
    params = uneven(made_up(9, 40))
    before = params.W_dec.norm(dim=1)
    reference.step(
        params,
        AdamState.zeros(params),
        batch(32, 9),
        Objective(0.5, decoder_norm="free"),
        Update(0),
    )
    torch.testing.assert_close(params.W_dec.norm(dim=1), before)
    reference.step(params, AdamState.zeros(params), batch(32, 9), Objective(0.5), Update(0))
    assert torch.equal(params.W_dec.norm(dim=1).round(decimals=9), (before > 0).double())


def test_the_gradient_passes_up_to_the_clip_and_not_at_zero_or_above():
    eye = torch.eye(4, dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    params = Parameters(eye.clone(), zeros.clone(), eye.clone(), zeros.clone())
    x = torch.tensor([[0.0, 0.5, 1.0, 1.5]], dtype=torch.float64)
    gradient, seen = reference.gradients(x, params, Objective(l1=1.0, clip=1.0))
    # Exact reconstruction below the clip leaves only the penalty's gradient of 1.
    assert gradient.b_enc.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert (seen.nnz, seen.saturated, seen.fired.tolist()) == (3, 1, [0, 1, 1, 1])


def test_projection_leaves_only_what_turns_the_row():
    params, gradient = made_up(7, 5), made_up(7, 5, seed=3)
    params.W_dec *= 3.0  # any length will do
    params.W_dec[2] = 0.0
    before = gradient.W_dec[2].clone()
    reference.project(gradient, params)
    along = (gradient.W_dec * params.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-13)
    assert torch.equal(gradient.W_dec[2], before)
    assert gradient.W_dec.norm(dim=1).min() > 0.1


def test_renormalising_gives_unit_rows_and_leaves_zero_rows():
    params = made_up(7, 5)
    params.W_dec *= torch.tensor([0.1, 1.0, 5.0, 0.0, 2.0], dtype=torch.float64)[:, None]
    reference.renormalise(params)
    lengths = params.W_dec.norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1, 1, 0, 1], dtype=torch.float64))


@pytest.mark.parametrize("weight", ["recon_weight", "l1_weight"])
def test_a_row_of_weight_zero_adds_nothing_to_its_term(weight):
    params, x = made_up(5, 12), batch(2, 5)
    kept = torch.tensor([1.0, 0.0], dtype=torch.float64)
    other = {"recon_weight": "l1_weight", "l1_weight": "recon_weight"}[weight]
    both = {weight: kept, other: torch.zeros(2, dtype=torch.float64)}
    first = {k: v[:1] for k, v in both.items()}
    alone, _ = reference.gradients(x[:1], params, Objective(2.0, **first))
    together, _ = reference.gradients(x, params, Objective(2.0, **both))
    assert alone.b_enc.norm() > 0
    for a, b in zip(alone.tensors().values(), together.tensors().values(), strict=True):
        torch.testing.assert_close(a / 2, b, rtol=1e-12, atol=1e-14)  # a mean over two rows


def test_a_free_feature_costs_nothing():
    params, x = made_up(5, 12), batch(40, 5)
    only = torch.zeros(12, dtype=torch.float64)
    only[4] = 2.0
    _, z = reference.activations(x, params)
    _, seen = reference.gradients(x, params, Objective(1.0, feature_weight=only))
    assert seen.l1 == pytest.approx(2 * z[:, 4].sum().item(), rel=1e-13)


# To torch.optim and back.


@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
def test_fused_steps_and_torch_optim_steps_can_take_turns(decoupled):
    update = UPDATES["weight decay" if decoupled else "adam"]

    def objective(x: Tensor) -> Objective:
        return Objective(0.5, 1.0, l1_weight=x[:, 0].abs(), decoder_norm="free")

    straight = made_up(9, 40, bias=-0.3)
    adam = AdamState.zeros(straight)
    turns = leaves_of(straight)
    mixed = AdamState.zeros(turns)
    for i in range(9):
        x = batch(32, 9, seed=i)
        reference.step(straight, adam, x, objective(x), update)
    optimizer = optimizer_of(turns, update)
    for i in range(9):
        x = batch(32, 9, seed=i)
        if i == 3:
            mixed.give_to(optimizer, turns)
        if i == 6:
            mixed = AdamState.take_from(optimizer, turns)
        if 3 <= i < 6:
            optimizer.zero_grad()
            reference.loss(x, turns, objective(x)).backward()
            optimizer.step()
        else:
            reference.step(turns, mixed, x, objective(x), update)
    assert mixed.step == adam.step == 9
    for name, tensor in state(turns, mixed).items():
        torch.testing.assert_close(
            tensor.detach(), state(straight, adam)[name], rtol=1e-10, atol=1e-12, msg=name
        )


def test_given_and_taken_moments_are_the_same_memory():
    params = Parameters(**{k: torch.nn.Parameter(t) for k, t in made_up(5, 12).tensors().items()})
    optimizer = torch.optim.Adam(params.tensors().values())
    adam = AdamState.zeros(params)
    reference.step(params, adam, batch(4, 5), Objective(1.0), Update(0.01))
    adam.give_to(optimizer, params)
    back = AdamState.take_from(optimizer, params)
    assert back.step == 1
    for name, tensor in state(params, adam).items():
        assert tensor is state(params, back)[name], name
    counters = [optimizer.state[p]["step"] for p in params.tensors().values()]
    assert len({t.data_ptr() for t in counters}) == 4, "an optimizer counts each of them up"


def test_a_given_state_is_saved_and_loaded_with_the_optimizer():
    params = leaves_of(made_up(5, 12))
    adam = AdamState.zeros(params)
    reference.step(params, adam, batch(4, 5), Objective(1.0), Update(0.01))
    first, second = (torch.optim.Adam(params.tensors().values()) for _ in range(2))
    adam.give_to(first, params)
    second.load_state_dict(first.state_dict())
    back = AdamState.take_from(second, params)
    assert back.step == 1
    for name, tensor in state(params, adam).items():
        assert torch.equal(tensor, state(params, back)[name]), name


def stepped(params: Parameters, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of the four tensors that has taken a step."""
    optimizer = torch.optim.Adam(params.tensors().values(), **options)
    for tensor in params.tensors().values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    return optimizer


def unlike_steps(params: Parameters) -> torch.optim.Optimizer:
    optimizer = stepped(params)
    params.b_enc.grad = None
    optimizer.step()
    return optimizer


def with_amsgrad_left(params: Parameters) -> torch.optim.Optimizer:
    optimizer = stepped(params, amsgrad=True)
    optimizer.param_groups[0]["amsgrad"] = False
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adam([p.W_enc_rows, p.b_enc, p.W_dec]), "does not hold b_dec"),
        (lambda p: stepped(leaves_of(made_up(5, 12))), "does not hold W_enc_rows"),
        (lambda p: torch.optim.Adam(p.tensors().values()), "no Adam state for W_enc_rows"),
        (
            lambda p: torch.optim.SGD(p.tensors().values()),
            "must be a torch.optim.Adam or AdamW, got SGD",
        ),
        (unlike_steps, "numbers of steps differ .*W_enc_rows 2, b_enc 1"),
        (lambda p: stepped(p, amsgrad=True), "amsgrad set for W_enc_rows"),
        (with_amsgrad_left, "amsgrad set for W_enc_rows"),
    ],
)
def test_an_optimizers_state_that_does_not_fit_is_refused(make, message):
    params = leaves_of(made_up(5, 12))
    with pytest.raises(UserError, match=message):
        AdamState.take_from(make(params), params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adam([p.W_enc_rows, p.b_enc, p.W_dec]), "does not hold b_dec"),
        (lambda p: torch.optim.Adam(p.tensors().values(), amsgrad=True), "amsgrad set"),
    ],
)
def test_an_optimizer_that_cannot_go_on_is_refused_and_left_as_it_was(make, message):
    params = leaves_of(made_up(5, 12))
    optimizer = make(params)
    with pytest.raises(UserError, match=message):
        AdamState.zeros(params).give_to(optimizer, params)
    assert not optimizer.state


# The outputs that a loss may be made of, and their gradients.

OUTPUTS = ("x_hat", "l1", "activity", "val")


@pytest.mark.parametrize("through", [*[(name,) for name in OUTPUTS], OUTPUTS], ids="+".join)
@pytest.mark.parametrize("feature_weight", [None, FEATURE_WEIGHT], ids=["p=1", "p"])
@pytest.mark.parametrize("supported", [False, True], ids=["all", "support"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_the_written_out_backward_equals_autograd(clip, supported, feature_weight, through):
    params, x = leaves_of(uneven(made_up(D_IN, D_SAE))), batch(ROWS, D_IN).requires_grad_()
    p = torch.ones(D_SAE, dtype=torch.float64) if feature_weight is None else feature_weight.clone()
    p.requires_grad_()
    support = some_support(params, x.detach()) if supported else None
    x_hat, l1, activity, code = reference.autoencode(x, params, clip, feature_weight, support)

    pre = (x - params.b_dec) @ params.W_enc_rows.T + params.b_enc
    z = pre.clamp(min=0) if clip is None else pre.clamp(min=0).clamp(max=clip)
    if support is not None:
        ones = torch.ones(len(support.col), dtype=torch.float64)
        z = z * dense(reference.SparseCode(*support, ones), D_SAE)
    over = z.detach() > 0 if clip is None else (z.detach() > 0) & (pre > clip)
    expected = {
        "x_hat": z @ params.W_dec + params.b_dec,
        "l1": (z * p).sum(1),
        "activity": z.sum(0),
        "val": z[z > 0],
    }
    seen = {"x_hat": x_hat, "l1": l1, "activity": activity, "val": code.val.abs()}
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value.detach(), rtol=1e-12, atol=1e-13, msg=name)
    if clip is not None:
        assert torch.equal(code.val < 0, over[z > 0])
        assert (code.val < 0).any()
    else:
        assert code.val.min() > 0

    generator = torch.Generator().manual_seed(9)
    cotangents = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in expected.items()
        if name in through
    }
    value = sum((cotangents[name] * expected[name]).sum() for name in through)
    assert isinstance(value, Tensor)
    value.backward()
    n1, n2, n3, n4 = (cotangents.get(name) for name in OUTPUTS)
    grad_x, gradient, grad_p = reference.autoencode_backward(
        (n1, n2, n3, n4), x, params, code, feature_weight
    )
    pairs = {"x": (grad_x, x), "p": (grad_p, p)}
    pairs |= {name: (gradient.tensors()[name], leaf) for name, leaf in params.tensors().items()}
    for name, (got, leaf) in pairs.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12, msg=name)


def test_the_objective_made_of_the_outputs_has_the_gradient_of_the_step():
    params, x = uneven(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    expected, _ = reference.gradients(x, params, Objective(2.0, 0.7, feature_weight=FEATURE_WEIGHT))
    x_hat, _, _, code = reference.autoencode(x, params, 0.7, FEATURE_WEIGHT)
    g_l1 = torch.full((ROWS,), 2.0 / ROWS, dtype=torch.float64)
    _, gradient, _ = reference.autoencode_backward(
        (2 / ROWS * (x_hat - x), g_l1, None, None), x, params, code, FEATURE_WEIGHT
    )
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(gradient.tensors()[name], tensor, rtol=1e-12, atol=1e-13)
