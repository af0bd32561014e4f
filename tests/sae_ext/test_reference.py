"""The reference against what PyTorch itself computes: autograd and torch.optim.Adam."""

from __future__ import annotations

import pytest
import torch
from made_up_weights import batch, copied, dense, made_up

from sae_ext import reference
from sae_ext.ops import AdamState, Parameters

WEIGHTS = {
    "recon_weight": 0.5 + batch(23, 1, seed=5)[:, 0].abs(),
    "l1_weight": batch(23, 1)[:, 0].abs(),
}


def autograd(x: torch.Tensor, params: Parameters, **arguments: object) -> dict[str, torch.Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in params.tensors().items()}
    reference.loss(x, Parameters(**leaves), **arguments).backward()  # type: ignore[arg-type]
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("l1", [0.0, 3.0])
def test_written_out_gradients_equal_autograd(weights, clip, l1):
    params, x = made_up(11, 31), batch(23, 11)
    arguments = {"l1": l1, "clip": clip, **weights}
    gradient, _ = reference.gradients(x, params, **arguments)
    for name, expected in autograd(x, params, **arguments).items():
        torch.testing.assert_close(gradient.tensors()[name], expected, rtol=1e-12, atol=1e-13)


def test_the_loss_is_the_mean_of_the_sums_a_step_reports():
    params, x = made_up(11, 31), batch(23, 11)
    _, seen = reference.gradients(x, params, l1=2.5)
    expected = (seen.squared_error + 2.5 * seen.l1) / 23
    assert reference.loss(x, params, l1=2.5).item() == pytest.approx(expected, rel=1e-13)


def test_gradients_and_codes_do_not_depend_on_the_chunk_of_rows(monkeypatch):
    params, x = made_up(11, 31), batch(23, 11)
    whole, seen = reference.gradients(x, params, l1=2.0, **WEIGHTS)
    code = reference.encode(x, params)
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 5 * 31 * 8)
    parts, seen_in_parts = reference.gradients(x, params, l1=2.0, **WEIGHTS)
    for a, b in zip(whole.tensors().values(), parts.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert torch.equal(seen.fired, seen_in_parts.fired)
    assert torch.equal(code.col, reference.encode(x, params).col)
    torch.testing.assert_close(
        reference.decode(code, params), dense(code, 31) @ params.W_dec + params.b_dec
    )


def test_fifty_steps_equal_torch_adam_on_projected_gradients_and_renormalised_rows():
    params = made_up(9, 40, bias=-0.3)
    adam = AdamState.zeros(params)
    rival = copied(params)
    leaves = [t.requires_grad_() for t in rival.tensors().values()]
    optimizer = torch.optim.Adam(leaves, lr=0.01, betas=(0.8, 0.99), eps=1e-6)
    for i in range(50):
        x = batch(32, 9, seed=i)
        reference.step(params, adam, x, l1=0.5, lr=0.01, clip=1.0, beta1=0.8, beta2=0.99, eps=1e-6)
        optimizer.zero_grad()
        reference.loss(x, rival, l1=0.5, clip=1.0).backward()
        with torch.no_grad():
            W, g = rival.W_dec, rival.W_dec.grad
            unit = W / W.norm(dim=1, keepdim=True)
            g -= torch.einsum("ji,ji->j", g, unit)[:, None] * unit
            optimizer.step()
            W /= W.norm(dim=1, keepdim=True)
    assert adam.step == 50
    for name, expected in rival.tensors().items():
        torch.testing.assert_close(
            params.tensors()[name], expected.detach(), rtol=1e-9, atol=1e-11, msg=name
        )


def test_the_gradient_passes_up_to_the_clip_and_not_at_zero_or_above():
    eye = torch.eye(4, dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    params = Parameters(eye.clone(), zeros.clone(), eye.clone(), zeros.clone())
    x = torch.tensor([[0.0, 0.5, 1.0, 1.5]], dtype=torch.float64)
    gradient, seen = reference.gradients(x, params, l1=1.0, clip=1.0)
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
    alone, _ = reference.gradients(x[:1], params, l1=2.0, **{k: v[:1] for k, v in both.items()})
    together, _ = reference.gradients(x, params, l1=2.0, **both)
    assert alone.b_enc.norm() > 0
    for a, b in zip(alone.tensors().values(), together.tensors().values(), strict=True):
        torch.testing.assert_close(a / 2, b, rtol=1e-12, atol=1e-14)  # a mean over two rows
