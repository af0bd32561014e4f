"""A module of the user's as a host."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch

from sae_ext.corpora import Document
from sae_ext.errors import UserError
from sae_ext.hosts import Found, Module

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
    import torch
    from torch import nn
    from sae_ext.hosts import Inputs

    GEAR = ["cap", "coat", "boots", "belt", "ring"]

    class Sets(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.items = nn.Embedding(len(GEAR) + 1, width, padding_idx=0)
            self.encoder = nn.Sequential(nn.Linear(width, width), nn.ReLU())
            self.spare = nn.Linear(width, width)

        def forward(self, items, mask):
            each = self.encoder(self.items(items))
            return (each * mask[..., None]).sum(dim=1)

    def load(width=8, seed=0):
        torch.manual_seed(int(seed))
        return Sets(int(width))

    def collate(documents):
        sets = [[GEAR.index(word) + 1 for word in d.text.split()] for d in documents]
        items = torch.zeros(len(sets), max(map(len, sets)), dtype=torch.long)
        for line, each in enumerate(sets):
            items[line, : len(each)] = torch.tensor(each, dtype=torch.long)
        mask = items > 0
        names = [[*d.text.split(), *[""] * (items.shape[1] - len(d.text.split()))] for d in documents]
        return Inputs({"items": items, "mask": mask}, mask, names)

    def pooled(documents):
        inputs = collate(documents)
        return Inputs(inputs.arguments)

    def unnamed(documents):
        return collate(documents)._replace(names=None)

    def wrong(documents):
        inputs = collate(documents)
        return inputs._replace(mask=inputs.mask[:, :1])

    def no_module():
        return 3

    def fails():
        raise OSError("weights.pt is not there")
"""
DOCUMENTS = [
    Document(f"d{i}", text, "")
    for i, text in enumerate(["cap coat", "boots", "ring belt cap", "coat coat coat coat"])
]


@pytest.fixture
def gear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's module, in which the command is run."""
    (tmp_path / "gear_model.py").write_text(dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "gear_model", raising=False)
    return tmp_path


def config(**more: object) -> Module:
    plain = {"build": "gear_model:load", "collate": "gear_model:collate", "hook": "encoder"}
    return Module(**{**plain, **more})


def read(host: Module) -> Found:
    (found,) = host.open().read(DOCUMENTS, torch.float32)
    return found


def test_the_rows_are_what_the_hooked_module_gives_where_the_mask_says(gear):
    found = read(config())
    assert found.counts.tolist() == [2, 1, 3, 4]
    assert list(found.token_text) == [w for d in DOCUMENTS for w in d.text.split()]
    assert found.token_id is None
    assert found.position.tolist() == [0, 1, 0, 0, 1, 2, 0, 1, 2, 3]
    module = config().open().model
    import gear_model

    ids = torch.tensor([gear_model.GEAR.index(t) + 1 for t in found.token_text])
    assert torch.equal(found.x, module.encoder(module.items(ids)))


@pytest.mark.parametrize("batch_documents", [1, 2, 64])
def test_the_size_of_batches_does_not_matter(gear, batch_documents):
    assert torch.allclose(read(config(batch_documents=batch_documents)).x, read(config()).x)


def test_an_output_without_places_is_a_row_a_document(gear):
    class_path = {"collate": "gear_model:pooled", "hook": ""}
    with pytest.raises(UserError, match="has no module ''"):
        read(config(**class_path))
    (gear / "gear_model.py").write_text(
        dedent(SOURCE).replace("        return (each * mask[..., None]).sum(dim=1)",
                               "        return self.spare((each * mask[..., None]).sum(dim=1))")
    )  # fmt: skip
    sys.modules.pop("gear_model", None)
    found = read(config(collate="gear_model:pooled", hook="spare"))
    assert found.counts.tolist() == [1, 1, 1, 1]
    assert found.x.shape == (4, 8)
    assert found.token_text is None


def test_places_may_be_without_names(gear):
    assert read(config(collate="gear_model:unnamed")).token_text is None


def test_options_are_given_to_the_callable_that_builds(gear):
    assert read(config(options={"width": 5})).x.shape == (10, 5)
    one, two = (read(config(options={"seed": s})).x for s in (0, 1))
    assert not torch.equal(one, two)


def test_the_module_is_frozen_and_in_evaluation(gear):
    model = config().open().model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_a_fingerprint_is_that_of_the_weights_and_the_source(gear):
    before = config().fingerprint()
    assert config().fingerprint() == before
    assert config(options={"seed": 1}).fingerprint() != before
    (gear / "gear_model.py").write_text(dedent(SOURCE) + "\n# another line\n")
    assert config().fingerprint() != before


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"build": "gear_model:nothing"}, r"host\.build: gear_model has no callable 'nothing'"),
        ({"build": "no_such.module:load"}, r"host\.build: no_such\.module cannot be imported .*install it"),
        ({"build": "gear_model:no_module"}, r"host\.build: gear_model:no_module gives a int, not a torch"),
        ({"hook": "encoders"}, r"no module 'encoders': did you mean encoder"),
        ({"hook": "spare"}, r"spare does not run when the model does"),
        ({"collate": "gear_model:wrong"}, r"encoder gives \[4, 4, 8\] for 4 documents, but rows are .*mask"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(gear, fields, named):
    with pytest.raises(UserError, match=named):
        read(config(**fields))


@pytest.mark.parametrize("name", ["gear_model", "gear_model:", ":load", "a:b:c"])
def test_a_callable_is_named_by_module_and_name(name):
    with pytest.raises(UserError, match=r"build must be package\.module:callable"):
        config(build=name)


def test_counts_are_plain_numbers(gear):
    assert read(config()).counts.dtype == np.int64
