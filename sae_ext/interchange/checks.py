"""What every format asks of an SAE that is to leave, and of tensors that come in."""

from __future__ import annotations

import logging
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_ext import arguments
from sae_ext.architectures import Architecture
from sae_ext.errors import UserError
from sae_ext.model import SAE
from sae_ext.parameters import Parameters

_log = logging.getLogger("sae_ext")

# What torch makes of bytes that are no checkpoint; which of these, depends on the bytes.
_UNREADABLE = (
    RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError, AssertionError,
    OverflowError, MemoryError, struct.error, pickle.UnpicklingError,
)  # fmt: skip


# -- leaving ---------------------------------------------------------------------------------------


def check_representable(sae: SAE, library: str, known: tuple[type[Architecture], ...]) -> None:
    """The library has this architecture, and nothing comes after z W_dec + b_dec.

    Raises:
        UserError: it has not.
    """
    if type(sae.architecture) not in known:
        names = ", ".join(kind.__name__ for kind in known)
        raise UserError(
            f"{library} has no {type(sae.architecture).__name__} architecture, only {names}: this SAE "
            "cannot be written for it"
        )
    if sae.output != "identity":
        raise UserError(
            f"{library} has no output activation, but this SAE ends in {sae.output}: it cannot be "
            "written for it"
        )


def clip_facts(
    sae: SAE, library: str, *, clip_rate: float | None, allow_clip: bool
) -> dict[str, Any]:
    """What the metadata say of a clip that the library does not know: `activation_clip`, its rate, `exact`.

    Args:
        clip_rate: share of firings at the clip, measured on the activations the SAE is for.
        allow_clip: warn where some were clipped, instead of refusing.

    Raises:
        UserError: the SAE has a clip whose rate is unknown, wrong, or above 0.
    """
    if sae.clip is None:
        return {"activation_clip": None, "activation_clip_rate": None, "exact": True}
    told = f"{library} has no clip, but this SAE clips activations at {sae.clip:g}"
    if clip_rate is None:
        raise UserError(f"{told} and clip_rate is unknown: measure it on the activations first")
    if not 0 <= clip_rate <= 1:
        raise UserError(f"clip_rate must lie in [0, 1], got {clip_rate}")
    if clip_rate > 0 and not allow_clip:
        raise UserError(
            f"{told} and {clip_rate:.3g} of the firings reach it: train without a clip, or accept the "
            "difference with allow_clip"
        )
    if clip_rate > 0:
        _log.warning("%s: %.3g of the firings will be larger there than here", told, clip_rate)
    return {
        "activation_clip": sae.clip,
        "activation_clip_rate": clip_rate,
        "exact": clip_rate == 0,
    }


def decoder_lengths(sae: SAE, library: str) -> Tensor:
    """Lengths of the decoder rows in float64, [d_sae], for a library that divides by them.

    Raises:
        UserError: one of them is 0.
    """
    lengths: Tensor = torch.linalg.vector_norm(sae.parameters.W_dec.double(), dim=1)
    if bool((lengths == 0).any()):
        raise UserError(
            f"W_dec[{int((lengths == 0).nonzero()[0])}] is 0 throughout, and {library} divides every "
            "decoder row by its length: drop that feature"
        )
    return lengths


# -- coming in -------------------------------------------------------------------------------------


def load_pickled(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU; no code in it is run.

    Raises:
        UserError: it is missing, no such file, or holds more than tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except _UNREADABLE as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} holds Python objects ({found[1]}), and reading them would run code: save the "
                "tensors alone, torch.save(model.state_dict(), path)"
            ) from error
        raise UserError(f"{path} is not a readable file of torch.save") from error


def tensors_of(state: object, path: Path) -> dict[str, Tensor]:
    """What a file holds, if that is tensors by name and nothing else.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not the weights of an SAE by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__}, but weights are tensors by name"
            )
    return dict(state)


def widened(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights as we compute with them: in one of float32 and float64, which holds them all exactly.

    Raises:
        UserError: one is not of floating point, or holds a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {name} is {tensor.dtype}, not floating point")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: {name} holds a NaN or an infinity")
    double = any(t.dtype == torch.float64 for t in tensors.values())
    dtype = torch.float64 if double else torch.float32
    return {name: t.to(dtype) for name, t in tensors.items()}


def check_layers(encoder: Tensor, decoder: Tensor, held: Mapping[str, Tensor], where: str) -> None:
    """Weights of two linear layers that lead there and back, as torch.nn.Linear keeps them.

    Raises:
        UserError: they are not; it names all that is `held`.
    """
    if encoder.ndim != 2 or encoder.shape != decoder.shape[::-1]:
        raise UserError(
            f"{where}: the encoder must be [d_sae, d_in] and the decoder [d_in, d_sae], but it holds "
            f"{listed(held)}"
        )


def parameters_of(
    where: str, *, W_enc_rows: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Parameters:
    """The four tensors in memory of their own.

    Raises:
        UserError: their shapes do not fit together.
    """
    four = (W_enc_rows, b_enc, W_dec, b_dec)
    params = Parameters(*(t.clone(memory_format=torch.contiguous_format) for t in four))
    try:
        arguments.check_params(params)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return params


def listed(tensors: Mapping[str, Tensor]) -> str:
    """Names and shapes, for a message."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(tensors.items())) or "nothing"
