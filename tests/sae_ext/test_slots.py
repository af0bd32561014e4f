"""Supervised slots: what they compute, what each of their terms teaches, and what a training makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_weights import batch, dense
from torch import Tensor

from sae_ext.activations.dataset import InMemory
from sae_ext.architectures import Now, OneSlot, Slots
from sae_ext.architectures.base import Weights, four
from sae_ext.config import SAEConfig
from sae_ext.errors import UserError
from sae_ext.fields import from_dict, to_dict
from sae_ext.model import SAE
from sae_ext.schedules import Schedule
from sae_ext.training.config import RevivalConfig, TrainConfig
from sae_ext.training.job import Trained
from sae_ext.training.learner import Learner
from sae_ext.training.revival import Revival
from sae_ext.training.run import run_to_end, train
from sae_ext.training.slot_terms import Alignment, Entropy, Independence, Value
from sae_ext.training.term import Seen, Term
from sae_ext.training.terms import MSE, ObjectiveConfig

pytestmark = pytest.mark.usefixtures("one_thread")

RULES, ANSWERS = ["birth", "city", "work"], ["a", "b", "c", "d"]
CLASSES = {"rule": RULES, "answer": ANSWERS}
K, D_IN, D_SAE, ROWS = 3, 5, 7, 12
ENCODER = {"W_enc_rows", "b_enc", "b_dec"}
HEADS = {"slots.content", "slots.head", "slots.head_bias"}
MAGNITUDES = {"slots.magnitude", "slots.magnitude_bias"}
TERMS = {
    "entropy": (Entropy(), ENCODER),
    "alignment": (Alignment(), ENCODER),
    "independence": (Independence(), ENCODER),
    "value": (Value(), ENCODER | HEADS),
    "mse": (MSE(), ENCODER | MAGNITUDES | {"W_dec"}),
}


def slots(**changes: Any) -> Slots:
    return Slots(**{"count": K, "answer": "answer", "content": 2, **changes})


def now(rule: Tensor | None = None, *, factor: float = 1.0, seed: int = 0) -> Now:
    rows = torch.arange(ROWS)
    columns = {"rule": rows % K if rule is None else rule, "answer": rows * 7 % len(ANSWERS)}
    return Now(
        step=0,
        generator=lambda purpose: torch.Generator().manual_seed(seed),
        factors={"anneal": factor},
        columns=columns,
        classes=CLASSES,
    )


def weights_of(architecture: Slots, d_sae: int = D_SAE) -> Weights:
    """Float64 weights somewhere in the middle of a training."""
    weights = architecture.initial(D_IN, d_sae, batch(1, D_IN, seed=8)[0], CLASSES, 3)
    return {
        name: t.double() + 0.3 * batch(1, t.numel(), seed=i).view(t.shape)
        for i, (name, t) in enumerate(weights.items())
    }


def value_of(architecture: Slots, term: Term, weights: Weights, at: Now) -> Tensor:
    x = batch(ROWS, D_IN)
    return term.value(Seen(architecture.forward(x, weights, at, price=None), x, x, weights, at))


@dataclass(frozen=True)
class Given:
    """Rows whose rule and answer can be read off them."""

    data: InMemory
    x: np.ndarray
    rule: np.ndarray
    answer: np.ndarray


def given(n: int = 1500, *, told: bool = True, seed: int = 0) -> Given:
    """Rows around a centre for each rule, moved along a direction for each answer where it is told."""
    rng = np.random.default_rng(seed)
    rule, answer = rng.integers(0, K, n), rng.integers(0, len(ANSWERS), n)
    centres, moves = (rng.standard_normal((count, 12)) for count in (K, len(ANSWERS)))
    x = 3 * centres[rule] + 0.3 * rng.standard_normal((n, 12)) + 1.0
    if told:
        x += 2 * moves[answer]
    x = x.astype(np.float32)
    columns = {"rule": np.array(RULES)[rule], "answer": np.array(ANSWERS)[answer]}
    return Given(InMemory(x, columns), x, rule, answer)


def objective(**changes: Any) -> ObjectiveConfig:
    terms = {"l1": None, "entropy": Entropy(), "alignment": Alignment(), "value": Value()}
    return ObjectiveConfig(**{**terms, **changes})


def trained(
    data: InMemory,
    architecture: Slots,
    goal: ObjectiveConfig | None = None,
    *,
    d_sae: int = 9,
    decoder: str = "free",
    steps: int = 40,
    hooks: Mapping[str, Any] | None = None,
    **config: Any,
) -> Trained:
    sae = SAEConfig(d_sae=d_sae, architecture=architecture, decoder=decoder)  # type: ignore[arg-type]
    plain = {"batch_rows": 128, "lr": 1e-2, "lr_schedule": Schedule(), "log_every": 10}
    plain["checkpoint_every"] = steps
    settings = {"objective": goal or objective(), "steps": steps, **plain, **config}
    return run_to_end(train(data, sae, TrainConfig(**settings), **(hooks or {})))


def content_of(sae: SAE) -> dict[str, bytes]:
    tensors = {**sae.parameters.tensors(), **sae.more}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


# ---- What a row becomes ----------------------------------------------------------------------------


@pytest.mark.parametrize("d_sae", [K, D_SAE], ids=["slots alone", "with free features"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_after_training_a_row_takes_the_slot_with_the_largest_logit(d_sae, magnitude):
    architecture = slots(magnitude=magnitude)
    weights, x = weights_of(architecture, d_sae), batch(ROWS, D_IN)
    final, more = architecture.final(weights, {})
    sae = SAE(four(weights), final, more)
    code = sae.encode(x)

    pre = (x - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    size = torch.ones(ROWS, K, dtype=torch.float64)
    if magnitude:
        centred = x - weights["b_dec"]
        size = centred @ weights["slots.magnitude"].T + weights["slots.magnitude_bias"]
        assert (size < 0).any()
    one_hot = torch.nn.functional.one_hot(pre[:, :K].argmax(1), K)
    z = torch.cat([one_hot * size.relu(), pre[:, K:].relu()], dim=1)
    torch.testing.assert_close(dense(code, d_sae), z)
    torch.testing.assert_close(sae.decode(code), z @ weights["W_dec"] + weights["b_dec"])
    assert bool((code.val > 0).all())
    for b in range(ROWS):
        assert (code.col[code.row_ptr[b] : code.row_ptr[b + 1]].diff() > 0).all()


@pytest.mark.parametrize("d_sae", [K, D_SAE], ids=["slots alone", "with free features"])
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_a_training_step_reconstructs_from_shares_and_free_features(d_sae, magnitude, hard):
    architecture = slots(magnitude=magnitude, hard=hard, temperature=0.7)
    weights, x = weights_of(architecture, d_sae), batch(ROWS, D_IN)
    price = weights["W_dec"].norm(dim=1)
    out = architecture.forward(x, weights, now(factor=0.5), price=price)

    pre = (x - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    wait = torch.empty(ROWS, K, dtype=torch.float64)
    noise = -wait.exponential_(generator=torch.Generator().manual_seed(0)).log()
    shares = ((pre[:, :K] + noise) / 0.35).softmax(1)
    if hard:
        shares = torch.nn.functional.one_hot(shares.argmax(1), K).double()
    z, free = shares, pre[:, K:].relu()
    if magnitude:
        centred = x - weights["b_dec"]
        z = z * (centred @ weights["slots.magnitude"].T + weights["slots.magnitude_bias"]).relu()
    whole = torch.cat([z, free], 1) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(out.x_hat, whole)
    torch.testing.assert_close(out.l1, (free * price[K:]).sum(1))
    torch.testing.assert_close(out.more["slot_scaled"], pre[:, :K] / 0.35)
    taken = z * torch.nn.functional.one_hot(shares.argmax(1), K)
    torch.testing.assert_close(dense(out.code, d_sae), torch.cat([taken, free], 1))


@pytest.mark.parametrize(("factor", "low", "high"), [(1e-3, 0.99, 1.0), (1e3, 0.33, 0.35)])
def test_shares_are_nearly_one_hot_at_a_low_temperature_and_alike_at_a_high_one(factor, low, high):
    architecture = slots()
    out = architecture.forward(
        batch(ROWS, D_IN), weights_of(architecture), now(factor=factor), price=None
    )
    largest = out.more["slot_shares"].max(dim=1).values.mean()
    assert low <= largest <= high


def test_slots_are_drawn_as_often_as_their_logits_say():
    architecture, weights = slots(), weights_of(slots())
    x = batch(1, D_IN).repeat(20_000, 1)
    out = architecture.forward(x, weights, now(factor=1e-3), price=None)
    expected = out.more["slot_logits"][0].softmax(0)
    error = 4 * (expected * (1 - expected) / len(x)).sqrt()
    assert ((out.more["slot_shares"].mean(0) - expected).abs() < error).all()


# ---- Gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("d_sae", [K, D_SAE], ids=["slots alone", "with free features"])
def test_each_term_has_the_gradient_that_finite_differences_measure(name, d_sae):
    architecture, (term, reached) = slots(magnitude=True), TERMS[name]
    weights = weights_of(architecture, d_sae)
    at = now()

    def value(*tensors: Tensor) -> Tensor:
        moved = weights | dict(zip(sorted(reached), tensors, strict=True))
        return value_of(architecture, term, moved, at)

    leaves = [weights[n].clone().requires_grad_() for n in sorted(reached)]
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-7)
    for n, g in zip(sorted(reached), torch.autograd.grad(value(*leaves), leaves), strict=True):
        assert (g[:K] if n in ("W_enc_rows", "b_enc") else g).norm() > 1e-6, n


@pytest.mark.parametrize("name", TERMS)
def test_a_term_reaches_no_other_weight(name):
    architecture, (term, reached) = slots(magnitude=True), TERMS[name]
    leaves = {n: t.requires_grad_() for n, t in weights_of(architecture).items()}
    value = value_of(architecture, term, leaves, now())
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    for (n, _), g in zip(leaves.items(), grads, strict=True):
        if n not in reached:
            assert g is None or g.abs().max() == 0, n
        elif n in ("W_enc_rows", "b_enc") and name != "mse":
            assert g[K:].abs().max() == 0, "a free feature"


def test_a_hard_sample_passes_the_gradient_of_the_soft_one():
    found = []
    for hard in (False, True):
        architecture = slots(hard=hard)
        leaves = {n: t.requires_grad_() for n, t in weights_of(architecture).items()}
        out = architecture.forward(batch(ROWS, D_IN), leaves, now(), price=None)
        cotangent = batch(ROWS, K, seed=4)
        found.append(torch.autograd.grad(out.more["slot_shares"], leaves["b_enc"], cotangent)[0])
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1])


# ---- The extremes of each term ---------------------------------------------------------------------


def term_value(term: Term, **more: Tensor) -> float:
    """Of what a forward would give."""
    architecture = slots()
    weights, x = weights_of(architecture), batch(ROWS, D_IN)
    out = architecture.forward(x, weights, now(), price=None)
    out = out._replace(more=out.more | more)
    return float(term.value(Seen(out, x, x, weights, now())))


def one_hot(rule: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(rule, K).double()


def test_entropy_is_log_k_for_slots_that_are_alike_and_0_for_a_sure_one():
    alike, sure = torch.full((ROWS, K), 0.7), 1e3 * one_hot(torch.arange(ROWS) % K)
    assert term_value(Entropy(), slot_logits=alike) == pytest.approx(math.log(K))
    assert term_value(Entropy(), slot_logits=sure) == pytest.approx(0.0, abs=1e-12)


def test_alignment_is_0_where_every_row_is_sure_of_its_rule_and_finite_where_it_is_sure_of_another():
    rule = torch.arange(ROWS) % K
    right, wrong = 1e3 * one_hot(rule), 1e3 * one_hot((rule + 1) % K)
    assert term_value(Alignment(), slot_scaled=right) == pytest.approx(0.0, abs=1e-12)
    assert term_value(Alignment(), slot_scaled=wrong) == pytest.approx(1e3)


def test_rows_of_unknown_rules_do_not_count():
    rule, scaled = torch.arange(ROWS) % K, batch(ROWS, K)
    known = torch.arange(ROWS) < 5
    some = torch.where(known, rule, -1)
    shares = scaled.softmax(1)
    for term, more in (
        (Alignment(), {"slot_scaled": scaled}),
        (Independence(), {"slot_shares": shares}),
    ):
        alone = {n: t[known] for n, t in more.items()} | {"slot_rule": rule[known]}
        assert term_value(term, slot_rule=some, **more) == pytest.approx(term_value(term, **alone))
        assert term_value(term, slot_rule=torch.full_like(rule, -1), **more) == 0
    none = torch.full_like(rule, -1)
    for unknown in ({"slot_rule": none}, {"slot_answer": none}):
        assert term_value(Value(), **unknown) == 0


@pytest.mark.parametrize("counts", [(4, 4, 4), (9, 2, 1)], ids=["balanced", "unbalanced"])
def test_independence_is_0_for_perfect_slots_whatever_the_frequencies_and_not_for_constant_ones(
    counts,
):
    rule = torch.repeat_interleave(torch.arange(K), torch.tensor(counts))
    p = torch.tensor(counts).double() / ROWS
    perfect = term_value(Independence(), slot_shares=one_hot(rule), slot_rule=rule)
    constant = term_value(Independence(), slot_shares=p.repeat(ROWS, 1), slot_rule=rule)
    assert perfect == pytest.approx(0.0, abs=1e-24)
    assert constant == pytest.approx(float((p.diag() - p.outer(p)).square().sum()))
    assert constant > 0.05


def test_independence_of_slots_that_mix_two_rules_lies_between():
    rule = torch.arange(ROWS) % K
    mixed = 0.5 * (one_hot(rule) + one_hot((rule + 1) % K))
    assert 0.01 < term_value(Independence(), slot_shares=mixed, slot_rule=rule) < 0.22


# ---- Trainings -------------------------------------------------------------------------------------


def marginal(rule: np.ndarray, answer: np.ndarray) -> float:
    """H(answer | rule): what is left to one that knows the rule alone."""
    counts = np.zeros((K, len(ANSWERS)))
    np.add.at(counts, (rule, answer), 1)
    p = counts / counts.sum(axis=1, keepdims=True)
    return float(-(counts * np.log(p)).sum() / counts.sum())


def head_loss(sae: SAE, rows: Given) -> float:
    assert isinstance(sae.architecture, OneSlot)
    logits = sae.architecture.answer_logits(torch.from_numpy(rows.x), sae.parameters, sae.more)
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(rows.answer)))


def test_heads_tell_answers_from_the_rows_content_and_only_their_frequencies_where_rows_say_nothing():
    telling = given()
    content = trained(telling.data, slots(content=8), steps=150)
    assert head_loss(content.sae, telling) < 0.2 * marginal(telling.rule, telling.answer)
    # Where all rows of a rule are alike, a head sees no more than z.
    silent = given(told=False)
    silent = replace(silent, x=silent.x.copy())
    for rule in range(K):
        silent.x[silent.rule == rule] = silent.x[silent.rule == rule][0]
    columns = {"rule": np.array(RULES)[silent.rule], "answer": np.array(ANSWERS)[silent.answer]}
    frequency = trained(InMemory(silent.x, columns), slots(content=8), steps=150)
    assert head_loss(frequency.sae, silent) > 0.98 * marginal(silent.rule, silent.answer)


def test_slots_are_the_rules_in_sorted_order_after_training():
    rows = given()
    sae = trained(rows.data, slots(), steps=100).sae
    code = sae.encode(torch.from_numpy(rows.x))
    taken = dense(code, 9)[:, :K]
    assert ((taken != 0).sum(dim=1) == 1).all()
    assert (taken.argmax(1).numpy() == rows.rule).mean() > 0.98


def test_slots_alone_have_one_reconstruction_each_and_magnitudes_more():
    rows = given()
    x = torch.from_numpy(rows.x)
    for magnitude in (False, True):
        sae = trained(rows.data, slots(magnitude=magnitude), d_sae=K, steps=100).sae
        different = len(torch.unique(sae.decode(sae.encode(x)), dim=0))
        assert (different == K) if not magnitude else (different > 10 * K)


def test_decoder_rows_of_length_1_are_the_free_features_alone():
    sae = trained(given().data, slots(), decoder="unit").sae
    length = sae.parameters.W_dec.norm(dim=1)
    torch.testing.assert_close(length[K:], length[K:].mean().expand(9 - K), rtol=1e-5, atol=0)
    assert (length[:K] / length[K]).log().abs().min() > 1e-3


def test_slots_that_are_never_taken_are_neither_dead_nor_revived():
    revival = RevivalConfig(at=(10,), candidates=ROWS)
    config = TrainConfig(
        steps=20, dead_rows=100, revival=revival, lr_schedule=Schedule(),
        objective=ObjectiveConfig(l1=None),
    )  # fmt: skip
    sae = SAEConfig(d_sae=D_SAE, architecture=slots(answer=None))
    learner = Learner(sae, config, CLASSES, device=torch.device("cpu"), group=None)
    learner.begin(D_IN, torch.zeros(D_IN))
    learner.weights["b_enc"][1:] = -100.0  # the first slot alone is ever taken
    x = batch(ROWS, D_IN).float()
    for _ in range(10):
        learner.step(x, {"rule": torch.arange(ROWS) % K})
    assert learner.silent_rows.tolist() == [0] * K + [10 * ROWS] * (D_SAE - K)
    assert learner.dead.tolist() == [False] * K + [True] * (D_SAE - K)
    before = learner.weights["W_enc_rows"].clone()
    events = Revival(revival, learner).revive(lambda count, seed: x)
    assert [event.features for event in events] == [D_SAE - K]
    same = (learner.weights["W_enc_rows"] == before).all(dim=1)
    assert same.tolist() == [True] * K + [False] * (D_SAE - K)


def test_what_was_learned_on_scaled_rows_serves_raw_ones():
    architecture = slots(magnitude=True)
    weights, x, scale = weights_of(architecture), batch(ROWS, D_IN), 2.5
    pairs = []
    for w, rows in ((weights, x * scale), (architecture.folded(weights, scale), x)):
        final, more = architecture.final(w, {})
        sae = SAE(four(w), final, more)
        code = sae.encode(rows)
        logits = final.answer_logits(rows, sae.parameters, sae.more)
        pairs.append((dense(code, D_SAE), sae.decode(code), logits))
    torch.testing.assert_close(pairs[1][0], pairs[0][0])
    torch.testing.assert_close(pairs[1][1] * scale, pairs[0][1])
    torch.testing.assert_close(pairs[1][2], pairs[0][2])


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("answer", [None, "answer"])
def test_a_folder_keeps_slots_their_names_and_heads(tmp_path, magnitude, answer):
    rows = given(400)
    goal = objective(value=None if answer is None else Value())
    sae = trained(rows.data, slots(magnitude=magnitude, answer=answer), goal, steps=5).sae
    for name, data in sae.files({}).items():
        (tmp_path / name).write_bytes(data)
    again = SAE.load(tmp_path)
    assert again.architecture == sae.architecture
    assert isinstance(again.architecture, OneSlot)
    assert again.architecture.rules == tuple(RULES)
    assert again.architecture.answers == (() if answer is None else tuple(ANSWERS))
    assert content_of(again) == content_of(sae)
    x = torch.from_numpy(rows.x)
    for one, other in zip(again.encode(x), sae.encode(x), strict=True):
        assert torch.equal(one, other)
    if answer is None:
        with pytest.raises(UserError, match="no value heads"):
            again.architecture.answer_logits(x, again.parameters, again.more)


def test_a_row_less_batch_has_an_empty_code():
    architecture = slots()
    weights = weights_of(architecture)
    final, more = architecture.final(weights, {})
    code = final.encode(torch.zeros(0, D_IN, dtype=torch.float64), four(weights), more)
    assert code.row_ptr.tolist() == [0]
    assert len(code.col) == len(code.val) == 0


def test_a_resumed_training_ends_with_the_same_bytes():
    rows, kept = given().data, []
    whole = trained(
        rows, slots(magnitude=True), steps=20, checkpoint_every=10,
        hooks={"save_checkpoint": kept.append},
    )  # fmt: skip
    again = trained(
        rows, slots(magnitude=True), steps=20, checkpoint_every=10,
        hooks={"load_checkpoint": lambda: kept[0]},
    )  # fmt: skip
    assert len(kept) == 2
    assert content_of(again.sae) == content_of(whole.sae)
    assert again.sae.architecture == whole.sae.architecture


# ---- Configuration ---------------------------------------------------------------------------------

CHANGES = {
    "column": {"column": "other"},
    "answer": {"answer": "other"},
    "content": {"content": 3},
    "temperature": {"temperature": 0.5},
    "anneal": {"anneal": Schedule(kind="linear", final=0.5)},
    "magnitude": {"magnitude": True},
    "hard": {"hard": True},
}


def both_columns() -> InMemory:
    rows = given(400)
    other = np.roll(np.array(RULES)[rows.rule], 1)
    columns = {name: rows.data.column(name, np.arange(400)) for name in ("rule", "answer")}
    return InMemory(rows.x, {**columns, "other": other})


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_what_is_learned(field):
    data = both_columns()
    plain, changed = (
        content_of(trained(data, slots(**change), steps=6).sae) for change in ({}, CHANGES[field])
    )
    assert plain != changed


def test_the_number_of_slots_is_that_of_the_rules():
    for count in (2, 4):
        with pytest.raises(
            UserError, match=f"count is {count}, .*'rule' has 3 values .* count to 3"
        ):
            trained(given(400).data, slots(count=count), steps=2)


@pytest.mark.parametrize("term", [Entropy, Alignment, Independence, Value])
@pytest.mark.parametrize("field", ["weight", "schedule"])
def test_the_weight_of_every_term_changes_what_is_learned(term, field):
    data, name = given(400).data, term.__name__.lower()
    change = {"weight": 3.0} if field == "weight" else {"schedule": Schedule(warmup_steps=3)}
    found = [
        content_of(trained(data, slots(), objective(**{name: t}), steps=6).sae)
        for t in (term(), term(**change), None)
    ]
    assert found[0] != found[1]
    assert found[1] != found[2]


def test_terms_stand_in_the_history():
    history = trained(given(400).data, slots(), objective(independence=Independence())).history
    for name in ("entropy", "alignment", "independence", "value"):
        values = history[name].to_pylist()
        assert values[-1] < values[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1}, "count must be above 1, got 1"),
        ({"content": 0}, "content must be positive, got 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"column": "answer"}, "answer and column are both 'answer'"),
        ({"anneal": Schedule(kind="linear")}, "anneal must not come to 0"),
        ({"anneal": Schedule(start_step=1)}, "anneal must not come to 0"),
        ({"anneal": Schedule(warmup_steps=5)}, "anneal must not come to 0"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(change, message):
    with pytest.raises(UserError, match=message):
        slots(**change)


def test_an_annealing_that_never_comes_to_0_may_begin_with_a_warm_up():
    slots(anneal=Schedule(warmup_steps=5, initial=0.5))


@pytest.mark.parametrize("term", [Entropy, Alignment, Independence, Value])
def test_a_negative_weight_is_refused(term):
    with pytest.raises(UserError, match="weight must be 0 or more, got -1"):
        term(weight=-1.0)


def test_more_slots_than_features_are_refused():
    with pytest.raises(UserError, match="count is 3, but d_sae is only 2"):
        SAEConfig(d_sae=2, architecture=slots())


def test_slot_terms_are_refused_where_there_are_no_slots_and_value_where_there_are_no_answers():
    rows = given(400).data
    with pytest.raises(UserError, match=r"objective.value needs 'slot_answer'"):
        trained(rows, slots(answer=None), steps=2)
    with pytest.raises(UserError, match=r"objective.entropy needs 'slot_logits'.* ReLU"):
        run_to_end(train(rows, SAEConfig(d_sae=4), TrainConfig(objective=objective())))


def test_an_annealing_longer_than_the_run_is_refused():
    anneal = Schedule(warmup_steps=50, initial=0.5)
    with pytest.raises(
        UserError, match=r"sae.architecture.anneal: .* 50, but the run has 40 steps"
    ):
        trained(given(400).data, slots(anneal=anneal))


def test_a_config_survives_json():
    config = SAEConfig(d_sae=9, architecture=slots(magnitude=True, hard=True))
    assert from_dict(SAEConfig, to_dict(config)) == config


def test_a_folder_with_fewer_features_than_slots_is_refused(tmp_path: Path):
    sae = trained(given(400).data, slots(), steps=2).sae
    for name, data in sae.files({}).items():
        (tmp_path / name).write_bytes(data.replace(b'"count": 3', b'"count": 30'))
    with pytest.raises(UserError, match="count is 30, but d_sae is only 9"):
        SAE.load(tmp_path)
