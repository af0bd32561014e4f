"""dictionary_learning: folders of its `AutoEncoder`, the ReLU SAE, as `ae.pt` and `config.json`.

    dictionary_learning.write(sae, Path("out"), {"model_name": ...}, clip_rate=None)
    sae = dictionary_learning.read(Path("their-folder"))

Its `load_dictionary` gives decoder rows length 1 on the way in, by dividing them and multiplying the
encoder. It is written that way already, so that every way of loading finds the same numbers: features
are then in other units than ours, ‖W_dec,j‖ · z_j, and reconstructions the same. Checked with 0.1.0.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from sae_ext.architectures import ReLU
from sae_ext.errors import UserError
from sae_ext.interchange.checks import (
    check_layers,
    check_representable,
    clip_facts,
    decoder_lengths,
    listed,
    load_pickled,
    parameters_of,
    tensors_of,
    widened,
)
from sae_ext.interchange.folder import write_folder
from sae_ext.model import SAE
from sae_ext.parameters import Parameters

WEIGHTS, CONFIG = "ae.pt", "config.json"
_LIBRARY, _CLASS = "dictionary_learning", "AutoEncoder"
_NAMES = {"bias", "encoder.weight", "encoder.bias", "decoder.weight"}
# Rows whose length differs from 1 by less stay as they are; the library itself lets 1e-5 pass.
_UNIT = 5e-6


def write(
    sae: SAE,
    folder: Path,
    metadata: dict[str, Any],
    *,
    clip_rate: float | None,
    allow_clip: bool = False,
) -> None:
    """Write a folder for `load_dictionary`, or `AutoEncoder.from_pretrained` of the file in it.

    Args:
        metadata: what the activations are; `model_name`, `layer`, `hook_name` and `context_size` are
            put where the library looks for them, and all of it under `metadata`. `activation_clip`,
            `activation_clip_rate`, `exact` (whether reconstructions there are the same) and
            `decoder_norms_folded` (whether the features are in other units) are added.
        clip_rate: share of firings at the clip as measured; None where it was not, or there is no clip.
        allow_clip: write an SAE of which some firings are clipped, with a warning.

    Raises:
        UserError: the library cannot represent the SAE, or the folder is in use.
    """
    check_representable(sae, _LIBRARY, (ReLU,))
    facts = clip_facts(sae, _LIBRARY, clip_rate=clip_rate, allow_clip=allow_clip)
    if sae.parameters.W_dec.dtype != torch.float32:
        raise UserError(
            f"{_LIBRARY} reads float32, but W_dec is {sae.parameters.W_dec.dtype}: convert the parameters"
        )
    params = _with_unit_rows(sae)
    facts["decoder_norms_folded"] = params is not sae.parameters
    config = {
        "trainer": {
            "dict_class": _CLASS,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "lm_name": metadata.get("model_name"),
            "layer": metadata.get("layer"),
            "submodule_name": metadata.get("hook_name"),
        },
        "buffer": {"d_submodule": sae.d_in, "ctx_len": metadata.get("context_size")},
        "metadata": {**metadata, **facts},
    }
    try:
        text = json.dumps(config, indent=1, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"the metadata cannot be written as JSON: {error}") from error
    write_folder(folder, {WEIGHTS: _pickled(params), CONFIG: text.encode()})


def read(folder: Path) -> SAE:
    """An `AutoEncoder` of the library, with the decoder rows as long as they are in the file.

    Raises:
        UserError: a file is missing or unreadable, or holds another class of dictionary.
    """
    trainer = _trainer(folder / CONFIG)
    if (found := trainer.get("dict_class")) != _CLASS:
        raise UserError(
            f"{folder / CONFIG}: trainer.dict_class is {found!r}, and only {_CLASS!r} can be read"
        )
    where = str(folder / WEIGHTS)
    state = tensors_of(load_pickled(folder / WEIGHTS), folder / WEIGHTS)
    if state.keys() != _NAMES:
        raise UserError(f"{where} must hold {', '.join(sorted(_NAMES))}, but holds {listed(state)}")
    state = widened(state, where)
    check_layers(state["encoder.weight"], state["decoder.weight"], state, where)
    params = parameters_of(
        where,
        W_enc_rows=state["encoder.weight"],
        b_enc=state["encoder.bias"],
        W_dec=state["decoder.weight"].T,
        b_dec=state["bias"],
    )
    return SAE(params, ReLU())


def _trainer(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise UserError(f"{path} has no trainer, which says what class of dictionary this is")
    return trainer


def _with_unit_rows(sae: SAE) -> Parameters:
    """The same reconstructions with decoder rows of length 1; the parameters themselves where they are."""
    params, lengths = sae.parameters, decoder_lengths(sae, _LIBRARY)
    if bool(((lengths - 1).abs() < _UNIT).all()):
        return params
    return Parameters(
        W_enc_rows=(params.W_enc_rows * lengths[:, None]).float(),
        b_enc=(params.b_enc * lengths).float(),
        W_dec=(params.W_dec / lengths[:, None]).float(),
        b_dec=params.b_dec,
    )


def _pickled(params: Parameters) -> bytes:
    """The bytes of `ae.pt`; tensors of their own, as a file holds all of the memory a view is in."""
    state = {
        "bias": params.b_dec,
        "encoder.weight": params.W_enc_rows,
        "encoder.bias": params.b_enc,
        "decoder.weight": params.W_dec.T,
    }
    stream = io.BytesIO()
    form = torch.contiguous_format
    torch.save({k: t.detach().cpu().clone(memory_format=form) for k, t in state.items()}, stream)
    return stream.getvalue()
