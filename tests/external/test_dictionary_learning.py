"""SAEs and dictionary_learning itself: the same numbers there for what we write, and here for what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_ext.architectures import ReLU
from sae_ext.architectures.base import four, initial_weights
from sae_ext.errors import UserError
from sae_ext.interchange import dictionary_learning as ours
from sae_ext.model import SAE
from sae_ext.ops import SparseCode

theirs = pytest.importorskip(
    "dictionary_learning", reason="dictionary_learning is not installed: run `make peers`"
)

D_IN, D_SAE = 24, 96
METADATA = {"model_name": "made-up-model", "layer": 3, "context_size": 64}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.dist(found, expected) / torch.linalg.vector_norm(expected))


def dense(code: SparseCode) -> Tensor:
    """The code as a [B, d_sae] tensor."""
    rows = torch.repeat_interleave(torch.arange(len(code.row_ptr) - 1), code.row_ptr.diff())
    out = torch.zeros(len(code.row_ptr) - 1, D_SAE, dtype=code.val.dtype)
    out[rows, code.col.long()] = code.val
    return out


def made_up_sae(*, unit: bool, scale: float = 1.0) -> SAE:
    """Random weights with every part in use, for rows of 1 / scale the usual size."""
    g = torch.Generator().manual_seed(5)
    weights = initial_weights(D_IN, D_SAE, 0.3 * torch.randn(D_IN, generator=g), seed=4)
    weights["W_enc_rows"] += 0.05 * torch.randn(D_SAE, D_IN, generator=g)
    weights["b_enc"] += 0.2 * torch.randn(D_SAE, generator=g) - 0.3
    if not unit:
        weights["W_dec"] *= torch.linspace(0.5, 2.0, D_SAE)[:, None]
    return SAE(four(ReLU().folded(weights, scale)), ReLU())


def rows(scale: float = 1.0) -> Tensor:
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(6)) / scale


def from_pretrained(folder: Path) -> Any:
    return theirs.AutoEncoder.from_pretrained(folder / "ae.pt", device="cpu")


def load_dictionary(folder: Path) -> Any:
    utils = pytest.importorskip("dictionary_learning.utils", reason="it needs zstandard, datasets")
    return utils.load_dictionary(str(folder), "cpu")[0]


LOADERS = [from_pretrained, load_dictionary]


@pytest.mark.parametrize("opened", LOADERS)
def test_dictionary_learning_holds_unit_rows_and_the_rest_bit_for_bit(tmp_path, opened):
    sae = made_up_sae(unit=True)
    ours.write(sae, tmp_path / "out", METADATA, clip_rate=None)
    held, p = opened(tmp_path / "out").state_dict(), sae.parameters
    assert torch.equal(held["bias"], p.b_dec)
    assert torch.equal(held["encoder.weight"], p.W_enc_rows)
    assert torch.equal(held["encoder.bias"], p.b_enc)
    assert torch.equal(held["decoder.weight"].T, p.W_dec)


@pytest.mark.parametrize("opened", LOADERS)
@pytest.mark.parametrize("scale", [1.0, 0.02, 7.0])
def test_dictionary_learning_holds_what_was_written_whatever_the_lengths(tmp_path, opened, scale):
    ours.write(made_up_sae(unit=False, scale=scale), tmp_path / "out", METADATA, clip_rate=None)
    written = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    for name, tensor in opened(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, written[name]), name


@pytest.mark.parametrize("opened", LOADERS)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.02, 7.0])
def test_dictionary_learning_computes_what_we_compute(tmp_path, opened, unit, scale):
    sae, x = made_up_sae(unit=unit, scale=scale), rows(scale)
    ours.write(sae, tmp_path / "out", METADATA, clip_rate=None)
    ae, code = opened(tmp_path / "out"), sae.encode(x)
    with torch.no_grad():
        z = dense(code) * sae.parameters.W_dec.norm(dim=1)
        assert relative_error(ae.encode(x), z) < 1e-6
        assert relative_error(ae(x), sae.decode(code)) < 1e-6


def test_the_config_comes_back_with_the_dictionary(tmp_path):
    utils = pytest.importorskip("dictionary_learning.utils", reason="it needs zstandard, datasets")
    ours.write(made_up_sae(unit=True), tmp_path / "out", METADATA, clip_rate=None)
    _, config = utils.load_dictionary(str(tmp_path / "out"), "cpu")
    assert config["trainer"]["lm_name"] == "made-up-model"
    assert config["trainer"]["layer"] == 3
    assert config["buffer"]["ctx_len"] == 64


def save_theirs(folder: Path, ae: Any, dict_class: str) -> None:
    torch.save(ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class}}))


@pytest.mark.parametrize("unit", [True, False])
def test_an_autoencoder_of_dictionary_learning_is_read_by_us(tmp_path, unit):
    ae = theirs.AutoEncoder(D_IN, D_SAE)
    g = torch.Generator().manual_seed(8)
    for parameter in ae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / D_IN**0.5
    if unit:
        ae.decoder.weight.data /= ae.decoder.weight.norm(dim=0)
    save_theirs(tmp_path, ae, "AutoEncoder")
    sae, x = ours.read(tmp_path), rows()
    with torch.no_grad():
        assert relative_error(dense(sae.encode(x)), ae.encode(x)) < 1e-6
        assert relative_error(sae.decode(sae.encode(x)), ae(x)) < 1e-6


def test_a_gated_autoencoder_of_dictionary_learning_is_refused(tmp_path):
    save_theirs(tmp_path, theirs.GatedAutoEncoder(D_IN, D_SAE), "GatedAutoEncoder")
    with pytest.raises(UserError, match="dict_class is 'GatedAutoEncoder'"):
        ours.read(tmp_path)
