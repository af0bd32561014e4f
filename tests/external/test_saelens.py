"""Exported SAEs against SAELens itself: the same numbers there, and the same SAE back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_up_campaign import MODEL, commit_campaign
from safetensors.torch import load_file
from torch import Tensor

from sae_ext.activations.reader import Activations
from sae_ext.artefacts import activations, campaigns, saes
from sae_ext.errors import UserError
from sae_ext.model import CFG_FILE, SAE, fold_scale, initial_parameters
from sae_ext.ops import Parameters, SparseCode
from sae_ext.store import Manifest, Store

sae_lens = pytest.importorskip(
    "sae_lens", reason="SAELens is not installed: pip install 'sparsemill[external]'"
)

D_IN, D_SAE, ROWS = 24, 96, 200
METADATA = {"model_name": "made-up-model", "hook_name": "residual_after_block_3"}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.dist(found, expected) / torch.linalg.vector_norm(expected))


def dense(code: SparseCode, d_sae: int) -> Tensor:
    """The code as a [B, d_sae] tensor."""
    rows = torch.repeat_interleave(torch.arange(len(code.row_ptr) - 1), code.row_ptr.diff())
    out = torch.zeros(len(code.row_ptr) - 1, d_sae, dtype=code.val.dtype)
    out[rows, code.col.long()] = code.val
    return out


def made_up_sae(
    *, scale: float = 1.0, clip: float | None = None, dtype: torch.dtype = torch.float32
) -> SAE:
    """Random weights with every part in use, trained on scale·x as it were."""
    g = torch.Generator().manual_seed(5)
    b_dec = 0.3 * torch.randn(D_IN, generator=g)
    start = initial_parameters(D_IN, D_SAE, b_dec, seed=4)
    start.W_enc_rows += 0.05 * torch.randn(D_SAE, D_IN, generator=g)
    start.b_enc += 0.2 * torch.randn(D_SAE, generator=g) - 0.3
    parameters = Parameters(**{k: t.to(dtype) for k, t in start.tensors().items()})
    return SAE(fold_scale(parameters, scale), clip)


def rows_for(sae: SAE, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(6)
    x = torch.randn(ROWS, sae.d_in, generator=g, dtype=torch.float64) / scale
    return x.to(sae.parameters.W_dec.dtype)


def export(sae: SAE, folder: Path) -> Path:
    for name, data in sae.files(METADATA).items():
        (folder / name).write_bytes(data)
    return folder


def opened(folder: Path) -> sae_lens.SAE:
    return sae_lens.SAE.load_from_disk(folder, device="cpu")


# -- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.02, 7.0])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_saelens_computes_what_we_compute(tmp_path, scale, dtype, limit):
    ours = made_up_sae(scale=scale, dtype=dtype)
    theirs = opened(export(ours, tmp_path))
    x = rows_for(ours, scale)
    code = ours.encode(x)
    z = dense(code, D_SAE)
    assert 0.05 < (z > 0).double().mean() < 0.95
    with torch.no_grad():
        assert relative_error(theirs.encode(x), z) < limit
        assert relative_error(theirs.decode(z), ours.decode(code)) < limit
        assert relative_error(theirs(x), ours.decode(code)) < limit
        assert theirs(x).dtype == dtype


def test_where_nothing_is_clipped_a_bounded_sae_is_the_same_in_saelens(tmp_path):
    plain = made_up_sae()
    x = rows_for(plain)
    highest = float(plain.encode(x).val.max())
    ours = SAE(plain.parameters, clip=1.01 * highest)
    with torch.no_grad():
        found = opened(export(ours, tmp_path))(x)
    assert relative_error(found, ours.decode(ours.encode(x))) < 1e-6


def test_saelens_reads_over_the_clip_which_the_metadata_names(tmp_path):
    ours = made_up_sae(clip=0.8)
    theirs = opened(export(ours, tmp_path))
    x = rows_for(ours)
    with torch.no_grad():
        z = theirs.encode(x)
    assert (z > 0.8).any()
    bound = theirs.cfg.metadata["activation_clip"]
    assert relative_error(z.clamp(max=bound), dense(ours.encode(x), D_SAE)) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_folding_the_decoder_norms_in_saelens_leaves_the_reconstruction(tmp_path, scale):
    ours = made_up_sae(scale=scale)
    ours.parameters.W_dec *= torch.linspace(0.5, 2.0, D_SAE)[:, None]
    theirs = opened(export(ours, tmp_path))
    x = rows_for(ours, scale)
    with torch.no_grad():
        before = theirs(x)
        theirs.fold_W_dec_norm()
        torch.testing.assert_close(theirs.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert relative_error(theirs(x), before) < 1e-6
    assert relative_error(before, ours.decode(ours.encode(x))) < 1e-6


# -- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_saelens_saves_comes_back_bit_for_bit(tmp_path, clip, dtype):
    ours = made_up_sae(scale=3.0, clip=clip, dtype=dtype)
    opened(export(ours, tmp_path)).save_model(tmp_path / "again")
    back = SAE.load(tmp_path / "again")
    assert back.clip == clip
    for name, tensor in ours.parameters.tensors().items():
        found = back.parameters.tensors()[name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor), name


def test_an_sae_changed_in_saelens_is_read_as_changed(tmp_path):
    ours = made_up_sae(scale=3.0)
    theirs = opened(export(ours, tmp_path))
    theirs.fold_W_dec_norm()
    theirs.save_model(tmp_path / "again")
    back = SAE.load(tmp_path / "again")
    x = rows_for(ours, 3.0)
    torch.testing.assert_close(back.parameters.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert relative_error(back.decode(back.encode(x)), ours.decode(ours.encode(x))) < 1e-6


def test_an_sae_made_in_saelens_is_read_by_us(tmp_path):
    theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D_IN, d_sae=D_SAE))
    g = torch.Generator().manual_seed(8)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / D_IN**0.5
    theirs.save_model(tmp_path)
    ours = SAE.load(tmp_path)
    assert ours.clip is None
    x = rows_for(ours)
    with torch.no_grad():
        assert relative_error(ours.decode(ours.encode(x)), theirs(x)) < 1e-6


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=8, d_sae=16, k=4)), "topk"),
        (lambda: sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=8, d_sae=16)), "jumprelu"),
        (
            lambda: sae_lens.StandardSAE(
                sae_lens.StandardSAEConfig(d_in=8, d_sae=16, apply_b_dec_to_input=False)
            ),
            "apply_b_dec_to_input is False",
        ),
        (
            lambda: sae_lens.StandardSAE(
                sae_lens.StandardSAEConfig(d_in=8, d_sae=16, normalize_activations="layer_norm")
            ),
            "normalize_activations is 'layer_norm'",
        ),
    ],
)
def test_an_sae_of_saelens_with_other_equations_is_refused(tmp_path, made, named):
    made().save_model(tmp_path)
    with pytest.raises(UserError, match=named):
        SAE.load(tmp_path)


@pytest.mark.parametrize("field", METADATA)
def test_what_the_activations_are_survives_the_round_trip(tmp_path, field):
    theirs = opened(export(made_up_sae(), tmp_path))
    assert theirs.cfg.metadata[field] == METADATA[field]
    theirs.save_model(tmp_path / "again")
    cfg = json.loads((tmp_path / "again" / CFG_FILE).read_text())
    assert cfg["metadata"][field] == METADATA[field]


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
