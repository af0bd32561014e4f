from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_up_weights import batch, copied, dense, made_up, top_k
from safetensors.torch import load, save
from torch import Tensor

from sae_ext.architectures import Architecture, ReLU, Thresholds, TopK
from sae_ext.architectures.base import four, initial_weights
from sae_ext.errors import UserError
from sae_ext.model import CFG_FILE, SAE, WEIGHTS_FILE, Output

D_IN, D_SAE = 6, 20
THRESHOLD = torch.linspace(0.0, 0.8, D_SAE, dtype=torch.float64)
KINDS: dict[str, tuple[Architecture, dict[str, Tensor]]] = {
    "relu": (ReLU(), {}),
    "clipped relu": (ReLU(clip=0.9), {}),
    "topk": (TopK(k=3), {}),
    "thresholds": (Thresholds(), {"threshold": THRESHOLD}),
}


def made_up_sae(
    kind: str, dtype: torch.dtype = torch.float32, output: Output = "identity", bias: float = 0.0
) -> SAE:
    architecture, more = KINDS[kind]
    params = copied(made_up(D_IN, D_SAE, bias=bias), dtype)
    return SAE(params, architecture, {name: t.to(dtype) for name, t in more.items()}, output)


def activation(kind: str, pre: Tensor) -> Tensor:
    """The formula of each kind, on dense float64 pre-activations."""
    if kind == "topk":
        return pre.relu() * top_k(pre, 3)
    if kind == "thresholds":
        return torch.where(pre > THRESHOLD, pre, 0.0).relu()
    return pre.relu().clamp(max=0.9) if kind == "clipped relu" else pre.relu()


def tensors_of(sae: SAE) -> dict[str, Tensor]:
    return {**sae.parameters.tensors(), **sae.more}


def put(sae: SAE, folder: Path) -> Path:
    for name, data in sae.files({"model_name": "made-up"}).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def sae() -> SAE:
    return SAE(copied(made_up(D_IN, D_SAE, bias=-0.3), torch.float32), ReLU(clip=2.5))


@pytest.fixture
def folder(sae: SAE, tmp_path: Path) -> Path:
    return put(sae, tmp_path)


def edit_cfg(folder: Path, **changes: object) -> None:
    cfg = json.loads((folder / CFG_FILE).read_bytes())
    (folder / CFG_FILE).write_text(json.dumps({**cfg, **changes}))


def edit_metadata(folder: Path, **changes: object) -> None:
    metadata = json.loads((folder / CFG_FILE).read_bytes())["metadata"]
    edit_cfg(folder, metadata={**metadata, **changes})


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load((folder / WEIGHTS_FILE).read_bytes()), **changes}
    kept = {name: t for name, t in tensors.items() if t is not None}
    (folder / WEIGHTS_FILE).write_bytes(save(kept))


# -- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["identity", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_sae_comes_back_bit_for_bit(tmp_path, kind, output, dtype):
    saved = made_up_sae(kind, dtype, output)
    loaded = SAE.load(put(saved, tmp_path))
    assert (loaded.architecture, loaded.output) == (saved.architecture, output)
    assert (loaded.d_in, loaded.d_sae) == (D_IN, D_SAE)
    assert tensors_of(loaded).keys() == tensors_of(saved).keys()
    for name, tensor in tensors_of(loaded).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors_of(saved)[name])
        assert tensor.is_contiguous()


def test_equal_weights_have_equal_bytes(sae):
    again = SAE(copied(sae.parameters, torch.float32), ReLU(clip=2.5))
    assert sae.files({"a": 1}) == again.files({"a": 1})


def test_the_metadata_cannot_say_another_clip_than_the_sae_has(sae):
    cfg = json.loads(sae.files({"activation_clip": 7.0, "output_activation": "tanh"})[CFG_FILE])
    assert cfg["metadata"]["activation_clip"] == 2.5
    assert cfg["metadata"]["output_activation"] == "identity"


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


@pytest.mark.parametrize(
    ("kind", "layout", "entries"),
    [
        ("relu", "standard", {}),
        ("topk", "topk", {"k": 3, "rescale_acts_by_decoder_norm": False}),
        ("thresholds", "jumprelu", {}),
    ],
)
def test_each_kind_has_the_name_and_the_entries_that_saelens_gives_it(kind, layout, entries):
    cfg = json.loads(made_up_sae(kind).files({})[CFG_FILE])
    assert cfg["architecture"] == layout
    assert {name: cfg.get(name) for name in entries} == entries


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
        (CFG_FILE, b"{}"),
        (CFG_FILE, b"\xff"),
        (WEIGHTS_FILE, b"damaged"),
        (WEIGHTS_FILE, save({"W_enc": torch.zeros(D_IN, D_SAE)})),
    ],
)
def test_a_damaged_file_is_a_user_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="the SAE cannot be read"):
        SAE.load(folder)


@pytest.mark.parametrize("unreadable", [CFG_FILE, WEIGHTS_FILE])
def test_a_folder_in_the_place_of_a_file_is_a_user_error(folder, unreadable):
    (folder / unreadable).unlink()
    (folder / unreadable).mkdir()
    with pytest.raises(UserError, match="the SAE cannot be read"):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("relu", {"architecture": "gated"}, "architecture 'gated' in cfg.json is not one"),
        ("relu", {"architecture": ["standard"]}, "cannot be read"),
        ("relu", {"apply_b_dec_to_input": False}, "apply_b_dec_to_input is False"),
        ("relu", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ("relu", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ("relu", {"lp_norm": 1.0}, "lp_norm in cfg.json is not an entry we know"),
        ("relu", {"k": 3}, "k in cfg.json is not an entry we know"),
        ("relu", {"d_in": D_IN + 1}, "d_in is 7 in cfg.json, but 6 in sae_weights"),
        ("relu", {"d_sae": None}, "d_sae is None in cfg.json, but 20 in sae_weights"),
        ("relu", {"metadata": 3}, "cannot be read"),
        ("relu", {"metadata": None}, "cannot be read"),
        ("topk", {"k": 0}, "k must be positive, got 0"),
        ("topk", {"k": D_SAE + 1}, "k is 21, but d_sae is only 20"),
        ("topk", {"k": 2.5}, "k is 2.5 in cfg.json"),
        ("topk", {"k": "many"}, "cannot be read"),
        ("topk", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
    ],
)
def test_an_entry_that_would_change_the_numbers_is_a_user_error(tmp_path, kind, changes, named):
    edit_cfg(put(made_up_sae(kind), tmp_path), **changes)
    with pytest.raises(UserError, match=named) as caught:
        SAE.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["d_in", "d_sae", "architecture"])
def test_a_missing_entry_is_a_user_error(folder, name):
    cfg = json.loads((folder / CFG_FILE).read_bytes())
    del cfg[name]
    (folder / CFG_FILE).write_text(json.dumps(cfg))
    with pytest.raises(UserError, match=rf"cannot be read .*{name}"):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_clip": -1.0}, "clip must be positive, got -1.0"),
        ({"activation_clip": float("inf")}, "clip must be finite"),
        ({"activation_clip": "six"}, "cannot be read"),
        ({"output_activation": "softmax"}, "output_activation in cfg.json is 'softmax'"),
        ({"output_activation": None}, "output_activation in cfg.json is None"),
    ],
)
def test_metadata_that_make_no_sense_are_a_user_error(folder, changes, named):
    edit_metadata(folder, **changes)
    with pytest.raises(UserError, match=named):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("relu", {"b_enc": None}, "cannot be read .*b_enc"),
        ("relu", {"b_enc": torch.zeros(D_SAE - 1)}, "b_enc has shape"),
        ("relu", {"b_dec": torch.zeros(D_IN, dtype=torch.float64)}, "b_dec is torch.float64"),
        ("relu", {"W_enc": torch.zeros(D_SAE, D_IN)}, "W_enc_rows has shape"),
        ("relu", {"W_enc": torch.zeros(D_SAE)}, "cannot be read"),
        ("relu", {"W_dec": torch.zeros(D_SAE)}, "W_dec must be"),
        ("relu", {"threshold": torch.zeros(D_SAE)}, "holds threshold beside"),
        ("topk", {"threshold": torch.zeros(D_SAE)}, "holds threshold beside"),
        ("thresholds", {"threshold": None}, "holds nothing beside"),
        ("thresholds", {"threshold": torch.zeros(1)}, "threshold .* is torch.float32 .1."),
        ("thresholds", {"threshold": torch.zeros(D_SAE).half()}, "threshold .* is torch.float16"),
    ],
)
def test_tensors_that_do_not_make_the_architecture_are_a_user_error(tmp_path, kind, changes, named):
    edit_tensors(put(made_up_sae(kind), tmp_path), **changes)
    with pytest.raises(UserError, match=named):
        SAE.load(tmp_path)


def test_a_folder_without_metadata_is_an_sae_without_a_clip(folder):
    cfg = json.loads((folder / CFG_FILE).read_bytes())
    del cfg["metadata"]
    (folder / CFG_FILE).write_text(json.dumps(cfg))
    assert SAE.load(folder).clip is None


# -- codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("output", "final"), [
    ("identity", lambda y: y), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh),
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_codes_and_reconstructions_are_those_of_the_equations(kind, output, final, dtype, limit):
    x, exact = batch(200, D_IN).to(dtype), made_up(D_IN, D_SAE)
    if dtype == torch.float32:  # what the SAE computes with, in float64
        exact = copied(copied(exact, dtype))
    z = activation(kind, (x.double() - exact.b_dec) @ exact.W_enc + exact.b_enc)
    sae = made_up_sae(kind, dtype, output)
    code = sae.encode(x)
    torch.testing.assert_close(dense(code, D_SAE).double(), z, rtol=limit, atol=limit)
    assert int((z > 0).sum()) == len(code.val)
    x_hat = final(z @ exact.W_dec + exact.b_dec)
    torch.testing.assert_close(sae.decode(code).double(), x_hat, rtol=limit, atol=limit)


def test_the_rows_for_the_equations_bring_out_what_the_kinds_differ_in():
    p = made_up(D_IN, D_SAE)
    pre = (batch(200, D_IN) - p.b_dec) @ p.W_enc + p.b_enc
    codes = {kind: activation(kind, pre) for kind in KINDS}
    for kind, z in codes.items():
        others = [other for name, other in codes.items() if name != kind]
        assert not any(torch.equal(z, other) for other in others)
    assert (codes["clipped relu"] == 0.9).any()
    assert (codes["topk"] > 0).sum(1).max() == 3


def test_topk_has_fewer_entries_where_fewer_are_positive():
    sae = made_up_sae("topk", bias=-1.5)
    counts = sae.encode(batch(200, D_IN)).row_ptr.diff()
    assert counts.min() < 3 == counts.max()


def test_an_activation_below_zero_is_not_active_whatever_the_threshold():
    architecture, more = KINDS["thresholds"]
    sae = SAE(made_up(D_IN, D_SAE), architecture, {"threshold": more["threshold"] - 5})
    plain = SAE(made_up(D_IN, D_SAE)).encode(batch(50, D_IN))
    for found, expected in zip(sae.encode(batch(50, D_IN)), plain, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_have_an_empty_code_and_no_reconstruction(kind):
    sae = made_up_sae(kind)
    code = sae.encode(torch.zeros(0, D_IN))
    assert code.row_ptr.tolist() == [0]
    assert len(code.col) == len(code.val) == 0
    assert sae.decode(code).shape == (0, D_IN)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, D_IN + 1), (5, D_IN - 1), (D_IN,), (2, 3, D_IN), (0, 1)])
def test_activations_of_another_width_are_a_user_error(kind, shape):
    with pytest.raises(UserError, match=rf"d_in = {D_IN}"):
        made_up_sae(kind).encode(torch.zeros(shape))


def test_the_cosine_is_that_of_each_features_two_directions(sae):
    p = sae.parameters
    found = sae.encoder_decoder_cosine()
    for j in range(D_SAE):
        encoder, decoder = p.W_enc[:, j], p.W_dec[j]
        expected = encoder @ decoder / (encoder.norm() * decoder.norm())
        assert float(found[j]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("kind", ["relu", "clipped relu", "topk"])
@pytest.mark.parametrize("scale", [0.01, 1.7, 30.0])
def test_folding_the_scale_in_keeps_codes_and_moves_the_reconstruction_to_raw_units(kind, scale):
    trained, (architecture, _) = made_up(D_IN, D_SAE), KINDS[kind]
    folded = architecture.folded(trained.tensors(), scale)
    inside, outside = SAE(trained, architecture), SAE(four(folded), architecture)
    raw = batch(80, D_IN) * 3
    scaled_code, raw_code = inside.encode(raw * scale), outside.encode(raw)
    assert torch.equal(raw_code.row_ptr, scaled_code.row_ptr)
    assert torch.equal(raw_code.col, scaled_code.col)
    torch.testing.assert_close(raw_code.val, scaled_code.val)
    torch.testing.assert_close(outside.decode(raw_code), inside.decode(scaled_code) / scale)


def test_folding_leaves_what_it_was_given_alone():
    trained = made_up(D_IN, D_SAE)
    before = copied(trained).tensors()
    for tensor in ReLU().folded(trained.tensors(), 2.0).values():
        tensor.zero_()
    for name, tensor in trained.tensors().items():
        assert torch.equal(tensor, before[name])


# -- the start -----------------------------------------------------------------------------------


def test_training_starts_with_unit_decoder_rows_and_a_tenth_of_them_as_encoder():
    b_dec = torch.arange(D_IN, dtype=torch.float64)
    start = initial_weights(D_IN, D_SAE, b_dec, seed=3)
    torch.testing.assert_close(start["W_dec"].norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(start["W_enc_rows"], 0.1 * start["W_dec"])
    assert start["W_enc_rows"].data_ptr() != start["W_dec"].data_ptr()
    assert not start["b_enc"].any()
    assert torch.equal(start["b_dec"], b_dec.float())
    assert {t.dtype for t in start.values()} == {torch.float32}


def test_the_start_is_a_function_of_the_seed():
    def start(seed: int) -> Tensor:
        return initial_weights(D_IN, D_SAE, torch.zeros(D_IN), seed)["W_dec"]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
