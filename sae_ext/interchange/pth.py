"""`.pth` files of two research systems: SplatNLP's `sae_model_final.pth`, and Growth-Signals' checkpoints.

    sae = read_splatnlp(Path("sae_model_final.pth"), clip=6.0)
    sae = read_growth_signals(Path("models/9_100000.pth"), output="sigmoid")

Both hold the two linear layers of an autoencoder, `encoder….weight [d_sae, d_in]` and
`decoder….weight [d_in, d_sae]`, and little that says what else belongs to it: what the file does not say,
the caller does. Anything that could be read in two ways is refused with what the file holds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sae_ext.architectures import ReLU
from sae_ext.errors import UserError
from sae_ext.interchange.checks import (
    check_layers,
    listed,
    load_pickled,
    parameters_of,
    tensors_of,
    widened,
)
from sae_ext.model import SAE, Output

_log = logging.getLogger("sae_ext")

# What torch.compile and DistributedDataParallel put before every name.
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")
# Where a checkpoint keeps the weights beside the optimizer's state.
_NESTED = ("model_state_dict", "state_dict", "model")
# Statistics of training that a module may keep among its weights.
_COUNTED = re.compile(r"usage|ema|fire|firing|dead|step|count|num_", re.IGNORECASE)


def read_splatnlp(path: Path, *, clip: float | None) -> SAE:
    """An SAE of SplatNLP: z = min(relu((x - b_dec) W_enc + b_enc), clip), x̂ = z Ŵ_dec + b_dec.

    The file holds W_dec as it was before its rows were divided by their lengths, which the system does
    whenever it decodes, and a bias of the decoder's layer that it never adds.

    Args:
        clip: 6 in that system; None for none.

    Raises:
        UserError: the file is unreadable, or its tensors are not those of such an SAE.
    """
    left = _weights(path)
    held = dict(left)
    if "b_dec" not in left:
        raise UserError(f"{path} has no b_dec, as SplatNLP's SAEs have; it holds {listed(held)}")
    b_dec = left.pop("b_dec")
    encoder, decoder = _layers(left, path)
    b_enc = _take("encoder", "bias", left, path)
    if b_enc is None:
        raise UserError(f"{path} has no bias of the encoder; it holds {listed(held)}")
    if _take("decoder", "bias", left, path) is not None:
        _log.info("%s: the bias of the decoder's layer is not part of the SAE", path)
    _nothing_else(left, path)
    W_dec = decoder.T
    norm = W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    params = parameters_of(
        str(path), W_enc_rows=encoder, b_enc=b_enc, W_dec=W_dec / norm, b_dec=b_dec
    )
    return SAE(params, ReLU(clip=clip))


def read_growth_signals(path: Path, *, output: Output) -> SAE:
    """An SAE of Growth-Signals: z = relu(x W_enc + b), x̂ = output(z W_dec + b_dec).

    Its encoder reads x, not x - b_dec: b_enc = b + b_dec W_enc makes that the same. Biases that the
    file does not have are 0.

    Args:
        output: the activation of the decoder, which the file does not tell.

    Raises:
        UserError: the file is unreadable, or its tensors are not those of such an SAE.
    """
    left = _weights(path)
    held = dict(left)
    encoder, decoder = _layers(left, path)
    b, b_dec = _take("encoder", "bias", left, path), _take("decoder", "bias", left, path)
    _nothing_else(left, path)
    d_sae, d_in = encoder.shape
    b = encoder.new_zeros(d_sae) if b is None else b
    b_dec = encoder.new_zeros(d_in) if b_dec is None else b_dec
    if b.shape != (d_sae,) or b_dec.shape != (d_in,):
        raise UserError(f"{path}: biases and weights do not fit together: it holds {listed(held)}")
    b_enc = (b.double() + encoder.double() @ b_dec.double()).to(encoder.dtype)
    params = parameters_of(str(path), W_enc_rows=encoder, b_enc=b_enc, W_dec=decoder.T, b_dec=b_dec)
    return SAE(params, ReLU(), output=output)


def _weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file by their names without wrappers, counters of training left out."""
    state = load_pickled(path)
    nested = [
        k for k in _NESTED if isinstance(state, Mapping) and isinstance(state.get(k), Mapping)
    ]
    if len(nested) > 1:
        raise UserError(f"{path} holds weights in {' and in '.join(nested)}: keep one of them")
    state = tensors_of(state[nested[0]] if nested else state, path)
    named = {name: _WRAPPERS.sub("", name) for name in state}
    if len(set(named.values())) < len(named):
        raise UserError(f"{path} holds the same weights twice: {listed(state)}")
    weights = {
        short: state[name]
        for name, short in named.items()
        if state[name].ndim > 1 or not _COUNTED.search(short.rpartition(".")[2])
    }
    if left_out := sorted(named.values() - weights.keys()):
        _log.info("%s: left out as statistics of training: %s", path, ", ".join(left_out))
    return widened(weights, str(path))


def _layers(left: dict[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    """Remove the weights of the two layers, encoder [d_sae, d_in] and decoder [d_in, d_sae]."""
    held = dict(left)
    encoder, decoder = (_take(side, "weight", left, path) for side in ("encoder", "decoder"))
    if encoder is None or decoder is None:
        raise UserError(
            f"{path} must hold encoder.weight and decoder.weight, but holds {listed(held)}"
        )
    check_layers(encoder, decoder, held, str(path))
    return encoder, decoder


def _take(side: str, what: str, left: dict[str, Tensor], path: Path) -> Tensor | None:
    """Remove the tensor of the layer on that side and return it; None where there is none."""
    pattern = rf"(?:.*\.)?{side}(?:\.\w+)*\.{what}"
    found = [name for name in left if re.fullmatch(pattern, name)]
    if len(found) > 1:
        raise UserError(f"{path} has several tensors for the {side}'s {what}: {', '.join(found)}")
    return left.pop(found[0]) if found else None


def _nothing_else(left: dict[str, Tensor], path: Path) -> None:
    if left:
        raise UserError(
            f"{path} holds tensors whose part in the SAE we do not know: {listed(left)}"
        )
