"""SAEs and SAELens itself: the same numbers there for what we write, and here for what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_campaign import MODEL, commit_campaign
from safetensors.torch import load_file
from torch import Tensor

from sae_ext import hosts
from sae_ext.activations.reader import Activations
from sae_ext.architectures import Architecture, ReLU, Thresholds, TopK
from sae_ext.architectures.base import four, initial_weights
from sae_ext.artefacts import activations, campaigns, saes
from sae_ext.errors import UserError
from sae_ext.interchange import cached_activations, saelens
from sae_ext.model import CFG_FILE, SAE
from sae_ext.ops import SparseCode
from sae_ext.store import Manifest, Store

sae_lens = pytest.importorskip(
    "sae_lens", reason="SAELens is not installed: pip install 'sparsemill[external]'"
)
ActivationsStore = pytest.importorskip("sae_lens.training.activations_store").ActivationsStore

D_IN, D_SAE, ROWS, K = 24, 96, 200, 7
METADATA = {"model_name": "made-up-model", "hook_name": "residual_after_block_3"}
THRESHOLD = torch.linspace(-0.2, 1.0, D_SAE, dtype=torch.float64)
KINDS: dict[str, tuple[Architecture, dict[str, Tensor]]] = {
    "standard": (ReLU(), {}),
    "topk": (TopK(k=K), {}),
    "jumprelu": (Thresholds(), {"threshold": THRESHOLD}),
}
DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-14)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.dist(found, expected) / torch.linalg.vector_norm(expected))


def dense(code: SparseCode, d_sae: int) -> Tensor:
    """The code as a [B, d_sae] tensor."""
    rows = torch.repeat_interleave(torch.arange(len(code.row_ptr) - 1), code.row_ptr.diff())
    out = torch.zeros(len(code.row_ptr) - 1, d_sae, dtype=code.val.dtype)
    out[rows, code.col.long()] = code.val
    return out


def made_up_sae(
    kind: str = "standard",
    *,
    scale: float = 1.0,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """Random weights with every part in use and decoder rows of many lengths, trained on scale·x as it were."""
    g = torch.Generator().manual_seed(5)
    weights = initial_weights(D_IN, D_SAE, 0.3 * torch.randn(D_IN, generator=g), seed=4)
    weights["W_enc_rows"] += 0.05 * torch.randn(D_SAE, D_IN, generator=g)
    weights["b_enc"] += 0.2 * torch.randn(D_SAE, generator=g) - 0.3
    weights["W_dec"] *= torch.linspace(0.5, 2.0, D_SAE)[:, None]
    architecture, more = KINDS[kind]
    architecture = ReLU(clip=clip) if kind == "standard" else architecture
    folded = architecture.folded({k: t.to(dtype) for k, t in weights.items()}, scale)
    return SAE(four(folded), architecture, {k: t.to(dtype) for k, t in more.items()})


def rows_for(sae: SAE, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(6)
    x = torch.randn(ROWS, sae.d_in, generator=g, dtype=torch.float64) / scale
    return x.to(sae.parameters.W_dec.dtype)


def export(sae: SAE, folder: Path, clip_rate: float | None = None) -> Path:
    saelens.write(sae, folder / "out", METADATA, clip_rate=clip_rate, allow_clip=True)
    return folder / "out"


def opened(folder: Path) -> sae_lens.SAE:
    return sae_lens.SAE.load_from_disk(folder, device="cpu")


def reconstruction(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode(sae.encode(x))


def assert_computes_the_same(ours: SAE, theirs: sae_lens.SAE, x: Tensor, limit: float) -> None:
    code = ours.encode(x)
    z = dense(code, D_SAE)
    assert 0.02 < (z > 0).double().mean() < 0.95
    with torch.no_grad():
        assert torch.equal(theirs.encode(x) > 0, z > 0)
        assert relative_error(theirs.encode(x), z) < limit
        assert relative_error(theirs.decode(z), ours.decode(code)) < limit
        assert relative_error(theirs(x), ours.decode(code)) < limit
        assert theirs(x).dtype == x.dtype


def assert_same_weights(found: SAE, expected: SAE) -> None:
    assert found.architecture == expected.architecture
    parts = [{**sae.parameters.tensors(), **sae.more} for sae in (found, expected)]
    assert parts[0].keys() == parts[1].keys()
    for name, tensor in parts[0].items():
        assert tensor.dtype == parts[1][name].dtype
        assert torch.equal(tensor, parts[1][name]), name


# -- what we write -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saelens_holds_our_weights_bit_for_bit(tmp_path, kind, dtype):
    ours = made_up_sae(kind, dtype=dtype)
    theirs = opened(export(ours, tmp_path))
    assert theirs.cfg.architecture() == kind
    p = ours.parameters
    expected = {"W_enc": p.W_enc, "b_enc": p.b_enc, "W_dec": p.W_dec, "b_dec": p.b_dec, **ours.more}
    held = theirs.state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert held[name].dtype == dtype
        assert torch.equal(held[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.02, 7.0])
@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
def test_saelens_computes_what_we_compute(tmp_path, kind, scale, dtype, limit):
    ours = made_up_sae(kind, scale=scale, dtype=dtype)
    theirs = opened(export(ours, tmp_path))
    assert_computes_the_same(ours, theirs, rows_for(ours, scale), limit)


def test_where_nothing_is_clipped_a_bounded_sae_is_the_same_in_saelens(tmp_path):
    plain = made_up_sae()
    x = rows_for(plain)
    ours = SAE(plain.parameters, ReLU(clip=1.01 * float(plain.encode(x).val.max())))
    theirs = opened(export(ours, tmp_path, clip_rate=0.0))
    assert theirs.cfg.metadata["exact"] is True
    with torch.no_grad():
        assert relative_error(theirs(x), reconstruction(ours, x)) < 1e-6


def test_saelens_reads_over_the_clip_which_the_metadata_names(tmp_path):
    ours = made_up_sae(clip=0.8)
    x = rows_for(ours)
    clipped = dense(ours.encode(x), D_SAE)
    rate = float((clipped == 0.8).sum() / (clipped > 0).sum())
    assert rate > 0
    theirs = opened(export(ours, tmp_path, clip_rate=rate))
    with torch.no_grad():
        z = theirs.encode(x)
    assert theirs.cfg.metadata["exact"] is False
    assert theirs.cfg.metadata["activation_clip_rate"] == pytest.approx(rate)
    bound = theirs.cfg.metadata["activation_clip"]
    assert relative_error(z.clamp(max=bound), clipped) < 1e-6


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_folding_the_decoder_norms_in_saelens_leaves_the_reconstruction(tmp_path, kind, scale):
    ours = made_up_sae(kind, scale=scale)
    theirs = opened(export(ours, tmp_path))
    x = rows_for(ours, scale)
    theirs.fold_W_dec_norm()
    torch.testing.assert_close(theirs.W_dec.norm(dim=1), torch.ones(D_SAE))
    with torch.no_grad():
        assert relative_error(theirs(x), reconstruction(ours, x)) < 1e-6


@pytest.mark.parametrize("field", METADATA)
def test_what_the_activations_are_survives_the_round_trip(tmp_path, field):
    theirs = opened(export(made_up_sae(), tmp_path))
    assert theirs.cfg.metadata[field] == METADATA[field]
    theirs.save_model(tmp_path / "again")
    cfg = json.loads((tmp_path / "again" / CFG_FILE).read_text())
    assert cfg["metadata"][field] == METADATA[field]


# -- what SAELens writes -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_saelens_saves_comes_back_bit_for_bit(tmp_path, kind, dtype):
    if kind == "clipped":
        ours, rate = made_up_sae(scale=3.0, clip=2.5, dtype=dtype), 0.0
    else:
        ours, rate = made_up_sae(kind, scale=3.0, dtype=dtype), None
    opened(export(ours, tmp_path, rate)).save_model(tmp_path / "again")
    assert_same_weights(saelens.read(tmp_path / "again"), ours)


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_an_sae_changed_in_saelens_is_read_as_changed(tmp_path, kind):
    ours = made_up_sae(kind, scale=3.0)
    theirs = opened(export(ours, tmp_path))
    theirs.fold_W_dec_norm()
    theirs.save_model(tmp_path / "again")
    back = saelens.read(tmp_path / "again")
    x = rows_for(ours, 3.0)
    torch.testing.assert_close(back.parameters.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert relative_error(reconstruction(back, x), reconstruction(ours, x)) < 1e-6


def randomised(theirs: sae_lens.SAE) -> sae_lens.SAE:
    """Every parameter random: decoder rows of many lengths, and for thresholds positive ones."""
    g = torch.Generator().manual_seed(8)
    for name, parameter in theirs.named_parameters():
        values = torch.randn(parameter.shape, generator=g) / D_IN**0.5
        parameter.data = values.abs() if "threshold" in name else values
    return theirs


THEIRS = {
    "standard": lambda: sae_lens.StandardSAE(sae_lens.StandardSAEConfig(D_IN, D_SAE)),
    "topk": lambda: sae_lens.TopKSAE(sae_lens.TopKSAEConfig(D_IN, D_SAE, k=K)),
    "topk, rescaling": lambda: sae_lens.TopKSAE(
        sae_lens.TopKSAEConfig(D_IN, D_SAE, k=K, rescale_acts_by_decoder_norm=True)
    ),
    "jumprelu": lambda: sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(D_IN, D_SAE)),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_an_sae_made_in_saelens_is_read_by_us(tmp_path, kind):
    theirs = randomised(THEIRS[kind]())
    theirs.save_model(tmp_path)
    ours = saelens.read(tmp_path)
    assert_computes_the_same(ours, theirs, rows_for(ours), 1e-6)


def test_rescaling_by_decoder_norms_chooses_other_features():
    plain, rescaling = (randomised(THEIRS[kind]()) for kind in ("topk", "topk, rescaling"))
    x = rows_for(made_up_sae())
    with torch.no_grad():
        assert not torch.equal(plain.encode(x) > 0, rescaling.encode(x) > 0)


def training(name: str, **settings: object) -> sae_lens.TrainingSAE:
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **settings)
    return randomised(getattr(sae_lens, f"{name}TrainingSAE")(config))


TRAINING = {
    "standard": lambda: training("Standard", l1_coefficient=0.1),
    "topk": lambda: training("TopK", k=K),
    "jumprelu": lambda: training("JumpReLU"),
}


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_an_sae_in_training_in_saelens_is_read_as_it_computes(tmp_path, kind, save):
    theirs = TRAINING[kind]()
    x = rows_for(made_up_sae())
    with torch.no_grad():
        x_hat, fires = theirs(x), theirs.encode(x) > 0
    getattr(theirs, save)(tmp_path)
    ours = saelens.read(tmp_path)
    assert torch.equal(dense(ours.encode(x), D_SAE) > 0, fires)
    assert relative_error(reconstruction(ours, x), x_hat) < 1e-6


def test_a_batchtopk_of_saelens_is_read_where_it_is_saved_for_inference(tmp_path):
    theirs = training("BatchTopK", k=K)
    theirs.topk_threshold.fill_(0.4)
    theirs.save_inference_model(tmp_path / "inference")
    ours = saelens.read(tmp_path / "inference")
    assert_computes_the_same(ours, opened(tmp_path / "inference"), rows_for(ours), 1e-6)
    theirs.save_model(tmp_path / "training")
    with pytest.raises(UserError, match="save_inference_model"):
        saelens.read(tmp_path / "training")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_come_from_saelens_without_a_change(tmp_path, dtype):
    config = sae_lens.StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype=dtype)
    theirs = randomised(sae_lens.StandardSAE(config)).to(dtype=getattr(torch, dtype))
    theirs.save_model(tmp_path)
    ours = saelens.read(tmp_path)
    assert torch.equal(ours.parameters.W_enc, theirs.W_enc.float())


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=8, d_sae=16)), "gated"),
        *(
            (
                lambda settings=settings: sae_lens.StandardSAE(
                    sae_lens.StandardSAEConfig(d_in=8, d_sae=16, **settings)
                ),
                named,
            )
            for settings, named in [
                ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input is False"),
                ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
                (
                    {"normalize_activations": "expected_average_only_in"},
                    "normalize_activations is 'expected_average_only_in'",
                ),
            ]
        ),
    ],
)
def test_an_sae_of_saelens_with_other_equations_is_refused(tmp_path, made, named):
    made().save_model(tmp_path)
    with pytest.raises(UserError, match=named):
        saelens.read(tmp_path)


# -- a campaign's export -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    store = Store.open(str(tmp_path_factory.mktemp("store")), writable=True)
    key = commit_campaign(store)
    return store, store.manifest(campaigns.KIND, key)


@pytest.fixture(scope="module")
def export_folder(campaign: tuple[Store, Manifest]) -> Path:
    store, manifest = campaign
    return Path(store.path(campaigns.KIND, manifest.key, "export"))


def test_a_campaigns_export_reads_raw_activations_in_saelens(campaign, export_folder):
    store, manifest = campaign
    training = json.loads(store.read(saes.KIND, manifest.inputs["saes"], "training.json"))
    assert not 0.5 < training["scale"] < 2
    source = Activations(store, manifest.inputs[activations.KIND])
    x = source.gather(source.rows("test"))
    ours = saes.load(store, manifest.inputs["saes"])
    theirs = opened(export_folder)
    code = ours.encode(x)
    with torch.no_grad():
        assert relative_error(theirs.encode(x), dense(code, ours.d_sae)) < 1e-6
        found = theirs(x)
    assert relative_error(found, ours.decode(code)) < 1e-6
    fvu = ((found - x).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert 1 - fvu == pytest.approx(manifest.extra["summary"]["explained_variance"], abs=1e-4)


def test_a_campaigns_export_names_the_model_and_the_place_in_it(export_folder):
    metadata = opened(export_folder).cfg.metadata
    assert metadata["model_name"] == MODEL
    assert metadata["hook_name"] == "residual_after_block_3"


def test_a_campaigns_export_holds_a_firing_rate_for_each_feature(export_folder):
    theirs = opened(export_folder)
    sparsity = load_file(export_folder / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (theirs.cfg.d_sae,)
    assert (sparsity <= 0).all()


# -- activations ---------------------------------------------------------------------------------


def test_exported_activations_are_what_saelens_reads_from_its_cache(campaign, tmp_path):
    pytest.importorskip("datasets")
    store, manifest = campaign
    rows = Activations(store, manifest.inputs[activations.KIND])
    contexts, _ = cached_activations.write(rows, tmp_path / "cache", 8)
    described = hosts.from_content(rows.manifest.config["host"]).described()
    reading = ActivationsStore(
        model=None, dataset=None, streaming=False, hook_name=described["hook_name"],
        hook_head_index=None, context_size=8, d_in=rows.d_in, n_batches_in_buffer=2,
        total_training_tokens=1000, store_batch_size_prompts=4, train_batch_size_tokens=32,
        prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
        cached_activations_path=str(tmp_path / "cache"),
    )  # fmt: skip
    ids = torch.tensor(rows.provenance(0)["token_id"].to_pylist())
    for start in range(0, contexts * 8 - 32, 32):
        x, tokens = reading.get_raw_llm_batch()
        wanted = rows.gather(np.arange(start, start + 32))
        assert torch.equal(x.reshape(32, -1).float(), wanted)
        assert torch.equal(tokens.reshape(-1).long(), ids[start : start + 32])
