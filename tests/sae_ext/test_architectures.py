"""Which entries each architecture makes active, in training and after it, against dense formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_up_training import D_IN, D_SAE, SHORT, fit, planted
from made_up_weights import batch, dense, identity, made_up, support_of, top_k
from torch import Tensor

from sae_ext import ops
from sae_ext.architectures import Architecture, BatchTopK, JumpReLU, Now, ReLU, TopK, base, jumprelu
from sae_ext.architectures.base import FOUR, four
from sae_ext.architectures.jumprelu import Thresholds
from sae_ext.architectures.topk import largest
from sae_ext.config import SAEConfig, with_changes
from sae_ext.errors import UserError
from sae_ext.model import SAE
from sae_ext.ops import Parameters
from sae_ext.training.terms import AuxK, ObjectiveConfig

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [ReLU(), ReLU(clip=0.6), TopK(k=3), BatchTopK(k=3), JumpReLU(threshold=0.4)]
NAMES = ["relu", "clip", "topk", "batchtopk", "jumprelu"]


def step(architecture: Architecture) -> Now:
    return Now(step=0, generator=lambda purpose: torch.Generator(), counters=architecture.counted())


def pre_of(x: Tensor, params: Parameters) -> Tensor:
    return (x - params.b_dec) @ params.W_enc + params.b_enc


def code(x: Tensor, params: Parameters, architecture: Architecture) -> Tensor:
    """z [B, d_sae] of a training step."""
    weights = params.tensors()
    if isinstance(architecture, JumpReLU):
        begun = architecture.initial(x.shape[1], len(params.b_enc), params.b_dec, {}, 0)
        weights |= {"threshold": begun["threshold"].double()}
    out = architecture.forward(x, weights, step(architecture), price=None)
    found = dense(out.code, len(params.b_enc))
    torch.testing.assert_close(out.x_hat, found @ params.W_dec + params.b_dec)
    torch.testing.assert_close(out.l1, found.sum(dim=1))
    return found


@pytest.fixture(params=["whole", "in chunks"])
def chunks(request, monkeypatch):
    """Whether pre-activations are looked at two rows at a time."""
    if request.param == "in chunks":
        monkeypatch.setattr(base, "_CHUNK_BYTES", 2 * 20 * 8)


# -- TopK ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("bias", [-0.7, 0.0, 0.7])
@pytest.mark.parametrize("rows", [1, 9])
def test_topk_keeps_the_k_largest_of_each_row_where_they_are_positive(chunks, rows, bias, k):
    params, x = made_up(6, 20, bias=bias), batch(rows, 6)
    pre = pre_of(x, params)
    expected = torch.where(top_k(pre, k), pre.relu(), 0)
    torch.testing.assert_close(code(x, params, TopK(k=k)), expected)
    after = TopK(k=k).encode(x, params, {})
    torch.testing.assert_close(dense(after, 20), expected)
    if bias < 0 and k > 1:
        assert (expected > 0).sum() < rows * k
    if k == 20:
        torch.testing.assert_close(expected, pre.relu())


def test_topk_lists_exactly_k_where_entries_are_equal():
    params = identity(6)
    x = torch.tensor([[2.0, 1, 1, 1, 1, 0]], dtype=torch.float64)
    support = TopK(k=3).support(x, params, None)
    assert len(support.col) == 3
    found = code(x, params, TopK(k=3))
    assert found[0, 0] == 2
    assert sorted(found[0].tolist()) == [0, 0, 0, 1, 1, 2]


def test_a_row_in_which_nothing_is_positive_has_an_empty_code():
    x = torch.tensor([[-1.0, -2, -3], [1, -1, 2]], dtype=torch.float64)
    for architecture in (TopK(k=2), BatchTopK(k=2), ReLU(), JumpReLU(threshold=0.5)):
        found = code(x, identity(3), architecture)
        assert found.tolist() == [[0, 0, 0], [1, 0, 2]]


def test_the_largest_among_some_features_are_found(chunks):
    params, x = made_up(6, 20, bias=0.3), batch(9, 6)
    among = torch.arange(20) % 3 == 0
    support = largest(x, params, 4, among=among)
    pre = pre_of(x, params).masked_fill(~among, -math.inf)
    expected = support_of(top_k(pre, 4))
    assert torch.equal(support.row_ptr, expected.row_ptr)
    assert torch.equal(support.col, expected.col)


# -- BatchTopK -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("rows", [1, 9])
def test_batchtopk_keeps_the_largest_of_the_whole_batch(chunks, rows, k):
    params, x = made_up(6, 20, bias=0.8), batch(rows, 6)
    pre = pre_of(x, params)
    order = pre.flatten().argsort(descending=True)[: rows * k]
    listed = torch.zeros(rows * 20, dtype=torch.bool)
    listed[order] = True
    expected = torch.where(listed.view(rows, 20), pre.relu(), 0)
    found = code(x, params, BatchTopK(k=k))
    torch.testing.assert_close(found, expected)
    if k < 20:
        assert (found > 0).sum() == rows * k
    if rows > 1 and k == 4:
        assert len(set((found > 0).sum(dim=1).tolist())) > 1
    if rows == 1:
        torch.testing.assert_close(found, code(x, params, TopK(k=k)))


def test_batchtopk_keeps_fewer_where_fewer_are_positive(chunks):
    params, x = made_up(6, 20, bias=-1.5), batch(9, 6)
    pre = pre_of(x, params)
    assert 0 < (pre > 0).sum() < 9 * 8
    torch.testing.assert_close(code(x, params, BatchTopK(k=8)), pre.relu())


def test_batchtopk_keeps_all_that_equal_the_least():
    x = torch.tensor([[3.0, 1, 0], [1, 2, 1]], dtype=torch.float64)
    assert code(x, identity(3), BatchTopK(k=2)).tolist() == x.tolist()
    assert code(x, identity(3), BatchTopK(k=1)).tolist() == [[3, 0, 0], [0, 2, 0]]


def test_batchtopks_threshold_is_the_running_mean_of_the_least_entry_kept():
    architecture, params = BatchTopK(k=2), made_up(6, 20)
    now = step(architecture)
    least = []
    for seed in range(6):
        x = batch(8, 6, seed=seed)
        architecture.support(x, params, now)
        least.append(float(pre_of(x, params).flatten().topk(16).values.min()))
    weights = [0.9 ** (5 - i) for i in range(6)]
    expected = np.dot(weights, least) / sum(weights)
    after, more = architecture.final(params.tensors(), now.counters)
    assert isinstance(after, Thresholds)
    torch.testing.assert_close(more["threshold"], torch.full((20,), expected).double())
    x = batch(50, 6, seed=9)
    found = dense(after.encode(x, params, more), 20)
    pre = pre_of(x, params)
    torch.testing.assert_close(found, torch.where(pre > expected, pre, 0))


def test_batchtopk_that_has_seen_nothing_is_a_relu():
    _, more = BatchTopK(k=2).final(made_up(6, 20).tensors(), BatchTopK(k=2).counted())
    assert more["threshold"].tolist() == [0.0] * 20


@pytest.mark.parametrize("k", [2, 4])
def test_batchtopk_after_training_uses_about_k_features_of_rows_it_has_not_seen(k):
    config = with_changes(SHORT, {"steps": 200, "objective": ObjectiveConfig(l1=None, auxk=AuxK())})
    trained = fit(SAEConfig(d_sae=D_SAE, architecture=BatchTopK(k=k)), config)
    assert isinstance(trained.sae.architecture, Thresholds)
    assert trained.validation["l0"] == pytest.approx(k, rel=0.15)
    assert trained.history["l0"].to_pylist()[-1] == k


# -- JumpReLU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_jumprelu_is_its_formula(chunks, rows, decoder):
    architecture = JumpReLU(threshold=0.4, bandwidth=0.5)
    params, x = made_up(6, 20), batch(rows, 6)
    weights = params.tensors() | {"threshold": torch.linspace(-2, 0.5, 20).double().exp()}
    price = 2 * params.W_dec.norm(dim=1) if decoder == "free" else None
    out = architecture.forward(x, weights, step(architecture), price=price)
    pre = pre_of(x, params)
    z = torch.where(pre > weights["threshold"], pre, 0)
    torch.testing.assert_close(dense(out.code, 20), z)
    torch.testing.assert_close(out.x_hat, z @ params.W_dec + params.b_dec)
    torch.testing.assert_close(out.l1, z.sum(dim=1) * (2 if decoder == "free" else 1))
    torch.testing.assert_close(out.more["l0"], (z > 0).sum(dim=1).double())


def test_jumprelu_is_silent_at_its_threshold_and_active_above_it():
    x = torch.tensor([[0.5, 0.5 + 1e-12, 0.4, 3.0]], dtype=torch.float64)
    architecture = JumpReLU(threshold=0.5)
    weights = identity(4).tensors() | {"threshold": torch.full((4,), 0.5).double()}
    out = architecture.forward(x, weights, step(architecture), price=None)
    assert dense(out.code, 4).tolist() == [[0, 0.5 + 1e-12, 0, 3]]


@pytest.mark.parametrize("of", ["x_hat", "l1", "l0"])
def test_jumprelus_gradients_are_the_same_in_pieces(monkeypatch, of):
    architecture = JumpReLU(threshold=0.4, bandwidth=1.0)
    params, x = made_up(6, 20), batch(9, 6)
    grads = []
    for size in (32 << 20, 3 * 6 * 8):
        monkeypatch.setattr(jumprelu, "_GATHER_BYTES", size)
        threshold = torch.linspace(-2, 0.5, 20).double().exp().requires_grad_()
        weights = params.tensors() | {"threshold": threshold}
        out = architecture.forward(x, weights, step(architecture), price=None)
        made = out.more["l0"] if of == "l0" else getattr(out, of)
        grads.append(torch.autograd.grad(made.square().sum(), threshold)[0])
    assert (grads[0] != 0).sum() > 10
    torch.testing.assert_close(*grads)


def test_no_threshold_falls_below_zero():
    weights = {"threshold": torch.tensor([-0.1, 0.0, 0.2])}
    JumpReLU().constrain(weights)
    torch.testing.assert_close(weights["threshold"], torch.tensor([0.0, 0.0, 0.2]))
    config = with_changes(SHORT, {"objective": ObjectiveConfig(l1=None), "lr": 3e-2})
    architecture = JumpReLU(threshold=0.05, bandwidth=0.2)
    sae = SAEConfig(d_sae=D_SAE, architecture=architecture, decoder="unit")
    found = fit(sae, config).sae.more["threshold"]
    assert found.min() == 0
    assert found.max() > 0


def test_jumprelu_after_training_has_the_thresholds_it_learned():
    weights = made_up(6, 20).tensors() | {"threshold": torch.linspace(-2, 0.5, 20).double().exp()}
    after, more = JumpReLU().final(weights, {})
    assert isinstance(after, Thresholds)
    assert more.keys() == {"threshold"}
    torch.testing.assert_close(more["threshold"], torch.linspace(-2, 0.5, 20).double().exp())


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_thresholds_pass_what_is_above_them_and_positive(chunks, rows):
    params, x = made_up(6, 20), batch(rows, 6)
    threshold = torch.linspace(-1, 1, 20).double()
    found = dense(Thresholds().encode(x, params, {"threshold": threshold}), 20)
    pre = pre_of(x, params)
    torch.testing.assert_close(found, torch.where((pre > threshold) & (pre > 0), pre, 0))
    assert rows < 9 or ((pre > threshold) & (pre <= 0)).any()


# -- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL, ids=NAMES)
def test_training_begins_with_unit_rows_and_a_tenth_of_them_as_encoder(architecture):
    b_dec = torch.linspace(-1, 1, 6, dtype=torch.float64)
    weights = architecture.initial(6, 20, b_dec, {}, 3)
    assert set(weights) - set(FOUR) == (
        {"threshold"} if isinstance(architecture, JumpReLU) else set()
    )
    assert all(t.dtype == torch.float32 for t in weights.values())
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(20))
    assert torch.equal(weights["W_enc_rows"], 0.1 * weights["W_dec"])
    assert weights["W_enc_rows"].data_ptr() != weights["W_dec"].data_ptr()
    assert (weights["b_enc"] == 0).all()
    assert torch.equal(weights["b_dec"], b_dec.float())
    if isinstance(architecture, JumpReLU):
        torch.testing.assert_close(weights["threshold"], torch.full((20,), 0.4))
    again = architecture.initial(6, 20, b_dec, {}, 3)
    assert all(torch.equal(t, again[name]) for name, t in weights.items())
    assert not torch.equal(weights["W_dec"], architecture.initial(6, 20, b_dec, {}, 4)["W_dec"])


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("architecture", ALL, ids=NAMES)
def test_the_folded_autoencoder_does_to_raw_rows_what_training_did_to_scaled_ones(
    architecture, scale
):
    weights = {n: t.double() for n, t in architecture.initial(6, 20, batch(1, 6)[0], {}, 0).items()}
    weights["b_enc"] += 0.1
    x = batch(40, 6)
    now = step(architecture)
    out = architecture.forward(scale * x, weights, now, price=None)
    folded = architecture.folded(weights, scale)
    after, more = architecture.final(folded, now.counters)
    sae = SAE(four(folded), after, more)
    seen = dense(sae.encode(x), 20)
    trained = dense(out.code, 20)
    if isinstance(architecture, BatchTopK):
        # The least entry itself is at the threshold, not above it.
        assert ((trained > 0) != (seen > 0)).sum() <= 1
        trained = torch.where(seen > 0, trained, 0)
    else:
        torch.testing.assert_close(scale * sae.decode(sae.encode(x)), out.x_hat)
    torch.testing.assert_close(seen, trained)


@pytest.mark.parametrize("architecture", ALL[:3], ids=NAMES[:3])
def test_a_code_of_no_rows_is_empty(architecture):
    found = architecture.encode(batch(0, 6), made_up(6, 20), {})
    assert found.row_ptr.tolist() == [0]
    assert len(found.col) == len(found.val) == 0


@pytest.mark.parametrize("clip", [None, 0.3])
def test_relu_passes_what_is_positive_up_to_its_clip(clip):
    params, x = made_up(6, 20), batch(9, 6)
    expected = pre_of(x, params).relu().clamp(max=clip or math.inf)
    torch.testing.assert_close(code(x, params, ReLU(clip=clip)), expected)
    torch.testing.assert_close(dense(ReLU(clip=clip).encode(x, params, {}), 20), expected)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (ReLU, "clip"),
        (TopK, "k"),
        (BatchTopK, "k"),
        (JumpReLU, "bandwidth"),
        (JumpReLU, "threshold"),
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_what_must_be_positive_is_named(kind, field, value):
    with pytest.raises(UserError, match=f"{field} must be positive, got {value}"):
        kind(**{field: value})


def test_duplicate_rows_are_no_trouble():
    """As first tokens are: the same row again and again, so that many entries are equal."""
    x = planted().gather(np.zeros(32, dtype=np.int64))
    for architecture in ALL:
        weights = architecture.initial(D_IN, D_SAE, torch.zeros(D_IN), {}, 0)
        out = architecture.forward(x, weights, step(architecture), price=None)
        rows = dense(out.code, D_SAE)
        assert (rows == rows[0]).all()
        assert isinstance(out.code, ops.SparseCode)
