from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from made_up_weights import batch, copied, dense, made_up
from safetensors.torch import load, save

from sae_ext.errors import UserError
from sae_ext.model import CFG_FILE, SAE, WEIGHTS_FILE, fold_scale, initial_parameters
from sae_ext.ops import Parameters

D_IN, D_SAE = 6, 20


def tensors_of(sae: SAE) -> dict[str, torch.Tensor]:
    return sae.parameters.tensors()


@pytest.fixture
def sae() -> SAE:
    return SAE(copied(made_up(D_IN, D_SAE, bias=-0.3), torch.float32), clip=2.5)


@pytest.fixture
def folder(sae: SAE, tmp_path: Path) -> Path:
    for name, data in sae.files({"model_name": "made-up"}).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def edit_cfg(folder: Path, **changes: object) -> None:
    cfg = json.loads((folder / CFG_FILE).read_bytes())
    (folder / CFG_FILE).write_text(json.dumps({**cfg, **changes}))


# -- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_sae_comes_back_bit_for_bit(tmp_path, clip, dtype):
    saved = SAE(copied(made_up(D_IN, D_SAE), dtype), clip)
    for name, data in saved.files({}).items():
        (tmp_path / name).write_bytes(data)
    loaded = SAE.load(tmp_path)
    assert loaded.clip == clip
    assert (loaded.d_in, loaded.d_sae) == (D_IN, D_SAE)
    for name, tensor in tensors_of(loaded).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors_of(saved)[name])
        assert tensor.is_contiguous()


def test_equal_weights_have_equal_bytes(sae):
    assert sae.files({"a": 1}) == SAE(copied(sae.parameters, torch.float32), 2.5).files({"a": 1})


def test_the_weights_lie_in_the_layout_of_the_file(folder, sae):
    tensors = load((folder / WEIGHTS_FILE).read_bytes())
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    assert shapes == {
        "W_enc": [D_IN, D_SAE], "b_enc": [D_SAE], "W_dec": [D_SAE, D_IN], "b_dec": [D_IN],
    }  # fmt: skip
    assert torch.equal(tensors["W_enc"], sae.parameters.W_enc)


def test_the_configuration_says_what_the_reconstruction_is(folder):
    cfg = json.loads((folder / CFG_FILE).read_bytes())
    metadata = cfg.pop("metadata")
    assert cfg == {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert metadata["activation_clip"] == 2.5
    assert metadata["model_name"] == "made-up"
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6


@pytest.mark.parametrize("name", [CFG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"holds no SAE: {name} is missing"):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (CFG_FILE, b"{"),
        (CFG_FILE, b"[]"),
        (CFG_FILE, b'{"architecture": "standard", "metadata": 3}'),
        (CFG_FILE, b"\xff"),
        (WEIGHTS_FILE, b"damaged"),
        (WEIGHTS_FILE, save({"W_enc": torch.zeros(D_IN, D_SAE)})),
    ],
)
def test_a_damaged_file_is_a_user_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="the SAE cannot be read"):
        SAE.load(folder)


def test_another_architecture_is_a_user_error(folder):
    edit_cfg(folder, architecture="jumprelu")
    with pytest.raises(UserError, match="architecture 'jumprelu' is not one we can read"):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("apply_b_dec_to_input", False),
        ("normalize_activations", "layer_norm"),
        ("reshape_activations", "hook_z"),
    ],
)
def test_a_setting_under_which_the_numbers_would_differ_is_a_user_error(folder, field, value):
    edit_cfg(folder, **{field: value})
    with pytest.raises(UserError, match=rf"{field} is {value!r}"):
        SAE.load(folder)


def test_a_folder_without_metadata_is_an_sae_without_a_clip(folder):
    cfg = json.loads((folder / CFG_FILE).read_bytes())
    del cfg["metadata"]
    (folder / CFG_FILE).write_text(json.dumps(cfg))
    assert SAE.load(folder).clip is None


# -- codes ---------------------------------------------------------------------------------------


def test_a_code_and_its_reconstruction_are_those_of_the_equations(sae):
    x, p = batch(50, D_IN).float(), sae.parameters
    z = ((x - p.b_dec) @ p.W_enc + p.b_enc).relu().clamp(max=2.5)
    code = sae.encode(x)
    torch.testing.assert_close(dense(code, D_SAE), z)
    torch.testing.assert_close(sae.decode(code), z @ p.W_dec + p.b_dec)
    assert (z == 2.5).any()


@pytest.mark.parametrize("shape", [(5, D_IN + 1), (5, D_IN - 1), (D_IN,), (2, 3, D_IN)])
def test_activations_of_another_width_are_a_user_error(sae, shape):
    with pytest.raises(UserError, match=rf"d_in = {D_IN}"):
        sae.encode(torch.zeros(shape))


def test_the_cosine_is_that_of_each_features_two_directions(sae):
    p = sae.parameters
    found = sae.encoder_decoder_cosine()
    for j in range(D_SAE):
        encoder, decoder = p.W_enc[:, j], p.W_dec[j]
        expected = encoder @ decoder / (encoder.norm() * decoder.norm())
        assert float(found[j]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.7, 30.0])
def test_folding_the_scale_in_keeps_codes_and_moves_the_reconstruction_to_raw_units(scale):
    trained = made_up(D_IN, D_SAE)
    inside, outside = SAE(trained, 1.2), SAE(fold_scale(trained, scale), 1.2)
    raw = batch(80, D_IN) * 3
    scaled_code, raw_code = inside.encode(raw * scale), outside.encode(raw)
    assert torch.equal(raw_code.row_ptr, scaled_code.row_ptr)
    assert torch.equal(raw_code.col, scaled_code.col)
    torch.testing.assert_close(raw_code.val, scaled_code.val)
    torch.testing.assert_close(outside.decode(raw_code), inside.decode(scaled_code) / scale)


def test_folding_leaves_what_it_was_given_alone():
    trained = made_up(D_IN, D_SAE)
    before = copied(trained)
    folded = fold_scale(trained, 2.0)
    folded.b_enc.zero_()
    for field in fields(Parameters):
        assert torch.equal(getattr(trained, field.name), getattr(before, field.name))


# -- the start -----------------------------------------------------------------------------------


def test_training_starts_with_unit_decoder_rows_and_the_encoder_their_transpose():
    b_dec = torch.arange(D_IN, dtype=torch.float64)
    start = initial_parameters(D_IN, D_SAE, b_dec, seed=3)
    torch.testing.assert_close(start.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(start.W_enc_rows, start.W_dec)
    assert start.W_enc_rows.data_ptr() != start.W_dec.data_ptr()
    assert not start.b_enc.any()
    assert torch.equal(start.b_dec, b_dec.float())
    assert {t.dtype for t in start.tensors().values()} == {torch.float32}


def test_the_start_is_a_function_of_the_seed():
    def start(seed: int) -> torch.Tensor:
        return initial_parameters(D_IN, D_SAE, torch.zeros(D_IN), seed).W_dec

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
