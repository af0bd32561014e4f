"""Stochastic gates: what they compute, the policy gradient they learn by, and what a training makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from made_up_weights import batch, dense
from torch import Tensor

from sae_ext.activations.dataset import InMemory
from sae_ext.architectures import Gated, Now, Thresholds
from sae_ext.architectures.base import Weights, four
from sae_ext.architectures.gated import bias_for
from sae_ext.config import SAEConfig
from sae_ext.errors import UserError
from sae_ext.fields import from_dict, to_dict
from sae_ext.model import SAE
from sae_ext.schedules import Schedule
from sae_ext.training.config import RevivalConfig, TrainConfig
from sae_ext.training.job import Trained
from sae_ext.training.learner import Learner
from sae_ext.training.revival import Revival
from sae_ext.training.reward import Reward
from sae_ext.training.run import run_to_end, train
from sae_ext.training.term import Seen
from sae_ext.training.terms import MSE, ObjectiveConfig

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, ROWS = 4, 6, 10
REWARD = Reward(l0_weight=0.7, diversity_weight=1.5, entropy_weight=0.3)
GATES = {"W_enc_rows", "b_dec", "gate_bias"}


def now(seed: int = 0, factor: float = 1.0) -> Now:
    return Now(
        step=0,
        generator=lambda purpose: torch.Generator().manual_seed(seed),
        factors={"anneal": factor},
    )


def weights_of(architecture: Gated, d_in: int = D_IN, d_sae: int = D_SAE) -> Weights:
    """Float64 weights somewhere in the middle of a training."""
    weights = architecture.initial(d_in, d_sae, torch.zeros(d_in), {}, 3)
    return {
        name: t.double() + 0.3 * batch(1, t.numel(), seed=i).view(t.shape)
        for i, (name, t) in enumerate(weights.items())
    }


def logits_of(x: Tensor, weights: Weights, temperature: float) -> Tensor:
    pre = (x - weights["b_dec"]) @ weights["W_enc_rows"].T
    return (pre + weights["gate_bias"]) / temperature


def value_of(architecture: Gated, reward: Reward, x: Tensor, weights: Weights, at: Now) -> Tensor:
    out = architecture.forward(x, weights, at, price=None)
    return reward.value(Seen(out, x, x, weights, at))


def gradient_of(value: Tensor, weights: Weights) -> Weights:
    grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    pairs = zip(weights.items(), grads, strict=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in pairs}


def leaves(weights: Weights) -> Weights:
    return {name: t.detach().clone().requires_grad_() for name, t in weights.items()}


def planted(n: int = 3000, d_in: int = 16, features: int = 24, active: float = 2) -> InMemory:
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((features, d_in))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sizes = np.abs(rng.standard_normal((n, features))) + 0.5
    z = np.where(rng.random((n, features)) < active / features, sizes, 0)
    return InMemory((z @ directions).astype(np.float32))


def trained(
    data: InMemory,
    architecture: Gated,
    reward: Reward | None = REWARD,
    *,
    steps: int = 6,
    hooks: dict[str, Any] | None = None,
    **config: Any,
) -> Trained:
    sae = SAEConfig(d_sae=32, architecture=architecture)
    plain = {"batch_rows": 128, "lr": 5e-3, "lr_schedule": Schedule(), "log_every": 20}
    plain |= {"objective": ObjectiveConfig(l1=None, reward=reward), "checkpoint_every": steps}
    return run_to_end(train(data, sae, TrainConfig(steps=steps, **plain | config), **(hooks or {})))


def content_of(sae: SAE) -> dict[str, bytes]:
    tensors = {**sae.parameters.tensors(), **sae.more}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


# ---- What a row becomes ----------------------------------------------------------------------------


def test_a_training_step_reconstructs_through_the_gates_that_are_open():
    architecture = Gated(temperature=0.8, share=0.4)
    weights, x = weights_of(architecture), batch(ROWS, D_IN)
    price = torch.linspace(0.5, 2, D_SAE, dtype=torch.float64)
    out = architecture.forward(x, weights, now(factor=0.5), price=price)
    torch.testing.assert_close(out.more["gate_logits"], logits_of(x, weights, 0.4))
    gates = out.more["gates"]
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    pre = (x - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    z = gates * pre.relu()
    assert ((gates == 1) & (pre < 0)).any()
    torch.testing.assert_close(dense(out.code, D_SAE), z)
    torch.testing.assert_close(out.x_hat, z @ weights["W_dec"] + weights["b_dec"])
    torch.testing.assert_close(out.l1, z @ price)


def test_gates_open_as_often_as_their_logits_say():
    architecture = Gated(share=0.4)
    weights, rows = weights_of(architecture), 20_000
    x = batch(1, D_IN).repeat(rows, 1)
    out = architecture.forward(x, weights, now(), price=None)
    expected = torch.sigmoid(out.more["gate_logits"][0])
    error = 4 * (expected * (1 - expected) / rows).sqrt()
    assert ((out.more["gates"].mean(0) - expected).abs() < error).all()
    pairs = torch.corrcoef(out.more["gates"].T) - torch.eye(D_SAE)
    assert pairs.abs().max() < 4 / math.sqrt(rows)


@pytest.mark.parametrize("share", [0.02, 0.3])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
@pytest.mark.parametrize("mean", [0.0, 0.8], ids=["centred", "off centre"])
def test_training_begins_with_the_share_of_open_gates_that_was_asked_for(share, temperature, mean):
    d_in, rows = 64, 2000
    architecture = Gated(share=share, temperature=temperature)
    centre = torch.full((d_in,), mean)
    # E‖x‖² = d_in
    x = centre + batch(rows, d_in).float() * math.sqrt(1 - mean**2)
    weights = architecture.initial(d_in, 128, centre, {}, 0)
    gates = architecture.forward(x, weights, now(), price=None).more["gates"]
    assert float(gates.mean()) == pytest.approx(share, rel=0.1)


def test_the_bias_of_a_share_is_that_of_a_logistic_and_of_a_normal_at_the_extremes():
    assert bias_for(0.2, 0.0, 0.5) == pytest.approx(0.5 * math.log(0.2 / 0.8))
    quantile = float(torch.special.ndtri(torch.tensor(0.1)))
    assert bias_for(0.1, 3.0, 1e-4) == pytest.approx(3 * quantile, rel=3e-3)


def test_after_training_a_gate_is_open_where_that_was_more_likely_than_not():
    architecture = Gated(share=0.4)
    weights, x = weights_of(architecture), batch(200, D_IN)
    weights["gate_bias"][0] = weights["b_enc"][0] + 2.0  # a threshold below 0
    final, more = architecture.final(weights, {})
    assert isinstance(final, Thresholds)
    assert bool((more["threshold"] >= 0).all())
    pre = (x - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    wanted = torch.where(logits_of(x, weights, 1.0) > 0, pre.relu(), 0.0)
    code = SAE(four(weights), final, more).encode(x)
    torch.testing.assert_close(dense(code, D_SAE), wanted)
    assert 0.05 < (wanted > 0).double().mean() < 0.95


def test_what_was_learned_on_scaled_rows_serves_raw_ones():
    architecture = Gated(share=0.4)
    weights, x, scale = weights_of(architecture), batch(ROWS, D_IN), 2.5
    codes = []
    for w, rows in ((weights, x * scale), (architecture.folded(weights, scale), x)):
        final, more = architecture.final(w, {})
        codes.append(dense(SAE(four(w), final, more).encode(rows), D_SAE))
    assert codes[0].abs().sum() > 0
    torch.testing.assert_close(codes[1], codes[0])


# ---- The policy gradient ---------------------------------------------------------------------------


def written_out(reward: Reward, x: Tensor, x_hat: Tensor, gates: Tensor, logits: Tensor) -> Tensor:
    """dL/dl [B, d_sae], entry by entry."""
    rows, d_sae = gates.shape
    R = []
    for i in range(rows):
        error = sum(float(x_hat[i, d] - x[i, d]) ** 2 for d in range(x.shape[1]))
        div = sum(float(gates[i, j] - gates[:, j].mean()) ** 2 for j in range(d_sae)) / d_sae
        opened = float(gates[i].sum())
        R.append(-error - reward.l0_weight * opened + reward.diversity_weight * div)
    grad = torch.zeros_like(logits)
    for i, j in itertools.product(range(rows), range(d_sae)):
        p = 1 / (1 + math.exp(-float(logits[i, j])))
        baseline = (sum(R) - R[i]) / (rows - 1)
        policy = -(R[i] - baseline) * (float(gates[i, j]) - p) / rows
        entropy = -float(logits[i, j]) * p * (1 - p) / rows  # d(-p log p - (1-p) log (1-p))/dl
        grad[i, j] = policy - reward.entropy_weight * entropy
    return grad


def test_the_gradient_is_the_policy_gradient_written_out():
    architecture = Gated(temperature=0.8, share=0.4)
    weights, x = leaves(weights_of(architecture)), batch(ROWS, D_IN)
    out = architecture.forward(x, weights, now(), price=None)
    logits, gates = out.more["gate_logits"], out.more["gates"]
    value = REWARD.value(Seen(out, x, x, weights, now()))
    (found,) = torch.autograd.grad(value, logits, retain_graph=True)
    expected = written_out(REWARD, x, out.x_hat.detach(), gates, logits.detach())
    assert expected.norm() > 0.1
    torch.testing.assert_close(found, expected)

    reached = gradient_of(value, weights)
    by_hand = gradient_of((logits_of(x, weights, 0.8) * expected).sum(), weights)
    for name in weights:
        torch.testing.assert_close(reached[name], by_hand[name])
        assert (reached[name].norm() > 1e-3) == (name in GATES), name


def test_the_value_is_what_rewards_and_entropy_come_to():
    architecture = Gated(share=0.4)
    weights, x = weights_of(architecture), batch(ROWS, D_IN)
    out = architecture.forward(x, weights, now(), price=None)
    rewards = REWARD.rewards(out.x_hat, x, out.more["gates"])
    bernoulli = torch.distributions.Bernoulli(logits=out.more["gate_logits"])
    entropy = bernoulli.entropy().sum(dim=1).mean()
    value = value_of(architecture, REWARD, x, weights, now())
    torch.testing.assert_close(value, -rewards.mean() - 0.3 * entropy)


def test_the_mean_diversity_is_the_variance_of_the_gates_between_rows():
    gates = (batch(ROWS, D_SAE) > 0.3).double()
    x = torch.zeros(ROWS, D_IN, dtype=torch.float64)
    diverse = Reward(l0_weight=0.0, diversity_weight=2.0).rewards(x, x, gates)
    assert float(diverse.mean()) == pytest.approx(2 * float(gates.var(dim=0, correction=0).mean()))
    alike = gates[:1].repeat(ROWS, 1)
    assert float(Reward(l0_weight=0.0, diversity_weight=2.0).rewards(x, x, alike).sum()) == 0


def every_gates(rows: int, d_sae: int) -> Iterator[Tensor]:
    for bits in itertools.product([0.0, 1.0], repeat=rows * d_sae):
        yield torch.tensor(bits, dtype=torch.float64).view(rows, d_sae)


def with_gates(x: Tensor, weights: Weights, gates: Tensor, logits: Tensor) -> Seen:
    """What the term would see if these gates had been drawn."""
    pre = (x - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    x_hat = (gates * pre.relu()) @ weights["W_dec"] + weights["b_dec"]
    out = Gated().forward(x, weights, now(), price=None)
    out = out._replace(x_hat=x_hat.detach(), more={"gate_logits": logits, "gates": gates})
    return Seen(out, x, x, weights, now())


def expectations(rows: int, reward: Reward) -> tuple[Tensor, Tensor, Weights, Tensor]:
    """The term's gradient to the logits and that of the expected reward, both summed over all gates."""
    architecture, d_sae = Gated(share=0.4), 2
    weights, x = weights_of(architecture, 3, d_sae), batch(rows, 3)
    logits = logits_of(x, weights, 1.0).requires_grad_()
    p = torch.sigmoid(logits)
    mean, expected = torch.zeros_like(logits), torch.zeros((), dtype=torch.float64)
    for gates in every_gates(rows, d_sae):
        chance = (gates * p + (1 - gates) * (1 - p)).prod()
        seen = with_gates(x, weights, gates, logits)
        (grad,) = torch.autograd.grad(reward.value(seen), logits, retain_graph=True)
        mean += chance.detach() * grad
        rewards = reward.rewards(seen.forward.x_hat, x, gates)
        expected = expected + chance * rewards.mean().detach()
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum(1).mean()
    (exact,) = torch.autograd.grad(-expected - reward.entropy_weight * entropy, logits)
    return mean, exact, weights, x


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_over_all_gates_it_is_the_gradient_of_the_expected_reward(rows):
    mean, exact, _, _ = expectations(rows, Reward(l0_weight=0.7, entropy_weight=0.3))
    assert exact.norm() > 0.05
    torch.testing.assert_close(mean, exact)


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_over_all_gates_diversity_has_the_stated_share_of_its_gradient(rows):
    found, exact = zip(
        *(expectations(rows, Reward(diversity_weight=w))[:2] for w in (0.0, 1.5)), strict=True
    )
    diversity = exact[1] - exact[0]
    assert diversity.norm() > 0.01
    torch.testing.assert_close(found[1] - found[0], (rows - 2) / (rows - 1) * diversity)


def test_over_many_draws_it_is_the_gradient_of_the_expected_reward():
    reward = Reward(l0_weight=0.7)
    _, exact, weights, x = expectations(3, reward)
    draws = []
    for seed in range(2000):
        out = Gated().forward(x, weights, now(seed), price=None)
        logits = out.more["gate_logits"].detach().requires_grad_()
        out = out._replace(more=out.more | {"gate_logits": logits})
        draws.append(torch.autograd.grad(reward.value(Seen(out, x, x, weights, now())), logits)[0])
    stacked = torch.stack(draws)
    error = stacked.std(dim=0) / math.sqrt(len(draws))
    assert ((stacked.mean(dim=0) - exact).abs() < 4 * error).all()
    assert (exact.abs() > 4 * error).any()


def test_a_single_row_is_refused():
    weights, architecture = weights_of(Gated()), Gated()
    with pytest.raises(
        UserError, match=r"reward compares rows: train.batch_rows must be 2 or more"
    ):
        value_of(architecture, REWARD, batch(1, D_IN), weights, now())
    with pytest.raises(UserError, match="batch_rows"):
        trained(planted(), Gated(), batch_rows=1)


# ---- Trainings -------------------------------------------------------------------------------------


def test_the_reward_rises_and_gates_close_in_training():
    out = trained(planted(), Gated(), Reward(l0_weight=0.5), steps=200)
    history = out.history.to_pydict()
    assert history["reward"][-1] < 0.5 * history["reward"][0]  # its value is the negative
    assert history["l0"][-1] < history["l0"][0]
    assert out.validation["fvu"] < 0.5


def test_the_dearer_gates_are_the_fewer_are_open():
    l0 = [trained(planted(), Gated(), Reward(l0_weight=w), steps=150).validation["l0"]
          for w in (0.1, 1.0, 3.0)]  # fmt: skip
    assert l0[0] > 1.3 * l0[1] > 1.3 * 1.3 * l0[2] > 0


def test_a_resumed_training_ends_with_the_same_bytes():
    data, kept = planted(), []
    first = {"save_checkpoint": kept.append}
    whole = trained(data, Gated(), steps=20, checkpoint_every=10, hooks=first)
    rest = {"load_checkpoint": lambda: kept[0]}
    again = trained(data, Gated(), steps=20, checkpoint_every=10, hooks=rest)
    assert len(kept) == 2
    assert content_of(again.sae) == content_of(whole.sae)


def test_a_revived_features_gate_is_open_about_as_often_as_in_the_beginning():
    revival = RevivalConfig(at=(10,), candidates=256, encoder_scale=0.1)
    config = TrainConfig(steps=300, dead_rows=100, revival=revival)  # short rows: other biases
    architecture = Gated(share=0.2, temperature=0.2)
    learner = Learner(SAEConfig(d_sae=64, architecture=architecture), config, {},
                      device=torch.device("cpu"), group=None)  # fmt: skip
    learner.begin(16, torch.zeros(16))
    learner.weights["gate_bias"][:32] = -100.0
    learner.silent_rows[:32] = 100
    x = batch(256, 16).float()
    assert [e.features for e in Revival(revival, learner).revive(lambda count, seed: x)] == [32]
    out = architecture.forward(x, learner.weights, learner.now({}), price=None)
    assert float(out.more["gates"][:, :32].mean()) == pytest.approx(0.2, abs=0.04)


# ---- Configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        Gated(share=0.3),
        Gated(temperature=0.5),
        Gated(anneal=Schedule()),
        Reward(weight=2.0),
        Reward(schedule=Schedule(warmup_steps=3)),
        Reward(l0_weight=2.0),
        Reward(diversity_weight=2.0),
        Reward(entropy_weight=2.0),
    ],
    ids=lambda c: repr(c)[:40],
)
def test_every_field_changes_what_is_learned(changed):
    pairs = [(Gated(), Reward()), (Gated(), changed)]
    if isinstance(changed, Gated):
        pairs[1] = (changed, Reward())
    one, other = (content_of(trained(planted(600), *pair).sae) for pair in pairs)
    assert one != other


def test_gates_learn_by_the_reward_alone():
    architecture = Gated(share=0.4)
    weights, x = leaves(weights_of(architecture)), batch(ROWS, D_IN)
    out = architecture.forward(x, weights, now(), price=None)
    grads = gradient_of(MSE().value(Seen(out, x, x, weights, now())), weights)
    assert grads["gate_bias"].abs().max() == 0
    for name in ("W_enc_rows", "b_enc", "W_dec", "b_dec"):
        assert grads[name].norm() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gated(share=0.0), r"share must lie in \(0, 1\), got 0"),
        (lambda: Gated(share=1.0), r"share must lie in \(0, 1\), got 1"),
        (lambda: Gated(temperature=0.0), "temperature must be positive"),
        (lambda: Gated(temperature=math.inf), "temperature must be finite"),
        (lambda: Gated(anneal=Schedule(kind="cosine")), "anneal must not come to 0"),
        (lambda: Reward(weight=-1.0), "weight must be 0 or more"),
        (lambda: Reward(l0_weight=-1.0), "l0_weight must be 0 or more"),
        (lambda: Reward(diversity_weight=-1.0), "diversity_weight must be 0 or more"),
        (lambda: Reward(entropy_weight=-1.0), "entropy_weight must be 0 or more"),
        (lambda: Reward(entropy_weight=math.nan), "entropy_weight must be finite"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_reward_is_refused_where_there_are_no_gates():
    objective = ObjectiveConfig(reward=Reward())
    with pytest.raises(UserError, match=r"objective.reward needs 'gate_logits'"):
        run_to_end(train(planted(600), SAEConfig(d_sae=8), TrainConfig(objective=objective)))


def test_an_annealing_longer_than_the_run_is_refused():
    anneal = Schedule(warmup_steps=50, initial=0.5)
    with pytest.raises(UserError, match=r"sae.architecture.anneal: .* 50, but the run has 6 steps"):
        trained(planted(600), Gated(anneal=anneal))


def test_a_config_survives_json():
    sae = SAEConfig(architecture=Gated(share=0.2))
    objective = ObjectiveConfig(l1=None, reward=REWARD)
    assert from_dict(SAEConfig, to_dict(sae)) == sae
    assert from_dict(ObjectiveConfig, to_dict(objective)) == objective
