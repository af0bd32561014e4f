from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_up_weights import identity, made_up
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from sae_ext.errors import UserError
from sae_ext.metrics.model_loss import (
    ModelLossSums,
    Predictions,
    attention_mask,
    mean_activation,
    model_loss,
    multilabel_bce,
    next_token,
    next_token_ce,
    patched,
)
from sae_ext.model import SAE
from sae_ext.ops import Parameters

WIDTH, VOCABULARY = 16, 23
BLOCK = "transformer.h.0"
TEXT = {"loss": next_token_ce, "predictions": next_token, "mask": attention_mask}


@pytest.fixture(scope="module")
def gpt() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=12,
        initializer_range=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return model.eval()


def texts(lengths: list[int], seed: int = 0, pad: int = 0, width: int = 10) -> dict[str, Tensor]:
    """Sequences of so many tokens, padded with `pad`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(mask, ids, pad), "attention_mask": mask.long()}


@pytest.fixture(scope="module")
def batches(gpt) -> list[dict[str, Tensor]]:
    """Padded texts whose next tokens are those that the model itself expects, mostly."""
    made = [texts([10, 4, 7], seed=1), texts([3, 9], seed=2), texts([10] * 4, seed=3)]
    for batch in made:
        for t in range(9):
            with torch.no_grad():
                best = gpt(input_ids=batch["input_ids"]).logits[:, t].argmax(dim=1)
            known = batch["attention_mask"][:, t + 1].bool()
            batch["input_ids"][:, t + 1] = torch.where(known, best, batch["input_ids"][:, t + 1])
    return made


class Tagger(nn.Module):
    """A small network for several labels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


@pytest.fixture
def tagger() -> Tagger:
    torch.manual_seed(1)
    model = Tagger()
    with torch.no_grad():
        model.head.weight *= 20
    return model


def tagged(model: Tagger, n: int, seed: int = 0) -> dict[str, Tensor]:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return {"x": x, "labels": (copy.deepcopy(model).eval()(x) > 0).float()}


TAGS: dict[str, Any] = {"loss": multilabel_bce, "run": lambda model, batch: model(batch["x"])}


def perfect(d: int) -> SAE:
    """Rebuilds exactly: a feature for each sign of each input."""
    eye, zeros = torch.eye(d), torch.zeros(d)
    both = torch.cat([eye, -eye])
    return SAE(Parameters(both, torch.zeros(2 * d), both.clone(), zeros))


def constant(value: Tensor) -> SAE:
    """Rebuilds everything as one vector."""
    p = identity(len(value), torch.float32)
    p.b_enc[:] = -1e6
    p.b_dec[:] = value
    return SAE(p)


def poor(d: int) -> SAE:
    p = made_up(d, 3 * d)
    return SAE(Parameters(**{name: t.float() for name, t in p.tensors().items()}))


def assert_same(one: dict, two: dict, rel: float = 1e-6) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == (
            pytest.approx(value, rel=rel, abs=1e-7) if isinstance(value, float) else value
        ), name


# -- the ends of the scale -----------------------------------------------------------------------


def test_a_perfect_reconstruction_recovers_everything(gpt, batches):
    mean = mean_activation(gpt, BLOCK, batches, mask=attention_mask)
    found = model_loss(gpt, BLOCK, perfect(WIDTH), batches, mean=mean, **TEXT).metrics()
    assert found["loss_zero"] > found["loss_clean"] + 0.1
    for name in ("loss_recovered_zero", "loss_recovered_mean", "kl_score_zero", "kl_score_mean"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert found["kl_sae"] == pytest.approx(0, abs=1e-9)
    assert found["loss_increase"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement_sae"] == 1
    assert found["top1_accuracy_sae"] == found["top1_accuracy_clean"] > 0.9


def test_predicting_zero_recovers_nothing_of_zero_ablation(gpt, batches):
    sae = constant(torch.zeros(WIDTH))
    found = model_loss(gpt, BLOCK, sae, batches, **TEXT).metrics()
    assert found["loss_recovered_zero"] == pytest.approx(0, abs=1e-6)
    assert found["kl_score_zero"] == pytest.approx(0, abs=1e-6)
    assert found["kl_sae"] > 0.1


def test_predicting_the_mean_recovers_nothing_of_mean_ablation(gpt, batches):
    mean = mean_activation(gpt, BLOCK, batches, mask=attention_mask)
    sae = constant(mean.float())
    found = model_loss(gpt, BLOCK, sae, batches, mean=mean, **TEXT).metrics()
    assert found["loss_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert found["kl_score_mean"] == pytest.approx(0, abs=1e-5)
    assert found["loss_recovered_zero"] != pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("train", [False, True])
def test_the_ends_of_the_scale_hold_for_binary_labels_too(tagger, train):
    tagger.train(train)
    batch = tagged(tagger, 200)
    mean = mean_activation(tagger, "hidden", [batch], run=TAGS["run"])
    ends = [(perfect(8), 1, 1), (constant(mean.float()), None, 0), (constant(0 * mean), 0, None)]
    for sae, zero, of_mean in ends:
        found = model_loss(tagger, "hidden", sae, [batch], mean=mean, **TAGS).metrics()
        for name, expected in (("zero", zero), ("mean", of_mean)):
            if expected is not None:
                recovered = found[f"loss_recovered_{name}"]
                assert recovered == pytest.approx(expected, abs=1e-5)
        assert found["kl_sae"] is found["top1_agreement_sae"] is found["top1_accuracy_sae"] is None


# -- definitions ---------------------------------------------------------------------------------


def test_every_number_is_that_of_its_definition(gpt, batches):
    sae, batch = poor(WIDTH), batches[0]
    mean = mean_activation(gpt, BLOCK, batches, mask=attention_mask)
    found = model_loss(gpt, BLOCK, sae, [batch], mean=mean, **TEXT).metrics()
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    chosen = [(b, t) for b in range(len(ids)) for t in range(9) if mask[b, t + 1]]
    targets = torch.tensor([ids[b, t + 1] for b, t in chosen])
    with torch.no_grad():
        hidden = gpt.transformer(**batch, output_hidden_states=True).hidden_states[1]
        ways = {
            "clean": hidden,
            "sae": sae.decode(sae.encode(hidden.reshape(-1, WIDTH))).reshape(hidden.shape),
            "zero": torch.zeros_like(hidden),
            "mean": mean.float().expand_as(hidden),
        }
        logits = {}
        for way, h in ways.items():
            h = torch.where(mask[..., None], h, hidden)
            out = gpt.transformer.h[1](h, attention_mask=causal(mask))
            out = out[0] if isinstance(out, tuple) else out
            out = gpt.lm_head(gpt.transformer.ln_f(out))
            logits[way] = torch.stack([out[b, t] for b, t in chosen]).double()
    loss = {w: float(F.cross_entropy(x, targets)) for w, x in logits.items()}
    p = logits["clean"].softmax(dim=1)
    kl = {
        w: float((p * (p.log() - x.log_softmax(dim=1))).sum(dim=1).mean())
        for w, x in logits.items()
    }
    best = {w: x.argmax(dim=1) for w, x in logits.items()}
    expected = {
        "n_items": len(chosen),
        **{f"loss_{w}": loss[w] for w in loss},
        "loss_increase": loss["sae"] - loss["clean"],
        **{
            f"loss_recovered_{w}": (loss[w] - loss["sae"]) / (loss[w] - loss["clean"])
            for w in ("zero", "mean")
        },
        **{f"kl_{w}": kl[w] for w in ("sae", "zero", "mean")},
        **{f"kl_score_{w}": (kl[w] - kl["sae"]) / kl[w] for w in ("zero", "mean")},
        **{
            f"top1_agreement_{w}": float((best[w] == best["clean"]).double().mean())
            for w in ("sae", "zero", "mean")
        },
        **{f"top1_accuracy_{w}": float((b == targets).double().mean()) for w, b in best.items()},
    }
    assert_same(expected, found, rel=1e-4)
    assert found["kl_sae"] > 0.01


def causal(mask: Tensor) -> Tensor:
    """An additive attention mask [B, 1, T, T] of what GPT-2 lets each token see."""
    seen = mask[:, None, None, :] & torch.ones(10, 10, dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_binary_losses_are_means_over_the_labels_of_a_row():
    logits, labels = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([[1, 0], [0, 1]])
    p = logits.double().sigmoid()
    expected = -torch.where(labels == 1, p.log(), (1 - p).log()).mean(dim=1)
    for output in (logits, SimpleNamespace(logits=logits)):
        found = multilabel_bce(output, {"labels": labels})
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_each_token_that_follows_a_token_is_predicted(padded):
    batch = texts([4, 2, 1], width=4)
    if not padded:
        del batch["attention_mask"]
    logits = torch.randn(3, 4, VOCABULARY)
    found = next_token(SimpleNamespace(logits=logits), batch)
    ids = batch["input_ids"]
    where = (
        [(0, 0), (0, 1), (0, 2), (1, 0)] if padded else [(b, t) for b in range(3) for t in range(3)]
    )
    assert found.targets.tolist() == [ids[b, t + 1].item() for b, t in where]
    assert torch.equal(found.logits, torch.stack([logits[b, t] for b, t in where]))
    ce = next_token_ce(SimpleNamespace(logits=logits), batch)
    torch.testing.assert_close(ce, F.cross_entropy(*found, reduction="none"))


def test_predictions_without_targets_have_agreement_but_no_accuracy(gpt, batches):
    options = {**TEXT, "predictions": lambda o, b: Predictions(next_token(o, b).logits, None)}
    found = model_loss(gpt, BLOCK, poor(WIDTH), batches, **options).metrics()
    assert found["top1_agreement_sae"] < 1
    assert found["kl_sae"] > 0
    assert found["top1_accuracy_clean"] is found["top1_accuracy_sae"] is None


def test_without_a_mean_there_is_no_mean_ablation(gpt, batches):
    found = model_loss(gpt, BLOCK, poor(WIDTH), batches, **TEXT).metrics()
    for name in ("loss_mean", "loss_recovered_mean", "kl_mean", "kl_score_mean"):
        assert found[name] is None
    assert found["loss_recovered_zero"] is not None


def test_where_an_ablation_does_not_hurt_nothing_can_be_recovered(tagger):
    batch = tagged(tagger, 100)
    batch["labels"] = 1 - batch["labels"]
    found = model_loss(tagger, "hidden", poor(8), [batch], **TAGS).metrics()
    assert found["loss_zero"] < found["loss_clean"]
    assert found["loss_recovered_zero"] is None
    with torch.no_grad():
        tagger.head.weight[:] = 0
    options = {**TAGS, "predictions": lambda output, _batch: Predictions(output, None)}
    found = model_loss(tagger, "hidden", poor(8), [batch], **options).metrics()
    assert found["loss_recovered_zero"] is found["kl_score_zero"] is None
    assert found["kl_zero"] == 0


def test_without_batches_nothing_is_claimed(gpt):
    assert model_loss(gpt, BLOCK, poor(WIDTH), [], **TEXT).metrics() == {"n_items": 0}
    with pytest.raises(UserError, match="no rows"):
        mean_activation(gpt, BLOCK, [])


# -- partitions and padding ----------------------------------------------------------------------


def test_neither_batches_nor_the_order_of_merging_change_the_metrics(gpt, batches):
    mean = torch.zeros(WIDTH)

    def over(parts: list[dict[str, Tensor]]) -> ModelLossSums:
        return model_loss(gpt, BLOCK, poor(WIDTH), parts, mean=mean, **TEXT)

    whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    one = over([whole]).metrics()
    assert_same(one, over(batches).metrics())
    parts = [over([batch]) for batch in reversed(batches)]
    parts[0].merge(parts[1])
    parts[2].merge(parts[0])
    assert_same(one, parts[2].metrics())


def test_sums_of_other_ablations_do_not_mix(gpt, batches):
    with_mean = model_loss(gpt, BLOCK, poor(WIDTH), batches[:1], mean=torch.zeros(WIDTH), **TEXT)
    with_mean.merge(model_loss(gpt, BLOCK, poor(WIDTH), batches[1:], **TEXT))
    found = with_mean.metrics()
    assert found["loss_mean"] is found["kl_score_mean"] is found["top1_accuracy_mean"] is None
    assert found["loss_zero"] is not None


@pytest.mark.parametrize("pad", [5, VOCABULARY - 1])
def test_padding_does_not_matter(gpt, batches, pad):
    def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = batch["attention_mask"].bool()
        ids = torch.where(keep, batch["input_ids"], pad)
        more = torch.full((len(ids), 2), pad)
        return {
            "input_ids": torch.cat([ids, more], dim=1),
            "attention_mask": torch.cat([keep.long(), 0 * more], dim=1),
        }

    others = [padded(batch) for batch in batches]
    means = [mean_activation(gpt, BLOCK, parts, mask=attention_mask) for parts in (batches, others)]
    torch.testing.assert_close(means[0], means[1], rtol=1e-5, atol=1e-6)
    one, two = (
        model_loss(gpt, BLOCK, poor(WIDTH), parts, mean=means[0], **TEXT).metrics()
        for parts in (batches, others)
    )
    assert_same(one, two, rel=1e-5)


def test_the_mean_is_that_of_the_rows_of_the_mask(gpt, batches):
    with torch.no_grad():
        rows = torch.cat([
            gpt.transformer(**b, output_hidden_states=True).hidden_states[1][
                b["attention_mask"].bool()
            ]
            for b in batches
        ])  # fmt: skip
    found = mean_activation(gpt, BLOCK, batches, mask=attention_mask)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, rows.double().mean(dim=0), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found, mean_activation(gpt, BLOCK, batches), atol=1e-3)


# -- patching ------------------------------------------------------------------------------------


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, "more"


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


@pytest.mark.parametrize("module", [Pair(), nn.Identity()])
def test_rows_outside_the_mask_pass_unchanged(module):
    model = nn.Sequential(module)
    x, mask = torch.randn(3, 4, 2), torch.rand(3, 4) > 0.5
    clean = model(x)
    with patched(model, "0", lambda rows: -5 * rows, mask):
        output = model(x)
    if isinstance(module, Pair):
        assert output[1] == "more"
        clean, output = clean[0], output[0]
    assert torch.equal(output[~mask], clean[~mask])
    assert torch.equal(output[mask], -5 * clean[mask])
    with patched(model, "0", torch.zeros_like):
        output = model(x)
    assert not (output[0] if isinstance(output, tuple) else output).any()


def test_a_patch_does_not_write_into_the_modules_own_tensor():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.ones(2, 3)
    with patched(model, "0", torch.zeros_like):
        model(x)
    assert x.all()


def test_rows_come_back_in_the_models_dtype():
    model = nn.Sequential(nn.Identity())
    x = torch.randn(3, 4).bfloat16()
    with patched(model, "0", lambda rows: rows.double()):
        assert model(x).dtype == torch.bfloat16
    sae = perfect(4)
    found = model_loss(
        model, "0", sae, [x], loss=lambda output, _: output.float().square().sum(dim=1)
    ).metrics()
    assert found["loss_increase"] == 0


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("transformer.h.O", "transformer.h.0"),
        ("transformers.h.1", "transformer.h.1"),
        ("mlp", "mlp"),
        ("", "named_modules"),
        ("zzzzzz", "named_modules"),
    ],
)
def test_an_unknown_module_is_refused_with_near_names(gpt, batches, path, near):
    with pytest.raises(UserError, match=near) as error:
        model_loss(gpt, path, poor(WIDTH), batches, **TEXT)
    assert "\n" not in str(error.value)
    assert repr(path) in str(error.value)


def test_a_module_that_does_not_run_is_not_taken_for_a_perfect_one(tagger):
    with pytest.raises(UserError, match="'unused' did not run"):
        model_loss(tagger, "unused", poor(8), [tagged(tagger, 5)], **TAGS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": lambda batch: torch.ones(4, dtype=torch.bool)}, r"mask is \[4\].*\[5\]"),
        ({"mean": torch.zeros(7)}, r"\[5, 8\].*replaced by \[5, 7\]"),
        (
            {"loss": lambda output, batch: multilabel_bce(output, batch).mean()},
            "one number per item",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tagger, options, said):
    with pytest.raises(UserError, match=said):
        model_loss(tagger, "hidden", poor(8), [tagged(tagger, 5)], **{**TAGS, **options})


def test_an_sae_of_another_width_is_refused(tagger):
    with pytest.raises(UserError, match="d_in = 6"):
        model_loss(tagger, "hidden", poor(6), [tagged(tagger, 5)], **TAGS)


def test_an_output_without_a_tensor_is_refused():
    model = nn.Sequential(Named())
    with pytest.raises(UserError, match="gives a dict"), patched(model, "0", torch.zeros_like):
        model(torch.ones(1, 2))


# -- the model afterwards ------------------------------------------------------------------------


def condition(model: nn.Module) -> tuple[list[Any], ...]:
    return (
        [module.training for module in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [(p.requires_grad, p.grad, p.detach().clone().tolist()) for p in model.parameters()],
    )


@pytest.mark.parametrize("fails", ["nowhere", "loss", "run", "replace"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_as_before_also_after_an_error(tagger, fails, grad):
    tagger.train()
    tagger.hidden[0].eval()
    before, batch = condition(tagger), tagged(tagger, 6)
    calls = 0

    def sometimes(where: str) -> None:
        nonlocal calls
        calls += where == fails
        if calls == 2:
            raise RuntimeError("broken")

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        sometimes("loss")
        assert not tagger.training
        assert not output.requires_grad
        return multilabel_bce(output, batch)

    def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        sometimes("run")
        return model(batch["x"])

    class Breaking(SAE):
        def decode(self, code: Any) -> Tensor:
            sometimes("replace")
            return super().decode(code)

    sae = Breaking(poor(8).parameters)
    with torch.set_grad_enabled(grad):
        if fails == "nowhere":
            model_loss(tagger, "hidden", sae, [batch, batch], loss=loss, run=run)
        else:
            with pytest.raises(RuntimeError, match="broken"):
                model_loss(tagger, "hidden", sae, [batch, batch], loss=loss, run=run)
        assert torch.is_grad_enabled() == grad
    assert condition(tagger) == before
