from __future__ import annotations

import json
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_weights import batch, copied, dense, made_up
from safetensors.torch import load, save
from torch import Tensor, nn

from sae_ext.architectures import (
    Architecture,
    BatchTopK,
    JumpReLU,
    OneSlot,
    Projected,
    ReLU,
    Thresholds,
    TopK,
)
from sae_ext.errors import UserError
from sae_ext.interchange import dictionary_learning, pth, saelens
from sae_ext.interchange.folder import write_folder
from sae_ext.interchange.saebench import Adapter
from sae_ext.model import CFG_FILE, SAE, WEIGHTS_FILE

D_IN, D_SAE = 6, 20
METADATA = {
    "model_name": "made-up",
    "hook_name": "block.3",
    "context_size": 64,
    "prepend_bos": True,
}
LENGTHS = torch.linspace(0.3, 2.0, D_SAE)
KINDS: dict[str, tuple[Architecture, dict[str, Tensor]]] = {
    "standard": (ReLU(), {}),
    "topk": (TopK(k=3), {}),
    "jumprelu": (Thresholds(), {"threshold": torch.linspace(0.0, 0.8, D_SAE)}),
}


def made_up_sae(architecture: Architecture | None = None, **more: Tensor) -> SAE:
    """An SAE whose decoder rows have many lengths."""
    params = copied(made_up(D_IN, D_SAE), torch.float32)
    params.W_dec *= LENGTHS[:, None]
    return SAE(params, architecture or ReLU(), more)


def of_kind(kind: str) -> SAE:
    architecture, more = KINDS[kind]
    return made_up_sae(architecture, **more)


def rows(n: int = 100) -> Tensor:
    return batch(n, D_IN).float()


def codes(sae: SAE, x: Tensor) -> Tensor:
    return dense(sae.encode(x), sae.d_sae)


def reconstruction(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode(sae.encode(x))


def assert_same(found: SAE, expected: SAE) -> None:
    assert (found.architecture, found.output) == (expected.architecture, expected.output)
    parts = [{**sae.parameters.tensors(), **sae.more} for sae in (found, expected)]
    assert parts[0].keys() == parts[1].keys()
    for name, tensor in parts[0].items():
        assert torch.equal(tensor, parts[1][name]), name


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- the folder ----------------------------------------------------------------------------------


def test_a_folder_appears_with_all_its_files_and_its_parents(tmp_path):
    write_folder(tmp_path / "a" / "b", {"x": b"1", "y": b"2"})
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "b").iterdir()} == {
        "x": b"1", "y": b"2",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "a").mkdir()
    write_folder(tmp_path / "a", {"x": b"1"})
    assert (tmp_path / "a" / "x").read_bytes() == b"1"


@pytest.mark.parametrize("holds", ["a file", "something"])
def test_what_is_there_already_stays_as_it_is(tmp_path, holds):
    place = tmp_path / "a"
    if holds == "something":
        place.mkdir()
    inside = place / "old" if holds == "something" else place
    inside.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists and is not an empty folder") as caught:
        write_folder(place, {"x": b"1"})
    assert str(place) in one_line(caught)
    assert inside.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted({"a", inside.name})


def test_what_fails_half_way_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_folder(tmp_path / "a", {"x": b"1", "missing/y": b"2"})
    assert list(tmp_path.iterdir()) == []


def test_a_file_among_the_parents_is_a_user_error(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        write_folder(tmp_path / "a" / "b", {"x": b"1"})


# -- what other libraries cannot say -------------------------------------------------------------

WRITERS = [saelens.write, dictionary_learning.write]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("output", ["sigmoid", "tanh"])
def test_an_output_activation_is_refused(tmp_path, write, output):
    sae = SAE(made_up_sae().parameters, output=output)
    with pytest.raises(UserError, match=rf"no output activation, .* ends in {output}") as caught:
        write(sae, tmp_path / "out", METADATA, clip_rate=None)
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("write", "architecture"),
    [
        (saelens.write, BatchTopK(k=3)),
        (saelens.write, JumpReLU()),
        (saelens.write, Projected(inner=ReLU())),
        (saelens.write, OneSlot(count=2, column="rule")),
        (dictionary_learning.write, TopK(k=3)),
        (dictionary_learning.write, Thresholds()),
    ],
)
def test_an_architecture_that_the_library_lacks_is_refused(tmp_path, write, architecture):
    with pytest.raises(UserError, match=rf"no {type(architecture).__name__} architecture"):
        write(made_up_sae(architecture), tmp_path / "out", METADATA, clip_rate=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("clip_rate", "allow_clip", "named"),
    [
        (None, False, "clip_rate is unknown: measure it"),
        (None, True, "clip_rate is unknown: measure it"),
        (0.03, False, "0.03 of the firings reach it"),
        (float("nan"), True, "clip_rate must lie in"),
        (-0.1, True, "clip_rate must lie in"),
        (1.5, True, "clip_rate must lie in"),
    ],
)
def test_a_clip_that_may_matter_is_refused(tmp_path, write, clip_rate, allow_clip, named):
    sae = made_up_sae(ReLU(clip=2.5))
    with pytest.raises(UserError, match=named) as caught:
        write(sae, tmp_path / "out", METADATA, clip_rate=clip_rate, allow_clip=allow_clip)
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


def written_metadata(folder: Path) -> dict[str, Any]:
    name = CFG_FILE if (folder / CFG_FILE).exists() else dictionary_learning.CONFIG
    return json.loads((folder / name).read_bytes())["metadata"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("clip", "rate", "exact"), [(None, None, True), (2.5, 0.0, True), (2.5, 0.03, False)]
)
def test_the_metadata_say_whether_the_numbers_are_the_same(
    tmp_path, caplog, write, clip, rate, exact
):
    caplog.set_level(logging.WARNING, "sae_ext")
    write(made_up_sae(ReLU(clip=clip)), tmp_path / "out", METADATA, clip_rate=rate, allow_clip=True)
    metadata = written_metadata(tmp_path / "out")
    assert metadata.items() >= METADATA.items()
    assert metadata["activation_clip"] == clip
    assert metadata["activation_clip_rate"] == rate
    assert metadata["exact"] is exact
    assert ("0.03 of the firings" in caplog.text) is not exact


@pytest.mark.parametrize("write", WRITERS)
def test_metadata_that_are_not_json_are_refused(tmp_path, write):
    with pytest.raises(UserError, match="metadata cannot be written as JSON"):
        write(made_up_sae(), tmp_path / "out", {"model_name": Path("x")}, clip_rate=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_in_use_is_refused(tmp_path, write):
    write(made_up_sae(), tmp_path / "out", METADATA, clip_rate=None)
    with pytest.raises(UserError, match="exists"):
        write(made_up_sae(), tmp_path / "out", METADATA, clip_rate=None)


# -- SAELens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_for_saelens_comes_back_bit_for_bit(tmp_path, kind):
    saelens.write(of_kind(kind), tmp_path / "out", METADATA, clip_rate=None)
    assert_same(saelens.read(tmp_path / "out"), of_kind(kind))


def test_a_clip_that_saelens_does_not_know_comes_back_too(tmp_path):
    sae = made_up_sae(ReLU(clip=2.5))
    saelens.write(sae, tmp_path / "out", METADATA, clip_rate=0.0)
    assert_same(saelens.read(tmp_path / "out"), sae)


def test_a_clip_is_refused_once_features_have_other_units(tmp_path):
    sae = made_up_sae(ReLU(clip=2.5))
    saelens.write(sae, tmp_path / "out", METADATA, clip_rate=0.0)
    p, norm = sae.parameters, sae.parameters.W_dec.norm(dim=1)
    assert abs(float(norm.mean()) - 1) > 0.01
    # As SAELens folds the decoder rows' lengths into the features.
    folded = {"W_enc": (p.W_enc_rows * norm[:, None]).T.contiguous(), "b_enc": p.b_enc * norm,
              "W_dec": p.W_dec / norm[:, None]}  # fmt: skip
    edit(tmp_path / "out", folded)
    with pytest.raises(
        UserError, match=r"metadata\.activation_clip in cfg\.json was for decoder rows"
    ):
        saelens.read(tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / CFG_FILE).read_bytes())["metadata"]
    edit(tmp_path / "out", folded, metadata={**metadata, "activation_clip": None})
    assert saelens.read(tmp_path / "out").clip is None


@pytest.mark.parametrize(
    ("sae", "rate", "named"),
    [
        (made_up_sae(ReLU()), None, None),
        (made_up_sae(ReLU(clip=2.5)), 0.0, None),
        (made_up_sae(ReLU(clip=2.5)), 0.1, "0.1 of the firings reach it"),
        (made_up_sae(ReLU(clip=2.5)), None, "clip_rate is unknown"),
        (replace(made_up_sae(), output="tanh"), None, "no output activation"),
    ],
)
def test_it_is_said_whether_saelens_gives_the_same_numbers(sae, rate, named):
    told = saelens.difference(sae, rate)
    assert (told is None) if named is None else (named in told)


def edit(folder: Path, tensors: dict[str, Tensor] | None = None, **entries: Any) -> None:
    cfg = {**json.loads((folder / CFG_FILE).read_bytes()), **entries}
    (folder / CFG_FILE).write_text(json.dumps(cfg))
    held = load((folder / WEIGHTS_FILE).read_bytes())
    (folder / WEIGHTS_FILE).write_bytes(save({**held, **(tensors or {})}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saelens.write(of_kind("topk"), tmp_path / "out", METADATA, clip_rate=None)
    return tmp_path / "out"


def test_a_rescaling_topk_chooses_by_activation_times_decoder_length(folder):
    edit(folder, rescale_acts_by_decoder_norm=True)
    p, x = of_kind("topk").parameters, rows()
    scaled = ((x - p.b_dec) @ p.W_enc + p.b_enc) * LENGTHS
    top = scaled.topk(3, dim=1)
    z = torch.zeros_like(scaled).scatter(1, top.indices, top.values.relu())
    plain = codes(of_kind("topk"), x)
    assert not torch.equal(z > 0, plain > 0)
    found = saelens.read(folder)
    torch.testing.assert_close(codes(found, x), z)
    torch.testing.assert_close(reconstruction(found, x), (z / LENGTHS) @ p.W_dec + p.b_dec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_read_as_float32(folder, dtype):
    tensors = load((folder / WEIGHTS_FILE).read_bytes())
    halved = {name: t.to(dtype) for name, t in tensors.items()}
    edit(folder, halved, dtype=str(dtype).removeprefix("torch."))
    assert torch.equal(saelens.read(folder).parameters.W_dec, halved["W_dec"].float())


def test_entries_that_only_training_uses_are_passed_over(folder):
    metadata = written_metadata(folder)
    metadata["training_architecture_details"] = {"aux_loss_coefficient": 1.0}
    edit(folder, metadata=metadata, aux_loss_coefficient=1.0)
    assert_same(saelens.read(folder), of_kind("topk"))


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations is 'expec"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations is 'covar"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input is False"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"architecture": "jumprelu"}, "holds nothing beside"),
        ({"aux_loss_coefficient": 1.0}, "aux_loss_coefficient in cfg.json is not an entry"),
        ({"metadata": {}}, "metadata.sae_lens_version"),
        ({"metadata": None}, "metadata.sae_lens_version"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, "metadata.sae_lens_version"),
    ],
)
def test_a_folder_of_saelens_with_other_equations_is_refused(folder, entries, named):
    edit(folder, **entries)
    with pytest.raises(UserError, match=named) as caught:
        saelens.read(folder)
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("cfg", ["[]", "3", "null"])
def test_a_configuration_that_is_no_object_is_refused(folder, cfg):
    (folder / CFG_FILE).write_text(cfg)
    with pytest.raises(UserError, match="cannot be read"):
        saelens.read(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_dec"])
def test_a_weight_that_is_no_number_is_refused(folder, name, bad):
    tensor = load((folder / WEIGHTS_FILE).read_bytes())[name]
    tensor.view(-1)[1] = bad
    edit(folder, {name: tensor})
    with pytest.raises(UserError, match=rf"{WEIGHTS_FILE}: {name} holds a NaN or an infinity"):
        saelens.read(folder)


@pytest.mark.parametrize("wrong", [torch.zeros(D_SAE), torch.zeros(3, D_IN), torch.zeros(())])
def test_a_rescaling_topk_without_a_decoder_for_it_is_refused(folder, wrong):
    edit(folder, {"W_dec": wrong}, rescale_acts_by_decoder_norm=True)
    with pytest.raises(UserError, match=str(folder)):
        saelens.read(folder)


# -- dictionary_learning -------------------------------------------------------------------------


def unit_sae() -> SAE:
    return SAE(copied(made_up(D_IN, D_SAE), torch.float32), ReLU())


def test_unit_rows_come_back_from_dictionary_learning_bit_for_bit(tmp_path):
    dictionary_learning.write(unit_sae(), tmp_path / "out", METADATA, clip_rate=None)
    assert_same(dictionary_learning.read(tmp_path / "out"), unit_sae())
    assert written_metadata(tmp_path / "out")["decoder_norms_folded"] is False


def test_other_rows_are_written_with_length_1_and_the_same_reconstructions(tmp_path):
    sae, x = made_up_sae(), rows()
    dictionary_learning.write(sae, tmp_path / "out", METADATA, clip_rate=None)
    found = dictionary_learning.read(tmp_path / "out")
    torch.testing.assert_close(found.parameters.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(codes(found, x), codes(sae, x) * LENGTHS, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        reconstruction(found, x), reconstruction(sae, x), rtol=1e-5, atol=1e-6
    )
    assert written_metadata(tmp_path / "out")["decoder_norms_folded"] is True


def test_writing_for_dictionary_learning_leaves_the_sae_alone(tmp_path):
    sae = made_up_sae()
    dictionary_learning.write(sae, tmp_path / "out", METADATA, clip_rate=None)
    assert_same(sae, made_up_sae())


def test_the_config_has_what_dictionary_learning_looks_for(tmp_path):
    metadata = {**METADATA, "layer": 3}
    dictionary_learning.write(unit_sae(), tmp_path / "out", metadata, clip_rate=None)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["trainer"] == {
        "dict_class": "AutoEncoder",
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "lm_name": "made-up",
        "layer": 3,
        "submodule_name": "block.3",
    }
    assert config["buffer"] == {"d_submodule": D_IN, "ctx_len": 64}


def test_the_weights_for_dictionary_learning_take_no_more_room_than_they_are(tmp_path):
    whole = torch.zeros(1000, D_SAE, D_IN)
    sae = unit_sae()
    sae.parameters.W_enc_rows = whole[0].copy_(sae.parameters.W_enc_rows)
    dictionary_learning.write(sae, tmp_path / "out", METADATA, clip_rate=None)
    assert (tmp_path / "out" / "ae.pt").stat().st_size < 10_000


def test_float64_weights_are_refused_where_float32_is_read(tmp_path):
    sae = SAE(made_up(D_IN, D_SAE), ReLU())
    with pytest.raises(UserError, match=r"reads float32, but W_dec is torch\.float64"):
        dictionary_learning.write(sae, tmp_path / "out", METADATA, clip_rate=None)


def test_a_decoder_row_of_zeros_is_refused_where_rows_are_divided_by_their_length(tmp_path):
    sae = made_up_sae()
    sae.parameters.W_dec[4] = 0
    for write in (
        lambda: dictionary_learning.write(sae, tmp_path / "out", METADATA, clip_rate=None),
        lambda: Adapter(sae, model_name="made-up", hook_layer=3),
    ):
        with pytest.raises(UserError, match=r"W_dec\[4\] is 0 throughout"):
            write()


LAYERS = {
    "bias": torch.zeros(D_IN), "encoder.weight": torch.zeros(D_SAE, D_IN),
    "encoder.bias": torch.zeros(D_SAE), "decoder.weight": torch.zeros(D_IN, D_SAE),
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ('{"trainer": {"dict_class": "AutoEncoderTopK"}}', "dict_class is 'AutoEncoderTopK'"),
        ('{"trainer": {}}', "dict_class is None"),
        ('{"buffer": {}}', "has no trainer"),
        ("[]", "has no trainer"),
        ("{", "is not JSON"),
        (None, "config.json cannot be read: No such file"),
    ],
)
def test_another_dictionary_than_an_autoencoder_is_refused(tmp_path, config, named):
    torch.save(LAYERS, tmp_path / "ae.pt")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=named) as caught:
        dictionary_learning.read(tmp_path)
    assert str(tmp_path / "config.json") in one_line(caught)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (
            {**LAYERS, "threshold": torch.zeros(1)},
            r"but holds bias \[6\], decoder.weight \[6, 20\]",
        ),
        ({k: t for k, t in LAYERS.items() if k != "bias"}, "must hold bias"),
        ({**LAYERS, "bias": torch.zeros(D_IN + 1)}, "b_dec has shape"),
        (
            {**LAYERS, "encoder.weight": torch.zeros(D_IN, D_SAE)},
            r"encoder must be \[d_sae, d_in\]",
        ),
        ({**LAYERS, "decoder.weight": torch.zeros(3)}, r"decoder.weight \[3\]"),
        ({**LAYERS, "encoder.weight": torch.zeros(())}, r"encoder.weight \[\]"),
        ({**LAYERS, "bias": torch.zeros(D_IN, dtype=torch.int64)}, "bias is torch.int64"),
        ({**LAYERS, "bias": 3}, "'bias' is a int"),
        ([1, 2], "holds a list"),
    ],
)
def test_weights_that_are_not_those_of_an_autoencoder_are_refused(tmp_path, state, named):
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    with pytest.raises(UserError, match=named) as caught:
        dictionary_learning.read(tmp_path)
    assert str(tmp_path / "ae.pt") in one_line(caught)


# -- .pth ----------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def a_read(path: Path) -> SAE:
    return pth.read_splatnlp(path, clip=6.0)


def b_read(path: Path) -> SAE:
    return pth.read_growth_signals(path, output="identity")


@pytest.mark.parametrize("read", [a_read, b_read])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path, monkeypatch, read, zipped
):
    monkeypatch.chdir(tmp_path)
    state = {"encoder.weight": torch.zeros(2, 2), "more": Harmful()}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would run code: save the tensors alone") as caught:
        read(tmp_path / "x.pth")
    assert "mkdir" in one_line(caught)
    assert not (tmp_path / "harmed").exists()


def test_a_whole_module_is_refused_with_the_way_to_save_its_tensors(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        a_read(tmp_path / "x.pth")


@pytest.mark.parametrize("read", [a_read, b_read])
@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", pickle.dumps([1, 2], protocol=2), b"PK\x03\x04"]
)
def test_a_damaged_file_is_refused(tmp_path, read, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth is not a readable file of torch\.save") as caught:
        read(tmp_path / "x.pth")
    one_line(caught)


@pytest.mark.parametrize("read", [a_read, b_read])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    with pytest.raises(UserError, match=r"x\.pth cannot be read: No such file"):
        read(tmp_path / "x.pth")


def splatnlp_state() -> dict[str, Tensor]:
    """Weights as SplatNLP keeps them: a decoder with a bias nobody uses and rows of any length."""
    p = made_up_sae().parameters
    return {
        "b_dec": p.b_dec,
        "encoder.weight": p.W_enc_rows,
        "encoder.bias": p.b_enc,
        "decoder.weight": p.W_dec.T.contiguous(),
        "decoder.bias": torch.full((D_IN,), 100.0),
    }


def saved(tmp_path: Path, state: object) -> Path:
    torch.save(state, tmp_path / "x.pth")
    return tmp_path / "x.pth"


@pytest.mark.parametrize("clip", [None, 0.9])
def test_a_splatnlp_file_is_read_with_unit_rows_its_clip_and_without_the_unused_bias(
    tmp_path, clip
):
    found = pth.read_splatnlp(saved(tmp_path, splatnlp_state()), clip=clip)
    p, x = made_up_sae().parameters, rows()
    z = ((x - p.b_dec) @ p.W_enc + p.b_enc).relu()
    z = z if clip is None else z.clamp(max=clip)
    assert found.clip == clip
    torch.testing.assert_close(codes(found, x), z)
    x_hat = z @ nn.functional.normalize(p.W_dec, dim=1) + p.b_dec
    torch.testing.assert_close(reconstruction(found, x), x_hat)


def growth_signals_state() -> dict[str, Tensor]:
    """Two linear layers in sequences, the encoder reading x itself."""
    p = made_up_sae().parameters
    return {
        "encoder.0.weight": p.W_enc_rows,
        "encoder.0.bias": p.b_enc,
        "decoder.0.weight": p.W_dec.T.contiguous(),
        "decoder.0.bias": p.b_dec,
    }


@pytest.mark.parametrize(("output", "final"), [
    ("identity", lambda y: y), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh),
])  # fmt: skip
@pytest.mark.parametrize("without", [(), ("encoder.0.bias",), ("decoder.0.bias",)])
def test_a_growth_signals_file_is_read_as_two_linear_layers(tmp_path, output, final, without):
    state = {name: t for name, t in growth_signals_state().items() if name not in without}
    found = pth.read_growth_signals(saved(tmp_path, state), output=output)
    p, x = made_up_sae().parameters, rows()
    bias, b_dec = (state.get(f"{side}.0.bias", torch.zeros(1)) for side in ("encoder", "decoder"))
    z = (x @ p.W_enc + bias).relu()
    torch.testing.assert_close(codes(found, x), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        reconstruction(found, x), final(z @ p.W_dec + b_dec), rtol=1e-5, atol=1e-6
    )


FILES = [(a_read, splatnlp_state), (b_read, growth_signals_state)]


@pytest.mark.parametrize(("read", "state"), FILES)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("under", [None, "model_state_dict", "state_dict", "model"])
def test_wrappers_and_a_checkpoint_around_the_weights_make_no_difference(
    tmp_path, read, state, prefix, under
):
    plain = read(saved(tmp_path, state()))
    weights = {prefix + name: t for name, t in state().items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    checkpoint = {"epoch": 1, "optimizer_state_dict": optimizer, under: weights}
    assert_same(read(saved(tmp_path, checkpoint if under else weights)), plain)


@pytest.mark.parametrize(("read", "state"), FILES)
def test_counters_of_training_are_left_out(tmp_path, read, state):
    plain = read(saved(tmp_path, state()))
    counters = {
        "usage_ema": torch.zeros(D_SAE),
        "steps": torch.tensor(3),
        "n_fired": torch.zeros(0),
    }
    assert_same(read(saved(tmp_path, {**state(), **counters})), plain)


@pytest.mark.parametrize("prefix", ["ema.", "step_100.", "remap.layer."])
def test_a_name_above_the_weights_makes_no_counter_of_a_bias(tmp_path, prefix):
    plain = b_read(saved(tmp_path, growth_signals_state()))
    named = {prefix + name: t for name, t in growth_signals_state().items()}
    assert_same(b_read(saved(tmp_path, named)), plain)


@pytest.mark.parametrize(("read", "state"), FILES)
def test_what_was_read_holds_its_own_memory(tmp_path, read, state):
    views = {name: torch.stack([t, t])[0] for name, t in state().items()}
    tensors = read(saved(tmp_path, views)).parameters.tensors()
    for tensor in tensors.values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_read_in_a_precision_that_holds_them(tmp_path, dtype):
    state = {name: t.to(dtype) for name, t in growth_signals_state().items()}
    found = b_read(saved(tmp_path, state)).parameters
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.W_enc_rows.dtype == wider
    assert torch.equal(found.W_enc_rows, state["encoder.0.weight"].to(wider))


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    """Names with __ for a dot; None leaves a tensor out."""
    named = {name.replace("__", "."): t for name, t in changes.items()}
    return {name: t for name, t in {**state, **named}.items() if t is not None}


@pytest.mark.parametrize(
    ("read", "state", "named"),
    [
        (a_read, growth_signals_state(), "no b_dec, as SplatNLP's"),
        (b_read, splatnlp_state(), r"whose part in the SAE we do not know: b_dec \[6\]"),
        (a_read, changed(splatnlp_state(), encoder__bias=None), "no bias of the encoder"),
        (a_read, changed(splatnlp_state(), encoder__weight=None), "must hold encoder.weight"),
        (b_read, changed(growth_signals_state(), decoder__0__weight=None), "must hold encoder.w"),
        (
            a_read,
            changed(splatnlp_state(), encoder__1__weight=torch.zeros(3, 3)),
            "several tensors for the encoder's weight: encoder.weight, encoder.1.weight",
        ),
        (
            b_read,
            changed(growth_signals_state(), decoder__2__bias=torch.zeros(3)),
            "several tensors for the decoder's bias",
        ),
        (
            a_read,
            changed(splatnlp_state(), scale=torch.ones(D_SAE)),
            r"whose part in the SAE we do not know: scale \[20\]",
        ),
        (
            a_read,
            changed(splatnlp_state(), ema_encoder=torch.ones(D_SAE, D_IN)),
            r"whose part in the SAE we do not know: ema_encoder \[20, 6\]",
        ),
        (
            a_read,
            changed(splatnlp_state(), encoder__weight=torch.zeros(D_IN, D_SAE)),
            r"encoder must be \[d_sae, d_in\].*encoder.weight \[6, 20\]",
        ),
        (b_read, changed(growth_signals_state(), encoder__0__weight=torch.zeros(3)), "must be"),
        (
            b_read,
            changed(growth_signals_state(), encoder__0__bias=torch.zeros(D_IN)),
            r"do not fit together: .*encoder.0.bias \[6\]",
        ),
        (
            b_read,
            changed(growth_signals_state(), decoder__0__bias=torch.zeros(1)),
            r"do not fit together: .*decoder.0.bias \[1\]",
        ),
        (a_read, changed(splatnlp_state(), b_dec=torch.zeros(D_SAE)), "b_dec has shape"),
        (a_read, changed(splatnlp_state(), encoder__bias=torch.zeros(D_IN)), "b_enc has shape"),
        (
            a_read,
            changed(splatnlp_state(), b_dec=torch.full((D_IN,), float("nan"))),
            "b_dec holds a NaN",
        ),
        (a_read, changed(splatnlp_state(), b_dec=torch.zeros(D_IN).int()), "b_dec is torch.int32"),
        (a_read, {}, "no b_dec, .*it holds nothing"),
        (b_read, {}, "but holds nothing"),
        (a_read, [torch.zeros(3)], "holds a list"),
        (a_read, {"epoch": 3}, "'epoch' is a int"),
        (a_read, {3: torch.zeros(3)}, "3 is a Tensor"),
        (b_read, {"model": growth_signals_state(), "state_dict": {}}, "in state_dict and in model"),
        (
            b_read,
            {**growth_signals_state(), "module.encoder.0.bias": torch.zeros(D_SAE)},
            "holds the same weights twice",
        ),
    ],
)
def test_what_is_not_the_file_of_that_system_is_refused(tmp_path, read, state, named):
    path = saved(tmp_path, state)
    with pytest.raises(UserError, match=named) as caught:
        read(path)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize("clip", [0.0, -6.0, float("inf"), float("nan")])
def test_a_clip_that_is_none_is_refused(tmp_path, clip):
    with pytest.raises(UserError, match="clip must be"):
        pth.read_splatnlp(saved(tmp_path, splatnlp_state()), clip=clip)


# -- SAEBench ------------------------------------------------------------------------------------


def adapter(sae: SAE) -> Adapter:
    return Adapter(sae, model_name="made-up", hook_layer=3)


ADAPTED = {**{kind: of_kind(kind) for kind in KINDS}, "clipped": made_up_sae(ReLU(clip=0.9)),
           "sigmoid": SAE(made_up_sae().parameters, output="sigmoid")}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("shape", [(40,), (5, 8), (), (0,), (2, 0)])
def test_the_adapter_gives_the_saes_codes_and_reconstructions(kind, shape):
    sae = ADAPTED[kind]
    flat = rows(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()]
    x, ours = flat.reshape(*shape, D_IN), adapter(sae)
    z = ours.encode(x)
    assert z.shape == (*shape, D_SAE)
    torch.testing.assert_close(z, codes(sae, flat).mul(LENGTHS).reshape(*shape, D_SAE))
    x_hat = reconstruction(sae, flat).reshape(*shape, D_IN)
    torch.testing.assert_close(ours.decode(z), x_hat, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours(x), ours.decode(z))


def test_the_adapters_parameters_have_the_shapes_and_make_the_same_autoencoder():
    ours, x = adapter(made_up_sae()), rows()
    shapes = {name: list(p.shape) for name, p in ours.named_parameters()}
    assert shapes == {
        "W_enc": [D_IN, D_SAE], "b_enc": [D_SAE], "W_dec": [D_SAE, D_IN], "b_dec": [D_IN],
    }  # fmt: skip
    z = ((x - ours.b_dec) @ ours.W_enc + ours.b_enc).relu()
    torch.testing.assert_close(ours.encode(x), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.decode(z), z @ ours.W_dec + ours.b_dec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_adapter_follows_the_evaluations_dtype(dtype):
    sae, x = made_up_sae(), rows()
    ours = adapter(sae).to(device="cpu", dtype=dtype)
    assert isinstance(ours, Adapter)
    assert ours.dtype == dtype == ours.W_enc.dtype
    assert ours.cfg.dtype == str(dtype).removeprefix("torch.")
    assert ours.device == torch.device("cpu")
    z = ours.encode(x.to(dtype))
    assert z.dtype == ours(x.to(dtype)).dtype == dtype
    once_rounded = max(1e-5, torch.finfo(dtype).eps)  # as only the result is
    expected = codes(sae, x.to(dtype)) * LENGTHS
    torch.testing.assert_close(z.float(), expected, rtol=once_rounded, atol=1e-6)
    assert ours.check_decoder_norms()


def test_the_adapter_leaves_the_sae_alone():
    sae = made_up_sae()
    for parameter in adapter(sae).parameters():
        parameter.data.zero_()
    adapter(sae).to(dtype=torch.bfloat16)
    assert_same(sae, made_up_sae())


def test_decoder_rows_of_another_length_are_noticed():
    ours = adapter(made_up_sae())
    assert ours.check_decoder_norms()
    ours.W_dec.data[2] *= 1.0001
    assert not ours.check_decoder_norms()


def test_gradients_pass_through_the_adapters_decoder():
    ours = adapter(made_up_sae())
    z = ours.encode(rows()).requires_grad_()
    ours.decode(z).sum().backward()
    torch.testing.assert_close(z.grad, ours.W_dec.sum(1).expand_as(z))


def test_the_adapters_cfg_has_what_the_evaluations_read():
    sae = of_kind("topk")
    cfg = Adapter(sae, model_name="made-up", hook_layer=3, context_size=64, prepend_bos=False).cfg
    assert (cfg.d_in, cfg.d_sae, cfg.hook_layer, cfg.architecture) == (D_IN, D_SAE, 3, "topk")
    assert (cfg.model_name, cfg.hook_name) == ("made-up", "blocks.3.hook_resid_post")
    assert (cfg.context_size, cfg.prepend_bos) == (64, False)
    cfg.metadata = object()  # type: ignore[attr-defined]  # as SAEBench does
    told = json.loads(json.dumps(cfg.to_dict()))
    assert told["dtype"] == "float32"
    assert "metadata" not in told


def test_another_hook_is_named_in_the_adapters_cfg():
    ours = Adapter(made_up_sae(), model_name="made-up", hook_layer=3, hook_name="blocks.3.mlp")
    assert ours.cfg.hook_name == "blocks.3.mlp"


@pytest.mark.parametrize("width", [D_IN, D_IN + 3])
def test_an_sae_of_projected_activations_is_refused_by_the_adapter(width):
    projection = {"projection.weight": torch.eye(D_IN, width), "projection.bias": torch.zeros(D_IN)}
    with pytest.raises(UserError, match="a Projected one turns them into others"):
        adapter(made_up_sae(Projected(inner=ReLU()), **projection))
