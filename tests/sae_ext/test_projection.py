"""A trained projection in front of a pre-trained autoencoder: gradients, collapse, and what is kept."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_weights import batch, dense
from torch import Tensor

from sae_ext import ops
from sae_ext.activations.dataset import InMemory
from sae_ext.analysis import analyse_shard, feature_table
from sae_ext.architectures import Now, Projected, Projection, ReLU, Slots, Thresholds, TopK
from sae_ext.architectures.base import Architecture, Weights, four
from sae_ext.config import AnalyseConfig, SAEConfig
from sae_ext.errors import UserError
from sae_ext.fields import from_dict, to_dict
from sae_ext.metrics import evaluate
from sae_ext.model import SAE, Output
from sae_ext.schedules import Schedule
from sae_ext.training.checks import check_together
from sae_ext.training.config import TrainConfig
from sae_ext.training.job import Trained
from sae_ext.training.learner import Learner
from sae_ext.training.run import run_to_end, train
from sae_ext.training.term import Seen
from sae_ext.training.terms import L1, MSE, AuxK, ObjectiveConfig

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, D_SAE, D_IN, ROWS = 6, 9, 8, 14
TARGETS = ["stopgrad", "embedding", "projected"]
KINDS = {
    "relu": ReLU(),
    "clipped": ReLU(clip=0.6),
    "topk": TopK(k=3),
    "thresholds": Thresholds(),
}
_P, _C = "projection.weight", "projection.bias"


def made_up(
    architecture: Architecture | None = None,
    *,
    lengths: Tensor | float = 0.5,
    output: Output = "identity",
    width: int = WIDTH,
    d_sae: int = D_SAE,
) -> SAE:
    """Random weights in raw units: decoder rows have these lengths."""
    directions = torch.nn.functional.normalize(batch(d_sae, width, seed=1).float(), dim=1)
    rows = torch.as_tensor(lengths).expand(d_sae)[:, None] * directions
    parameters = ops.Parameters(
        W_enc_rows=batch(d_sae, width, seed=2).float(),
        b_enc=0.2 * batch(1, d_sae, seed=3)[0].float(),
        W_dec=rows.contiguous(),
        b_dec=0.2 * batch(1, width, seed=4)[0].float(),
    )
    architecture = architecture or ReLU()
    more = {}
    if isinstance(architecture, Thresholds):
        more["threshold"] = torch.linspace(0.05, 0.5, d_sae)
    return SAE(parameters, architecture, more, output)


def written(folder: Path, sae: SAE, scale: float | None = None) -> str:
    folder.mkdir(exist_ok=True)
    for name, data in sae.files({}).items():
        (folder / name).write_bytes(data)
    if scale is not None:
        (folder / "training.json").write_text(json.dumps({"scale": scale}))
    return str(folder)


def now(counters: dict[str, Tensor]) -> Now:
    return Now(step=0, generator=lambda purpose: torch.Generator(), counters=counters)


def begun(
    architecture: Projection, d_in: int = D_IN, d_sae: int = D_SAE, centre: Tensor | None = None
) -> Weights:
    centre = torch.zeros(d_in) if centre is None else centre
    return architecture.initial(d_in, d_sae, centre, {}, 3)


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in tensors.items()}


def code_of(sae: SAE, x: Tensor) -> Tensor:
    return dense(sae.encode(x), sae.d_sae)


# ---- As training begins ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [None, 2.5], ids=["no training.json", "training.json"])
def test_the_pretrained_autoencoder_is_the_same_with_decoder_rows_of_length_1(
    tmp_path, kind, scale
):
    even = kind in ("clipped", "topk")
    lengths = 0.5 if even or scale is None else torch.linspace(0.2, 0.9, D_SAE)
    sae = made_up(KINDS[kind], lengths=lengths)
    architecture = Projection(pretrained=written(tmp_path, sae, scale))
    weights = begun(architecture)
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(D_SAE))
    final, more = architecture.final(weights, architecture.counted())
    assert isinstance(final, Projected)

    x = batch(50, WIDTH).float()
    factor = scale or 1 / 0.5
    inner = SAE(four(weights), final.inner, {n: t for n, t in more.items() if n == "threshold"})
    given = sae.encode(x)
    taken = inner.encode(factor * x)
    assert torch.equal(taken.row_ptr, given.row_ptr)
    assert torch.equal(taken.col, given.col)
    assert 0.1 < len(given.col) / (50 * D_SAE) < 0.9
    n = sae.parameters.W_dec.norm(dim=1) * factor
    torch.testing.assert_close(taken.val, given.val * n[given.col.long()])
    torch.testing.assert_close(inner.decode(taken) / factor, sae.decode(given))


@pytest.mark.parametrize("d_in", [WIDTH - 2, WIDTH, 3 * WIDTH])
@pytest.mark.parametrize("mean", [0.0, 0.7], ids=["centred", "off centre"])
def test_a_projection_begins_with_rows_as_long_as_those_the_autoencoder_was_trained_on(
    tmp_path, d_in, mean
):
    sae = made_up()
    architecture = Projection(pretrained=written(tmp_path, sae))
    centre = torch.full((d_in,), mean)
    e = centre + batch(20_000, d_in).float() * math.sqrt(1 - mean**2)
    weights = begun(architecture, d_in, centre=centre)
    x = architecture.read(e, weights)
    assert float(x.square().sum(1).mean()) == pytest.approx(WIDTH, rel=0.05)
    torch.testing.assert_close(x.mean(0), weights["b_dec"], atol=0.05, rtol=0)
    W = weights[_P]
    gram = W @ W.T if d_in >= WIDTH else W.T @ W
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_the_read_out_begins_as_what_undoes_the_projection_as_far_as_it_can_be(tmp_path):
    sae = made_up()
    for d_in in (WIDTH - 2, 3 * WIDTH):
        architecture = Projection(pretrained=written(tmp_path, sae), target="embedding")
        centre = 0.3 * batch(1, d_in, seed=5)[0].float()
        weights = begun(architecture, d_in, centre=centre)
        e = batch(ROWS, d_in).float()
        back = weights["projection.readout"] @ architecture.read(e, weights).T
        back = back.T + weights["projection.readout_bias"]
        W = weights[_P]
        seen = centre + (e - centre) @ (torch.linalg.pinv(W) @ W).T
        torch.testing.assert_close(back, seen, atol=1e-5, rtol=1e-4)
        if d_in < WIDTH:
            torch.testing.assert_close(back, e, atol=1e-5, rtol=1e-4)


def test_the_projection_is_drawn_with_the_seed_of_the_training(tmp_path):
    architecture = Projection(pretrained=written(tmp_path, made_up()))
    drawn = [architecture.initial(D_IN, D_SAE, torch.zeros(D_IN), {}, s)[_P] for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- Gradients -------------------------------------------------------------------------------------


def by_autograd(
    architecture: Projection, e: Tensor, w: Weights, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x̂ and its target from dense products that autograd knows."""
    inner = architecture._pretrained.inner
    x = e @ w[_P].T + w[_C]
    pre = (x - w["b_dec"]) @ w["W_enc_rows"].T + w["b_enc"]
    z = pre.relu()
    if inner.clip is not None:
        z = z.clamp(max=inner.clip)
    if isinstance(inner, TopK):
        z = z * torch.zeros_like(z).scatter(1, pre.topk(inner.k, dim=1).indices, 1.0)
    if threshold is not None:
        z = z * (pre > threshold)
    x_hat = z @ w["W_dec"] + w["b_dec"]
    if architecture.target == "embedding":
        return x_hat @ w["projection.readout"].T + w["projection.readout_bias"], e
    return x_hat, x if architecture.target == "projected" else x.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_equal_autograds_through_dense_products(tmp_path, kind, target):
    folder = written(tmp_path, made_up(KINDS[kind]))
    architecture = Projection(pretrained=folder, target=target)
    counters = doubled(architecture.counted())
    weights = {n: t.requires_grad_() for n, t in doubled(begun(architecture)).items()}
    e = batch(ROWS, D_IN)
    out = architecture.forward(e, weights, now(counters), price=None)
    x_hat, wanted = by_autograd(architecture, e, weights, counters.get("threshold"))
    torch.testing.assert_close(out.x_hat, x_hat)
    torch.testing.assert_close(out.target, wanted)

    seen = Seen(out, architecture.read(e, weights), out.target, weights, now(counters))
    found = torch.autograd.grad(MSE().value(seen), list(weights.values()))
    loss = (x_hat - wanted).square().sum(dim=1).mean()
    expected = torch.autograd.grad(loss, list(weights.values()))
    for name, one, other in zip(weights, found, expected, strict=True):
        assert other.norm() > 1e-3, name
        torch.testing.assert_close(one, other, msg=name)


def test_the_three_targets_give_the_projection_three_gradients(tmp_path):
    folder, e, grads = written(tmp_path, made_up()), batch(ROWS, D_IN), []
    for target in TARGETS:
        architecture = Projection(pretrained=folder, target=target)
        weights = doubled(begun(architecture))
        weights[_P].requires_grad_()
        out = architecture.forward(e, weights, now({}), price=None)
        assert out.target is not None
        loss = (out.x_hat - out.target).square().sum()
        grads.append(torch.autograd.grad(loss, weights[_P])[0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (grads[one] - grads[other]).norm() > 0.1 * grads[one].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_l1_and_counts_are_the_autoencoders_on_the_projected_rows(tmp_path, kind):
    architecture = Projection(pretrained=written(tmp_path, made_up(KINDS[kind])))
    weights, e = begun(architecture), batch(ROWS, D_IN).float()
    price = torch.linspace(0.5, 2, D_SAE)
    out = architecture.forward(e, weights, now(architecture.counted()), price=price)
    final, more = architecture.final(weights, architecture.counted())
    z = code_of(SAE(four(weights), final, more), e)
    torch.testing.assert_close(dense(out.code, D_SAE), z)
    torch.testing.assert_close(out.l1, z @ price)


# ---- Trainings -------------------------------------------------------------------------------------


def planted(n: int, features: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((features, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sizes = np.abs(rng.standard_normal((n, features))) + 0.5
    z = np.where(rng.random((n, features)) < 2 / features, sizes, 0)
    return (z @ directions + 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder trained on other rows, of another width."""
    data = InMemory(planted(2000, 12, 10, 0))
    config = TrainConfig(
        steps=150, batch_rows=128, lr=5e-3, lr_schedule=Schedule(), checkpoint_every=150,
        objective=ObjectiveConfig(l1=L1(weight=1.0, schedule=Schedule())),
    )  # fmt: skip
    sae = run_to_end(train(data, SAEConfig(d_sae=16), config)).sae
    return written(tmp_path_factory.mktemp("pretrained"), sae)


ROWS_OF_TEXT = planted(2000, 20, 10, 1)


def trained(
    folder: str, target: str = "stopgrad", *, steps: int = 10, l1: float = 2.0,
    sae: dict[str, Any] | None = None, hooks: dict[str, Any] | None = None, **config: Any,
) -> Trained:  # fmt: skip
    architecture = Projection(pretrained=folder, target=target)  # type: ignore[arg-type]
    objective = ObjectiveConfig(l1=L1(weight=l1, schedule=Schedule()))
    plain = {
        "steps": steps, "batch_rows": 128, "lr": 5e-3, "lr_schedule": Schedule(),
        "objective": objective, "checkpoint_every": steps,
    }  # fmt: skip
    shape = SAEConfig(**{"d_sae": 16, "architecture": architecture} | (sae or {}))
    return run_to_end(
        train(InMemory(ROWS_OF_TEXT), shape, TrainConfig(**plain | config), **(hooks or {}))
    )


def content_of(sae: SAE) -> dict[str, bytes]:
    tensors = {**sae.parameters.tensors(), **sae.more}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


def projection_variance(sae: SAE) -> float:
    e = torch.from_numpy(ROWS_OF_TEXT)
    return float(sae.architecture.read(e, sae.more).var(dim=0).sum())


@pytest.mark.parametrize(("target", "low", "high"), [("projected", 0, 0.05), ("stopgrad", 0.3, 9)])
def test_the_projection_collapses_where_it_is_its_own_target_and_else_does_not(
    pretrained, target, low, high
):
    begin = projection_variance(trained(pretrained, target, steps=1).sae)
    end = projection_variance(trained(pretrained, target, steps=300).sae)
    assert low <= end / begin <= high


@pytest.mark.parametrize("target", TARGETS)
def test_training_lowers_the_error_against_its_target(pretrained, target):
    first, last = (trained(pretrained, target, steps=s, l1=0.1).validation for s in (1, 200))
    assert (
        last["fvu" if target != "projected" else "mse"]
        < 0.5 * first["fvu" if target != "projected" else "mse"]
    )


@pytest.mark.parametrize("target", TARGETS)
def test_all_of_it_learns(pretrained, target):
    one, other = (trained(pretrained, target, steps=s).sae for s in (1, 20))
    before, after = content_of(one), content_of(other)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def test_the_history_has_no_fvu_for_there_is_no_variance_it_could_be_of(pretrained):
    history = trained(pretrained).history.to_pydict()
    assert set(history["fvu"]) == {None}
    assert history["validation_fvu"][-1] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_keeps_the_projection_and_its_autoencoder(tmp_path, kind, target):
    folder = written(tmp_path / "pretrained", made_up(KINDS[kind]))
    architecture = Projection(pretrained=folder, target=target)
    weights = begun(architecture)
    final, more = architecture.final(weights, architecture.counted())
    sae = SAE(four(weights), final, more)
    again = SAE.load(Path(written(tmp_path / "kept", sae)))
    assert again.architecture == sae.architecture
    assert again.d_in == D_IN
    assert again.clip == sae.clip
    assert content_of(again) == content_of(sae)
    e = batch(ROWS, D_IN).float()
    for one, other in zip(again.encode(e), sae.encode(e), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(again.decode(again.encode(e)), sae.decode(sae.encode(e)))
    assert torch.equal(again.target(e), e if target == "embedding" else sae.target(e))
    assert again.decode(again.encode(e)).shape == again.target(e).shape
    assert again.architecture.d_out(again.parameters, again.more) == again.target(e).shape[1]
    assert json.loads((tmp_path / "kept" / "cfg.json").read_bytes())["architecture"].startswith(
        "sparsemill_"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_learned_on_scaled_rows_serves_raw_ones(tmp_path, target):
    folder, scale, pairs = written(tmp_path, made_up()), 2.5, []
    architecture = Projection(pretrained=folder, target=target)
    weights, e = begun(architecture), batch(ROWS, D_IN).float()
    for w, rows in ((weights, e * scale), (architecture.folded(weights, scale), e)):
        final, more = architecture.final(w, {})
        sae = SAE(four(w), final, more)
        pairs.append((code_of(sae, rows), sae.decode(sae.encode(rows)), sae.target(rows)))
    back = scale if target == "embedding" else 1.0
    torch.testing.assert_close(pairs[1][0], pairs[0][0])
    torch.testing.assert_close(pairs[1][1] * back, pairs[0][1])
    torch.testing.assert_close(pairs[1][2] * back, pairs[0][2])


@pytest.mark.parametrize("target", TARGETS)
def test_training_reads_and_rebuilds_what_the_autoencoder_does_after_it(pretrained, target):
    architecture = Projection(pretrained=pretrained, target=target)
    weights, e = begun(architecture, 10, 16), torch.from_numpy(ROWS_OF_TEXT[:50])
    out = architecture.forward(e, weights, now({}), price=None)
    final, more = architecture.final(weights, {})
    sae = SAE(four(weights), final, more)
    torch.testing.assert_close(sae.decode(sae.encode(e)), out.x_hat)
    torch.testing.assert_close(sae.target(e), out.target)


@pytest.mark.parametrize("target", TARGETS)
def test_an_analysis_judges_it_by_its_target(tmp_path, put_activations, target):
    architecture = Projection(pretrained=written(tmp_path / "pretrained", made_up()), target=target)
    weights = begun(architecture)
    final, more = architecture.final(weights, {})
    sae = SAE(four(weights), final, more)
    x = batch(120, D_IN).float().numpy()
    rows = put_activations(tmp_path / "store", x, [4] * 30)
    parts = [
        analyse_shard(rows, sae, AnalyseConfig(pool=40), i) for i in range(len(rows.shard_rows))
    ]
    found = functools.reduce(lambda one, two: (one.merge(two), one)[1], parts)
    assert len(rows.rows("test")) > 1
    wanted = evaluate(sae, [rows.gather(rows.rows("test"))]).metrics()
    told = found.held_out.metrics()
    assert told["fvu"] == pytest.approx(wanted["fvu"], rel=1e-9)
    assert told["mse"] == pytest.approx(wanted["mse"], rel=1e-9)
    table = feature_table(rows, sae, found)
    assert table.num_rows == D_SAE


@pytest.mark.parametrize("kind", ["relu", "thresholds"])
def test_a_resumed_training_ends_with_the_same_bytes(tmp_path, kind):
    folder, kept = written(tmp_path, made_up(KINDS[kind], width=10, d_sae=16)), []
    first = {"save_checkpoint": kept.append}
    whole = trained(folder, steps=20, checkpoint_every=10, hooks=first)
    again = trained(
        folder, steps=20, checkpoint_every=10, hooks={"load_checkpoint": lambda: kept[0]}
    )
    assert len(kept) == 2
    assert content_of(again.sae) == content_of(whole.sae)
    assert again.sae.architecture == whole.sae.architecture


def test_a_folder_that_is_written_anew_is_read_anew(tmp_path):
    for bound in (0.3, 0.6):
        folder = written(tmp_path, made_up(ReLU(clip=bound)))
        assert Projection(pretrained=folder).clip == pytest.approx(bound)


def test_a_training_stays_with_what_it_began_from(tmp_path):
    folder = written(tmp_path, made_up(ReLU(clip=0.3), width=10, d_sae=16))
    architecture = Projection(pretrained=folder)
    sae = SAEConfig(d_sae=16, architecture=architecture)
    learner = Learner(sae, TrainConfig(), {}, device=torch.device("cpu"), group=None)
    learner.begin(20, torch.zeros(20))
    written(tmp_path, made_up(ReLU(clip=0.6), width=10, d_sae=16))
    assert architecture.clip == pytest.approx(0.3)
    assert learner.sae(1.0).clip == pytest.approx(0.3)


def test_the_loss_of_the_history_is_per_input_of_what_is_rebuilt(tmp_path):
    pretrained = written(tmp_path, made_up(width=6, d_sae=16))
    objective = ObjectiveConfig(mse=MSE(reduction="mean"), l1=None)
    for target, width in (("stopgrad", 6), ("embedding", 10)):
        history = trained(pretrained, target, objective=objective, log_every=5).history.to_pydict()
        for loss, mse in zip(history["loss"], history["mse"], strict=True):
            assert loss == pytest.approx(mse / width, rel=1e-9)


# ---- Configuration ---------------------------------------------------------------------------------


def test_every_field_changes_what_is_learned(tmp_path, pretrained):
    other = written(tmp_path, made_up(width=10, d_sae=16))
    found = [content_of(trained(pretrained, target).sae) for target in TARGETS]
    found.append(content_of(trained(other).sae))
    for i, one in enumerate(found):
        assert all(one != another for another in found[i + 1 :])


def test_the_centre_that_begins_at_b_dec_is_that_of_the_config(pretrained):
    mean, zero = (
        trained(pretrained, steps=1, sae={"b_dec": b_dec}).sae for b_dec in ("mean", "zero")
    )
    assert (mean.more[_C] - zero.more[_C]).norm() > 0.5


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (made_up(output="sigmoid"), "ends in a sigmoid, .* without an output activation"),
        (
            made_up(TopK(k=2), lengths=torch.linspace(0.5, 1, D_SAE)),
            "has a TopK and decoder rows of",
        ),
        (made_up(ReLU(clip=1.0), lengths=torch.linspace(0.5, 1, D_SAE)), "has a clip and decoder"),
        (made_up(lengths=torch.arange(D_SAE) * 0.1), "decoder rows are 0"),
    ],
    ids=["output", "topk", "clip", "zero"],
)
def test_an_autoencoder_that_cannot_be_trained_on_is_refused(tmp_path, sae, message):
    folder = written(tmp_path, sae)
    with pytest.raises(UserError, match=f"pretrained: the SAE in {folder}.*{message}"):
        begun(Projection(pretrained=folder))


def test_a_projection_is_no_autoencoder_to_train_a_projection_on(tmp_path):
    inner = Projection(pretrained=written(tmp_path / "one", made_up()))
    weights = begun(inner)
    final, more = inner.final(weights, {})
    folder = written(tmp_path / "two", SAE(four(weights), final, more))
    with pytest.raises(UserError, match="is a Projected, which cannot be trained on"):
        begun(Projection(pretrained=folder))


def test_another_number_of_features_is_refused_with_both(tmp_path):
    folder = written(tmp_path, made_up())
    with pytest.raises(
        UserError, match=f"d_sae is 5, but .*{folder}.* has 9 features: set d_sae to 9"
    ):
        begun(Projection(pretrained=folder), d_sae=5)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no SAE"):
        begun(Projection(pretrained=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    "content", ["[1]", '{"scale": "wide"}', "{", '{"scale": 0}', '{"scale": -1}']
)
def test_a_scale_that_is_none_is_refused_by_its_file(tmp_path, content):
    folder = written(tmp_path, made_up())
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(UserError, match=r"training.json"):
        begun(Projection(pretrained=folder))


def test_an_output_activation_and_a_read_out_beside_auxk_are_refused(tmp_path, pretrained):
    with pytest.raises(UserError, match=r"sae.output is 'tanh', but a Projection has a target"):
        trained(pretrained, sae={"output": "tanh"}, scale="none")
    few = {"objective": ObjectiveConfig(auxk=AuxK(), l1=None), "dead_rows": 100}
    with pytest.raises(UserError, match=r"objective.auxk reaches features .* set train.revival"):
        check_together(
            SAEConfig(d_sae=16, architecture=Projection(pretrained=pretrained)), TrainConfig(**few)
        )
    ranking = written(tmp_path, made_up(TopK(k=3)))
    for target in TARGETS:
        sae = SAEConfig(d_sae=D_SAE, architecture=Projection(pretrained=ranking, target=target))
        if target != "embedding":
            check_together(sae, TrainConfig(**few))
            continue
        with pytest.raises(UserError, match=r"objective.auxk is about .*target to stopgrad"):
            check_together(sae, TrainConfig(**few))


def test_in_front_of_a_topk_it_needs_no_penalty_and_revives_as_a_topk(tmp_path, pretrained):
    ranking = Projection(pretrained=written(tmp_path, made_up(TopK(k=3))))
    assert (ranking.sparse_alone, ranking.ranks) == (True, True)
    with pytest.raises(UserError, match=r"train.objective.l1 .*set l1 to null"):
        check_together(SAEConfig(d_sae=D_SAE, architecture=ranking), TrainConfig())
    plain = Projection(pretrained=pretrained)
    assert (plain.sparse_alone, plain.ranks) == (False, False)
    check_together(SAEConfig(d_sae=16, architecture=plain), TrainConfig())


def test_dead_features_learn_by_auxk_from_the_projected_rows(tmp_path):
    architecture = Projection(pretrained=written(tmp_path, made_up(TopK(k=3))))
    weights, e = doubled(begun(architecture)), batch(ROWS, D_IN)
    for t in weights.values():
        t.requires_grad_()
    at = now({})
    at.dead = torch.arange(D_SAE) < 4
    out = architecture.forward(e, weights, at, price=None)
    seen = Seen(out, architecture.read(e, weights), out.target, weights, at)
    grads = torch.autograd.grad(AuxK(k=2).value(seen), [weights["W_enc_rows"], weights[_P]])
    assert all(g.norm() > 1e-3 for g in grads)


def test_a_training_step_gives_auxk_what_the_encoder_read(tmp_path):
    architecture = Projection(pretrained=written(tmp_path, made_up(TopK(k=3))))
    objective = ObjectiveConfig(l1=None, auxk=AuxK())
    config = TrainConfig(steps=300, dead_rows=100, objective=objective)
    sae = SAEConfig(d_sae=D_SAE, architecture=architecture)
    learner = Learner(sae, config, {}, device=torch.device("cpu"), group=None)
    learner.begin(D_IN, torch.zeros(D_IN))
    learner.weights["b_enc"][:4] = -100.0
    for _ in range(11):
        learner.step(batch(ROWS, D_IN).float(), {})
    assert learner.dead.tolist() == [True] * 4 + [False] * (D_SAE - 4)
    learner.settle()
    assert learner.window.terms["auxk"] >= 0


def test_a_config_survives_json_without_its_folder():
    config = SAEConfig(d_sae=9, architecture=Projection(pretrained="elsewhere", target="projected"))
    assert from_dict(SAEConfig, to_dict(config)) == config
    with pytest.raises(UserError, match="target"):
        from_dict(
            SAEConfig, {"architecture": {"kind": "projection", "pretrained": "x", "target": "x"}}
        )


def test_slots_are_no_autoencoder_to_train_a_projection_on(tmp_path):
    weights = Slots(count=2).initial(WIDTH, D_SAE, torch.zeros(WIDTH), {"rule": ["a", "b"]}, 0)
    final, more = Slots(count=2).final(weights, {})
    folder = written(tmp_path, SAE(four(weights), final, more))
    with pytest.raises(UserError, match="is a OneSlot, which cannot be trained on"):
        begun(Projection(pretrained=folder))
